"""Linear layers whose weight the code of a model reads itself, instead of calling the layer.

Such code would take int8 codes for weights, or does not find the weight where codes are packed. There are two places:
the methods that compute, whose source is searched for `self.layer.weight`, and the initialization of weights, which
transformers also runs after loading, and which is tried on a model without storage.
"""

from __future__ import annotations

import ast
import contextlib
import inspect
import operator
import re
import textwrap
from collections.abc import Callable, Iterator
from fnmatch import fnmatchcase
from functools import cache
from typing import Any, NamedTuple

_DESCRIBE = ("device", "is_cuda", "is_meta", "ndim", "requires_grad", "shape", "size", "dim", "numel")  # no values
_FIRST = re.compile(r"next\(self\.[\w.]+\.parameters\(\)\)")
_ANY = "*"  # an element of a list of layers
_UNKNOWN = object()


def read_by_code(model: Any) -> set[str]:
    """Linear modules whose weight the methods that compute read: to multiply by it, or to cast to its dtype.

    Searched are `forward` and all methods that it may call. Branches for settings that the model does not have, and for
    a weight that is known to be int8, are left out. Branches for training are searched, because adapters are trained on
    int8 weights: there, Mamba 2's fused kernel reads `out_proj.weight`.

    Args:
        model: A transformers model.

    Returns:
        The names of the modules.
    """
    from torch import nn

    modules = dict(model.named_modules())
    methods = {kind: _methods(kind) for kind in {type(module) for module in modules.values()}}
    called, seen = {"forward"}, set[str]()
    while fresh := called - seen:
        seen |= fresh
        reached = [own[name] for own in methods.values() for name in fresh if name in own]
        called |= {name for method in reached for name in _source(method).names}
    found: set[str] = set()
    for name, module in modules.items():
        reader = _Reader(module)
        for key, method in methods[type(module)].items():
            source = _source(method)
            if (source.reads and key in called) or source.counts:
                reader.visit(source.tree)
        for pattern in (f"{name}.{path}".lstrip(".") for path in reader.found):
            found |= {each for each in modules if each == pattern or (_ANY in pattern and fnmatchcase(each, pattern))}
    return {name for name in found if isinstance(modules[name], nn.Linear)}


def read_on_loading(model: Any) -> set[str]:
    """Linear modules whose weight the initialization of a module reads, so that it fails if they have none.

    After loading, transformers runs `_init_weights` on every module with a parameter that it does not find in the
    checkpoint by its name; the layers of packed codes are such modules. It relies on loaded tensors not being changed.
    This function runs `_init_weights`, of the model that a module belongs to, for one module of each type, while the
    layers within it have no weight.

    Args:
        model: A transformers model on the meta device.

    Returns:
        The names of the modules.
    """
    result: set[str] = set()
    readers: dict[tuple[type, type], set[str]] = {}
    for name, module, owner in _with_owners(model, "", model):
        kind = type(owner), type(module)
        if kind not in readers:
            readers[kind] = _read_by_initialization(owner, module)
        result |= {f"{name}.{path}".strip(".") for path in readers[kind]}
    return result


def _with_owners(module: Any, name: str, owner: Any) -> Iterator[tuple[str, Any, Any]]:
    """Every module with its name and the innermost model that contains it, whose initialization it gets."""
    from transformers import PreTrainedModel

    owner = module if isinstance(module, PreTrainedModel) else owner
    yield name, module, owner
    for key, child in module.named_children():
        yield from _with_owners(child, f"{name}.{key}".lstrip("."), owner)


def _read_by_initialization(owner: Any, module: Any) -> set[str]:
    """The layers, by their path in a module, without whose weight the initialization of the module fails."""
    from torch import nn

    read: list[str] = []
    found: set[str] = set()
    layers = {path: layer for path, layer in module.named_modules() if type(layer) is nn.Linear}
    for _ in range(len(layers) + 1):
        weights = {path: layer._parameters.pop("weight") for path, layer in layers.items() if path not in found}
        read.clear()
        try:
            for path in weights:
                _watch(layers[path], path, read)
            with contextlib.suppress(Exception):  # of which only a missing weight matters
                owner._init_weights(module)
                read.clear()  # what was read was not needed
        finally:
            for path, weight in weights.items():
                layers[path].__class__ = nn.Linear
                layers[path]._parameters = {"weight": weight, **layers[path]._parameters}
        if not read:
            break
        found.add(read[-1])
    return found


def _watch(layer: Any, path: str, read: list[str]) -> None:
    """Record in `read` when the weight of a layer without one is asked for, until its class is restored."""
    from torch import nn

    def missing(self: Any, name: str) -> Any:
        if name == "weight":
            read.append(path)
        return nn.Module.__getattr__(self, name)

    layer.__class__ = type("Linear", (nn.Linear,), {"__getattr__": missing})


_COMPARISONS: dict[type, Callable[[Any, Any], Any]] = {
    ast.Gt: operator.gt,
    ast.Lt: operator.lt,
    ast.Eq: operator.eq,
    ast.NotEq: operator.ne,
    ast.Is: operator.is_,
    ast.IsNot: operator.is_not,
}


class _Source(NamedTuple):
    """The source of a method."""

    tree: ast.AST
    names: frozenset[str]  # all names of attributes and functions in it
    reads: bool  # whether it may read a weight
    counts: bool  # whether it asks for the first parameter of a module, which `_init_weights` may call, too


@cache
def _source(method: Any) -> _Source:
    try:
        text = textwrap.dedent(inspect.getsource(inspect.unwrap(method)))
        tree: ast.AST = ast.parse(text)
    except (OSError, SyntaxError, TypeError):  # without source, as in an interactive session
        return _Source(ast.Module([], []), frozenset(), False, False)
    attributes = {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
    return _Source(tree, frozenset(attributes), ".weight" in text, _FIRST.search(text) is not None)


def _methods(kind: type) -> dict[str, Any]:
    """The methods of a module's class by name, without those of torch itself."""
    from torch import nn

    found: dict[str, Any] = {}
    for base in reversed(kind.__mro__):
        if issubclass(base, nn.Module) and not base.__module__.startswith("torch."):
            found |= {name: value for name, value in vars(base).items() if inspect.isfunction(value)}
    return {name: value for name, value in found.items() if name not in ("__init__", "_init_weights")}


class _Reader(ast.NodeVisitor):
    """Finds what a module's methods read as `.weight` of modules within it; follows local names.

    Attributes:
        found: The paths of those modules from the module, such as `layers.*.fc1`.
    """

    def __init__(self, module: Any) -> None:
        self.module = module
        self.found: set[str] = set()
        self.known: dict[str, str] = {}  # local name -> its path

    def visit_If(self, node: ast.If) -> None:
        """Leave out branches that are not taken, and those that a test for int8 guards."""
        if "int8" in ast.dump(node.test):
            return
        value = self.value(node.test)
        branches = [*node.body, *node.orelse] if value is _UNKNOWN else node.body if value else node.orelse
        for statement in (node.test, *branches):
            self.visit(statement)

    def value(self, node: ast.AST) -> Any:
        """The value of a test of settings, or _UNKNOWN."""
        if isinstance(node, ast.Constant):
            return node.value
        if isinstance(node, ast.Attribute):
            value = self._attribute(node)
            return value if isinstance(value, bool | int | float | str | None) else _UNKNOWN
        if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not):
            value = self.value(node.operand)
            return value if value is _UNKNOWN else not value
        if isinstance(node, ast.BoolOp):
            deciding = isinstance(node.op, ast.Or)  # True decides `or`, False decides `and`
            values = [self.value(each) for each in node.values]
            if any(value is not _UNKNOWN and bool(value) is deciding for value in values):
                return deciding
            return _UNKNOWN if any(value is _UNKNOWN for value in values) else not deciding
        if isinstance(node, ast.Compare) and len(node.ops) == 1 and type(node.ops[0]) in _COMPARISONS:
            left, right = self.value(node.left), self.value(node.comparators[0])
            with contextlib.suppress(TypeError):  # such as None > 1, which the code does not get to
                return _UNKNOWN if _UNKNOWN in (left, right) else _COMPARISONS[type(node.ops[0])](left, right)
        return _UNKNOWN

    def _attribute(self, node: ast.AST) -> Any:
        """The value of an expression such as self.config.name; a model may compute in training or not."""
        if isinstance(node, ast.Name):
            return self.module if node.id == "self" else _UNKNOWN
        if not isinstance(node, ast.Attribute):
            return _UNKNOWN
        owner = self._attribute(node.value)
        if owner is _UNKNOWN or node.attr == "training":
            return _UNKNOWN
        try:
            return getattr(owner, node.attr)
        except Exception:  # a property may raise anything
            return _UNKNOWN

    def visit_Assign(self, node: ast.Assign) -> None:
        """Remember a local name for a module."""
        path = self.path(node.value)
        for target in node.targets:
            if isinstance(target, ast.Name):
                self._name(target.id, path)
        self.generic_visit(node)

    def visit_For(self, node: ast.For) -> None:
        """Remember the name for the elements of a list of modules."""
        path = self.path(node.iter)
        if isinstance(node.target, ast.Name):
            self._name(node.target.id, path and f"{path}.{_ANY}")
        self.generic_visit(node)

    def visit_Attribute(self, node: ast.Attribute) -> None:
        """Record a weight that is read, unless only its shape or device is."""
        inner = node.value
        if node.attr in _DESCRIBE and isinstance(inner, ast.Attribute) and inner.attr == "weight":
            return
        if node.attr == "weight" and (path := self.path(inner)):
            self.found.add(path)
        self.generic_visit(node)

    def visit_Call(self, node: ast.Call) -> None:
        """Record the weight of which `next(self.module.parameters())` is."""
        called = node.func
        if isinstance(called, ast.Attribute) and called.attr == "parameters" and (path := self.path(called.value)):
            with contextlib.suppress(AttributeError, StopIteration):  # a path that is no module, or one without any
                first, _ = next(self.module.get_submodule(path).named_parameters())
                self.found.add(f"{path}.{first}".removesuffix(".weight"))
        self.generic_visit(node)

    def path(self, node: ast.AST) -> str:
        """The path of an expression from self, such as `layers.*.fc1`; empty if it is something else."""
        if isinstance(node, ast.Name):
            return self.known.get(node.id, "")
        if isinstance(node, ast.Subscript):
            inner = self.path(node.value)
            return inner and f"{inner}.{_ANY}"
        if isinstance(node, ast.Attribute):
            if isinstance(node.value, ast.Name) and node.value.id == "self":
                return node.attr
            inner = self.path(node.value)
            return inner and f"{inner}.{node.attr}"
        return ""

    def _name(self, name: str, path: str) -> None:
        self.known.pop(name, None)
        if path:
            self.known[name] = path
