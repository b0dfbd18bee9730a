"""Helpers shared by tests and benchmarks; needs the `test` extra."""
