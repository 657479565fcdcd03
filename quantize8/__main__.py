"""`python -m quantize8`."""

from quantize8.cli import main

main()
