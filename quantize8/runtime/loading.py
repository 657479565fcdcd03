"""Loading models: artifacts run on quantize8's layers, unquantized checkpoints as transformers loads them."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from quantize8.artifact.outliers import has_outliers, read_outliers
from quantize8.errors import ArtifactError, DependencyError, Quantize8Error, SourceError, first_line
from quantize8.formats.bitsandbytes import is_int8
from quantize8.formats.gguf.reader import GgufCheckpoint
from quantize8.kernels.devices import resolve
from quantize8.kernels.reference import DEFAULT_THRESHOLD, MODES, OutlierMode
from quantize8.optional import require
from quantize8.sources import Checkpoint, open_checkpoint
from quantize8.sources.base import FLOAT_NAMES
from quantize8.sources.guard import guarded
from quantize8.sources.native import Native, is_known, native_class
from quantize8.sources.quantized import QuantizedCheckpoint
from quantize8.sources.structure import as_transformers_loads, structure_of
from quantize8.sources.tokenizer import check_tokenizer

_ADAPTER = "adapter_config.json"  # makes transformers read more weights, and not through quantize8's safe readers

# every tokenizer has at least one of these files
_TOKENIZERS = (
    *("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model"),
    *("sentencepiece.bpe.model", "source.spm", "bpe.codes"),
)


def load(
    path: str | Path,
    device_map: Any = "auto",
    *,
    dtype: Any = "auto",
    mode: OutlierMode | None = None,
    threshold: float | None = None,
    revision: str | None = None,
    token: str | None = None,
) -> tuple[Any, Any]:
    """Load an artifact, or any checkpoint that `convert` reads.

    Weights stored as int8 with one scale per row run on quantize8's layers; weights quantized in other ways are decoded
    to floating point.

    Args:
        path: Folder, GGUF file or hub id.
        device_map: As in transformers, but "auto" puts int8 layers on the CPU if no GPU can run their kernels.
        dtype: Dtype of the floating-point part. "auto" for the stored one, except that a float16 model computes in
            float32 on a CPU, which represents the same numbers and is faster there.
        mode: Outlier mode; None for "hybrid" if the artifact was calibrated, else "dynamic".
        threshold: Outlier threshold; None for the stored one.
        revision: Branch, tag or commit on the hub.
        token: Access token for the hub.

    Returns:
        The transformers model in eval mode, and its tokenizer, or None if the folder has none.

    Raises:
        SourceError: The folder is missing or damaged, has a quantization that is not supported, holds an adapter, or
            needs code of its own to run; or the mode is unknown.
        ArtifactError: The stored outlier columns do not match the model.
        DependencyError: torch, transformers or accelerate is missing, the device cannot be used, or the tokenizer does
            not load.
    """
    if mode is not None and mode not in MODES:
        raise SourceError(f"mode {mode}: unknown; name one of {', '.join(MODES)}")
    require("to run a model")
    with quiet():
        # opening reports missing, truncated or inconsistent files in one line, before transformers reads them
        checkpoint = open_checkpoint(str(path), revision=revision, token=token)
        stored = checkpoint.inner if isinstance(checkpoint, QuantizedCheckpoint) else checkpoint
        if (stored.folder / _ADAPTER).exists():
            raise SourceError(
                f"{path}: holds an adapter ({_ADAPTER}), which is not applied; merge it with convert --adapter, "
                "or remove that file"
            )
        calibrated = has_outliers(stored.folder)
        mode = mode or ("hybrid" if calibrated else "dynamic")
        if checkpoint.decoded and device_map in ("auto", "cuda"):
            device_map = device_map if resolve(device_map) == "cuda" else "cpu"
        given = {"dtype": _dtype(dtype, checkpoint.config, device_map), "device_map": device_map}
        is_ours = isinstance(stored, GgufCheckpoint) or (checkpoint.decoded and not is_int8(stored.config))
        threshold = _threshold(stored) if threshold is None else threshold
        if is_ours or as_transformers_loads(checkpoint) is not checkpoint:
            model = _load_decoded(checkpoint, mode, threshold, given)
        else:
            native = _with_int8_entry(native_of(stored), stored, mode, threshold)
            model = _built(native, stored.folder, stored.folder, trust_remote_code=False, **given)
        if mode == "hybrid" and calibrated:
            _give_outliers(model, checkpoint, stored.folder)
        return model.eval(), find_tokenizer(checkpoint)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Suppress transformers' progress bars and warnings within the context; errors are still shown."""
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


def native_of(checkpoint: Checkpoint) -> Native:
    """The transformers class that runs a checkpoint, with its settings; SourceError if transformers has none."""
    config = checkpoint.config
    if not is_known(config):
        raise SourceError(
            f"{checkpoint.folder}: transformers has no model type {config.get('model_type')!r}; "
            "convert the checkpoint, and run the result with the code that belongs to the model"
        )
    return native_class(config, checkpoint.tensors, checkpoint.is_encoder)


def _threshold(stored: Checkpoint) -> float:
    """The outlier threshold that config.json names, else the default."""
    entry = stored.config.get("quantization_config")
    named = entry.get("llm_int8_threshold") if isinstance(entry, dict) else None
    return DEFAULT_THRESHOLD if named is None else float(named)


def _with_int8_entry(native: Native, stored: Checkpoint, mode: OutlierMode, threshold: float) -> Native:
    """`native`, with the settings that quantize8's quantizer needs if the folder is in the bitsandbytes format."""
    entry = stored.config.get("quantization_config")
    if isinstance(entry, dict):
        skip = entry.get("llm_int8_skip_modules")
        native.settings.quantization_config = _entry(threshold, skip, mode, int8_experts=False)
    return native


def _load_decoded(checkpoint: Checkpoint, mode: OutlierMode, threshold: float, given: dict[str, Any]) -> Any:
    """Load a model through quantize8's readers: int8 weights stay as they are, all others become floating point."""
    from quantize8.runtime.state import plan_loading

    native, plan = native_of(checkpoint), plan_loading(checkpoint)
    if any(tensor.dtype == "I8" for tensor in plan.state.values()):
        native.settings.quantization_config = _entry(threshold, plan.skip_modules, mode, plan.int8_experts)
    model = _built(native, checkpoint.folder, None, state_dict=plan.state, **given).eval()
    for name, rotation in plan.rotations.items():
        model.get_submodule(name).rotation = rotation
    return model


def _built(native: Native, where: Path, source: Path | None, **given: Any) -> Any:
    """Load a model with transformers, and report every error as a SourceError in one line.

    This includes errors of torch, such as too little memory, and a parameter that is missing in the checkpoint, of
    which transformers would only warn and which it would initialize at random.
    """
    given = {"config": native.settings, **native.arguments, **given}
    try:
        with guarded():
            model, loading = native.kind.from_pretrained(source, output_loading_info=True, **given)
    except Quantize8Error:
        raise
    except Exception as error:  # a config.json with wrong settings can cause errors of any kind
        raise SourceError(f"{where}: transformers cannot load this model ({first_line(error)})") from None
    parameters = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    if missing := sorted(parameters & set(loading["missing_keys"])):
        raise SourceError(
            f"{where}: {missing[0]} is not in the checkpoint, and would be random; fetch the checkpoint again"
        )
    return model


def _give_outliers(model: Any, checkpoint: Checkpoint, folder: Path) -> None:
    """Give the int8 layers of a model their stored outlier columns; some layers, such as experts, have none."""
    import torch

    from quantize8.runtime.linear import Int8Linear

    names = structure_of(checkpoint).model_names
    layers = dict(model.named_modules())
    for name, stored in read_outliers(folder).items():
        layer = layers.get(names.get(name, name))
        rows, last = stored.weight.shape[0], int(stored.columns.max(initial=-1))
        if not isinstance(layer, Int8Linear) or rows != layer.out_features or last >= layer.in_features:
            raise ArtifactError(f"{folder}: its outlier columns of {name} fit no int8 layer; convert the source again")
        device = torch.device("cpu") if layer.SCB.is_meta else layer.SCB.device
        layer.outlier_columns = torch.from_numpy(stored.columns).to(device)
        layer.outlier_weight = torch.from_numpy(stored.weight).to(device)


def _entry(threshold: float, skip_modules: Any, mode: OutlierMode, int8_experts: bool) -> dict[str, Any]:
    """A quantization_config, in memory only, that makes transformers use quantize8's quantizer."""
    from quantize8.runtime.quantizer import METHOD

    return {
        "quant_method": METHOD,
        "llm_int8_threshold": threshold,
        "llm_int8_skip_modules": skip_modules,
        "mode": mode,
        "quantize_experts": int8_experts,
    }


def _dtype(asked: Any, config: dict[str, Any], device_map: Any) -> Any:
    """The floating-point type to compute in."""
    import torch

    if asked != "auto":
        return getattr(torch, asked) if isinstance(asked, str) else asked
    stored = str(config.get("dtype") or config.get("torch_dtype") or "auto").removeprefix("torch.")
    stored = stored if stored in FLOAT_NAMES else "float32"
    on_cpu = device_map == "cpu" or not torch.cuda.is_available()
    return torch.float32 if on_cpu and stored == "float16" else getattr(torch, stored)


def find_tokenizer(checkpoint: Checkpoint) -> Any:
    """The tokenizer of a checkpoint, or None if it has none; DependencyError if it does not load."""
    from transformers import AutoTokenizer

    if isinstance(origin := checkpoint.origin, GgufCheckpoint):
        return origin.tokenizer
    folder = checkpoint.folder
    if not any((folder / name).is_file() for name in _TOKENIZERS):
        return None
    check_tokenizer(folder)
    try:
        with guarded():
            return AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except Exception as error:  # tokenizers raises plain Exceptions
        raise DependencyError(f"{folder}: its tokenizer does not load ({first_line(error)})") from None
