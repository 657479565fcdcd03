"""Single flipped bits in artifacts of three formats. `verify` must find each of them."""

import random
import shutil
import tempfile
from collections import Counter
from pathlib import Path

from helpers.gguf_files import config_of, folder_of
from helpers.making import llama, word_tokenizer

from quantize8 import ArtifactError, convert, verify

FORMATS = {"bitsandbytes": 0.6, "compressed-tensors": 0.2, "gguf": 0.2}  # and the share of the flips that each gets


def artifacts(folder: Path) -> dict[str, Path]:
    """A tiny artifact of each format; the first is calibrated, in several files, with files beside the weights."""
    source = word_tokenizer(llama(folder / "source", layers=1))
    for name in ("LICENSE", "model_code.py", "chat_template.jinja", "1_Pooling/config.json"):
        (source / name).parent.mkdir(exist_ok=True)
        (source / name).write_text("{}\n")
    (folder / "text").write_text(" ".join(f"w{i * 7 % 63}" for i in range(100)))
    options = {"max_shard_size": "10KB", "calibrate": folder / "text", "outlier_columns": 4}
    convert(str(source), folder / "bitsandbytes", **options)
    convert(str(source), folder / "compressed-tensors", format="compressed-tensors")
    source = folder_of(folder / "gguf-source", config_of("llama", num_hidden_layers=1))
    for path in (source / "tokenizer").iterdir():
        path.rename(source / path.name)
    (source / "tokenizer").rmdir()
    convert(str(source), folder / "gguf", format="gguf")
    return {name: folder / name for name in FORMATS}


def flip(artifact: Path, count: int, seed: int = 0) -> Counter[tuple[str, bool]]:
    """Flip `count` random bits, one after another, in every file in turn: (file, whether it was found) -> how often."""
    rng, found = random.Random(seed), Counter()
    files = sorted(path for path in artifact.rglob("*") if path.is_file())
    for trial in range(count):
        path = files[trial % len(files)]
        whole = path.read_bytes()
        place = rng.randrange(len(whole))
        with path.open("r+b") as file:
            file.seek(place)
            file.write(bytes([whole[place] ^ 1 << rng.randrange(8)]))
        try:
            verify(artifact)
            found[path.name, False] += 1
        except ArtifactError:
            found[path.name, True] += 1
        path.write_bytes(whole)
    verify(artifact)
    return found


def flip_all(count: int) -> str:
    """Flip so many bits in artifacts made for this, and print how many flips were found."""
    place = Path(tempfile.mkdtemp(prefix="flips-"))
    found: Counter[tuple[str, bool]] = Counter()
    for name, artifact in artifacts(place).items():
        found += flip(artifact, round(FORMATS[name] * count), seed=count)
    shutil.rmtree(place)
    missed = sorted(name for name, good in found if not good)
    good = sum(number for (_, good), number in found.items() if good)
    files = len({name for name, _ in found})
    return f"{good} of {sum(found.values())} found, in {files} files; missed in {missed}"
