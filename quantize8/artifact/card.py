"""The model card of an artifact on the hub: its source, how it was converted, the error, and how to open it.

Every value comes from the manifest or the files. The card itself is not part of the artifact, and `verify` ignores it.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from quantize8.artifact.manifest import Manifest
from quantize8.artifact.outliers import OUTLIERS_NAME
from quantize8.formats.base import Format, make_format
from quantize8.kernels import GPTQ
from quantize8.sources.base import CONFIG_NAME

CARD_NAME = "README.md"
_MB = 1e6
_TRANSFORMERS = """With transformers (`pip install {packages}`):

```python
from transformers import {auto}

model = {auto}.from_pretrained("{repo}")
```
"""
_VLLM = """With vLLM (`pip install vllm`):

```sh
vllm serve {repo}
```
"""
_LLAMA_CPP = """With llama.cpp:

```sh
hf download {repo} {file} --local-dir .
llama-cli -m {file}
```
"""
_QUANTIZE8 = """With quantize8:

```sh
quantize8 run {repo} --prompt "The capital of France is"
```
"""
_HOW_TO_OPEN = {"transformers": _TRANSFORMERS, "vllm": _VLLM, "llama.cpp": _LLAMA_CPP, "quantize8": _QUANTIZE8}
_CARD = """# {title}

{source}{adapter}, converted by [quantize8](https://pypi.org/project/quantize8/) {version}.

| | |
|---|---|
{rows}

{error_note}## How to open it

{loaders}
`quantize8 verify FOLDER` checks every byte of a downloaded copy against `quantize8.json`.
"""
_ERROR_NOTE = """The relative error of a weight w is the Frobenius norm of (w - dequantized) divided by that of w. It
measures how close the weights are, not how good the answers of the model are.

"""


def card(folder: Path, manifest: Manifest, repo_id: str, license: str | None) -> str:
    """Write the text of README.md for an artifact.

    Args:
        folder: The folder of the artifact.
        manifest: Its manifest.
        repo_id: The model repository that it is uploaded to.
        license: License of the source. None if it is not known.
    """
    from huggingface_hub import ModelCardData

    output = make_format(manifest.format)
    causal = _architecture(folder).endswith("ForCausalLM") or not output.is_folder
    from_hub = "revision" in manifest.source
    quantized = any(record.quantized for record in manifest.tensors.values())
    data = ModelCardData(
        base_model=manifest.source["id"] if from_hub else None,
        base_model_relation="quantized" if from_hub and quantized else None,
        license=license,
        library_name="transformers" if output.is_folder else None,
        pipeline_tag="text-generation" if causal else None,
        tags=["quantize8", *(["int8", "8-bit"] if quantized else []), manifest.format],
    )
    rows = "\n".join(f"| {name} | {_cell(value)} |" for name, value in _rows(folder, manifest).items())
    text = _CARD.format(
        title=repo_id.rpartition("/")[2],
        source=_source(manifest, link=True),
        adapter=f" with the adapter {manifest.source['adapter']} merged" if "adapter" in manifest.source else "",
        version=manifest.version,
        rows=rows,
        error_note=_ERROR_NOTE if quantized else "",
        loaders="\n".join(_loaders(manifest, output, repo_id, causal)),
    )
    return f"---\n{data.to_yaml()}\n---\n\n{text}"


def _rows(folder: Path, manifest: Manifest) -> dict[str, str]:
    """The rows of the table, by name."""
    errors = {name: record.quantized.relative_error for name, record in manifest.tensors.items() if record.quantized}
    size = sum((folder / name).stat().st_size for name in manifest.headers)
    rows = {"source": _source(manifest), **_adapter(manifest), "format": manifest.format}
    if scheme := _scheme(folder):
        rows["scheme"] = scheme
    if errors:
        rows["recipe"] = f"{manifest.recipe['name']}, threshold {manifest.recipe['threshold']:g}"
        rows["calibration"] = _calibration(manifest.calibration, OUTLIERS_NAME in manifest.headers)
        chosen = sum(record.quantized.rounding == GPTQ for record in manifest.tensors.values() if record.quantized)
        if chosen:
            rows["rounding"] = f"{GPTQ} for {chosen} of {len(errors)} weights"
        rows["int8"] = f"{len(errors)} weights; {len(manifest.kept)} left in floating point"
    rows["weights on disk"] = f"{manifest.source_bytes / _MB:,.1f} MB -> {size / _MB:,.1f} MB"
    if errors:
        worst = max(errors, key=lambda name: errors[name])
        mean = sum(errors.values()) / len(errors)
        rows["relative error"] = f"{mean:.4f} mean, {errors[worst]:.4f} maximum, in {worst}"
    return rows


def _source(manifest: Manifest, link: bool = False) -> str:
    name, revision = manifest.source["id"], manifest.source.get("revision")
    if revision is None:
        return name
    return f"[{name}](https://huggingface.co/{name}/tree/{revision})" if link else f"{name} at {revision}"


def _adapter(manifest: Manifest) -> dict[str, str]:
    """The row about the adapter, if one was merged into the source."""
    source = manifest.source
    if "adapter" not in source:
        return {}
    return {"adapter": f"{source['adapter']}, merged; its weights have the BLAKE3 {source['adapter_blake3']}"}


def _calibration(asked: dict[str, Any], has_columns: bool) -> str:
    if not asked:
        return "none"
    smooth = "" if asked["smooth"] is None else f", smoothed with alpha {asked['smooth']:g}"
    text = f"{asked.get('rounding_tokens', asked['tokens'])} tokens of a text with BLAKE3 {asked['text_blake3']}"
    columns = f"; outlier columns: {asked['outlier_columns']}" if has_columns and asked["outlier_columns"] != 0 else ""
    return f"{text}{columns}{smooth}"


def _loaders(manifest: Manifest, output: Format, repo_id: str, causal: bool) -> list[str]:
    """How to open the artifact in each loader of its format; quantize8 runs causal language models alone."""
    names = [name for name in output.loaders if name not in manifest.closed_to and (causal or name != "quantize8")]
    facts = {
        "repo": repo_id,
        "file": next(iter(manifest.headers), ""),
        "packages": f"transformers accelerate {output.package}".strip(),
        "auto": "AutoModelForCausalLM" if causal else "AutoModel",
    }
    return [_HOW_TO_OPEN[name].format(**facts) for name in names]


def _config(folder: Path) -> dict[str, Any]:
    path = folder / CONFIG_NAME
    return dict(json.loads(path.read_bytes())) if path.is_file() else {}


def _architecture(folder: Path) -> str:
    return str((_config(folder).get("architectures") or [""])[0])


def _scheme(folder: Path) -> str:
    """The scheme of compressed-tensors, as its loaders name it; empty for other formats."""
    return str((_config(folder).get("quantization_config") or {}).get("format", ""))


def _cell(text: str) -> str:
    """A text that can be put into a cell of a Markdown table."""
    return " ".join(text.replace("|", "\\|").split())
