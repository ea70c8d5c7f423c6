"""How often a migration tells how far it has come: not with every page, and not in a switchover that is soon over."""

import time

EVERY_S = 0.1


class Pace:
    """`due` is true every EVERY_S at most, and the first time when so much has passed."""

    def __init__(self) -> None:
        self._told = time.monotonic()

    def due(self) -> bool:
        now = time.monotonic()
        if now - self._told < EVERY_S:
            return False
        self._told = now
        return True
