"""Settings of the whole suite: hypothesis runs the same examples everywhere, and has no deadline on a busy machine."""

import pytest
from hypothesis import settings

settings.register_profile("suite", deadline=None, derandomize=True)
settings.load_profile("suite")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--long", action="store_true", help="the long forms of tests that have one")
