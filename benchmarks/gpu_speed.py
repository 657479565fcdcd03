"""Speed of the kernels: quantizing against a device copy; linear layers and a stack shaped like Llama-3-8B against
cuBLAS in float16 and bfloat16, and against bitsandbytes.

Our kernels and cuBLAS are timed as CUDA graphs. bitsandbytes reads results back to the host in the middle of a layer,
so it cannot be captured, and is timed the way programs call it. All data is random and never NaN, and weights rotate so
that they come from memory.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import torch
from torch.nn import functional

from benchmarks.stack import Stack
from benchmarks.timing import CACHE_BYTES, eager_time, graph_time
from quantize8.kernels import gpu
from quantize8.kernels.reference import DECODE_TOKENS, Int8Weight, rotation_of

QUANTIZE_SHAPES = ((4096, 4096), (14336, 4096), (28672, 8192), (128256, 4096))
LINEAR_SHAPES = ((4096, 4096), (6144, 4096), (14336, 4096), (28672, 4096), (4096, 14336))
TOKENS = (1, 4, 16, 64, 256, 2048, 8192)
OUTLIERS = (0, 6, 64)
DTYPES = (torch.float16, torch.bfloat16)
_LEAST, _MOST = 4, 16  # number of weights in rotation


def ceilings(device: torch.device, size: int = 8192, copy_bytes: int = 2**30) -> dict[str, Any]:
    """What the card can do, measured: bytes/s of a copy (read and write), and operations/s of a product."""
    a, b = (torch.randn(size, size, device=device, dtype=torch.bfloat16) for _ in range(2))
    p, q = (torch.randint(-127, 128, (size, size), device=device, dtype=torch.int8) for _ in range(2))
    source = torch.empty(copy_bytes, dtype=torch.int8, device=device).random_(-127, 127)
    target = torch.empty_like(source)
    operations = 2 * size**3
    return {
        "copy_bytes_per_s": 2 * copy_bytes / graph_time([lambda: target.copy_(source)] * 4),
        "bf16_flop_per_s": operations / graph_time([lambda: a @ b] * 2),
        "int_mm_op_per_s": operations / graph_time([lambda: torch._int_mm(p, q.t())] * 2),
    }


def quantizing(
    device: torch.device, copy_rate: float, shapes: tuple[tuple[int, int], ...] = QUANTIZE_SHAPES
) -> Iterator[dict[str, Any]]:
    """The bytes that must move (read the weight, write codes) over the time, as a fraction of the copy rate."""
    for rows, columns in shapes:
        for dtype in (*DTYPES, torch.float32):
            weights = _weights(rows, columns, dtype, device)
            moved = rows * columns * (dtype.itemsize + 1)
            row: dict[str, Any] = {"dtype": str(dtype), "rows": rows, "columns": columns}
            seconds = graph_time([_call(gpu.quantize_rowwise, weight) for weight in weights])
            row |= {"us": seconds * 1e6, "of_copy": moved / seconds / copy_rate}
            stats = gpu.DeviceStats.empty(columns, device)
            seconds = graph_time([_call(gpu.quantize_rowwise, weight, stats) for weight in weights])
            row |= {"with_stats_us": seconds * 1e6, "with_stats_of_copy": moved / seconds / copy_rate}
            if (peer := _bitsandbytes()) and dtype == torch.float16:
                seconds = eager_time([_call(peer.functional.int8_vectorwise_quant, weight) for weight in weights])
                row["bitsandbytes_us"] = seconds * 1e6
            yield row


def linears(
    device: torch.device, shapes: tuple[tuple[int, int], ...] = LINEAR_SHAPES, tokens: tuple[int, ...] = TOKENS
) -> Iterator[dict[str, Any]]:
    """Microseconds of a layer [N, K] on M tokens, including quantizing activations, by number of outlier columns."""
    for out_features, in_features in shapes:
        for dtype in DTYPES:
            floats = _weights(out_features, in_features, dtype, device)
            more = _weights(out_features, in_features, dtype, device)  # int8 has half the bytes, so twice the layers
            layers = [Int8Weight(*gpu.quantize_rowwise(weight)) for weight in floats + more]
            rotated = [replace(layer, rotation=rotation_of(in_features)) for layer in layers]  # codes do not matter
            peers = [_peer(weight) for weight in floats] if dtype == torch.float16 and _bitsandbytes() else []
            for m in tokens:
                x = _tokens(m, in_features, 0, dtype, device)
                cublas = graph_time([_call(functional.linear, x, weight) for weight in floats])
                in_blocks = graph_time([_call(gpu.linear, x, layer, None, 0.0) for layer in rotated])
                for outliers in OUTLIERS if m > DECODE_TOKENS or peers else (0,):
                    x = _tokens(m, in_features, outliers, dtype, device)
                    row = {"N": out_features, "K": in_features, "M": m, "outliers": outliers, "dtype": str(dtype)}
                    row |= {"us": 1e6 * graph_time([_call(gpu.linear, x, layer, None, 6.0) for layer in layers])}
                    row |= {"cublas_us": 1e6 * cublas, "rotated_us": 1e6 * in_blocks}
                    if peers:
                        row |= {"bitsandbytes_us": 1e6 * eager_time([_call(peer, x) for peer in peers])}
                    yield row


def stack(device: torch.device, layers: int, hidden: int = 4096, inner: int = 14336) -> Iterator[dict[str, Any]]:
    """A Llama-3-8B-shaped stack: decode tokens/s at batch 1 and 16 after 512 tokens, and prefill of 2048 tokens."""
    for kind in ("bfloat16", "float16", "quantize8 bfloat16", "quantize8 float16", "bitsandbytes float16"):
        dtype = torch.bfloat16 if "bfloat16" in kind else torch.float16
        peer = _bitsandbytes()
        if kind.startswith("bitsandbytes") and peer is None:
            continue
        measure = eager_time if kind.startswith("bitsandbytes") else graph_time
        with torch.inference_mode():
            model = Stack(_linear_of(kind, device), layers, hidden, inner, dtype, device)
            row: dict[str, Any] = {"kind": kind, "layers": layers}
            for batch in (1, 16):
                step = model.decode(batch, past=512)
                row[f"decode_{batch}_tokens_per_s"] = batch / measure([step])
            row["prefill_2048_tokens_per_s"] = 2048 / measure([model.prefill(2048)])
            yield row
        del model
        if device.type == "cuda":
            torch.cuda.empty_cache()


def _linear_of(kind: str, device: torch.device) -> Callable[[torch.Tensor], Callable[[torch.Tensor], torch.Tensor]]:
    """Turns a float weight into the function of a layer."""

    def ours(weight: torch.Tensor) -> Callable[[torch.Tensor], torch.Tensor]:
        layer = Int8Weight(*gpu.quantize_rowwise(weight))
        return lambda x: gpu.linear(x.reshape(-1, x.shape[-1]), layer, None, 6.0).view(*x.shape[:-1], len(layer.codes))

    if kind.startswith("quantize8"):
        return ours
    if kind.startswith("bitsandbytes"):
        return _peer
    return lambda weight: lambda x: functional.linear(x, weight)


def _bitsandbytes() -> Any:
    try:
        import bitsandbytes

        return bitsandbytes
    except Exception:  # not installed, or no build for this GPU: the results file says which (timing.about_machine)
        return None


def _peer(weight: torch.Tensor) -> Any:
    """A float16 weight as bitsandbytes' Linear8bitLt, at threshold 6."""
    peer = _bitsandbytes()
    layer = peer.nn.Linear8bitLt(weight.shape[1], weight.shape[0], bias=False, has_fp16_weights=False, threshold=6.0)
    layer.weight = peer.nn.Int8Params(weight.cpu(), requires_grad=False, has_fp16_weights=False)
    return layer.to(weight.device).eval()


def _call(function: Callable[..., Any], *arguments: Any) -> Callable[[], Any]:
    return lambda: function(*arguments)


def _weights(rows: int, columns: int, dtype: torch.dtype, device: torch.device) -> list[torch.Tensor]:
    """Weights to use in rotation: more of them than the caches hold."""
    count = max(_LEAST, -(-CACHE_BYTES // (rows * columns * dtype.itemsize)))
    return [torch.randn(rows, columns, device=device, dtype=dtype) * 0.02 for _ in range(min(count, _MOST))]


def _tokens(m: int, in_features: int, outliers: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    x = torch.randn(m, in_features, device=device).clamp(-5, 5)
    x[:, torch.randperm(in_features, device=device)[:outliers]] *= 12
    return x.to(dtype)
