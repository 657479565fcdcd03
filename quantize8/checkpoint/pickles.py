"""What the pickle of a .bin file would do, told from its opcodes without doing it.

torch's weights_only lets no foreign code run, but a pickle may still ask it for memory without end, or for a hash of
tuples that are nested into each other a hundred times. A dictionary of tensors needs neither.
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
    """What stands on the stack for a value that is no plain one."""

    MARK = auto()
    STORAGE_TYPE = auto()
    MAKES_CONTAINER = auto()
    MAKES_TENSOR = auto()
    CONTAINER = auto()
    OTHER = auto()


_RESULTS = {_Kind.MAKES_CONTAINER: _Kind.CONTAINER, _Kind.MAKES_TENSOR: _Kind.OTHER}


def check_pickle(file: IO[bytes] | mmap, size: int) -> None:
    """Read one pickle from a file of `size` bytes, and stop behind it.

    Raises pickle.UnpicklingError where it is more than tensors in dictionaries and lists, ValueError where it is broken
    or a storage has more bytes than the file.
    """
    state = _State()
    try:
        for opcode, argument, place in pickletools.genops(file):  # type: ignore[arg-type]
            if place is not None and place > limits.PICKLE_BYTES:
                raise pickle.UnpicklingError("too long")
            state.step(opcode.name, argument)
    except (IndexError, KeyError, TypeError, StopIteration) as error:
        raise ValueError(f"broken pickle: {error}") from None
    if sum(state.storages.values()) > size:
        raise ValueError("its storages are larger than the file")


class _State:
    def __init__(self) -> None:
        self.storages: dict[str, int] = {}  # elements of each, by its key
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
        """Do to the stack what an opcode does, with names for what it would make."""
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
        place = next(i for i in range(len(self.stack) - 1, -1, -1) if self.stack[i] is _Kind.MARK)
        items = self.stack[place + 1 :]
        del self.stack[place:]
        return items

    def _tuple(self, items: list[Any]) -> None:
        self.stack.append(tuple(_Kind.OTHER if isinstance(item, tuple) else item for item in items))

    def _put(self, items: list[Any], keyed: bool) -> None:
        """Into the list, dictionary or object on the stack; what a dictionary hashes must be plain."""
        if keyed and any(isinstance(key, tuple | _Kind) for key in items[::2]):
            raise pickle.UnpicklingError("a key that is no name")
        if self.stack[-1] is not _Kind.CONTAINER:
            raise pickle.UnpicklingError("an item of no container")

    def _call(self) -> None:
        function, _ = self._pop(2)
        if function not in _RESULTS:
            raise pickle.UnpicklingError("a call of no function")
        self.stack.append(_RESULTS[function])

    def _storage(self) -> None:
        """A storage: ("storage", type, key, place, elements, ...)."""
        (key,) = self._pop(1)
        if isinstance(key, tuple):
            _, kind, name, _, count = key[:5]
            self.storages[str(name)] = int(count)
            if kind is not _Kind.STORAGE_TYPE or int(count) < 0:
                raise ValueError("a storage that cannot be")
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
