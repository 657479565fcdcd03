"""Artifacts on disk: their digests, and whether anything opens one."""

import hashlib
from pathlib import Path

from quantize8 import ArtifactError, Quantize8Error, run, verify
from quantize8.sources import open_checkpoint


def digests(folder: Path) -> dict[str, str]:
    """SHA-256 of each file."""
    files = (path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def opens(folder: Path) -> bool:
    """Whether any loader accepts a folder as a model: transformers, verify, run, or our reader of checkpoints."""
    from transformers import AutoModelForCausalLM

    calls = (
        (lambda: AutoModelForCausalLM.from_pretrained(folder, local_files_only=True), (OSError, ValueError)),
        (lambda: verify(folder), ArtifactError),
        (lambda: run(str(folder), "a", max_new_tokens=1), Quantize8Error),
        (lambda: open_checkpoint(str(folder)), Quantize8Error),
    )
    for call, refusals in calls:
        try:
            call()
        except refusals:
            continue
        return True
    return False


def check_same_logits(artifact, plain, ids):
    """Assert that transformers opens both folders completely, and computes the same logits for ids [1, T] with both."""
    import torch
    from transformers import AutoModelForCausalLM

    expected = AutoModelForCausalLM.from_pretrained(plain).eval()
    opened, notes = AutoModelForCausalLM.from_pretrained(artifact, output_loading_info=True)
    assert not any(notes[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys")), notes
    with torch.inference_mode():
        assert torch.equal(opened.eval()(ids).logits, expected(ids).logits)
