"""Ash turns a folder into a production agent API. This package imports nothing, so that any part can be used alone."""

__version__ = "0.1.0"
