"""The runtime: int8 layers, and loading a checkpoint into a transformers model that uses them."""
