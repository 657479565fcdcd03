"""The verbs on arrays. `reference` defines them, `cpu` is the fast path on a CPU; both give the same integers."""
