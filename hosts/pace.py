"""How often it is told how far a migration has come: not with every page, not in a switchover that is soon over."""

import time

EVERY_S = 0.1


class Pace:
    """`due` is true every so many seconds at most, and the first time when so much has passed."""

    def __init__(self, every_s: float | None = None) -> None:
        self._every_s = EVERY_S if every_s is None else every_s
        self._told = time.monotonic()

    def due(self) -> bool:
        now = time.monotonic()
        if now - self._told < self._every_s:
            return False
        self._told = now
        return True
