"""quantize8: an int8 quantizer and converter for LLM checkpoints, built on LLM.int8()."""

__version__ = "0.1.0"
