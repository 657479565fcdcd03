"""From a folder to a model that runs: artifacts on our layers, plain checkpoints as transformers loads them."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from quantize8.artifact.outliers import has_outliers, read_outliers
from quantize8.checkpoint import Checkpoint, QuantizedCheckpoint, open_checkpoint
from quantize8.checkpoint.base import FLOAT_NAMES
from quantize8.checkpoint.bitsandbytes import is_int8
from quantize8.checkpoint.gguf import GgufCheckpoint
from quantize8.checkpoint.guard import guarded
from quantize8.checkpoint.native import Native, is_known, native_class
from quantize8.checkpoint.structure import structure_of
from quantize8.checkpoint.tokenizer import check_tokenizer
from quantize8.errors import ArtifactError, DependencyError, Quantize8Error, SourceError, first_line
from quantize8.ops.choice import resolve
from quantize8.ops.reference import DEFAULT_THRESHOLD, MODES, OutlierMode
from quantize8.optional import require

_ADAPTER = "adapter_config.json"  # by which transformers would read further weights, with readers that are not ours

# one of which a tokenizer has, whatever else it has
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
    """Load an artifact, or any checkpoint that `convert` reads: (transformers model, tokenizer).

    Weights stored as int8 with a scale per row run on our layers; those quantized otherwise are decoded.

    Args: path, a folder, GGUF file or hub id; device_map, as transformers takes it, but "auto" keeps int8 layers on the
    CPU where no GPU can run their kernels; dtype of the floating-point part, "auto" for the stored one, except that
    float16 is computed in float32 on a CPU, which holds the same numbers and is faster there; mode and threshold of
    the outlier correction: mode None for hybrid where the artifact was calibrated, else dynamic, threshold None for
    the stored one.
    Returns: the model in eval mode; its tokenizer, None where the folder has none.
    Raises: SourceError where the folder is missing, is quantized in a way not read, or needs code of its own to run,
    and for a mode that there is not; DependencyError where torch, transformers or accelerate is missing.
    """
    if mode is not None and mode not in MODES:
        raise SourceError(f"mode {mode}: unknown; name one of {', '.join(MODES)}")
    require("to run a model")
    with quiet():
        # opening tells what is missing, cut or lying in one line, before transformers meets it
        checkpoint = open_checkpoint(str(path), revision=revision, token=token)
        stored = checkpoint.inner if isinstance(checkpoint, QuantizedCheckpoint) else checkpoint
        if (stored.folder / _ADAPTER).exists():
            raise SourceError(f"{path}: holds an adapter ({_ADAPTER}), which is not run; merge it, or move it away")
        calibrated = has_outliers(stored.folder)
        mode = mode or ("hybrid" if calibrated else "dynamic")
        if checkpoint.decoded and device_map in ("auto", "cuda"):
            device_map = device_map if resolve(device_map) == "cuda" else "cpu"
        given = {"dtype": _dtype(dtype, checkpoint.config, device_map), "device_map": device_map}
        if isinstance(stored, GgufCheckpoint) or (checkpoint.decoded and not is_int8(stored.config)):
            model = _load_decoded(checkpoint, mode, threshold, given)
        else:
            native = _with_int8_entry(native_of(stored), stored, mode, threshold)
            model = _built(native, stored.folder, stored.folder, trust_remote_code=False, **given)
        if mode == "hybrid" and calibrated:
            _give_outliers(model, checkpoint, stored.folder)
        return model.eval(), find_tokenizer(checkpoint)


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


def native_of(checkpoint: Checkpoint) -> Native:
    """The class that runs a checkpoint, with its settings; raises SourceError where transformers has none."""
    config = checkpoint.config
    if not is_known(config):
        raise SourceError(
            f"{checkpoint.folder}: transformers has no model type {config.get('model_type')!r}; "
            "convert it, and run it with the code that it comes with"
        )
    return native_class(config, checkpoint.tensors, checkpoint.is_encoder)


def _with_int8_entry(native: Native, stored: Checkpoint, mode: OutlierMode, threshold: float | None) -> Native:
    """The same; of an int8 folder in the bitsandbytes format with what our quantizer needs to know."""
    entry = stored.config.get("quantization_config")
    if isinstance(entry, dict):
        asked = float(entry.get("llm_int8_threshold", DEFAULT_THRESHOLD)) if threshold is None else threshold
        skip = entry.get("llm_int8_skip_modules")
        native.settings.quantization_config = _entry(asked, skip, mode, int8_experts=False)
    return native


def _load_decoded(checkpoint: Checkpoint, mode: OutlierMode, threshold: float | None, given: dict[str, Any]) -> Any:
    """A model from what our readers make of its weights: int8 as it is, all else in floating point."""
    from quantize8.model.state import plan_loading

    native, plan = native_of(checkpoint), plan_loading(checkpoint)
    if any(tensor.dtype == "I8" for tensor in plan.state.values()):
        asked = DEFAULT_THRESHOLD if threshold is None else threshold
        native.settings.quantization_config = _entry(asked, plan.skip_modules, mode, plan.int8_experts)
    return _built(native, checkpoint.folder, None, state_dict=plan.state, **given).eval()


def _built(native: Native, where: Path, source: Path | None, **given: Any) -> Any:
    """The model as transformers loads it; whatever it or torch raise, of memory too, is one line.

    So is what it would only warn of: a parameter that the checkpoint does not have, and that would be random.
    """
    given = {"config": native.settings, **native.arguments, **given}
    try:
        with guarded():
            model, found = native.kind.from_pretrained(source, output_loading_info=True, **given)
    except Quantize8Error:
        raise
    except Exception as error:  # of any kind, as what a config.json may say of its weights
        raise SourceError(f"{where}: transformers cannot load this model ({first_line(error)})") from None
    parameters = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    if missing := sorted(parameters & set(found["missing_keys"])):
        raise SourceError(f"{where}: {missing[0]} is not in the checkpoint, and would be random; fetch it again")
    return model


def _give_outliers(model: Any, checkpoint: Checkpoint, folder: Path) -> None:
    """Give the int8 layers of a model the outlier columns that were stored for them; experts, say, have none."""
    import torch

    from quantize8.model.linear import Int8Linear

    names = structure_of(checkpoint).model_names
    layers = dict(model.named_modules())
    for name, found in read_outliers(folder).items():
        layer = layers.get(names.get(name, name))
        shape = found.weight.shape[0], int(found.columns.max(initial=-1))
        if not isinstance(layer, Int8Linear) or shape[0] != layer.out_features or shape[1] >= layer.in_features:
            raise ArtifactError(f"{folder}: its outlier columns of {name} fit no int8 layer; convert the source again")
        device = torch.device("cpu") if layer.SCB.is_meta else layer.SCB.device
        layer.outlier_columns = torch.from_numpy(found.columns).to(device)
        layer.outlier_weight = torch.from_numpy(found.weight).to(device)


def _entry(threshold: float, skip_modules: Any, mode: OutlierMode, int8_experts: bool) -> dict[str, Any]:
    """A quantization_config, in memory only, by which transformers calls our quantizer."""
    from quantize8.model.quantizer import METHOD

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
    """The tokenizer of a checkpoint; None where it has none."""
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
    except Exception as error:  # tokenizers raises nothing narrower
        raise DependencyError(f"{folder}: its tokenizer does not load ({first_line(error)})") from None
