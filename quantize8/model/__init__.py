"""The runtime: int8 layers, and loading a folder into a transformers model that uses them."""
