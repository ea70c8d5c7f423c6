"""The error base of the whole project.

A message is one line: it names the thing (VM, host, file, option), the reason and the remedy.
"""


class TestbedError(Exception):
    """A run that failed: exit status 1."""

    __test__ = False  # pytest takes the name for a test's
    exit_status = 1


class UsageError(TestbedError):
    """Something a person asked for that cannot be done: exit status 2, and nothing is left behind."""

    exit_status = 2
