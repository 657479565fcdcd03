"""Int8Linear: a drop-in nn.Linear whose weight is int8, and whose forward is the mixed-precision product."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from quantize8.errors import WeightError
from quantize8.model.weight import Int8Weight
from quantize8.ops import bitsandbytes
from quantize8.ops.choice import default_mode
from quantize8.ops.operator import linear, packed_linear
from quantize8.ops.reference import DECODE_TOKENS, DEFAULT_THRESHOLD, INT8_MAX, STATIC_MODES, LayerMode

if TYPE_CHECKING:
    from quantize8.ops.packed import PackedWeight

_PACKING = threading.Lock()  # two threads may compute with one layer


class Int8Linear(nn.Linear):
    """A linear layer with LLM.int8() weights, named as the bitsandbytes format names them.

    weight: int8 [N, K], by its name an `Int8Weight`, which refuses to be taken for floating point. SCB: float32 [N],
    the absmax of each row. weight_format: 0, row-major. bias: [N] or None.
    outlier_columns int32 [J] and outlier_weight float16 [N, E]: what modes static and hybrid go by; static without them
    has no outliers. They are no part of a state_dict.
    Inputs are float16, bfloat16 or float32 [..., K]; the output has the input's dtype. Gradients reach the input (for
    adapters) through the dequantized weight, and the bias; the weight itself is frozen.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        threshold: float = DEFAULT_THRESHOLD,
        mode: LayerMode | None = "dynamic",
        device: Any = None,
    ) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features = in_features, out_features
        self.threshold, self.chosen_mode = threshold, mode
        self.transposed = False  # whether it stands for a Conv1D, which is stored [K, N] in floating point
        self._packed: PackedWeight | None = None
        codes = torch.empty(out_features, in_features, dtype=torch.int8, device=device)
        self._parameters["weight"] = nn.Parameter(codes, requires_grad=False)
        self.SCB = nn.Parameter(torch.empty(out_features, dtype=torch.float32, device=device), requires_grad=False)
        values = nn.Parameter(torch.empty(out_features, device=device), requires_grad=False) if bias else None
        self.register_parameter("bias", values)
        self.register_buffer("weight_format", torch.zeros((), dtype=torch.uint8, device=device))
        self.outlier_columns: Tensor | None
        self.outlier_weight: Tensor | None
        self.register_buffer("outlier_columns", None, persistent=False)
        self.register_buffer("outlier_weight", None, persistent=False)

    @classmethod
    def from_float(cls, source: nn.Linear, threshold: float = DEFAULT_THRESHOLD) -> Int8Linear:
        """Quantize a layer where it is; raises WeightError where a row holds NaN, infinity or a |w| beyond float16."""
        codes, absmax = checked_quantize(source.weight.detach())
        layer = cls(source.in_features, source.out_features, source.bias is not None, threshold)
        layer.weight.data, layer.SCB.data = codes, absmax
        layer.weight_format = layer.weight_format.to(codes.device)
        if source.bias is not None:
            layer.bias = nn.Parameter(source.bias.detach().clone(), requires_grad=False)
        return layer

    @property
    def mode(self) -> LayerMode:
        """The outlier mode that the layer computes in: `chosen_mode`, or the default for the layer's device."""
        return self.chosen_mode or default_mode(self.SCB.device.type)

    @mode.setter
    def mode(self, value: LayerMode | None) -> None:
        self.chosen_mode = value

    @property
    def weight(self) -> Any:
        """The codes for others than the layer itself; floating point that somebody put there, as it is."""
        stored = self._parameters["weight"]
        return stored if stored is None or stored.dtype != torch.int8 else self._view(stored)

    @weight.setter
    def weight(self, value: Any) -> None:  # for type checkers: it is __setattr__ that is called
        self.__setattr__("weight", value)

    def _view(self, stored: Tensor) -> Int8Weight:
        return Int8Weight(stored.detach(), layer=self)

    def __setattr__(self, name: str, value: Any) -> None:
        """As nn.Module's; a new weight takes the place of a packed one too."""
        if name == "weight":
            self._packed = None
            if isinstance(value, Int8Weight):
                with torch.inference_mode(False):  # training may follow
                    codes = value.plain()
                    value = nn.Parameter(codes.clone() if codes.is_inference() else codes, requires_grad=False)
        super().__setattr__(name, value)

    def _stored(self) -> Tensor:
        """The parameter, for computing with it: without values where it is packed."""
        weight: Any = self._parameters["weight"]
        if weight.dtype != torch.int8:
            raise WeightError(
                f"Int8Linear weight {list(weight.shape)}: is {weight.dtype}, not int8, and not computed with; "
                "make the layer with Int8Linear.from_float"
            )
        return weight.plain() if isinstance(weight, Int8Weight) else weight

    def stored_codes(self) -> Tensor:
        """The parameter with its values, int8 [N, K]; what is written to it changes the layer."""
        self.unpack()
        return self._stored().detach()

    def forward(self, x: Tensor) -> Tensor:
        """x [..., K] -> [..., N] in x's dtype; on a GPU, launches that wait for nothing."""
        flat = x.reshape(-1, self.in_features)
        # In these modes neither a token's neighbours nor the batch may matter: what is short enough for the decode path
        # goes there in any batch, a few sequences at a time.
        if self.mode in STATIC_MODES and x.dim() > 2 and x.shape[-2] <= DECODE_TOKENS < len(flat):
            product = torch.cat([self._product(few) for few in flat.split(DECODE_TOKENS)])
        else:
            product = self._product(flat)
        return product.view(*x.shape[:-1], self.out_features)

    def _product(self, x: Tensor) -> Tensor:
        """x [M, K] -> [M, N] in x's dtype."""
        product: Tensor
        if not self._packs_for(x):
            if self._packed is not None:
                self.unpack()
            columns = self._static_columns() if self.mode in STATIC_MODES else (None, None)
            product = linear(x, self._stored(), self.SCB, self.bias, self.threshold, self.mode, *columns)
        elif torch.compiler.is_compiling():
            product = packed_linear(x, self.pack().parts, self.bias, self.out_features, self.threshold, self.mode)
        elif self.mode == "bitsandbytes":
            product = bitsandbytes.linear(x, self.pack(), self.SCB, self.bias, self.threshold)
        else:
            product = self.pack().linear(x, self.bias, self.threshold, self.mode)
        return product

    def _static_columns(self) -> tuple[Tensor, Tensor]:
        """outlier_columns and outlier_weight; empty where the artifact stores none for this layer."""
        columns, weight = self.outlier_columns, self.outlier_weight
        if columns is None or weight is None:
            device = self.SCB.device
            columns = torch.zeros(0, dtype=torch.int32, device=device)
            weight = torch.zeros(self.out_features, 0, dtype=torch.float16, device=device)
        return columns, weight

    def pack(self) -> PackedWeight:
        """Move the weight into the layout of the CPU's int8 units; `weight` keeps its shape, and no values."""
        packed = self._packed
        if packed is not None and (packed.static is not None) == (self.mode in STATIC_MODES):
            return packed
        from quantize8.ops.packed import PackedWeight

        if packed is not None:
            self.unpack()  # it was laid out for another mode

        with _PACKING, torch.inference_mode(False):  # training may follow, and refuses tensors made in inference mode
            if self._packed is None:
                codes, columns = self._stored().data, self._static_columns() if self.mode in STATIC_MODES else ()
                self._packed = PackedWeight(codes, self.SCB.data, None, *columns)
                self._stored().data = codes.new_zeros(()).expand(codes.shape)
            return self._packed

    @torch.compiler.disable
    def unpack(self) -> None:
        """Give `weight` its values back, as training, moving and saving need them."""
        with _PACKING, torch.inference_mode(False):
            if self._packed is not None:
                self._stored().data, self._packed = self._packed.codes(), None

    def codes(self) -> Tensor:
        """The codes int8 [N, K], wherever they are kept."""
        return self._stored().data if self._packed is None else self._packed.codes()

    def dequantize(self) -> Tensor:
        """The float32 weight [N, K] that the codes stand for."""
        return self.codes().float() * (self.SCB / INT8_MAX)[:, None]

    def _packs_for(self, x: Tensor) -> bool:
        """Whether the packed weight can serve: on a CPU, without gradients.

        Tracing does not move weights, so a model is called once before it is compiled.
        """
        if x.device.type != "cpu" or self._stored().device.type != "cpu":
            return False
        if torch.is_grad_enabled() and (x.requires_grad or (self.bias is not None and self.bias.requires_grad)):
            return False
        if self.mode == "bitsandbytes" and torch.compiler.is_compiling():
            return False  # that is one operator only on codes that lie as usual
        if getattr(self.__dict__.get("_hf_hook"), "offload", False):  # the weight comes from disk, and goes again
            return False
        if self._packed is not None:
            return True
        return not torch.compiler.is_compiling()

    def extra_repr(self) -> str:
        """What print(model) says of the layer."""
        return f"{super().extra_repr()}, int8, threshold={self.threshold}, mode={self.mode}"

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Int8Linear:
        """Move and cast as nn.Module does, but leave SCB in float32: model.half() must not round scales."""
        self.unpack()
        scale, exact = self.SCB.data, self.outlier_weight
        super()._apply(fn, recurse)
        if exact is not None:
            self.outlier_weight = exact.to(self.SCB.device)
        if self.SCB.dtype != torch.float32:
            self.SCB.data = scale.to(self.SCB.device)
        return self

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        nn.Linear._save_to_state_dict(self, destination, prefix, keep_vars)
        if self._packed is not None:
            destination[f"{prefix}weight"] = self._packed.codes()

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
        self.unpack()
        name = f"{prefix}weight"
        if name in state_dict and state_dict[name].dtype != torch.int8:
            rest[-1].append(f"{name} is {state_dict[name].dtype}, not int8: make the layer with Int8Linear.from_float")
            return
        nn.Linear._load_from_state_dict(self, state_dict, prefix, *rest)

    def __copy__(self) -> Int8Linear:
        """A layer with the same tensors, but a parameter of its own: packing takes the values out of it."""
        made, state = type(self).__new__(type(self)), self.__getstate__()
        weight = nn.Parameter(self._stored().data, requires_grad=False)
        made.__dict__.update({**state, "_parameters": {**self._parameters, "weight": weight}})
        return made

    def __getstate__(self) -> dict[str, Any]:
        """For copy and pickle, which cannot take a packed weight."""
        self.unpack()
        return self.__dict__


def quantize(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Codes and absmax of a weight [N, K], on its device."""
    if weight.is_cuda:
        from quantize8.ops import gpu

        return gpu.quantize_rowwise(weight)
    from quantize8.ops import cpu

    if weight.dtype != torch.float32:
        weight = weight.to(torch.float32)  # exact
    codes, absmax = cpu.quantize_rowwise(weight.contiguous().numpy())
    return torch.from_numpy(codes), torch.from_numpy(absmax)


def checked_quantize(weight: Tensor) -> tuple[Tensor, Tensor]:
    """As `quantize`; raises WeightError where a row holds NaN, infinity or a |w| beyond float16."""
    codes, absmax = quantize(weight)
    if not absmax.isfinite().all():
        row = int(absmax.isfinite().int().argmin())
        raise WeightError(
            f"weight row {row} holds NaN, infinity or a |w| beyond float16, and cannot be int8; keep it in float"
        )
    return codes, absmax
