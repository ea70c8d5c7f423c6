"""Waiting for something to become true, with an end."""

import time
from collections.abc import Callable

from topologies.errors import TestbedError

_LOOK_EVERY_S = 0.03


def until(holds: Callable[[], object], what: str, within_s: float) -> None:
    """TestbedError with `what` was waited for, if it does not hold in time."""
    deadline = time.monotonic() + within_s
    while not holds():
        if time.monotonic() > deadline:
            raise TestbedError(f"not within {within_s:g} s: {what}")
        time.sleep(_LOOK_EVERY_S)
