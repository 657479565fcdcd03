"""The CUDA kernels: their source files, number types, GPUs and sizes, all of which are defined in this module alone.

The sources are in `cuda/`. Everything that a kernel needs at compile time is passed as a definition on the compiler's
command line. `launch.Gpu` runs a kernel on the GPU; tests run the same `Kernel` with the same arguments on an emulator.
"""

from __future__ import annotations

import ctypes
import math
import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache, lru_cache
from typing import TYPE_CHECKING

from quantize8.kernels.reference import DECODE_TOKENS, INT8_MAX, OUTLIER_SIGMAS, ROTATIONS

if TYPE_CHECKING:
    from torch import Tensor

Capability = tuple[int, int]  # compute capability of a GPU: (8, 0) is an A100

MINIMUM: Capability = (7, 5)  # Turing, the first with int8 tensor cores
TENSOR_CORES: Capability = (8, 0)  # the first with the shapes and asynchronous copies that the fast kernels use
HOPPER: Capability = (9, 0)  # the only one with wgmma
ARCHITECTURES = ("sm_75", "sm_80", "sm_86", "sm_89", "sm_90a", "sm_100", "sm_120")  # that the project is built for
ANY: Capability = (99, 9)
WARP = 32
CHUNK = 16  # bytes of an asynchronous copy or a decode load: the fast kernels need K to be a multiple of it
VECTOR = 8  # adjacent elements that a thread handles at a time
_ROW_THREADS = 512  # threads of a block of quantize_rowwise
_VECTORS_AT_ONCE = 8  # vectors per thread: 64 KiB of 16-bit rows per block, so that the L1 cache holds two blocks' rows
_NUMBERS = {"torch.float16": "half", "torch.bfloat16": "bfloat16", "torch.float32": "float"}


@dataclass(frozen=True)
class Kernel:
    """One entry point of one source file, compiled for one type of number."""

    file: str
    entry: str
    number: str  # the C++ type that FLOAT is defined as
    threads: int  # threads of a block
    defines: tuple[tuple[str, int], ...] = ()
    shared_bytes: int = 0  # dynamic shared memory of a block
    aligned: bool = True  # whether the length of rows is a multiple of VECTOR
    since: Capability = MINIMUM  # first and
    until: Capability = ANY  # last compute capability that can run it

    @property
    def options(self) -> tuple[str, ...]:
        """The definitions to pass to the compiler."""
        arithmetic = (("INT8_MAX", INT8_MAX), ("OUTLIER_SIGMAS", OUTLIER_SIGMAS), ("VECTOR", VECTOR))
        own = (("THREADS", self.threads), ("ALIGNED", int(self.aligned)), *self.defines)
        return (f"-DFLOAT={self.number}", *(f"-D{name}={value}" for name, value in (*arithmetic, *own)))

    def runs_on(self, capability: Capability) -> bool:
        """Whether a GPU has the instructions that the kernel uses."""
        return self.since <= capability <= self.until

    def architecture(self, capability: Capability) -> str:
        """The architecture to compile for, such as sm_80; Hopper's special instructions need sm_90a."""
        return f"sm_{capability[0]}{capability[1]}" + ("a" if capability == HOPPER else "")


@dataclass(frozen=True)
class Tile:
    """The part of the prefill product that a thread block computes at a time: m tokens by n outputs, k at a time."""

    m: int
    n: int
    k: int
    stages: int  # tiles of K that are being loaded or multiplied at once
    threads: int
    file: str = "mixed_matmul.cu"

    def blocks(self, tokens: int, out_features: int) -> tuple[int, int]:
        """The grid of thread blocks (x, y) for an output [tokens, out_features]."""
        return ceil_div(out_features, self.n), ceil_div(tokens, self.m)


# Largest first. Four stages hide the memory latency. One block of the first tile fills the shared memory of a Hopper
# multiprocessor (192 KiB of 227), two of the second that of an Ampere one (64 KiB each); the third is for few tokens.
WGMMA_TILE = Tile(128, 256, 128, stages=4, threads=256, file="mixed_matmul_sm90.cu")
LARGE_TILE = Tile(128, 128, 64, stages=4, threads=256)
SMALL_TILE = Tile(64, 64, 64, stages=4, threads=128)


def ceil_div(a: int, b: int) -> int:
    """a / b, rounded up."""
    return -(-a // b)


def number_of(tensor: Tensor) -> str:
    """The C++ name of a tensor's dtype; KeyError for a dtype that the kernels do not support."""
    return _NUMBERS[str(tensor.dtype)]


@cache
def quantize_rowwise(number: str, columns: int, stats: bool) -> Kernel:
    """The kernel that computes codes, absmax and, with `stats`, column statistics of a weight with rows this long."""
    aligned, defines = columns % VECTOR == 0, (("STATS", int(stats)),)
    return Kernel("quantize_rowwise.cu", "quantize_rowwise", number, _ROW_THREADS, defines, aligned=aligned)


def rows_at_once(columns: int) -> int:
    """The number of rows that a block of quantize_rowwise handles at once; the longer the rows, the fewer."""
    rows = _ROW_THREADS // WARP
    while rows > 1 and rows * columns > _ROW_THREADS * VECTOR * _VECTORS_AT_ONCE:
        rows //= 2
    return rows


@cache
def add_tiles() -> Kernel:
    """The kernel that sums over the tiles of quantize_rowwise. Blocks are small, as a column needs only one thread."""
    return Kernel("add_tiles.cu", "add_tiles", "half", threads=64)


@cache
def dequantize(number: str) -> Kernel:
    """The kernel that computes a floating-point weight from codes and absmax."""
    return Kernel("dequantize.cu", "dequantize", number, threads=256)


@cache
def quantize_activations(number: str, columns: int, rotation: int = 0) -> Kernel:
    """The kernel that computes codes, scales and the list of outlier columns of activations, or rotates them first."""
    file, aligned = "quantize_activations.cu", columns % VECTOR == 0
    return Kernel(file, "quantize_activations", number, 256, _rotation(rotation), aligned=aligned)


@cache
def rotate(number: str, rotation: int) -> Kernel:
    """The kernel that rotates activations."""
    return Kernel("rotate.cu", "rotate", number, 256, _rotation(rotation))


def _rotation(size: int) -> tuple[tuple[str, int], ...]:
    return (("ROTATION", size), ("ROTATION_ROOT", math.isqrt(size))) if size else (("ROTATION", 0),)


@cache
def weight_only(number: str, tokens: int) -> Kernel:
    """The decode product on tensor cores, compiled for up to 8 or up to 16 tokens."""
    room = 8 if tokens <= 8 else DECODE_TOKENS
    defines = (("MAX_TOKENS", room), ("TENSOR_CORES", 1))
    return Kernel("weight_only_matmul.cu", "weight_only_matmul", number, 256, defines, since=TENSOR_CORES)


@cache
def weight_only_any(number: str, columns: int, rotated: bool = False) -> Kernel:
    """The decode product for any K, number type and GPU; also for activations that `rotate` has left in float32."""
    defines = (("MAX_TOKENS", DECODE_TOKENS), ("ROTATED", int(rotated)))
    return Kernel("weight_only_matmul.cu", "weight_only_matmul", number, 256, defines, aligned=columns % VECTOR == 0)


@cache
def mixed(number: str, tile: Tile) -> Kernel:
    """The prefill product with one tile size."""
    sizes = (("TILE_M", tile.m), ("TILE_N", tile.n), ("TILE_K", tile.k), ("STAGES", tile.stages), ("TENSOR_CORES", 1))
    shared = tile.stages * (tile.m + tile.n) * tile.k
    since, until = (HOPPER, HOPPER) if tile is WGMMA_TILE else (TENSOR_CORES, ANY)
    return Kernel(tile.file, "mixed_matmul", number, tile.threads, sizes, shared, since=since, until=until)


@cache
def mixed_epilogue(number: str) -> Kernel:
    """The kernel that computes the prefill product from int32 sums of a library's matrix product."""
    return Kernel("mixed_epilogue.cu", "mixed_epilogue", number, threads=256)


def all_kernels() -> Iterator[Kernel]:
    """All kernels, of which each GPU runs some."""
    yield add_tiles()
    for number in _NUMBERS.values():
        yield dequantize(number)
        yield mixed_epilogue(number)
        for columns in (VECTOR, VECTOR + 1):  # aligned and not
            yield quantize_rowwise(number, columns, stats=False)
            yield quantize_rowwise(number, columns, stats=True)
            yield quantize_activations(number, columns)
            yield weight_only_any(number, columns)
        yield weight_only_any(number, VECTOR, rotated=True)
        for size in ROTATIONS:
            yield quantize_activations(number, VECTOR, size)
            yield rotate(number, size)
    for number in ("half", "bfloat16"):
        yield weight_only(number, 8)
        yield weight_only(number, DECODE_TOKENS)
        for tile in (WGMMA_TILE, LARGE_TILE, SMALL_TILE):
            yield mixed(number, tile)


def choose_tile(capability: Capability, processors: int, tokens: int, out_features: int) -> Tile:
    """The largest tile that gives every multiprocessor a block, or the smallest tile if there is none.

    Args:
        capability: Compute capability of the GPU.
        processors: Number of its multiprocessors.
        tokens: Rows M of the output.
        out_features: Columns N of the output.
    """
    for tile in (WGMMA_TILE, LARGE_TILE):
        fits = mixed("half", tile).runs_on(capability)
        columns, rows = tile.blocks(tokens, out_features)
        if fits and columns * rows >= processors:
            return tile
    return SMALL_TILE


def pack(arguments: Sequence[Tensor | int | float | None]) -> tuple[ctypes.Array[ctypes.c_void_p], object]:
    """Lay out kernel arguments as cuLaunchKernel reads them.

    Each value takes 8 bytes, little-endian, so that a Python int works for both int and int64_t parameters. None
    becomes a null pointer.

    Args:
        arguments: Tensors, numbers or None, in the order of the kernel's parameters.

    Returns:
        An array of addresses, and the object that they point into, which must stay alive until the launch returns.
    """
    words = []
    for argument in arguments:
        if isinstance(argument, float):
            words.append(_float_bits(argument))
        elif isinstance(argument, int):
            words.append(argument)
        else:
            words.append(0 if argument is None else argument.data_ptr())
    values = (ctypes.c_int64 * len(words))(*words)
    start = ctypes.addressof(values)
    return (ctypes.c_void_p * len(words))(*range(start, start + 8 * len(words), 8)), values


@lru_cache(maxsize=16)
def _float_bits(value: float) -> int:
    return int(struct.unpack("<I", struct.pack("<f", value))[0])
