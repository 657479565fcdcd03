"""The verbs on arrays. `reference` defines them, `cpu` is the fast path on a CPU; both give the same integers."""

ABSMAX, MSE = SCALES = ("absmax", "mse")  # how the scale of a row of a weight is chosen: see `scales`
