"""GPTQ's choice of int8 codes: the definition, and calls of its kernels in cpu/rounding.c.

Rounding each weight to the nearest code is not best for the layer's output. GPTQ (Frantar et al. 2022,
arXiv:2210.17323) rounds one input feature after the other, and adds to the weights that are not rounded yet what makes
up for the errors so far. Let H = x^T x be the Gram matrix of the layer's inputs x [T, K], damped, with its features in
the order of rounding, and H = R R^T with R upper triangular. A row with the errors e = w - code * scale has the squared
output error e H e^T = ||e R||^2, and its component j depends on the errors of the features up to j alone:

    (e R)_j = R_jj (e_j + c_j),    c_j = sum_(i < j) e_i R_ij / R_jj

So the code of feature j, with those before it fixed, is best at code_j = rint((w_j + c_j) / scale). This is Babai's
nearest plane algorithm, and in exact arithmetic the same as GPTQ's updates with the Cholesky factor of the inverse of H
(Chen et al. 2025, arXiv:2507.18553), without an inverse. Features with the largest inputs come first, as in GPTQ's
`act_order`: their errors have the most features left to make up for them.

A code that would be beyond 127 is clamped, and then others can become worse than without any of this. So a row keeps
its nearest codes where these have the smaller output error, also where that is luck.

Every sum has one order, and every operation rounds once, so that all units and any number of threads give the same
bits: the inputs are bfloat16 numbers, whose products float32 holds exactly; everything else rounds a product before it
is added.
"""

from __future__ import annotations

import math

import numpy as np

from quantize8.kernels import cpu
from quantize8.kernels.cpu import check, pointer
from quantize8.kernels.reference import INT8_MAX, Array

# Of the diagonal's mean, added to the diagonal, with which the factorization cannot fail: its eigenvalues are at least
# that, and rounding changes them by about K^2 2^-53 of the mean, 1e-7 for K = 30,000. GPTQ's authors take 0.01. With a
# few thousand tokens, more leaves less error on other text: the KL divergence of SmolLM2-135M with rotated int8 weights
# falls from 0.00044 to 0.00038 (2048 tokens), and from 0.00041 to 0.00038 (2711 tokens).
DAMPING = 0.05
MOST_INPUT = 2.0**60  # inputs are smaller than this, so that no sum overflows
LEAST_INPUT = 2.0**-60  # smaller inputs count as 0, so that the product of two is exact in float32
TOKENS = 128  # float32 sums over so many tokens, float64 sums over these
_BLOCK = 64  # features whose columns are copied at a time


def accumulate(gram: Array, x: Array, threads: int = 1) -> None:
    """Add x^T x to a Gram matrix.

    Args:
        gram: Contiguous float64 [K, K]. Only its upper triangle is meant; the rest can hold anything afterwards.
        x: float32 [T, K] with bfloat16 numbers below MOST_INPUT. A sum over tokens starts anew every TOKENS tokens, so
            calls with a multiple of them equal one call with all.
        threads: Number of threads; the result does not depend on it.

    Raises:
        MemoryError: The kernel cannot allocate its buffer.
        DependencyError: The kernels are not compiled for this machine.
    """
    x = np.ascontiguousarray(x, np.float32)
    check(cpu.library().q8_accumulate(pointer(gram), pointer(x), *x.shape, threads))


def defined_gram(x: Array) -> Array:
    """The definition of `accumulate` for a matrix of zeros: float64 [K, K] of x float32 [T, K]."""
    x = np.where(np.abs(x) < LEAST_INPUT, np.float32(0), x)
    gram = np.zeros((x.shape[1], x.shape[1]))
    for start in range(0, len(x), TOKENS):
        part = np.zeros(gram.shape, np.float32)
        for token in x[start : start + TOKENS]:
            part += np.outer(token, token)
        gram += part
    return gram


def factor(gram: Array, threads: int = 1, by_size: bool = True) -> tuple[Array, Array]:
    """The order in which features are rounded, and the factor by which errors carry over.

    Args:
        gram: Contiguous float64 [K, K], finite, given by its upper triangle. It is overwritten: the factor takes its
            memory.
        threads: Number of threads; the result does not depend on it.
        by_size: Order the features by their mean square, the largest first; otherwise keep their order.

    Returns:
        The order, int64 [K]; and the factor, float32 [K, K] with features in this order: R_ij / R_jj above the
        diagonal, R_jj on it, 0 below.

    Raises:
        MemoryError: The kernel cannot allocate its buffer.
        DependencyError: The kernels are not compiled for this machine.
    """
    order = _prepare(gram, by_size)
    check(cpu.library().q8_factor(pointer(gram), len(gram), threads))
    return order, gram.reshape(-1).view(np.float32)[: gram.size].reshape(gram.shape)


def defined_factor(gram: Array) -> tuple[Array, Array]:
    """The definition of `factor`, which leaves the matrix as it is."""
    left = gram.copy()
    order = _prepare(left)
    result = np.zeros(gram.shape)
    for k in reversed(range(len(left))):
        root = np.sqrt(left[k, k])
        column = left[:k, k] / root
        left[:k, :k] -= np.outer(column, column)
        result[:k, k], result[k, k] = column, root
    roots = result.diagonal().copy()
    result /= roots
    np.fill_diagonal(result, roots)
    return order, result.astype(np.float32)


def round_codes(weight: Array, scales: Array, order: Array, factor: Array, threads: int = 1) -> Array:
    """Choose the codes of a weight with given scales.

    Args:
        weight: float32 [N, K].
        scales: float32 [N, G], for groups of K / G adjacent features; a weight is read as code * scale.
        order: int64 [K], as of `factor`.
        factor: float32 [K, K], as of `factor`.
        threads: Number of threads; the result does not depend on it, and a row's not on other rows.

    Returns:
        int8 [N, K] in -127..127; 0 where a scale is 0 or not finite, or its inverse is not finite.

    Raises:
        MemoryError: The kernel cannot allocate its buffers.
        DependencyError: The kernels are not compiled for this machine.
    """
    weight, scales = np.ascontiguousarray(weight, np.float32), np.ascontiguousarray(scales, np.float32)
    order, factor = np.ascontiguousarray(order, np.int64), np.ascontiguousarray(factor, np.float32)
    codes = np.zeros(weight.shape, np.int8)
    if weight.size:
        given = [pointer(array) for array in (weight, scales, order, factor)]
        check(cpu.library().q8_round_codes(*given, *weight.shape, scales.shape[1], threads, pointer(codes)))
    return codes


def nearest_codes(weight: Array, scales: Array) -> Array:
    """The nearest codes int8 [N, K], as `round_codes` rounds: weight float32 [N, K], scales float32 [N, G]."""
    with np.errstate(all="ignore"):
        inverses = _spread(scales, np.arange(weight.shape[1]))[1]
        return _codes(weight, inverses).astype(np.int8)


def defined_codes(weight: Array, scales: Array, order: Array, factor: Array) -> Array:
    """The definition of `round_codes`."""
    with np.errstate(all="ignore"):
        values, steps, inverses = weight[:, order], *_spread(scales, order)
        nearest = _codes(values, inverses)
        near_squares = _squares(values - nearest * steps, factor)
        codes, errors, carry = np.zeros_like(values), np.zeros_like(values), np.zeros_like(values)
        for j in range(len(order)):
            codes[:, j] = _codes(values[:, j] + carry[:, j], inverses[:, j])
            errors[:, j] = values[:, j] - codes[:, j] * steps[:, j]
            carry[:, j + 1 :] += errors[:, j, None] * factor[j, j + 1 :]
        better = _squares(errors, factor) <= near_squares
    result = np.empty(weight.shape, np.int8)
    result[:, order] = np.where(better[:, None], codes, nearest)
    return result


def _prepare(gram: Array, by_size: bool = True) -> Array:
    """Fill in the lower triangle, damp the diagonal, and put the features in the order of rounding, in place."""
    size, diagonal = len(gram), gram.diagonal().copy()
    order = np.argsort(-diagonal, kind="stable") if by_size else np.arange(size)
    for start in range(0, size, _BLOCK):
        square, right = gram[start : start + _BLOCK, start : start + _BLOCK], slice(start + _BLOCK, None)
        square[:] = np.triu(square) + np.triu(square, 1).T
        gram[right, start : start + _BLOCK] = gram[start : start + _BLOCK, right].T
    damping = DAMPING * (math.fsum(diagonal.tolist()) / max(size, 1)) or 1.0
    gram.reshape(-1)[:: size + 1] += damping
    _permute_rows(gram, order)
    for row in gram:
        row[:] = row[order]
    return order


def _permute_rows(matrix: Array, order: Array) -> None:
    """matrix[:] = matrix[order], with memory for one more row."""
    done = np.zeros(len(order), np.bool_)
    for start in range(len(order)):
        if done[start]:
            continue
        first, place = matrix[start].copy(), start
        while order[place] != start:
            matrix[place] = matrix[order[place]]
            done[place] = True
            place = int(order[place])
        matrix[place] = first
        done[place] = True


def _spread(scales: Array, order: Array) -> tuple[Array, Array]:
    """The scale of each weight in the order of rounding and its inverse, float32 [N, K]; both 0 if it is unusable."""
    inverses = np.float32(1) / scales
    usable = np.isfinite(scales) & np.isfinite(inverses)
    groups = order // max(len(order) // scales.shape[1], 1)
    zero = np.float32(0)
    return np.where(usable, scales, zero)[:, groups], np.where(usable, inverses, zero)[:, groups]


def _codes(targets: Array, inverses: Array) -> Array:
    """The nearest codes, as float32 numbers; NaN has the code -127."""
    scaled, limit = targets * inverses, np.float32(INT8_MAX)
    scaled = np.where(scaled > -limit, scaled, -limit)
    scaled = np.where(scaled < limit, scaled, limit)
    codes: Array = np.where(inverses != 0, np.rint(scaled), np.float32(0))
    return codes


def _squares(errors: Array, factor: Array) -> Array:
    """||e R||^2 of each row of errors [N, K], float32 [N]."""
    squares, carry = np.zeros(len(errors), np.float32), np.zeros_like(errors)
    for j in range(len(factor)):
        part = (errors[:, j] + carry[:, j]) * factor[j, j]
        squares += part * part
        carry[:, j + 1 :] += errors[:, j, None] * factor[j, j + 1 :]
    return squares
