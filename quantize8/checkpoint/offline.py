"""No request to the hub while transformers works on a folder: it would fetch what a config.json names there."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from threading import Lock

_LOCK = Lock()
_inside = 0  # blocks entered, of all threads
_before = False


@contextmanager
def no_network() -> Iterator[None]:
    """Offline mode of huggingface_hub within the block, which all requests of it and of transformers obey."""
    from huggingface_hub import constants

    global _inside, _before
    with _LOCK:
        if _inside == 0:
            _before = constants.HF_HUB_OFFLINE
            constants.HF_HUB_OFFLINE = True
        _inside += 1
    try:
        yield
    finally:
        with _LOCK:
            _inside -= 1
            if _inside == 0:
                constants.HF_HUB_OFFLINE = _before
