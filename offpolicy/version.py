"""The version of the library, below everything that says it."""

__version__ = "0.2.0"
