"""A LoRA adapter as PEFT saves it: its settings, its tensors, and which of them belong together."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from blake3 import blake3

from quantize8 import limits
from quantize8.errors import SourceError
from quantize8.sources.base import BLOCK_BYTES, QUANTIZABLE, Checkpoint, contained
from quantize8.sources.safetensors import SafetensorsCheckpoint

CONFIG_NAME = "adapter_config.json"
WEIGHTS_NAME, PICKLED_NAME = "adapter_model.safetensors", "adapter_model.bin"
_MERGE = "merge it with PEFT (merge_and_unload), save that, and convert it"
_PREFIX = "base_model.model."  # before the names of the model's modules
# Settings with which an adapter is more than B A: PEFT computes something else with it, or with another base
_MORE = (
    *("use_qalora", "use_bdlora", "arrow_config", "kasa_config", "monteclora_config", "velora_config"),
    *("alora_invocation_tokens", "layer_replication", "trainable_token_indices"),
)
_KEEP_THE_BASE = (True, False, None, "gaussian", "eva", "orthogonal")  # values of init_lora_weights
# Parts of a module in PEFT's names -> fields of `Pair`
_PARTS = {
    "lora_A.weight": "a",
    "lora_B.weight": "b",
    "lora_B.bias": "bias",
    "lora_embedding_A": "a",
    "lora_embedding_B": "b",
    "lora_magnitude_vector": "magnitude",
    "lora_magnitude_vector.weight": "magnitude",  # as PEFT saved it for a while
}
_PART = re.compile(rf"(.+)\.({'|'.join(map(re.escape, _PARTS))})")
_INNER = re.compile(r"\.(?:base_layer|modules_to_save)(?=\.[^.]+$)")  # wrappers of a module, which PEFT names at times
# Patterns are regular expressions of a file. One with repeated groups, or many repetitions, could match for hours.
_SIMPLE = re.compile(r"(?:[^*+{?]*[*+{?]){0,3}[^*+{?]*")
_REPEATED_GROUP = re.compile(r"\)[*+{?]")


@dataclass(frozen=True)
class Settings:
    """The settings of an adapter that decide what it adds.

    Attributes:
        rank: R, for modules without a pattern.
        alpha: alpha, for modules without a pattern.
        ranks: Pattern of module names -> R.
        alphas: Pattern of module names -> alpha.
        rslora: Whether alpha is divided by sqrt(R), not R.
        fan_in_fan_out: Whether the adapter was trained on weights that are stored [K, N].
        parameters: Ends of names of the parameters that are adapted by themselves, and not as weights of layers.
    """

    rank: int
    alpha: float
    ranks: Mapping[str, int]
    alphas: Mapping[str, float]
    rslora: bool
    fan_in_fan_out: bool
    parameters: tuple[str, ...] = ()

    def targets(self, parameter: str) -> bool:
        """Whether a parameter of the model is adapted by itself."""
        return any(f".{parameter}".endswith(f".{end}") for end in self.parameters)

    def of(self, module: str) -> tuple[int, float]:
        """The rank of a module or parameter, and the factor of B A: the first pattern that fits the end of the name."""
        rank = _first_match(self.ranks, module, self.rank)
        alpha = _first_match(self.alphas, module, self.alpha)
        return rank, alpha / (math.sqrt(rank) if self.rslora else rank)


@dataclass(frozen=True)
class Pair:
    """The tensors of an adapted module, by their names in the adapter; those that it lacks are empty.

    Attributes:
        a: A [R, K]; of an embedding [V, H]: [R, V].
        b: B [N, R]; of an embedding: [H, R].
        embeds: Whether the module is an embedding.
        rank: R according to the settings.
        scaling: The factor of B A.
        magnitude: DoRA's m [N]; of an embedding: [H].
        bias: The bias [N] of B.
    """

    a: str
    b: str
    embeds: bool
    rank: int
    scaling: float
    magnitude: str = ""
    bias: str = ""


@dataclass(frozen=True)
class Adapter:
    """An adapter, opened.

    Attributes:
        name: The name of its folder.
        weights: Its tensors.
        settings: Its settings.
        identity: What the manifest records: its name, the digests of its two files, and the base that it names.
        pairs: The adapted modules, by name in the model.
        replaced: Weight or bias of the model -> the tensor that is read instead.
    """

    name: str
    weights: Checkpoint
    settings: Settings
    identity: dict[str, str]
    pairs: dict[str, Pair] = field(default_factory=dict)
    replaced: dict[str, str] = field(default_factory=dict)

    def error(self, text: str) -> SourceError:
        """An error about its weights."""
        return SourceError(f"{self.weights.folder / next(iter(self.weights.files))}: {text}")


def open_adapter(folder: str) -> Adapter:
    """Open an adapter and check all that its files say.

    Args:
        folder: The folder with adapter_config.json and adapter_model.safetensors, or adapter_model.bin.

    Returns:
        The adapter; the shapes are not compared with those of a model.

    Raises:
        SourceError: A file is missing or damaged, or the adapter is not one that can be merged.
        DependencyError: The weights are a .bin file, and torch is missing.
    """
    path = Path(folder).expanduser()
    if not (path / CONFIG_NAME).is_file():
        raise SourceError(
            f"{folder}: no folder with {CONFIG_NAME}; name the folder of an adapter "
            "(one of the hub: hf download ID --local-dir FOLDER)"
        )
    path = path.resolve()
    config = limits.read_object(contained(path / CONFIG_NAME, path), limits.CONFIG_BYTES, SourceError)
    settings = _settings(config, path / CONFIG_NAME)
    file = next((name for name in (WEIGHTS_NAME, PICKLED_NAME) if (path / name).is_file()), None)
    if file is None:
        raise SourceError(f"{path}: has no {WEIGHTS_NAME}; fetch the adapter again")
    weights = _open(contained(path / file, path))
    identity = {"adapter": path.name, "adapter_blake3": _digest(path / file)}
    identity["adapter_config_blake3"] = _digest(path / CONFIG_NAME)
    if isinstance(base := config.get("base_model_name_or_path"), str) and base:
        # a path says nothing elsewhere, and manifests hold none
        is_path = base.startswith(("/", "~", ".")) or "\\" in base or base.count("/") > 1
        identity["adapter_base"] = re.split(r"[/\\]", base.rstrip("/\\"))[-1] if is_path else base
    weights.files[CONFIG_NAME] = limits.CONFIG_BYTES
    return _grouped(Adapter(path.name, weights, settings, identity), bool(config.get("use_dora")))


def _settings(config: dict[str, Any], path: Path) -> Settings:
    """Check the settings and return those that decide what is added."""
    kind = config.get("peft_type")
    if kind != "LORA":
        raise SourceError(f"{path}: is an adapter of type {kind}, and only LORA is merged; {_MERGE}")
    for name in _MORE:
        if config.get(name):
            raise SourceError(f"{path}: has {name}, which is not merged; {_MERGE}")
    start = config.get("init_lora_weights", True)
    if not any(start is value or (isinstance(start, str) and start == value) for value in _KEEP_THE_BASE):
        raise SourceError(
            f"{path}: was started with init_lora_weights {start!r}, which changes the base; save it as plain LoRA "
            "(PEFT: save_pretrained with path_initial_model_for_weight_conversion), or merge it with PEFT"
        )

    def patterns(name: str, fits: Callable[[Any], bool]) -> dict[str, Any]:
        found = config.get(name) or {}
        if not isinstance(found, dict) or not all(map(fits, found.values())):
            raise SourceError(f"{path}: {name} is not an object of positive numbers; fetch it again")
        for pattern in found:
            if not _SIMPLE.fullmatch(pattern) or _REPEATED_GROUP.search(pattern) or not _compiles(pattern):
                raise SourceError(f"{path}: {name} has the pattern {pattern!r}, which is not read; write names in full")
        return found

    rank, alpha = config.get("r"), config.get("lora_alpha")
    if rank is None or alpha is None or not _is_rank(rank) or not _is_number(alpha):
        raise SourceError(f"{path}: r is {rank!r} and lora_alpha {alpha!r}, not positive numbers; fetch it again")
    ranks, alphas = patterns("rank_pattern", _is_rank), patterns("alpha_pattern", _is_number)
    rslora, fan_in_fan_out = (bool(config.get(name)) for name in ("use_rslora", "fan_in_fan_out"))
    targets = config.get("target_parameters") or []
    if not isinstance(targets, list) or not all(isinstance(name, str) and name for name in targets):
        raise SourceError(f"{path}: target_parameters is not a list of names; fetch it again")
    return Settings(int(rank), float(alpha), ranks, alphas, rslora, fan_in_fan_out, tuple(targets))


def _is_rank(value: Any) -> bool:
    return type(value) is int and 0 < value <= limits.VOCABULARY


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and abs(value) < limits.EMPTY_LENGTH


def _compiles(pattern: str) -> bool:
    try:
        re.compile(pattern)
    except (re.error, OverflowError, RecursionError):
        return False
    return True


def _first_match(patterns: Mapping[str, Any], module: str, otherwise: Any) -> Any:
    found = (value for pattern, value in patterns.items() if re.match(rf"(.*\.)?({pattern})$", module))
    return next(found, otherwise)


def _open(path: Path) -> Checkpoint:
    """The tensors of an adapter's file."""
    folder, file, name = path.parent, path.name, path.parent.name
    if file == WEIGHTS_NAME:
        return SafetensorsCheckpoint(folder, [file], {"id": name}, name)
    from quantize8.sources.torch_bin import TorchCheckpoint

    class Pickled(TorchCheckpoint):
        """A .bin file without a config.json, in which no tensor stands for another one."""

        @property
        def config(self) -> dict[str, Any]:
            """See `Checkpoint.config`."""
            return {"tie_word_embeddings": False}

    return Pickled(folder, [file], {"id": name}, name)


def _digest(path: Path) -> str:
    """BLAKE3 of a file."""
    content = blake3()
    with path.open("rb") as file:
        while block := file.read(BLOCK_BYTES):
            content.update(block)
    return str(content.hexdigest())


def _grouped(adapter: Adapter, dora: bool) -> Adapter:
    """Find out what each tensor is for."""
    parts: dict[str, dict[str, str]] = {}
    for key, info in adapter.weights.tensors.items():
        name = key.removeprefix(_PREFIX)
        if name == key:
            raise adapter.error(f"{key} does not begin with {_PREFIX}, as the names of PEFT do; save it with PEFT")
        if info.dtype not in QUANTIZABLE:
            raise adapter.error(f"{key} is {info.dtype}, not {', '.join(QUANTIZABLE)}; convert the adapter first")
        match, replaced = _PART.fullmatch(name), _INNER.sub("", name)
        if match is None and "lora_" in name.rpartition(".")[0]:
            raise adapter.error(f"{key} is not a part of a LoRA adapter that is merged; {_MERGE}")
        if match is None:
            other = adapter.replaced.setdefault(replaced, key)
        else:
            other = parts.setdefault(match[1], {}).setdefault(_PARTS[match[2]], key)
        if other != key:
            raise adapter.error(f"{key} and {other} stand for the same; fetch the adapter again")
    if not adapter.weights.tensors:
        raise adapter.error("holds no tensors; fetch the adapter again")
    for module, found in parts.items():
        adapter.pairs[module] = _pair(adapter, module, found, dora)
    return adapter


def _pair(adapter: Adapter, module: str, found: dict[str, str], dora: bool) -> Pair:
    for part, what in {"a": "A", "b": "B", **({"magnitude": "magnitude vector"} if dora else {})}.items():
        if part not in found:
            other = next(iter(found.values()))
            raise adapter.error(f"{other} has no {what} beside it; fetch the adapter again, or save it anew")
    embeds = "lora_embedding_" in found["a"]
    if embeds != ("lora_embedding_" in found["b"]):
        raise adapter.error(f"{found['a']} and {found['b']} are of different kinds of layers; fetch it again")
    weight = f"{module}.weight"
    rank, scaling = adapter.settings.of(weight if adapter.settings.targets(weight) else module)
    return Pair(embeds=embeds, rank=rank, scaling=scaling, **found)
