"""Thin helpers behind the notebooks: each file is one idea, and each stage reads the folder that the last one wrote."""

__version__ = "0.1.0"
