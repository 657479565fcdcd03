"""A guard around transformers while it reads a model's small files: no requests to the hub, no panics of Rust code."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from threading import Lock

_LOCK = Lock()
_inside = 0  # blocks that are entered, in all threads
_before = False  # huggingface_hub's setting outside of the blocks


@contextmanager
def guarded() -> Iterator[None]:
    """Set huggingface_hub to offline mode within the block.

    Without it, transformers would fetch models that a config.json names.

    Raises:
        RuntimeError: Rust code panicked. Its own exception is not derived from Exception.
    """
    from huggingface_hub import constants

    global _inside, _before
    with _LOCK:
        if _inside == 0:
            _before = constants.HF_HUB_OFFLINE
            constants.HF_HUB_OFFLINE = True
        _inside += 1
    try:
        yield
    except BaseException as error:
        if type(error).__name__ != "PanicException":
            raise
        raise RuntimeError(str(error)) from None
    finally:
        with _LOCK:
            _inside -= 1
            if _inside == 0:
                constants.HF_HUB_OFFLINE = _before
