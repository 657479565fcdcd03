"""The weight of an int8 layer as other code sees it: codes that can be read, moved and copied, but not computed with.

PEFT has adapters that read `layer.weight` as floating point and write sums back. With codes that would silently give
wrong results; here it raises an error.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map_only

from quantize8.errors import WeightError

if TYPE_CHECKING:
    from quantize8.runtime.linear import Int8Linear

_ATTRIBUTES = ("device", "dtype", "grad", "is_cuda", "is_leaf", "is_meta", "layout", "ndim", "requires_grad", "shape")
_METHODS = ("__len__", "dim", "element_size", "is_complex", "is_floating_point", "numel", "size")
_LIKE = ("empty_like", "full_like", "ones_like", "rand_like", "randn_like", "zeros_like")
# functions that need no values, so that a packed weight can stay packed
_DESCRIBE = {getattr(Tensor, name).__get__ for name in _ATTRIBUTES} | {getattr(Tensor, name) for name in _METHODS}
_DESCRIBE |= {getattr(torch, name) for name in _LIKE}
_SAME = {Tensor.data.__get__, Tensor.detach}  # type: ignore[attr-defined]
_SET_DATA = Tensor.data.__set__  # type: ignore[attr-defined]
_DTYPE_ERRORS = re.compile("Char|[Ff]loating[- ]point")  # in torch's errors about the dtype of an argument
_ON_CODES = ("bitsandbytes.", "quantize8.")  # prefixes of operators that expect int8 codes


class Int8Weight(nn.Parameter):
    """The codes int8 [N, K] of a layer, or a tensor made from them.

    An operation that mixes it with floating point, or would return floating point, raises WeightError.
    """

    layer: Int8Linear | None
    _codes: Tensor
    _is_hf_initialized = True  # read by transformers, which fills parameters that are not initialized with noise

    def __new__(cls, data: Tensor, requires_grad: bool = False, layer: Int8Linear | None = None) -> Int8Weight:
        """As nn.Parameter; `data` is an ordinary tensor."""
        made: Int8Weight = torch.Tensor._make_subclass(cls, data, False)
        made.layer, made._codes = layer, data
        return made

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Handle every torch function that is called with such a weight."""
        kwargs = kwargs or {}
        with torch._C.DisableTorchFunctionSubclass():
            if func in _DESCRIBE:
                return func(*args, **kwargs)
            if func in _SAME:
                return cls(Tensor.detach(args[0]), layer=args[0].layer)
            if func == _SET_DATA and isinstance(args[0], Int8Weight):
                return args[0]._set(args[1])
            if func is Tensor.requires_grad_:
                return args[0]
            plain_args, plain_kwargs = tree_map_only(Int8Weight, Int8Weight.plain, (args, dict(kwargs)))
            if str(func).startswith(_ON_CODES):
                return func(*plain_args, **plain_kwargs)
            if any(_is_floating(value) for value in tree_leaves((plain_args, plain_kwargs))):
                raise _refusal(func, args, kwargs)
            try:
                result = func(*plain_args, **plain_kwargs)
            except (NotImplementedError, RuntimeError, TypeError) as error:
                raise _refusal(func, args, kwargs) if _DTYPE_ERRORS.search(str(error)) else error from None
        if any(_is_floating(value) for value in tree_leaves(result)):
            raise _refusal(func, args, kwargs)
        return tree_map_only(Tensor, _guarded, result)

    def plain(self) -> Tensor:
        """The codes as an ordinary tensor; those of the layer itself if there is a layer."""
        return self._codes if self.layer is None else self.layer.stored_codes()

    def _set(self, value: Tensor) -> None:
        """Handle `weight.data = value`."""
        if value.dtype != torch.int8:
            raise _refusal(_SET_DATA, (self, value), {})
        codes = value.plain() if isinstance(value, Int8Weight) else value
        if self.layer is None:
            _SET_DATA(self, codes)
            self._codes = codes
        else:
            self.layer.weight = nn.Parameter(codes, requires_grad=False)

    def __deepcopy__(self, memo: dict[int, Any]) -> Int8Weight:
        return type(self)(self.plain().clone())

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Pickle as an ordinary parameter."""
        return nn.Parameter(self.plain(), requires_grad=False).__reduce_ex__(protocol)


def _guarded(value: Tensor) -> Tensor:
    return Int8Weight(value) if value.dtype == torch.int8 and type(value) is Tensor else value


def _is_floating(value: Any) -> bool:
    return (value if isinstance(value, torch.dtype) else getattr(value, "dtype", torch.int8)) in _FLOATS


_FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


def _refusal(func: Callable[..., Any], args: Any, kwargs: Mapping[str, Any]) -> WeightError:
    name = "data =" if func == _SET_DATA else getattr(func, "__name__", str(func))
    shape = next(list(value.shape) for value in tree_leaves((args, dict(kwargs))) if isinstance(value, Int8Weight))
    return WeightError(
        f"Int8Linear weight {shape}: holds int8 codes, but {name!r} treats them as floating point; use the layer's "
        "dequantize(), or PEFT's methods for 8-bit layers: install bitsandbytes, and import peft before loading the "
        "model (docs/training.md)"
    )
