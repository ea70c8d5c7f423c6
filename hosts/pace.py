"""How often a migration tells how far it has come: not with every page."""

import time

EVERY_S = 0.1


class Pace:
    """`due` is true at most every EVERY_S, the first time at once."""

    def __init__(self) -> None:
        self._told = float("-inf")

    def due(self) -> bool:
        now = time.monotonic()
        if now - self._told < EVERY_S:
            return False
        self._told = now
        return True
