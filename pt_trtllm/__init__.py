"""From a Parallel Track transformer checkpoint to a served endpoint."""

__version__ = "0.1.0"
