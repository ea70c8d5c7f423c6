"""Settings of the whole suite: hypothesis runs the same examples everywhere, and has no deadline on a busy machine."""

from hypothesis import settings

settings.register_profile("suite", deadline=None, derandomize=True)
settings.load_profile("suite")
