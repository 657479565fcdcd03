"""GGUF, llama.cpp's format: read by `reader`, written by `writer`."""
