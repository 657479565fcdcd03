"""The verbs on arrays. `reference` defines them, `cpu` is the fast path on a CPU; both give the same integers."""

ABSMAX, MSE = SCALES = ("absmax", "mse")  # how the scale of a row of a weight is chosen: see `scales`
NEAREST, GPTQ = ROUNDINGS = ("nearest", "gptq")  # how the codes of a weight are chosen: see `rounding`
# Sizes of the blocks of input features that a Hadamard matrix rotates (reference.rotate), the best one first. They are
# powers of 4, so that dividing by the square root of the size is exact. Larger blocks gain nothing and fit less often.
ROTATIONS = (256, 64, 16)
