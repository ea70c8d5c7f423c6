"""Bring a testbed up, let something happen in it, measure it, judge it, take it down."""
