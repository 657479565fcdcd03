"""The kernels on a real GPU against the reference: integers, scales, statistics bit for bit, products up to rounding.

Every shape that a kernel treats differently is covered, each path of the dispatch is forced, and outputs start as NaN
or as the largest integer. Each check returns what is wrong, or None.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import ml_dtypes
import numpy as np
import torch

from quantize8.kernels import cuda as kernels
from quantize8.kernels import gpu, operator, reference
from quantize8.kernels.reference import ColumnStats, Int8Weight

DTYPES = (torch.float16, torch.bfloat16, torch.float32)
ROUNDING = 1.05
ROW_SHAPES = ((1, 1), (5, 8), (200, 129), (70, 4096), (9, 4104), (130, 14336), (3, 32768), (2, 53248))
PRODUCT_SHAPES = ((20, 72, 64, 3), (130, 137, 208, 21), (33, 131, 16, 16), (257, 4096, 1040, 40), (2048, 1024, 4096, 6))
DECODE_SHAPES = ((1, 4096, 4096), (3, 17, 2064), (8, 1000, 16), (16, 14336, 4096), (9, 21, 4112))
ODD_SHAPES = ((20, 33, 101, 9), (300, 40, 100, 4))  # shapes for the fallback kernel on every GPU


def run(device: torch.device, small: bool = False) -> Iterator[dict[str, Any]]:
    """For each check: its name, whether it passes, what is wrong, and how long it took. small: tiny shapes only."""
    checks: list[tuple[str, Callable[[torch.device, bool], str | None]]] = [
        ("quantize_rowwise and column_stats", check_rowwise),
        ("dequantize", check_dequantize),
        ("quantize_activations and the outlier list", check_activations),
        ("rotation", check_rotation),
        ("weight_only_matmul", check_decode),
        ("mixed_matmul, every tile", check_prefill),
        ("fallbacks", check_fallbacks),
        ("the same twice", check_repeat),
    ]
    if device.type == "cuda" and not small:
        checks += [
            ("more than 2^31 weights", check_large),
            ("a CUDA graph on new inputs", check_graph),
            ("torch.compile without breaks", check_compile),
            ("two streams at once", check_streams),
            ("convert --device cuda writes the CPU's bytes", check_convert),
        ]
    for name, check in checks:
        start = time.perf_counter()
        try:
            with poisoned():
                wrong = check(device, small)
        except Exception as error:  # one failure must not hide the other results
            wrong = f"{type(error).__name__}: {error}".splitlines()[0]
        ok = None if wrong and wrong.startswith("not run") else wrong is None
        yield {"check": name, "ok": ok, "wrong": wrong, "seconds": round(time.perf_counter() - start, 2)}


@contextlib.contextmanager
def poisoned() -> Iterator[None]:
    """Within this block torch.empty returns NaN and the largest integers, so that an unwritten output is noticed."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


def shapes(all_of_them: tuple[Any, ...], small: bool) -> tuple[Any, ...]:
    return all_of_them[:3] if small else all_of_them


def numpy(tensor: torch.Tensor) -> Any:
    tensor = tensor.cpu()
    if tensor.dtype == torch.bfloat16:
        return tensor.contiguous().view(torch.int16).numpy().view(ml_dtypes.bfloat16)
    return tensor.numpy()


def weight_of(rows: int, columns: int, dtype: torch.dtype, seed: int = 0) -> torch.Tensor:
    """A weight with outlier columns, a zero row, and values at half the row's absmax (where rounding order matters)."""
    random = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, columns, generator=random) * 0.02
    weight[:, :: max(1, columns // 3)] *= 30
    weight[:, 1::64] = weight.half().float().abs().amax(1, keepdim=True) / 2
    if rows > 1:
        weight[1] = 0
    return weight.to(dtype)


def tokens_of(tokens: int, columns: int, dtype: torch.dtype, outliers: int, seed: int = 0) -> torch.Tensor:
    random = torch.Generator().manual_seed(seed)
    x = torch.randn(tokens, columns, generator=random).clamp(-5, 5)
    chosen = torch.randperm(columns, generator=random)[:outliers]
    x[:, chosen] *= torch.where(torch.rand(tokens, len(chosen), generator=random) < 0.5, 9.0, 0.1)
    if outliers:
        x[-1, chosen[0]] = 6.0
    return x.to(dtype)


def layer_of(out_features: int, in_features: int, device: torch.device) -> tuple[Int8Weight, Int8Weight]:
    """The same layer for the GPU and for the reference."""
    codes, absmax = reference.quantize_rowwise(numpy(weight_of(out_features, in_features, torch.float16)))
    there = Int8Weight(torch.from_numpy(codes).to(device), torch.from_numpy(absmax).to(device))
    return there, Int8Weight(codes, absmax)


def error_over_rounding(y: torch.Tensor, exact: np.ndarray[Any, Any]) -> float:
    """The error of y, relative to that of rounding the exact product to y's dtype plus that of float32 sums."""
    rounded = torch.from_numpy(exact).to(y.dtype).double().numpy()
    floor = np.linalg.norm(rounded - exact) + 2e-7 * np.linalg.norm(exact)
    return float(np.linalg.norm(y.double().cpu().numpy() - exact) / floor)


def check_rowwise(device: torch.device, small: bool) -> str | None:
    for dtype in DTYPES:
        for rows, columns in shapes(ROW_SHAPES, small):
            weight = weight_of(rows, columns, dtype)
            codes, absmax = reference.quantize_rowwise(numpy(weight))
            expected = reference.column_stats(numpy(weight), codes, absmax)
            found, stats = ColumnStats.empty(columns), gpu.DeviceStats.empty(columns, device)
            for with_stats in (None, stats):
                ours = gpu.quantize_rowwise(weight.to(device), with_stats)
                if not np.array_equal(numpy(ours[0]), codes) or not np.array_equal(numpy(ours[1]), absmax):
                    return f"codes or absmax of {dtype} [{rows}, {columns}], statistics {with_stats is not None}"
            stats.read_into(found)
            for name in vars(expected):
                if not np.array_equal(getattr(found, name), getattr(expected, name)):
                    return f"column {name} of {dtype} [{rows}, {columns}]"
    return None


def check_dequantize(device: torch.device, small: bool) -> str | None:
    there, here = layer_of(33, 301, device)
    for dtype in DTYPES:
        expected = torch.from_numpy(reference.dequantize(here.codes, here.absmax)).to(dtype)
        if not torch.equal(gpu.dequantize(there.codes, there.absmax, dtype).cpu(), expected):
            return str(dtype)
    return None


def check_activations(device: torch.device, small: bool) -> str | None:
    cases = ((1, 1, 1), (3, 8, 0), (50, 4101, 40), (300, 4096, 6), (2048, 14336, 64), (7, 32768, 3000))
    for dtype in DTYPES:
        for tokens, columns, outliers in shapes(cases, small):
            x = tokens_of(tokens, columns, dtype, outliers)
            codes, scale, mask = reference.quantize_activations(numpy(x), 6.0)
            ours = gpu.quantize_activations(x.to(device), 6.0)
            assert ours.outliers is not None and ours.count is not None
            listed = numpy(ours.outliers)[: int(ours.count)]
            if not np.array_equal(listed, np.flatnonzero(mask.any(0))):
                return f"outlier list of {dtype} [{tokens}, {columns}]"
            if not np.array_equal(numpy(ours.codes), codes) or not np.array_equal(numpy(ours.scale), scale):
                return f"codes or scales of {dtype} [{tokens}, {columns}]"
    return None


def check_rotation(device: torch.device, small: bool) -> str | None:
    cases = ((3, 48, 16), (2, 2112, 64), (3, 768, 256), (17, 576, 64), (2048, 4096, 256), (300, 14336, 256))
    for dtype in DTYPES:
        for tokens, columns, size in shapes(cases, small):
            x = tokens_of(tokens, columns, dtype, 3)
            codes, scale, _ = reference.quantize_activations(numpy(x), 0.0, rotation=size)
            ours = gpu.quantize_activations(x.to(device), 0.0, size)
            if not np.array_equal(numpy(ours.codes), codes) or not np.array_equal(numpy(ours.scale), scale):
                return f"codes or scales of {dtype} [{tokens}, {columns}] in blocks of {size}"
            rotated = numpy(gpu.rotate(x.to(device), size))
            if not np.array_equal(rotated, reference.rotate(numpy(x).astype(np.float32), size)):
                return f"{dtype} [{tokens}, {columns}] in blocks of {size}"
            there, here = (replace(layer, rotation=size) for layer in layer_of(40, columns, device))
            exact = reference.linear(numpy(x), here, None, 0.0)
            error = error_over_rounding(gpu.linear(x.to(device), there, None, 0.0), exact)
            if not error <= ROUNDING:
                return f"product of {dtype} [{tokens}, {columns}] in blocks of {size}: {error:.3f} of rounding"
    return None


def check_decode(device: torch.device, small: bool) -> str | None:
    for dtype in DTYPES:
        for tokens, rows, columns in ((3, 17, 2064), (9, 21, 37)) if small else DECODE_SHAPES:
            there, here = layer_of(rows, columns, device)
            x, bias = tokens_of(tokens, columns, dtype, 2), torch.linspace(-1, 1, rows).to(dtype)
            exact = reference.weight_only_matmul(numpy(x), here, numpy(bias))
            error = error_over_rounding(gpu.weight_only_matmul(x.to(device), there, bias.to(device)), exact)
            if not error <= ROUNDING:
                return f"{dtype} M {tokens} N {rows} K {columns}: {error:.3f} of rounding"
    return None


def check_prefill(device: torch.device, small: bool) -> str | None:
    capability = gpu.gpu_of(device.index or 0).capability
    for tile in (kernels.SMALL_TILE, kernels.LARGE_TILE, kernels.WGMMA_TILE):
        if not kernels.mixed("half", tile).runs_on(capability):
            continue
        with forced_tile(tile):
            for dtype in DTYPES[:2]:
                for case in shapes(PRODUCT_SHAPES, small):
                    if wrong := product_is_wrong(device, dtype, *case):
                        return f"tile {tile.m} x {tile.n}: {wrong}"
    return None


def check_fallbacks(device: torch.device, small: bool) -> str | None:
    for dtype in DTYPES:
        for case in ODD_SHAPES:
            if wrong := product_is_wrong(device, dtype, *case):
                return wrong
    return None


def product_is_wrong(
    device: torch.device, dtype: torch.dtype, tokens: int, rows: int, columns: int, outliers: int
) -> str:
    there, here = layer_of(rows, columns, device)
    x, bias = tokens_of(tokens, columns, dtype, outliers), torch.linspace(-1, 1, rows).to(dtype)
    for threshold, shift in ((6.0, bias), (0.0, None)):
        exact = reference.mixed_matmul(numpy(x), here, None if shift is None else numpy(shift), threshold)
        on_device = None if shift is None else shift.to(device)
        error = error_over_rounding(gpu.mixed_matmul(x.to(device), there, on_device, threshold), exact)
        if not error <= ROUNDING:
            return f"{dtype} M {tokens} N {rows} K {columns} {threshold}: {error:.3f} of rounding"
    return ""


@contextlib.contextmanager
def forced_tile(tile: kernels.Tile) -> Iterator[None]:
    """Force products to use one tile, whatever their size."""
    chosen = kernels.choose_tile
    kernels.choose_tile = lambda *_: tile
    try:
        yield
    finally:
        kernels.choose_tile = chosen


def check_repeat(device: torch.device, small: bool) -> str | None:
    tokens, rows, columns = (40, 72, 208) if small else (2048, 4096, 4096)
    there, _ = layer_of(rows, columns, device)
    x = tokens_of(tokens, columns, torch.bfloat16, 20).to(device)
    first = gpu.mixed_matmul(x, there, None, 6.0)
    for _ in range(2 if small else 20):
        if not torch.equal(gpu.mixed_matmul(x, there, None, 6.0), first):
            return "results differ between runs"
    return None


def check_large(device: torch.device, small: bool) -> str | None:
    rows, columns = 2**19 + 70, 4096
    if torch.cuda.mem_get_info(device)[0] < 12 * 2**30:
        return "not run: needs 12 GiB of free GPU memory"
    weight = torch.zeros(rows, columns, dtype=torch.float16, device=device)
    last = weight_of(100, columns, torch.float16)
    weight[-100:] = last.to(device)
    codes, absmax = gpu.quantize_rowwise(weight)
    expected = reference.quantize_rowwise(numpy(last))
    same = np.array_equal(numpy(codes[-100:]), expected[0]) and np.array_equal(numpy(absmax[-100:]), expected[1])
    return None if same and not codes[:-100].any() else "codes or absmax"


def check_graph(device: torch.device, small: bool) -> str | None:
    there, _ = layer_of(1024, 4096, device)
    for tokens in (1, 16, 100, 2048):
        static = tokens_of(tokens, 4096, torch.float16, 6).to(device)
        gpu.linear(static, there, None, 6.0)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            y = gpu.linear(static, there, None, 6.0)
        for seed, outliers in ((1, 0), (2, 40), (3, 3)):
            static.copy_(tokens_of(tokens, 4096, torch.float16, outliers, seed))
            graph.replay()
            if not torch.equal(y, gpu.linear(static, there, None, 6.0)):
                return f"M {tokens}: a replay with {outliers} outlier columns"
    return None


def check_compile(device: torch.device, small: bool) -> str | None:
    there, _ = layer_of(256, 512, device)

    def layer(x: torch.Tensor) -> torch.Tensor:
        return torch.relu(operator.linear(x, there.codes, there.absmax, None, 6.0, "dynamic"))

    x = tokens_of(40, 512, torch.bfloat16, 6).to(device)
    same = torch.equal(torch.compile(layer, fullgraph=True, backend="aot_eager")(x), layer(x))
    return None if same else "results differ"


def check_streams(device: torch.device, small: bool) -> str | None:
    there, _ = layer_of(1024, 4096, device)
    inputs = [tokens_of(300, 4096, torch.float16, outliers).to(device) for outliers in (0, 50)]
    expected = [gpu.linear(x, there, None, 6.0) for x in inputs]
    streams = [torch.cuda.Stream(device) for _ in inputs]
    torch.cuda.synchronize(device)
    for _ in range(20):
        found = []
        for x, stream in zip(inputs, streams, strict=True):
            with torch.cuda.stream(stream):
                found.append(gpu.linear(x, there, None, 6.0))
        torch.cuda.synchronize(device)
        if not all(torch.equal(a, b) for a, b in zip(found, expected, strict=True)):
            return "results differ"
    return None


def check_convert(device: torch.device, small: bool) -> str | None:
    try:
        from benchmarks.checkpoints import converts_alike
    except ImportError as error:
        return f"not run: {error}"
    return converts_alike()
