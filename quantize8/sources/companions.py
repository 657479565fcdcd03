"""Which files of a model folder are copied into an artifact: all that are not known to be something else.

Tokenizers, processors and templates have names of every kind (`source.spm`, `bpe.codes`, `tokenizer.model.v3`), so a
list of them is never complete. Left out are weights, what other tools left behind, and what only describes the model.
Names alone decide, so the result is the same for a folder, the hub and an object store.
"""

from __future__ import annotations

import re
from collections.abc import Collection
from fnmatch import fnmatch
from pathlib import PurePosixPath

_OURS = ("config.json", "*.index.json", "quantize8.json")  # which an artifact has of its own
_WEIGHTS = (
    *(".safetensors", ".bin", ".gguf", ".ggml", ".pt", ".pth", ".ckpt", ".h5", ".msgpack", ".ot"),
    *(".onnx", ".onnx_data", ".tflite", ".nemo", ".mlmodel", ".mlpackage", ".xml", ".engine"),
    *(".tar", ".gz", ".zip", ".7z", ".parquet", ".arrow"),
)
_ADAPTER = ("adapter_config.json",)  # by which transformers would look for further weights
_TRAINING = ("trainer_state.json", "events.out.tfevents.*", "*.log", "*.lock", "*.incomplete", "zero_to_fp32.py")
_PICKLES = (".pkl", ".pickle", ".joblib")  # which run code when they are opened
_ABOUT = ("README.md", "*.png", "*.jpg", "*.jpeg", "*.gif", "*.svg", "*.webp", "*.mp4", "*.webm", "*.pdf", "*.ipynb")
_PART = re.compile(r"\d+_\w+/.+")  # a module of sentence-transformers, such as 2_Dense, whose weights are its own


def files_to_copy(names: Collection[str]) -> list[str]:
    """The files of a model folder that an artifact gets unchanged, sorted.

    Args:
        names: All files of the folder, as POSIX paths relative to it.
    """
    left = files_left_out(names)
    return sorted(name for name in names if name not in left and not _is_ours(name))


def files_left_out(names: Collection[str]) -> dict[str, str]:
    """The files of a model folder that an artifact does not get, with the reason for each.

    Files that an artifact has of its own, such as config.json, are in neither list.

    Args:
        names: All files of the folder, as POSIX paths relative to it.
    """
    with_weights = {_folder(name) for name in names if PurePosixPath(name).suffix.lower() in _WEIGHTS}
    found = {name: _reason(name, with_weights) for name in sorted(names) if not _is_ours(name)}
    return {name: reason for name, reason in found.items() if reason}


def _reason(name: str, with_weights: Collection[str]) -> str:
    path = PurePosixPath(name)
    if any(part.startswith(".") or part == "__pycache__" for part in path.parts) or len(path.parts) > 2:
        return "hidden, or deeper in the folder than a model's files"
    if _PART.fullmatch(name):
        return ""
    if path.suffix.lower() in _WEIGHTS:
        return "weights that are not read"
    if _folder(name) and _folder(name) in with_weights:
        return "beside weights of another format or model"
    if path.suffix.lower() in _PICKLES:
        return "a pickle, which runs code when it is opened"
    for patterns, reason in ((_ADAPTER, "an adapter's"), (_TRAINING, "left by training"), (_ABOUT, "about the model")):
        if any(fnmatch(path.name, pattern) for pattern in patterns):
            return reason
    return ""


def _is_ours(name: str) -> bool:
    return "/" not in name and any(fnmatch(name, pattern) for pattern in _OURS)


def _folder(name: str) -> str:
    return name.rpartition("/")[0]
