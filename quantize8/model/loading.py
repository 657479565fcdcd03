"""From a folder to a model that runs: artifacts on our layers, plain checkpoints as transformers loads them."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from quantize8.checkpoint import QuantizedCheckpoint, open_checkpoint
from quantize8.checkpoint.bitsandbytes import is_int8
from quantize8.checkpoint.gguf import GgufCheckpoint
from quantize8.errors import DependencyError, SourceError, first_line
from quantize8.ops.choice import resolve
from quantize8.ops.reference import DEFAULT_THRESHOLD, OutlierMode


def load(
    path: str | Path,
    device_map: Any = "auto",
    *,
    dtype: Any = "auto",
    mode: OutlierMode = "dynamic",
    threshold: float | None = None,
    revision: str | None = None,
    token: str | None = None,
) -> tuple[Any, Any]:
    """Load an artifact (or any int8 bitsandbytes folder, or a plain checkpoint): (transformers model, tokenizer).

    Args: path, a folder, GGUF file or hub id; device_map, as transformers takes it, but "auto" keeps int8 layers on the
    CPU where no GPU can run their kernels; dtype of the floating-point part, "auto" for the stored one, except that
    float16 is computed in float32 on a CPU, which holds the same numbers and is faster there; mode and threshold of
    the outlier correction, threshold None for the stored one.
    Returns: the model in eval mode; its tokenizer, None where the folder has none.
    Raises: SourceError where the folder is missing, holds another quantization, or needs code of its own to run.
    """
    if mode == "static":
        raise SourceError(f"{path}: holds no calibrated outlier columns for mode static; use dynamic or elementwise")
    with quiet():
        # opening tells what is missing, cut or lying in one line, before transformers meets it
        checkpoint = open_checkpoint(str(path), revision=revision, token=token)
        if isinstance(checkpoint, GgufCheckpoint):
            return _load_gguf(checkpoint, device_map, dtype)
        stored = checkpoint.stored if isinstance(checkpoint, QuantizedCheckpoint) else checkpoint
        folder, config = stored.folder, stored.config
        if is_int8(config) and device_map in ("auto", "cuda"):
            device_map = device_map if resolve(device_map) == "cuda" else "cpu"
        settings = _model_config(folder, config, mode, threshold)
        numbers = _dtype(dtype, config, device_map)
        model = _model_class(config).from_pretrained(
            folder, config=settings, dtype=numbers, device_map=device_map, trust_remote_code=False
        )
        return model.eval(), _tokenizer(folder)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keep transformers' progress bars and advice off the terminal while we load; errors still come."""
    from transformers.utils import logging

    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()


def _model_config(folder: Path, config: dict[str, Any], mode: OutlierMode, threshold: float | None) -> Any:
    from transformers import AutoConfig

    try:
        settings = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    except ValueError as error:
        raise SourceError(f"{folder}: transformers cannot run this architecture ({first_line(error)})") from None
    stored = config.get("quantization_config")
    if is_int8(config):
        from quantize8.model.quantizer import METHOD

        assert isinstance(stored, dict)
        stored_threshold = float(stored.get("llm_int8_threshold", DEFAULT_THRESHOLD))
        settings.quantization_config = {
            "quant_method": METHOD,
            "llm_int8_threshold": stored_threshold if threshold is None else threshold,
            "llm_int8_skip_modules": stored.get("llm_int8_skip_modules"),
            "mode": mode,
            "quantize_experts": False,
        }
    elif stored is not None:
        method = stored.get("quant_method") if isinstance(stored, dict) else stored
        raise SourceError(f"{folder}: is quantized by {method}, which quantize8 does not run; use its own loader")
    return settings


def _load_gguf(checkpoint: GgufCheckpoint, device_map: Any, dtype: Any) -> tuple[Any, Any]:
    """A GGUF file, dequantized by our reader, as a plain transformers model."""
    import torch
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    config = checkpoint.config
    state = {}
    for name, info in checkpoint.tensors.items():
        values = checkpoint.rows(name, 0, info.shape[0])
        bits = torch.from_numpy(values.view(np.int16))
        state[name] = bits.view(torch.bfloat16 if info.dtype == "BF16" else torch.float16)
    settings = CONFIG_MAPPING[config["model_type"]].from_dict(config)
    numbers = _dtype(dtype, config, device_map)
    model = _model_class(config).from_pretrained(
        None, config=settings, state_dict=state, dtype=numbers, device_map=device_map
    )
    return model.eval(), checkpoint.tokenizer


def _dtype(asked: Any, config: dict[str, Any], device_map: Any) -> Any:
    """The floating-point type to compute in."""
    import torch

    if asked != "auto":
        return getattr(torch, asked) if isinstance(asked, str) else asked
    stored = str(config.get("dtype") or config.get("torch_dtype") or "float32").removeprefix("torch.")
    on_cpu = device_map == "cpu" or not torch.cuda.is_available()
    return torch.float32 if on_cpu and stored == "float16" else getattr(torch, stored)


def _model_class(config: dict[str, Any]) -> Any:
    import transformers

    name = (config.get("architectures") or ["AutoModel"])[0]
    return getattr(transformers, name, None) or transformers.AutoModel


def _tokenizer(folder: Path) -> Any:
    from transformers import AutoTokenizer

    if not any((folder / name).is_file() for name in ("tokenizer.json", "tokenizer_config.json", "tokenizer.model")):
        return None
    try:
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except (ValueError, OSError, ImportError) as error:
        raise DependencyError(f"{folder}: its tokenizer does not load ({first_line(error)})") from None
