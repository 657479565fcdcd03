"""Checks from its opcodes what the pickle of a .bin file would do, without executing it.

torch's weights_only runs no foreign code, but a pickle can still make it allocate unlimited memory, or hash tuples that
are nested a hundred levels deep. A dictionary of tensors needs neither.
"""

from __future__ import annotations

import pickle
import pickletools
import re
from collections.abc import Callable
from enum import Enum, auto
from mmap import mmap
from typing import IO, Any

from quantize8 import limits

_CONTAINERS = {"collections OrderedDict"}
_TENSORS = {
    "torch._utils _rebuild_tensor",
    "torch._utils _rebuild_tensor_v2",
    "torch._utils _rebuild_tensor_v3",
    "torch._utils _rebuild_parameter",
}
_STORAGES = re.compile(r"torch(\.cuda|\.storage)? \w+Storage")
_DTYPES = re.compile(r"torch (u?int|b?float|complex|bool)\w*")
_PLAIN = {"BININT", "BININT1", "BININT2", "BINFLOAT", "BINUNICODE", "SHORT_BINSTRING", "LONG1"}
_CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False}


class _Kind(Enum):
    """What the stack holds in place of a value that is not a plain one."""

    MARK = auto()
    STORAGE_TYPE = auto()
    MAKES_CONTAINER = auto()
    MAKES_TENSOR = auto()
    CONTAINER = auto()
    OTHER = auto()


_RESULTS = {_Kind.MAKES_CONTAINER: _Kind.CONTAINER, _Kind.MAKES_TENSOR: _Kind.OTHER}


def check_pickle(file: IO[bytes] | mmap, size: int) -> None:
    """Read one pickle, and leave the file's position after it.

    Args:
        file: The file.
        size: Its size in bytes.

    Raises:
        pickle.UnpicklingError: The pickle holds more than tensors in dictionaries and lists.
        ValueError: The pickle is damaged, or its storages have more bytes than the file.
    """
    state = _State()
    try:
        for opcode, argument, position in pickletools.genops(file):  # type: ignore[arg-type]
            if position is not None and position > limits.PICKLE_BYTES:
                raise pickle.UnpicklingError("too long")
            state.step(opcode.name, argument)
    except (IndexError, KeyError, TypeError, StopIteration) as error:
        raise ValueError(f"damaged pickle: {error}") from None
    if sum(state.storages.values()) > size:
        raise ValueError("its storages are larger than the file")


class _State:
    """The state of a pickle's virtual machine, with kinds of values instead of values."""

    def __init__(self) -> None:
        self.storages: dict[str, int] = {}  # number of elements by key
        self.stack: list[Any] = []
        self.memo: dict[int, Any] = {}
        self.steps: dict[str, Callable[[], None]] = {
            "EMPTY_TUPLE": lambda: self.stack.append(()),
            "MARK": lambda: self.stack.append(_Kind.MARK),
            "TUPLE": lambda: self._tuple(self._to_mark()),
            "TUPLE1": lambda: self._tuple(self._pop(1)),
            "TUPLE2": lambda: self._tuple(self._pop(2)),
            "TUPLE3": lambda: self._tuple(self._pop(3)),
            "APPEND": lambda: self._put(self._pop(1), keyed=False),
            "APPENDS": lambda: self._put(self._to_mark(), keyed=False),
            "SETITEM": lambda: self._put(self._pop(2), keyed=True),
            "SETITEMS": lambda: self._put(self._to_mark(), keyed=True),
            "BUILD": lambda: self._put(self._pop(1), keyed=False),
            "REDUCE": self._call,
            "BINPERSID": self._storage,
        }
        for name in ("EMPTY_LIST", "EMPTY_DICT"):
            self.steps[name] = lambda: self.stack.append(_Kind.CONTAINER)

    def step(self, name: str, argument: Any) -> None:
        """Apply an opcode to the stack, with kinds instead of the values that it would create."""
        if name in self.steps:
            self.steps[name]()
        elif name in _PLAIN:
            self.stack.append(argument)
        elif name in _CONSTANTS:
            self.stack.append(_CONSTANTS[name])
        elif name in ("BINPUT", "LONG_BINPUT"):
            self.memo[argument] = self.stack[-1]
        elif name in ("BINGET", "LONG_BINGET"):
            self.stack.append(self.memo[argument])
        elif name == "GLOBAL":
            self.stack.append(_named(argument))
        elif name not in ("PROTO", "STOP"):
            raise pickle.UnpicklingError(name)

    def _pop(self, count: int) -> list[Any]:
        if len(self.stack) < count:
            raise IndexError("empty stack")
        items = self.stack[-count:]
        del self.stack[-count:]
        return items

    def _to_mark(self) -> list[Any]:
        mark = next(i for i in range(len(self.stack) - 1, -1, -1) if self.stack[i] is _Kind.MARK)
        items = self.stack[mark + 1 :]
        del self.stack[mark:]
        return items

    def _tuple(self, items: list[Any]) -> None:
        self.stack.append(tuple(_Kind.OTHER if isinstance(item, tuple) else item for item in items))

    def _put(self, items: list[Any], keyed: bool) -> None:
        """Put items into the list, dictionary or object on top of the stack; the keys of a dictionary must be plain."""
        if keyed and any(isinstance(key, tuple | _Kind) for key in items[::2]):
            raise pickle.UnpicklingError("a key that is not a name")
        if self.stack[-1] is not _Kind.CONTAINER:
            raise pickle.UnpicklingError("an item outside a container")

    def _call(self) -> None:
        function, _ = self._pop(2)
        if function not in _RESULTS:
            raise pickle.UnpicklingError("a call of something else than a function")
        self.stack.append(_RESULTS[function])

    def _storage(self) -> None:
        """Record a storage: ("storage", type, key, location, elements, ...)."""
        (key,) = self._pop(1)
        if isinstance(key, tuple):
            _, kind, name, _, count = key[:5]
            self.storages[str(name)] = int(count)
            if kind is not _Kind.STORAGE_TYPE or int(count) < 0:
                raise ValueError("a storage that is not valid")
        self.stack.append(_Kind.OTHER)


def _named(name: str) -> _Kind:
    if name in _CONTAINERS:
        return _Kind.MAKES_CONTAINER
    if name in _TENSORS:
        return _Kind.MAKES_TENSOR
    if _STORAGES.fullmatch(name):
        return _Kind.STORAGE_TYPE
    if _DTYPES.fullmatch(name):
        return _Kind.OTHER
    raise pickle.UnpicklingError(name)
