"""Writing artifacts: the plan of every byte, the folder that appears whole or not at all, and the manifest."""
