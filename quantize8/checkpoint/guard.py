"""Around what transformers makes of a model's small files: no request to the hub, and nothing but exceptions."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from threading import Lock

_LOCK = Lock()
_inside = 0  # blocks entered, of all threads
_before = False


@contextmanager
def guarded() -> Iterator[None]:
    """Offline mode of huggingface_hub within the block: a config.json may name models that transformers would fetch.

    A panic of Rust code, which is no Exception, becomes a RuntimeError.
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
