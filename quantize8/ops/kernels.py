"""The CUDA kernels: which file, for which numbers and GPUs, and in what sizes. The only home of those sizes.

Sources lie in `cuda/`; everything a kernel needs to know at compile time reaches it as a definition on the command
line. A kernel runs on the GPU through `device.Gpu`, and in tests on an emulator, by the same `Kernel` and arguments.
"""

from __future__ import annotations

import ctypes
import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache, lru_cache
from typing import TYPE_CHECKING

from quantize8.ops.reference import DECODE_TOKENS, INT8_MAX, OUTLIER_SIGMAS

if TYPE_CHECKING:
    from torch import Tensor

Capability = tuple[int, int]  # of a GPU: (8, 0) is an A100

MINIMUM: Capability = (7, 5)  # Turing, the first with int8 tensor cores
TENSOR_CORES: Capability = (8, 0)  # the first with the shapes and asynchronous copies that the fast kernels use
HOPPER: Capability = (9, 0)  # the only one with wgmma
ARCHITECTURES = ("sm_75", "sm_80", "sm_86", "sm_89", "sm_90a", "sm_100", "sm_120")  # that the project compiles for
ANY: Capability = (99, 9)
WARP = 32
CHUNK = 16  # bytes that an asynchronous copy or a decode load takes: K must be a multiple for the fast kernels
VECTOR = 8  # neighbouring elements that a thread takes at a time
_ROW_THREADS = 512  # of quantize_rowwise
_VECTORS_AT_ONCE = 8  # of each of them: 64 KiB of 16-bit rows, which the nearest cache holds for two blocks
_NUMBERS = {"torch.float16": "half", "torch.bfloat16": "bfloat16", "torch.float32": "float"}


@dataclass(frozen=True)
class Kernel:
    """One entry point of one source file, compiled for one kind of number."""

    file: str
    entry: str
    number: str  # the C++ type that FLOAT stands for
    threads: int  # of a block
    defines: tuple[tuple[str, int], ...] = ()
    shared_bytes: int = 0  # dynamic shared memory of a block
    aligned: bool = True  # rows are a multiple of VECTOR long
    since: Capability = MINIMUM
    until: Capability = ANY

    @property
    def options(self) -> tuple[str, ...]:
        """Definitions for the compiler."""
        arithmetic = (("INT8_MAX", INT8_MAX), ("OUTLIER_SIGMAS", OUTLIER_SIGMAS), ("VECTOR", VECTOR))
        own = (("THREADS", self.threads), ("ALIGNED", int(self.aligned)), *self.defines)
        return (f"-DFLOAT={self.number}", *(f"-D{name}={value}" for name, value in (*arithmetic, *own)))

    def runs_on(self, capability: Capability) -> bool:
        """Whether a GPU has the instructions that the kernel uses."""
        return self.since <= capability <= self.until

    def architecture(self, capability: Capability) -> str:
        """What to compile for; Hopper's own instructions need the name with an a."""
        return f"sm_{capability[0]}{capability[1]}" + ("a" if capability == HOPPER else "")


@dataclass(frozen=True)
class Tile:
    """What a block of the prefill product makes at a time."""

    m: int
    n: int
    k: int
    stages: int  # tiles of K in flight
    threads: int
    file: str = "mixed_matmul.cu"

    def blocks(self, tokens: int, out_features: int) -> tuple[int, int]:
        """Grid for y [tokens, out_features]."""
        return ceil_div(out_features, self.n), ceil_div(tokens, self.m)


# Largest first. Four stages hide the latency of memory; a block of the first fills a Hopper multiprocessor's shared
# memory (192 KiB of 227), two of the second an Ampere one's (64 KiB each), and the third is for few tokens.
WGMMA_TILE = Tile(128, 256, 128, stages=4, threads=256, file="mixed_matmul_sm90.cu")
LARGE_TILE = Tile(128, 128, 64, stages=4, threads=256)
SMALL_TILE = Tile(64, 64, 64, stages=4, threads=128)


def ceil_div(a: int, b: int) -> int:
    """a / b, rounded up."""
    return -(-a // b)


def number_of(tensor: Tensor) -> str:
    """The C++ name of a tensor's dtype; KeyError for one that kernels do not take."""
    return _NUMBERS[str(tensor.dtype)]


@cache
def quantize_rowwise(number: str, columns: int, stats: bool) -> Kernel:
    """Weight to codes, absmax and, where they are wanted, column statistics."""
    aligned, defines = columns % VECTOR == 0, (("STATS", int(stats)),)
    return Kernel("quantize_rowwise.cu", "quantize_rowwise", number, _ROW_THREADS, defines, aligned=aligned)


def rows_at_once(columns: int) -> int:
    """Rows that a block of quantize_rowwise takes side by side: the fewer the longer they are."""
    rows = _ROW_THREADS // WARP
    while rows > 1 and rows * columns > _ROW_THREADS * VECTOR * _VECTORS_AT_ONCE:
        rows //= 2
    return rows


@cache
def add_tiles() -> Kernel:
    """Sums over tiles of quantize_rowwise; few threads a block, as there is one a column only."""
    return Kernel("add_tiles.cu", "add_tiles", "half", threads=64)


@cache
def dequantize(number: str) -> Kernel:
    """Codes and absmax to a float weight."""
    return Kernel("dequantize.cu", "dequantize", number, threads=256)


@cache
def quantize_activations(number: str, columns: int) -> Kernel:
    """Activations to codes, scales and the outlier list."""
    return Kernel("quantize_activations.cu", "quantize_activations", number, threads=256, aligned=columns % VECTOR == 0)


@cache
def weight_only(number: str, tokens: int) -> Kernel:
    """The decode product on tensor cores, for up to 8 or up to 16 tokens."""
    room = 8 if tokens <= 8 else DECODE_TOKENS
    defines = (("MAX_TOKENS", room), ("TENSOR_CORES", 1))
    return Kernel("weight_only_matmul.cu", "weight_only_matmul", number, 256, defines, since=TENSOR_CORES)


@cache
def weight_only_any(number: str, columns: int) -> Kernel:
    """The decode product for any K, number and GPU."""
    defines = (("MAX_TOKENS", DECODE_TOKENS),)
    return Kernel("weight_only_matmul.cu", "weight_only_matmul", number, 256, defines, aligned=columns % VECTOR == 0)


@cache
def mixed(number: str, tile: Tile) -> Kernel:
    """The prefill product in tiles of one size."""
    sizes = (("TILE_M", tile.m), ("TILE_N", tile.n), ("TILE_K", tile.k), ("STAGES", tile.stages), ("TENSOR_CORES", 1))
    shared = tile.stages * (tile.m + tile.n) * tile.k
    since, until = (HOPPER, HOPPER) if tile is WGMMA_TILE else (TENSOR_CORES, ANY)
    return Kernel(tile.file, "mixed_matmul", number, tile.threads, sizes, shared, since=since, until=until)


@cache
def mixed_epilogue(number: str) -> Kernel:
    """From int32 sums that a library made to the prefill product."""
    return Kernel("mixed_epilogue.cu", "mixed_epilogue", number, threads=256)


def all_kernels() -> Iterator[Kernel]:
    """Every kernel that some GPU may run."""
    yield add_tiles()
    for number in _NUMBERS.values():
        yield dequantize(number)
        yield mixed_epilogue(number)
        for columns in (VECTOR, VECTOR + 1):  # aligned and not
            yield quantize_rowwise(number, columns, stats=False)
            yield quantize_rowwise(number, columns, stats=True)
            yield quantize_activations(number, columns)
            yield weight_only_any(number, columns)
    for number in ("half", "bfloat16"):
        yield weight_only(number, 8)
        yield weight_only(number, DECODE_TOKENS)
        for tile in (WGMMA_TILE, LARGE_TILE, SMALL_TILE):
            yield mixed(number, tile)


def choose_tile(capability: Capability, processors: int, tokens: int, out_features: int) -> Tile:
    """The largest tile that still gives every multiprocessor a block; the smallest where none does."""
    for tile in (WGMMA_TILE, LARGE_TILE):
        fits = mixed("half", tile).runs_on(capability)
        columns, rows = tile.blocks(tokens, out_features)
        if fits and columns * rows >= processors:
            return tile
    return SMALL_TILE


def pack(arguments: Sequence[Tensor | int | float | None]) -> tuple[ctypes.Array[ctypes.c_void_p], object]:
    """Arguments as cuLaunchKernel reads them: an array of addresses, and what they point at, to be kept until then.

    Each takes 8 bytes, little-endian, so that an int serves for int and int64_t alike. None is a null pointer.
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
