"""Who calls at the vMotion port and has shown no token yet: hosts/vmotion_port.py."""

import threading
from pathlib import Path

import pytest
from pairs import HELLO, connection

from hosts.control import issue_certificates
from hosts.protocol import Header, encode_body
from hosts.stream import StreamLost
from hosts.vmotion_port import VmotionPort
from topologies.plan import read_plan


def test_a_caller_that_drips_a_proper_hello_is_not_waited_for(tmp_path: Path) -> None:
    """Each byte comes in time, all of them do not."""
    plan = read_plan()
    issue_certificates(tmp_path, {"esx2": [plan.host("esx2").management]})
    port = VmotionPort(plan.host("esx2"), plan, tmp_path, 0.1, lambda role, state: None)
    kind, body = encode_body(HELLO)
    hello, over = Header(kind, 0, 0, 0, 1, len(body)).pack() + body, threading.Event()

    with connection() as (caller, called):

        def drip() -> None:
            for byte in hello:
                if over.wait(0.05):
                    return
                caller.send(bytes([byte]))

        thread = threading.Thread(target=drip)
        thread.start()
        try:
            with pytest.raises(StreamLost):
                port.open(called)
        finally:
            over.set()
            thread.join()
