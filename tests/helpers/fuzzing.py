"""Every reader of foreign bytes as a fuzzing target, and the rule that each must follow: a result, or a one-line error.

`attempt` runs one input through one reader. tests/test_fuzz.py uses it to replay the saved inputs and a short seeded
run, tests/fuzz.py for longer runs.

The first byte of an input says how to interpret it. 0: the rest is the file itself. Otherwise the rest describes a file
whose lengths, checksums and digests are made valid, which those of random bytes rarely are.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import io
import json
import math
import os
import pickle
import pickletools
import random
import struct
import sys
import warnings
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np

from quantize8.errors import OutputError, Quantize8Error, SourceError
from quantize8.sources import base

ROOT = Path(__file__).parent.parent
CORPUS = ROOT / "corpus"
EXECUTIONS = CORPUS / "executions.json"
RAW, MADE = b"\0", b"\1"
_LARGEST = 1 << 16  # bytes of the tensors that a described file may have
_FORBIDDEN = ("socket.connect", "socket.getaddrinfo", "socket.sendto", "subprocess.Popen", "os.system", "os.exec")


class Escape(BaseException):
    """A reader accessed the network, another process, or a file outside its folder."""


@dataclass(frozen=True)
class Reader:
    """One reader: a function that reads an input in a folder, inputs to start from, and how to mutate one."""

    run: Callable[[bytes, Path], object]
    seeds: Callable[[], list[bytes]]
    mutate: Callable[[bytes, random.Random], bytes]


def attempt(name: str, data: bytes, folder: Path) -> str | None:
    """Give an input to a reader. Returns None for a result, or its one-line error. Anything else is a finding."""
    _watch(folder)
    try:
        with np.errstate(all="ignore"), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            READERS[name].run(data, folder)
    except Quantize8Error as error:
        line = str(error)
        assert line and line.isprintable() and len(line) < 3000, f"not one line: {line!r}"
        return line
    finally:
        _watch(None)
    return None


# --- what is watched ---

_allowed: list[tuple[str, ...] | None] = []


def _watch(folder: Path | None) -> None:
    if not _allowed:
        _allowed.append(None)
        sys.addaudithook(_audit)
    _allowed[0] = None if folder is None else _places_of(folder)


@functools.cache
def _places_of(folder: Path) -> tuple[str, ...]:
    code = {sys.prefix, sys.base_prefix, str(ROOT.parent), *(path for path in sys.path if path.startswith("/"))}
    return str(folder.resolve()), str(folder), *code, "/proc/", "/sys/", "/dev/null"


def _audit(event: str, arguments: tuple[Any, ...]) -> None:
    allowed = _allowed[0]
    if allowed is None:
        return
    if event in _FORBIDDEN:
        _allowed[0] = None
        raise Escape(f"{event} {arguments!r}")
    if event == "open" and isinstance(arguments[0], str | bytes | Path):
        path = os.path.abspath(os.fsdecode(arguments[0]))  # noqa: PTH100 - as it is opened, links not followed
        if not path.startswith(allowed):
            _allowed[0] = None
            raise Escape(f"open {path}")


# --- changing inputs ---

_NUMBERS = (0, 1, -1, 2, 3, 7, 8, 31, 32, 127, 128, 255, 2**15, 2**31, 2**32, 2**53, 2**63, 2**64, 10**30, -(2**63))
_ODD = (
    None,
    True,
    False,
    0.5,
    1e400,
    -1e400,
    "",
    "x",
    "../x",
    "/etc/passwd",
    "a\0b",
    "\x1b[2J",
    "\n",
    [],
    {},
    [1],
    [[]],
)


def mutate_bytes(data: bytes, rng: random.Random) -> bytes:
    """Bytes with a few changed, removed, doubled, or replaced by a number that is typical of counts."""
    values = bytearray(data)
    for _ in range(rng.choice((1, 1, 2, 4))):
        place = rng.randrange(len(values) + 1)
        kind = rng.randrange(5)
        if kind == 0 and values:
            values[place % len(values)] ^= 1 << rng.randrange(8)
        elif kind == 1:
            del values[place : place + rng.choice((1, 4, 16, 64))]
        elif kind == 2:
            values[place:place] = values[place : place + rng.choice((1, 4, 16, 64))]
        elif kind == 3:
            size = rng.choice((1, 2, 4, 8))
            values[place : place + size] = (rng.choice(_NUMBERS) % 256**size).to_bytes(size, "little")
        else:
            values[place : place + 1] = bytes([rng.randrange(256)])
    return bytes(values)


def mutate_json(data: bytes, rng: random.Random) -> bytes:
    """A described input with some of its JSON values changed; occasionally mutated bytes."""
    if rng.random() < 0.15:
        return mutate_bytes(data, rng)
    try:
        value = json.loads(data[1:])
    except (ValueError, RecursionError):
        return mutate_bytes(data, rng)
    for _ in range(rng.choice((1, 1, 2, 3))):
        value = _changed(value, rng)
    return data[:1] + json.dumps(value).encode("utf-8", "surrogatepass")


def _places(value: Any, found: list[tuple[Any, Any]]) -> list[tuple[Any, Any]]:
    for key in value if isinstance(value, dict) else range(len(value)):
        found.append((value, key))
        if isinstance(value[key], dict | list) and len(found) < 5000:
            _places(value[key], found)
    return found


def _changed(value: Any, rng: random.Random) -> Any:
    if not isinstance(value, dict | list) or not (places := _places(value, [])):
        return copy.deepcopy(rng.choice(_ODD))
    (where, key), (other, its_key) = rng.choice(places), rng.choice(places)
    kind = rng.randrange(6)
    if kind == 0:
        where[key] = rng.choice(_NUMBERS)
    elif kind == 1:
        where[key] = copy.deepcopy(rng.choice(_ODD))
    elif kind == 2:
        where[key] = json.loads(json.dumps(other[its_key]))
    elif kind == 3:
        del where[key]
    elif isinstance(where, list):
        where.insert(key, rng.choice((1, 2, 8, where[key] if not isinstance(where[key], dict | list) else 0)))
    elif kind == 4:
        where[str(its_key)] = where.pop(key)
    elif isinstance(where[key], int) and not isinstance(where[key], bool):
        where[key] += rng.choice((1, -1, where[key], 32))
    return value


def mutate_pickle(data: bytes, rng: random.Random) -> bytes:
    """A described input with opcodes of its pickle moved, doubled or removed; occasionally mutated bytes."""
    with contextlib.suppress(Exception):
        if rng.random() < 0.6:
            places = [place for _, _, place in pickletools.genops(data[1:])]
            parts = [data[1:][i:j] for i, j in zip(places, [*places[1:], len(data) - 1], strict=True)]
            for _ in range(rng.choice((1, 2, 3))):
                kind, i = rng.randrange(3), rng.randrange(len(parts))
                if kind == 0:
                    del parts[i]
                elif kind == 1:
                    parts.insert(rng.randrange(len(parts)), parts[i])
                else:
                    parts[i] = rng.choice(_OPCODES)
            return data[:1] + b"".join(parts)
    return mutate_bytes(data, rng)


_OPCODES = [b"(", b"t", b"\x86", b"\x87", b"R", b"Q", b"b", b"s", b"u", b"0", b"2", b"}", b"]", b"e", b"a", b")", b"N"]
_OPCODES += [
    b"\x81",
    b"h\0",
    b"h\1",
    b"q\1",
    b"K\5",
    b"J\xff\xff\xff\x7f",
    b"J\xff\xff\xff\xff",
    b"\x8a\x08" + b"\x7f" * 8,
]
_OPCODES += [b"cbuiltins\nbytearray\n", b"ctorch\nFloatStorage\n", b"ccollections\nOrderedDict\n", b"cos\nsystem\n"]
_OPCODES += [b"ctorch._utils\n_rebuild_tensor_v2\n", b"ctorch\nSize\n", b"X\1\0\0\0a", b".", b"cbuiltins\nset\n"]


def described(value: Any) -> bytes:
    """An input that describes a file as JSON."""
    return MADE + json.dumps(value).encode()


def _parsed(data: bytes) -> Any:
    try:
        return json.loads(data[1:])
    except (ValueError, RecursionError):
        raise SourceError("no description") from None


def _get(value: Any, key: str, kind: type) -> Any:
    found = value.get(key) if isinstance(value, dict) else None
    return found if isinstance(found, kind) else kind()


# --- JSON: config.json, the index, recipes, manifests ---


def _config(data: bytes, folder: Path) -> None:
    from quantize8.sources.structure import read_structure

    (folder / "config.json").write_bytes(data[1:])
    config = base.read_config(folder)
    if not isinstance(config.get("model_type"), str) or data[:1] == RAW:
        tensors = {name: base.TensorInfo(name, "F16", (4, 4), "x") for name in _WEIGHTS}
        base.model_dtype(config, tensors.values())
        read_structure({**config, "model_type": None}, tensors)


def _config_model(data: bytes, folder: Path) -> None:
    from quantize8.sources.structure import read_structure

    (folder / "config.json").write_bytes(data[1:])
    config = base.read_config(folder)
    read_structure(config, {name: base.TensorInfo(name, "F16", (4, 4), "x") for name in _WEIGHTS})


_WEIGHTS = ("model.layers.0.mlp.up_proj.weight", "lm_head.weight", "h.0.attn.c_attn.weight", "a.experts.0.w1.weight")
_FAMILIES = {"gpt2": "GPT2LMHeadModel", "mixtral": "MixtralForCausalLM"}
_SMALL = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 16}


def _config_seeds() -> list[bytes]:
    from quantize8.sources.structure import read_structure

    read_structure({}, {})  # imports transformers
    more = {"architectures": ["LlamaForCausalLM"], "dtype": "float16", "tie_word_embeddings": False}
    vision = {"text_config": {"dtype": "bfloat16", "layer_types": ["x"]}, "attn_implementation": "eager"}
    return [described({**_SMALL, **more}), described({**_SMALL, **vision, "model_type": "llama"}), described({})]


def _config_model_seeds() -> list[bytes]:
    _warm()
    seeds = [
        {**_SMALL, "model_type": kind, "architectures": [name]} for kind, name in {**_FAMILIES, "detr": ""}.items()
    ]
    return [described({**seed, "backbone": "x/y", "num_local_experts": 2, "d_model": 8}) for seed in seeds]


def _warm() -> None:
    """Make transformers import what it needs for a first model, so that this is not watched."""
    from transformers.utils import logging

    from quantize8.formats.gguf.architectures import complete
    from quantize8.sources.structure import read_structure

    logging.set_verbosity_error()
    for kind, name in _FAMILIES.items():
        read_structure({**_SMALL, "model_type": kind, "architectures": [name]}, {})
    complete({**_SMALL, "model_type": "llama", "architectures": ["LlamaForCausalLM"]}, "x")


def _index(data: bytes, folder: Path) -> None:
    from quantize8.sources.safetensors import INDEX_NAME, open_safetensors

    if not (folder / "a.safetensors").is_file():
        for name in ("a", "b"):
            (folder / f"{name}.safetensors").write_bytes(safetensors({f"{name}.weight": ["F32", [2, 2]]}))
        (folder / "link.safetensors").symlink_to("/etc/hostname")
        (folder / "loop.safetensors").symlink_to("loop.safetensors")
    (folder / INDEX_NAME).write_bytes(data[1:])
    checkpoint = open_safetensors(folder, {}, "x")
    for name in checkpoint.tensors if checkpoint else ():
        list(checkpoint.blocks(name))


def _index_seeds() -> list[bytes]:
    files = {"a.weight": "a.safetensors", "b.weight": "b.safetensors"}
    odd = {"x": "link.safetensors", "y": "loop.safetensors", "z": "../a.safetensors"}
    return [
        described({"metadata": {"total_size": 32}, "weight_map": files}),
        described({"weight_map": {**files, **odd}}),
    ]


def _recipe(data: bytes, folder: Path) -> None:
    from quantize8.recipe import load_recipe

    path = folder / "x.toml"
    path.write_bytes(data[1:])
    recipe = load_recipe(str(path))
    recipe.skips("model.layers.0.mlp.up_proj")
    json.dumps(recipe.as_json())


def _recipe_seeds() -> list[bytes]:
    texts = [
        "threshold = 6.0\noutput_head = true\nskip = ['model.layers.*', \"b\"]\n",
        "threshold = 0\n[a.b]\nc = 1e3\n",
    ]
    texts += ["threshold = 0x7f\nd = 1979-05-27T07:32:00Z\ne = [[], {x = '''y'''}]\n[[f]]\n"]
    return [RAW + text.encode() for text in texts]


def mutate_recipe(data: bytes, rng: random.Random) -> bytes:
    """TOML with tokens inserted; otherwise mutated bytes."""
    if rng.random() < 0.5:
        return mutate_bytes(data, rng)
    tokens = (
        b"[",
        b"]",
        b"{",
        b"}",
        b"=",
        b"[[",
        b"'''",
        b'"""',
        b"inf",
        b"nan",
        b"1e999",
        b"9" * 400,
        b"\n",
        b".",
        b"-",
    )
    tokens += (
        b"threshold = ",
        b"skip = ",
        b"output_head = true",
        b"[" * 50,
        b"0000-00-00",
        b"\\u0000",
        b"\\ud800",
        b"x",
    )
    place = rng.randrange(len(data) + 1)
    return data[:place] + rng.choice(tokens) + data[place:]


def _manifest(data: bytes, folder: Path) -> None:
    from quantize8.artifact import manifest

    content = data[1:]
    if data[:1] != RAW:
        value = _parsed(data)
        with contextlib.suppress(ValueError, AttributeError, TypeError, UnicodeError):
            value.pop(manifest._DIGEST, None)
            value[manifest._DIGEST] = manifest._digest_of(value)
            content = json.dumps(value, indent=1, ensure_ascii=False).encode() + b"\n"
    (folder / manifest.MANIFEST_NAME).write_bytes(content)
    found = manifest.read_manifest(folder)
    assert found.to_bytes()
    for record in found.tensors.values():
        assert record.quantized is None or np.isfinite(float(record.quantized.relative_error))
    assert all((folder / name).resolve().is_relative_to(folder.resolve()) for name in [*found.files, *found.headers])


def _manifest_bytes() -> bytes:
    from quantize8.artifact.manifest import Manifest, Quantized, TensorRecord

    quantized = Quantized("F16", "00", 0.01, (0.1, 2.0), 3, [(1, 2, 0.5)])
    record = TensorRecord("model.safetensors", "I8", (2, 4), "00", quantized)
    manifest = Manifest("1", "bitsandbytes", {"id": "x"}, {"name": "r", "threshold": 6.0}, 8, {"a.weight": record})
    manifest.headers, manifest.files = {"model.safetensors": "00"}, {"config.json": "00", "1_Pooling/config.json": "00"}
    manifest.kept = {"lm_head": "output head"}
    return manifest.to_bytes()


def _journal(data: bytes, folder: Path) -> None:
    """A journal of an unfinished conversion, which anybody may have put into a store. Its source is not opened."""
    from quantize8.artifact.manifest import Manifest
    from quantize8.conversion import plan
    from quantize8.destinations import journal, local

    content = data[1:]
    if data[:1] != RAW:
        lines = _parsed(data)
        try:
            content = b"".join(map(journal._line, lines if isinstance(lines, list) else [lines]))
        except (ValueError, TypeError):
            raise SourceError("no description") from None
    heading, entries = journal.parse(content)
    for records in entries.values():
        assert Manifest("1", "bitsandbytes", {"id": "x"}, {}, 8, tensors=records).to_bytes()
    expected = {"decisions": _HEADING["decisions"], "calibration_blake3": ""}
    if not journal.agrees(heading, expected) and (other := local.unlike(heading, expected["decisions"])):
        raise OutputError(other)
    with mock.patch.object(plan, "open_checkpoint", side_effect=_Opened), contextlib.suppress(_Opened):
        plan.recorded_plan(heading, folder)


class _Opened(Exception):
    """Raised instead of opening a source."""


_HEADING = {
    "decisions": {
        "version": "1",
        "source": {"id": "x", "config": "00", "files": {"model.safetensors": [8, 1, "00"]}, "revision": "00"},
        "format": {"scheme": "w8a8"},
        "recipe": {"name": "r", "threshold": 6.0, "output_head": False, "skip": ["a.*"]},
        "scale": "absmax",
        "calibration": {"text_blake3": "00", "tokens": 8, "outlier_columns": "auto", "smooth": None},
        "layout": "00",
    },
    "request": {"source": "x", "threshold": 6.0, "outlier_columns": 4, "calibrate": "text", "smooth": 0.5},
    "calibration_blake3": "",
}


def _journal_seeds() -> list[bytes]:
    tensors = json.loads(_manifest_bytes())["tensors"]
    entries = [{"source": name, "records": {name: record}} for name, record in tensors.items()]
    return [described([_HEADING, *entries]), described([_HEADING]), RAW + b"00 {}\n"]


def _verify(data: bytes, folder: Path) -> None:
    """A manifest with a matching digest, next to files that it may or may not list."""
    from quantize8.commands.verify import verify

    if not (folder / "config.json").is_file():
        (folder / "config.json").write_text("{}")
        (folder / "model.safetensors").write_bytes(safetensors({"a.weight": ["F32", [2, 4]]}))
    from quantize8.artifact import manifest

    value = _parsed(data)
    with contextlib.suppress(Exception):
        _with_digests(value, folder)
        value[manifest._DIGEST] = manifest._digest_of(value)
    (folder / manifest.MANIFEST_NAME).write_bytes(json.dumps(value, indent=1, ensure_ascii=True).encode() + b"\n")
    verify(folder)


def _with_digests(value: dict[str, Any], folder: Path) -> None:
    from quantize8.artifact.manifest import digest

    for name, given in value["files"].items():
        if given == "00":
            value["files"][name] = digest((folder / name).read_bytes())
    for name, given in value["headers"].items():
        if given == "00":
            content = (folder / name).read_bytes()
            value["headers"][name] = digest(content[: 8 + int.from_bytes(content[:8], "little")])
    for record in value["tensors"].values():
        if record["blake3"] == "00":
            record["blake3"] = digest(_pattern(32))


def _verify_seeds() -> list[bytes]:
    value = json.loads(_manifest_bytes())
    del value["files"]["1_Pooling/config.json"], value["manifest_blake3"]
    plain = {**value, "format": "float32", "tensors": {"a.weight": {**value["tensors"]["a.weight"], "dtype": "F32"}}}
    del plain["tensors"]["a.weight"]["quantized"]
    return [described(plain), described(value), described({**plain, "format": "gguf"})]


# --- tensors: safetensors, outlier columns, GGUF, torch ---


@functools.lru_cache(64)
def _pattern(count: int) -> bytes:
    return bytes(i * 37 % 251 for i in range(count))


def safetensors(tensors: dict[str, Any], metadata: Any = None) -> bytes:
    """A file of tensors name -> [dtype, shape] or [dtype, shape, values], with valid offsets."""
    header: dict[str, Any] = {} if metadata is None else {"__metadata__": metadata}
    data = b""
    for name, entry in tensors.items():
        dtype, shape = entry[0], entry[1]
        count = int(np.prod([int(size) for size in shape], dtype=object)) if shape else 1
        nbytes = count * base.DTYPES[dtype].itemsize if dtype in base.DTYPES else 1
        if not 0 <= nbytes <= _LARGEST - len(data):
            raise SourceError("more than the file has")
        values = np.array(entry[2], base.DTYPES[dtype]).tobytes() if len(entry) > 2 else _pattern(nbytes)
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [len(data), len(data) + nbytes]}
        data += values[:nbytes].ljust(nbytes, b"\0")
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


def _tensor_file(data: bytes) -> bytes:
    if data[:1] == RAW:
        return data[1:]
    if data[:1] == b"\2":  # a header as it is, of the right length, and enough data
        return struct.pack("<Q", len(data) - 1) + data[1:] + _pattern(256)
    try:
        value = _parsed(data)
        return safetensors(_get(value, "tensors", dict), value.get("metadata"))
    except (ValueError, TypeError, KeyError, IndexError, AttributeError, OverflowError):
        raise SourceError("no description") from None


def _safetensors(data: bytes, folder: Path) -> None:
    from quantize8.sources.safetensors import SINGLE_NAME, SafetensorsCheckpoint

    (folder / SINGLE_NAME).write_bytes(_tensor_file(data))
    checkpoint = SafetensorsCheckpoint(folder, [SINGLE_NAME], {}, "x")
    for name in checkpoint.tensors:
        assert sum(block.nbytes for block in checkpoint.blocks(name)) == checkpoint.tensors[name].nbytes
    base.main_dtype(checkpoint.tensors.values())


def _safetensors_seeds() -> list[bytes]:
    tensors = {
        "a.weight": ["F32", [2, 4]],
        "b": ["BF16", []],
        "c": ["I8", [0, 4]],
        "d": ["F8_E4M3", [3]],
        "e": ["BOOL", [1]],
    }
    made = described({"tensors": tensors, "metadata": {"format": "pt"}})
    raw = _tensor_file(made)
    return [made, RAW + raw, b"\2" + raw[8 : 8 + int.from_bytes(raw[:8], "little")]]


def _outliers(data: bytes, folder: Path) -> None:
    from quantize8.artifact.outliers import OUTLIERS_NAME, read_outliers

    (folder / OUTLIERS_NAME).write_bytes(_tensor_file(data))
    for found in read_outliers(folder).values():
        assert found.weight.shape[1] <= len(found.columns)


def _outliers_seeds() -> list[bytes]:
    tensors = {"m.outlier_columns": ["I32", [2], [1, 0]], "m.outlier_weight": ["F16", [3, 1], [1.0, 2.0, 3.0]]}
    tensors |= {"m.input_mean_square": ["F32", [4]], "m.input_absmax": ["F32", [4]]}
    made = described({"tensors": tensors})
    return [made, RAW + _tensor_file(made)]


_BASE = {"tensors": {"m.weight": ["F16", [3, 4]], "m.bias": ["F32", [3]], "e.weight": ["BF16", [5, 2]]}}


def _adapter(data: bytes, folder: Path) -> None:
    from quantize8.sources.adapter import merged
    from quantize8.sources.lora import CONFIG_NAME, WEIGHTS_NAME

    settings = {} if data[:1] == RAW else _get(_parsed(data), "config", dict)
    (folder / CONFIG_NAME).write_text(json.dumps(settings or _LORA))
    (folder / WEIGHTS_NAME).write_bytes(_tensor_file(data))
    checkpoint = merged(_Memory(folder, _BASE), str(folder))
    for name, info in checkpoint.tensors.items():
        assert np.concatenate(list(checkpoint.blocks(name, 1))).shape == info.shape
        json.dumps(checkpoint.identity, allow_nan=False)


_LORA = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "alpha_pattern": {"m": 1.5}, "base_model_name_or_path": "a/b"}


def _adapter_seeds() -> list[bytes]:
    m, e = "base_model.model.m", "base_model.model.e"
    pair = {f"{m}.lora_A.weight": ["F32", [2, 4]], f"{m}.lora_B.weight": ["BF16", [3, 2]]}
    more = {f"{m}.lora_magnitude_vector": ["F32", [3]], f"{m}.lora_B.bias": ["F16", [3]]}
    embedding = {f"{e}.lora_embedding_A": ["F32", [2, 5]], f"{e}.lora_embedding_B": ["F32", [2, 2]]}
    replaced = {f"{m}.base_layer.bias": ["F32", [3]], f"{e}.weight": ["F16", [5, 2]]}
    cases = [pair, pair | more, embedding, replaced, pair | embedding | replaced]
    cases = [
        {name: [dtype, shape, [0.5] * math.prod(shape)] for name, (dtype, shape) in case.items()} for case in cases
    ]
    made = [described({"config": _LORA | {"use_rslora": True}, "tensors": tensors}) for tensors in cases]
    return [*made, RAW + _tensor_file(made[0])]


def gguf(value: Any) -> bytes:
    """A GGUF file of {"version", "fields": [[key, type, value]], "tensors": [[name, dims, type, offset]], "counts"}."""
    fields, tensors = _get(value, "fields", list), _get(value, "tensors", list)
    counts = _get(value, "counts", list) or [len(tensors), len(fields)]
    out = io.BytesIO()
    out.write(b"GGUF" + struct.pack("<IQQ", value.get("version", 3), counts[0], counts[1]))
    for key, kind, content in fields:
        out.write(_gguf_string(key) + struct.pack("<I", kind) + _gguf_value(kind, content))
    for name, dimensions, kind, offset in tensors:
        out.write(_gguf_string(name) + struct.pack("<I", len(dimensions)))
        out.write(struct.pack(f"<{len(dimensions)}Q", *dimensions) + struct.pack("<IQ", kind, offset))
    out.write(b"\0" * (-out.tell() % 32))
    return out.getvalue() + _pattern(6144)


def _gguf_string(text: Any) -> bytes:
    content = str(text).encode("utf-8", "surrogatepass")
    return struct.pack("<Q", len(content)) + content


_GGUF_FORMS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "B", 10: "Q", 11: "q", 12: "d"}


def _gguf_value(kind: int, content: Any) -> bytes:
    if kind == 8:
        return _gguf_string(content)
    if kind == 9:  # [type, values] or [type, values, a count that lies]
        inner, values = content[0], content[1]
        count = content[2] if len(content) > 2 else len(values)
        return struct.pack("<IQ", inner, count) + b"".join(_gguf_value(inner, each) for each in values)
    return struct.pack("<" + _GGUF_FORMS.get(kind, "I"), content)


def _gguf(data: bytes, folder: Path) -> None:
    """A file, or, if the description is a list, the parts of a split one, of which the last is opened."""
    from quantize8.formats.gguf.reader import GgufCheckpoint

    try:
        parsed = None if data[:1] == RAW else _parsed(data)
        values = parsed if isinstance(parsed, list) and parsed else [parsed]
        contents = [data[1:]] if data[:1] == RAW else [gguf(value) for value in values[:9]]
    except (struct.error, ValueError, TypeError, KeyError, IndexError, AttributeError, OverflowError):
        raise SourceError("no description") from None
    for path in folder.glob("*.gguf"):
        path.unlink()
    for number, content in enumerate(contents, 1):
        name = f"x-{number:05d}-of-{len(contents):05d}" if len(contents) > 1 else "x"
        path = folder / f"{name}.gguf"
        path.write_bytes(content)
    checkpoint = GgufCheckpoint(path, {}, "x")
    checkpoint.fingerprint()
    for key in checkpoint.header.entries:
        checkpoint.header.value(key)
    for name in checkpoint.tensors:
        for block in checkpoint.blocks(name):
            assert block.dtype == base.DTYPES[checkpoint.dtype]


def _gguf_value_seed() -> dict[str, Any]:
    """A complete Llama of one layer, followed by values that are not part of it."""
    counts = {"block_count": 1, "context_length": 8, "embedding_length": 32, "feed_forward_length": 4}
    counts |= {"attention.head_count": 2, "attention.head_count_kv": 1, "attention.key_length": 2}
    fields = [["general.architecture", 8, "llama"], *([f"llama.{key}", 4, count] for key, count in counts.items())]
    fields += [["llama.attention.layer_norm_rms_epsilon", 6, 1e-5], ["llama.rope.freq_base", 6, 5e5]]
    fields += [["tokenizer.ggml.scores", 9, [6, [0.5, 1.0]]], ["tokenizer.ggml.tokens", 9, [8, ["a", "b"]]]]
    fields += [
        ["llama.rope.scaling.type", 8, "yarn"],
        ["llama.rope.scaling.factor", 6, 2.0],
        ["general.type", 8, "model"],
    ]
    fields += [["general.alignment", 4, 32], ["x", 7, 1], ["y", 10, 5]]
    shapes = {"token_embd": [32, 2], "blk.0.attn_norm": [32], "blk.0.attn_q": [32, 4], "blk.0.attn_k": [32, 2]}
    shapes |= {"blk.0.attn_v": [32, 2], "blk.0.attn_output": [4, 32], "blk.0.ffn_norm": [32], "blk.0.ffn_up": [32, 4]}
    shapes |= {"blk.0.ffn_gate": [32, 4], "blk.0.ffn_down": [4, 32], "output_norm": [32]}
    return {
        "version": 3,
        "fields": fields,
        "tensors": _gguf_tensors({f"{name}.weight": shapes[name] for name in shapes}),
    }


def _gguf_tensors(shapes: dict[str, list[int]]) -> list[list[Any]]:
    """Tensors one after the other: vectors and biases in F32, matrices in Q8_0, or in F16 if their rows are short."""
    tensors: list[list[Any]] = []
    offset = 0
    for name, shape in shapes.items():
        kind, size = (0, 4) if len(shape) == 1 or "bias" in name else (1, 2) if shape[0] % 32 else (8, 34 / 32)
        tensors.append([name, shape, kind, offset])
        offset += -(-int(np.prod(shape) * size) // 32) * 32
    return tensors


def _gguf_experts_seed() -> dict[str, Any]:
    """A complete gpt-oss of one layer with two experts: stacked tensors, and rows of two that alternate."""
    value = _gguf_value_seed()
    fields = [[key.replace("llama", "gpt-oss"), kind, content] for key, kind, content in value["fields"]]
    fields[0] = ["general.architecture", 8, "gpt-oss"]
    counts = {"expert_count": 2, "expert_used_count": 1, "expert_feed_forward_length": 4}
    fields += [[f"gpt-oss.{key}", 4, count] for key, count in (counts | {"attention.sliding_window": 4}).items()]
    shapes = {name: shape for name, shape, _, _ in value["tensors"] if ".ffn_" not in name}
    shapes |= {f"blk.0.attn_{name}.bias": [size] for name, size in (("q", 4), ("k", 2), ("v", 2), ("output", 32))}
    shapes |= {"blk.0.post_attention_norm.weight": [32], "blk.0.attn_sinks.weight": [2], "output.weight": [32, 2]}
    shapes |= {"blk.0.ffn_gate_inp.weight": [32, 2], "blk.0.ffn_gate_inp.bias": [2]}
    for name, columns, rows in (("gate", 32, 4), ("up", 32, 4), ("down", 4, 32)):
        shapes[f"blk.0.ffn_{name}_exps.weight"] = [columns, rows, 2]
        shapes[f"blk.0.ffn_{name}_exps.bias"] = [rows, 2]
    return {**value, "fields": fields, "tensors": _gguf_tensors(shapes)}


def _gguf_gemma_seed() -> dict[str, Any]:
    """A complete Gemma 3 of one layer, in which 1 is added to the weights of norms."""
    value = _gguf_value_seed()
    fields = [[key.replace("llama", "gemma3"), kind, content] for key, kind, content in value["fields"]]
    fields = [field for field in fields if ".scaling." not in field[0]]
    fields[0] = ["general.architecture", 8, "gemma3"]
    fields += [["gemma3.attention.sliding_window", 4, 4], ["gemma3.rope.freq_base_swa", 6, 1e4]]
    shapes = {name: shape for name, shape, _, _ in value["tensors"]}
    shapes |= {"blk.0.post_attention_norm.weight": [32], "blk.0.post_ffw_norm.weight": [32]}
    shapes |= {"blk.0.attn_q_norm.weight": [2], "blk.0.attn_k_norm.weight": [2]}
    return {**value, "fields": fields, "tensors": _gguf_tensors(shapes)}


def _gguf_split_seed() -> list[Any]:
    """The same in two parts."""
    value = _gguf_value_seed()
    parts = [{**value, "tensors": value["tensors"][:5]}, {"version": 3, "tensors": value["tensors"][5:], "fields": []}]
    base = parts[1]["tensors"][0][3]
    parts[1]["tensors"] = [[*tensor[:3], tensor[3] - base] for tensor in parts[1]["tensors"]]
    for number, part in enumerate(parts):
        split = [["split.no", 2, number], ["split.count", 2, 2], ["split.tensors.count", 5, len(value["tensors"])]]
        part["fields"] = [*part["fields"], *split]
    return parts


def _gguf_seeds() -> list[bytes]:
    value = _gguf_value_seed()
    seeds = [described(value), RAW + gguf(value)[:-4600], described({**value, "counts": [4, 8]})]
    return [*seeds, *map(described, (_gguf_split_seed(), _gguf_experts_seed(), _gguf_gemma_seed()))]


def torch_zip(content: bytes) -> bytes:
    """The file that torch.save writes around this pickle: right checksums, two storages of 64 bytes."""
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as archive:
        archive.writestr("x/data.pkl", content)
        archive.writestr("x/byteorder", b"little")
        for key in "01":
            archive.writestr(f"x/data/{key}", _pattern(64))
        archive.writestr("x/version", b"3\n")
    return out.getvalue()


def _torch_file(data: bytes) -> bytes:
    if data[:1] == RAW:
        return data[1:]
    if data[:1] == b"\2":  # before torch 1.6
        from torch.serialization import MAGIC_NUMBER, PROTOCOL_VERSION

        information = {"protocol_version": 1001, "little_endian": True, "type_sizes": {"short": 2, "int": 4, "long": 4}}
        before = b"".join(pickle.dumps(each, 2) for each in (MAGIC_NUMBER, PROTOCOL_VERSION, information))
        return before + data[1:] + pickle.dumps(["0"], 2) + struct.pack("<Q", 16) + _pattern(64)
    return torch_zip(data[1:])


def _torch(data: bytes, folder: Path) -> None:
    from quantize8.sources.torch_bin import SINGLE_NAME, TorchCheckpoint

    if not (folder / "config.json").is_file():
        (folder / "config.json").write_text("{}")
    (folder / SINGLE_NAME).write_bytes(_torch_file(data))
    checkpoint = TorchCheckpoint(folder, [SINGLE_NAME], {}, "x")
    for name in checkpoint.tensors:
        for block in checkpoint.blocks(name):
            assert block.nbytes <= _LARGEST


def _torch_seeds() -> list[bytes]:
    import torch

    state = {"a": torch.arange(6.0).view(2, 3), "b": torch.ones(2, dtype=torch.float16)}
    out = io.BytesIO()
    torch.save(state, out)
    content = zipfile.ZipFile(out).read("archive/data.pkl")
    old = io.BytesIO()
    torch.save({"a": torch.arange(6.0)}, old, _use_new_zipfile_serialization=False)
    old.seek(0)
    for _ in range(3):
        list(pickletools.genops(old))
    start = old.tell()
    list(pickletools.genops(old))
    legacy = old.getvalue()[start : old.tell()]
    return [MADE + content, RAW + torch_zip(content), b"\2" + legacy, RAW + old.getvalue()]


# --- quantized checkpoints, without files ---


class _Memory(base.Checkpoint):
    """Tensors name -> [dtype, shape] or [dtype, shape, values], as a file that holds them would give them."""

    def __init__(self, folder: Path, value: Any) -> None:
        super().__init__(folder, "x", {})
        self._config = {"quantization_config": value.get("entry")} if isinstance(value, dict) else {}
        self._arrays: dict[str, np.ndarray] = {}
        left = _LARGEST
        for name, entry in _get(value, "tensors", dict).items():
            try:
                dtype, shape = base.DTYPES[entry[0]], tuple(entry[1])
                self.tensors[name] = base.TensorInfo(name, entry[0], shape, "x.safetensors")
                left -= self.tensors[name].nbytes
                if left < 0:
                    raise SourceError("more than the file has")
                values = _pattern(self.tensors[name].nbytes)
                if len(entry) > 2:
                    values = np.array(entry[2], dtype).tobytes()[: len(values)].ljust(len(values), b"\0")
            except (TypeError, KeyError, IndexError, ValueError, OverflowError):
                raise SourceError("no description") from None
            self._arrays[name] = np.frombuffer(values, dtype).reshape(shape)

    @property
    def config(self) -> dict[str, Any]:
        return self._config

    def rows(self, name: str, start: int, stop: int) -> np.ndarray:
        values = self._arrays[name]
        return values[start:stop].copy() if values.ndim else values.copy()


def _quantized(data: bytes, folder: Path) -> None:
    from quantize8.sources.quantized import QuantizedCheckpoint, decode

    checkpoint = decode(_Memory(folder, _parsed(data)))
    assert checkpoint.stored_bytes >= 0
    for name, info in checkpoint.tensors.items():
        assert checkpoint.tensors[name].stored_dtype in (*base.DTYPES, *base.FLOAT4)
        for block in checkpoint.blocks(name):
            assert block.shape[1:] == info.shape[1:]
        if isinstance(checkpoint, QuantizedCheckpoint) and checkpoint.tensors[name].is_int8:
            codes, absmax = checkpoint.int8_rows(name, 0, info.shape[0])
            assert codes.dtype == np.int8 and absmax.shape == info.shape[:1]


def _quantized_seeds(*cases: tuple[dict[str, Any], dict[str, Any]]) -> Callable[[], list[bytes]]:
    plain = {"norm.weight": ["F16", [4]]}
    return lambda: [described({"entry": entry, "tensors": {**plain, **tensors}}) for entry, tensors in cases]


_AWQ = _quantized_seeds(
    (
        {"quant_method": "awq", "bits": 4, "group_size": 4, "zero_point": True, "version": "gemm"},
        {"m.qweight": ["I32", [8, 1]], "m.qzeros": ["I32", [2, 1]], "m.scales": ["F16", [2, 8]]},
    ),
    (
        {"quant_method": "awq", "w_bit": 4, "q_group_size": -1, "zero_point": False},
        {"m.qweight": ["I32", [8, 1]], "m.scales": ["F16", [1, 8]]},
    ),
)
_GPTQ = _quantized_seeds(
    (
        {"quant_method": "gptq", "bits": 4, "group_size": 8, "desc_act": True, "sym": False, "dynamic": {"-:x": {}}},
        {
            "m.qweight": ["I32", [2, 8]],
            "m.qzeros": ["I32", [2, 1]],
            "m.scales": ["F16", [2, 8]],
            "m.g_idx": ["I32", [16], [0, 1] * 8],
        },
    ),
    (
        {
            "quant_method": "gptq",
            "bits": 3,
            "group_size": 32,
            "checkpoint_format": "gptq_v2",
            "dynamic": {"x": {"bits": 3}},
        },
        {"m.qweight": ["I32", [3, 32]], "m.qzeros": ["I32", [1, 3]], "m.scales": ["F16", [1, 32]]},
    ),
)
_FP8 = _quantized_seeds(
    (
        {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [2, 3]},
        {"m.weight": ["F8_E4M3", [4, 6]], "m.weight_scale_inv": ["F32", [2, 2]], "m.input_scale": ["F32", []]},
    ),
    ({"quant_method": "fp8"}, {"m.weight": ["F8_E5M2", [4, 6]], "m.weight_scale": ["F8_E8M0", [4, 1]]}),
)
_PACKED = {"weights": {"num_bits": 4, "group_size": 4, "strategy": "group"}, "format": "pack-quantized"}
_COMPRESSED = _quantized_seeds(
    (
        {
            "quant_method": "compressed-tensors",
            "quantization_status": "compressed",
            "sparsity_config": {"format": "dense"},
            "transform_config": {"config_groups": {}},
            "config_groups": {"g": _PACKED},
        },
        {
            "m.weight_packed": ["I32", [4, 1]],
            "m.weight_scale": ["F16", [4, 2]],
            "m.weight_shape": ["I64", [2], [4, 8]],
            "m.weight_zero_point": ["I32", [1, 2]],
            "m.weight_g_idx": ["I32", [8], [0, 1] * 4],
        },
    ),
    (
        {
            "quant_method": "compressed-tensors",
            "config_groups": {"g": {"weights": {"num_bits": 4, "group_size": 16}, "format": "nvfp4-pack-quantized"}},
        },
        {
            "m.weight_packed": ["U8", [2, 16]],
            "m.weight_scale": ["F8_E4M3", [2, 2], [1.0] * 4],
            "m.weight_global_scale": ["F32", [1], [2.0]],
            "n.weight_packed": ["U8", [2, 16]],
            "n.weight_scale": ["U8", [2, 1]],
        },
    ),
    (
        {
            "quant_method": "compressed-tensors",
            "config_groups": {"g": {"weights": {"num_bits": 8, "block_structure": [2, 2]}}},
        },
        {
            "m.weight": ["I8", [4, 8]],
            "m.weight_scale": ["F32", [4, 1]],
            "n.weight": ["F8_E4M3", [2, 2]],
            "n.weight_scale": ["F32", [1]],
        },
    ),
)
_BITSANDBYTES = _quantized_seeds(
    (
        {
            "quant_method": "bitsandbytes",
            "load_in_8bit": True,
            "llm_int8_threshold": 6.0,
            "llm_int8_skip_modules": ["x"],
        },
        {"m.weight": ["I8", [4, 8]], "m.SCB": ["F32", [4]], "m.weight_format": ["U8", []]},
    ),
    ({"load_in_8bit": True}, {"m.weight": ["I8", [2, 0]], "m.SCB": ["F32", [2]]}),
)

_MXFP4 = _quantized_seeds(
    (
        {"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head"]},
        {"m.down_proj_blocks": ["U8", [2, 3, 2, 16]], "m.down_proj_scales": ["U8", [2, 3, 2]]},
    ),
)
_MODELOPT = _quantized_seeds(
    (
        {"quant_method": "modelopt", "quant_algo": "NVFP4", "ignore": ["lm_head"]},
        {
            "m.weight": ["U8", [2, 16]],
            "m.weight_scale": ["F8_E4M3", [2, 2], [1.0] * 4],
            "m.weight_scale_2": ["F32", [], 2.0],
            "m.input_scale": ["F32", []],
        },
    ),
    (
        {"quant_method": "modelopt", "quantization": {"quant_algo": "FP8"}},
        {"m.weight": ["F8_E4M3", [4, 6]], "m.weight_scale": ["F32", []]},
    ),
)


# --- tokenizers ---


def _tokenizer(data: bytes, folder: Path) -> None:
    """tokenizer.json and the settings for it in config.json, without transformers' search for files."""
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

    from quantize8.formats.gguf import tokenizer as gguf_tokenizer
    from quantize8.sources.tokenizer import check_tokenizer

    value = _parsed(data)
    config = _get(value, "config", dict)
    special = {f"{kind}_token": f"<{kind}>" for kind in ("bos", "eos", "unk") if kind in _get(value, "special", list)}
    (folder / "tokenizer.json").write_text(json.dumps(_get(value, "tokenizer", dict)))
    check_tokenizer(folder)
    try:
        tokenizer = Tokenizer.from_str((folder / "tokenizer.json").read_text())
        fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, chat_template=value.get("template"), **special)
    except BaseException as error:  # the package's own; a panic of its Rust code is no Exception
        raise SourceError(f"not a tokenizer ({type(error).__name__})") from None
    for field in gguf_tokenizer.fields_of(fast, config, folder):
        assert field.key


def _tokenizer_seeds() -> list[bytes]:
    _warm()
    vocabulary = {"<unk>": 0, "<s>": 1, "▁": 2, "a": 3, "b": 4, "ab": 5, "<0x61>": 6}
    model = {"type": "BPE", "vocab": vocabulary, "merges": [["a", "b"]], "unk_token": "<unk>", "byte_fallback": True}
    tokenizer = {
        "version": "1.0",
        "added_tokens": [],
        "model": model,
        "normalizer": {"type": "Prepend", "prepend": "▁"},
    }
    plain = {**tokenizer, "model": {**model, "byte_fallback": False}, "decoder": _BYTES, "pre_tokenizer": _BYTES}
    plain["normalizer"] = None
    config = {**_SMALL, "model_type": "llama", "architectures": ["LlamaForCausalLM"]}
    return [
        described({"tokenizer": each, "config": config, "special": ["unk"], "template": "{{ x }}"})
        for each in (tokenizer, plain)
    ]


_BYTES = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}


# --- the table ---

_json = functools.partial(Reader, mutate=mutate_json)

READERS: dict[str, Reader] = {
    "safetensors": _json(_safetensors, _safetensors_seeds),
    "index": _json(_index, _index_seeds),
    "adapter": _json(_adapter, _adapter_seeds),
    "gguf": _json(_gguf, _gguf_seeds),
    "torch": Reader(_torch, _torch_seeds, mutate_pickle),
    "config": _json(_config, _config_seeds),
    "config-model": _json(_config_model, _config_model_seeds),
    "tokenizer": _json(_tokenizer, _tokenizer_seeds),
    "recipe": Reader(_recipe, _recipe_seeds, mutate_recipe),
    "manifest": _json(_manifest, lambda: [MADE + _manifest_bytes(), RAW + _manifest_bytes()]),
    "journal": _json(_journal, _journal_seeds),
    "verify": _json(_verify, _verify_seeds),
    "outliers": _json(_outliers, _outliers_seeds),
    "awq": _json(_quantized, _AWQ),
    "gptq": _json(_quantized, _GPTQ),
    "fp8": _json(_quantized, _FP8),
    "compressed-tensors": _json(_quantized, _COMPRESSED),
    "bitsandbytes": _json(_quantized, _BITSANDBYTES),
    "mxfp4": _json(_quantized, _MXFP4),
    "modelopt": _json(_quantized, _MODELOPT),
}


def kept(name: str) -> list[Path]:
    """The saved inputs for a reader: findings, and a few that reach deep into the code."""
    return sorted((CORPUS / name).glob("*"))
