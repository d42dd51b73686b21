"""The version of the package, which also tells whether what an earlier run left is of the same code."""

__version__ = "0.1.0"
