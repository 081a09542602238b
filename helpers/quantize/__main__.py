"""The process that quantizes; quantize/process.py starts it."""

from helpers.quantize import METHODS, process

process.main(METHODS)
