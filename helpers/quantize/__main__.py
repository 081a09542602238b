"""The process that quantizes and opens GPTQ models; quantize.in_process starts it."""

from helpers.quantize import main

main()
