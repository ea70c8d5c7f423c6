"""The manager's side of the control API against an agent that takes its time."""

import threading
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from hosts import control
from hosts.control import AgentClient, AgentGone, ControlServer

IP = "127.0.84.43"  # nobody else's: the port is a fixed one


class SlowAgent:
    """It answers nothing until it is told to `go_on`."""

    def __init__(self, certificates: Path) -> None:
        self.go_on = threading.Event()
        self.certificates = certificates
        control.issue_certificates(certificates, {"esx1": [IP], control.MANAGER: [IP]})
        context = control.tls_context(certificates, "esx1", server=True)
        self.server = ControlServer(IP, context, self.answer, lambda line: None)
        threading.Thread(target=self.server.serve_forever, args=(0.02,), daemon=True).start()

    def answer(self, request: control.Request, notify: control.Notify) -> Any:
        self.go_on.wait(60)
        return {}


@pytest.fixture
def agent(tmp_path: Path) -> Iterator[SlowAgent]:
    agent = SlowAgent(tmp_path)
    yield agent
    agent.go_on.set()
    agent.server.shutdown()
    agent.server.server_close()


def test_a_host_that_says_nothing_to_a_status_is_gone_though_its_connection_looks_open(
    agent: SlowAgent, monkeypatch: pytest.MonkeyPatch
) -> None:
    """180 s is for what takes that long: a power-on, a migration."""
    assert control.Status.answer_within_s <= 5
    monkeypatch.setattr(control.Status, "answer_within_s", 0.2)
    with closing(AgentClient("esx1", IP, agent.certificates)) as client:
        assert client.is_open()
        began_s = time.monotonic()
        with pytest.raises(AgentGone, match="host esx1: its agent is gone"):
            client.call(control.Status())
        assert time.monotonic() - began_s < 5 and client.broken


def test_an_order_has_the_time_that_it_takes(agent: SlowAgent, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(control.Status, "answer_within_s", 0.2)
    with closing(AgentClient("esx1", IP, agent.certificates)) as client:
        threading.Timer(0.5, agent.go_on.set).start()
        assert client.call(control.PowerOff("vm1")) == {}
