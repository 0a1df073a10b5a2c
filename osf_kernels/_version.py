"""The version, in the one place that the package, `setup.py` and `info` read it from."""

__version__ = "0.1.0"
