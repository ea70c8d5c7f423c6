"""Live tests run the real thing, inside a world of their own: sudo ./vmotion test"""

import os

import pytest


@pytest.fixture(autouse=True)
def inside_a_world() -> None:
    if os.getpid() != 1:
        pytest.fail("live tests run inside a private world; use: sudo ./vmotion test [pytest options]")
