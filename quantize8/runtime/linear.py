"""Int8Linear: a drop-in nn.Linear with an int8 weight, which computes the mixed-precision product of LLM.int8()."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from quantize8.errors import WeightError
from quantize8.kernels import bitsandbytes
from quantize8.kernels.devices import default_mode
from quantize8.kernels.operator import linear, packed_linear, rotate
from quantize8.kernels.reference import (
    DECODE_TOKENS,
    DEFAULT_THRESHOLD,
    INT8_MAX,
    STATIC_MODES,
    LayerMode,
    check_rotation,
)
from quantize8.runtime.weight import Int8Weight

if TYPE_CHECKING:
    from quantize8.kernels.packed import PackedWeight

_PACKING = threading.Lock()  # several threads may use one layer at the same time


class Int8Linear(nn.Linear):
    """A linear layer with LLM.int8() weights (Dettmers et al. 2022). Its tensors have the bitsandbytes format's names.

    Inputs are float16, bfloat16 or float32 [..., K]; outputs [..., N] have the input's dtype. Gradients flow to the
    input, through the dequantized weight, so that adapters can be trained, and to the bias; the weight is frozen.

    Args:
        in_features: K.
        out_features: N.
        bias: Whether the layer has a bias.
        threshold: Outlier threshold; 0 for none.
        mode: Outlier mode; None for the default of the device that the layer is on: "bitsandbytes" on a CPU, "dynamic"
            on a GPU.
        device: Device of the tensors, which are not initialized.

    Attributes:
        weight: int8 [N, K], read as an `Int8Weight`, which raises an error where it is used as floating point.
        SCB: float32 [N], the absmax of each row.
        weight_format: uint8, 0 for row-major.
        bias: [N] or None.
        outlier_columns: int32 [J] or None, the outlier columns of modes static and hybrid. Not part of a state_dict.
        outlier_weight: float16 [N, E] or None, exact weights of the first E of them. Not part of a state_dict. In mode
            static a layer without stored columns has no outliers.
        rotation: Size of the blocks in which the codes and the input are rotated, one of `reference.ROTATIONS` that
            divides K; 0 for none. A rotated layer has no outliers, whatever its threshold and mode. Not part of a
            state_dict.
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
        self.rotation = 0
        self.transposed = False  # whether it replaces a Conv1D, which is stored [K, N] in floating point
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
    def from_float(cls, source: nn.Linear, threshold: float = DEFAULT_THRESHOLD, rotation: int = 0) -> Int8Linear:
        """Quantize a floating-point layer on its device, in mode dynamic.

        Args:
            source: The layer; it is not changed.
            threshold: Outlier threshold; 0 for none.
            rotation: Size of the blocks to rotate in, such as `reference.rotation_of(K)`; 0 for none.

        Raises:
            WeightError: A row of the weight holds NaN, infinity or a |w| beyond float16, or the rotation does not fit.
        """
        check_rotation(rotation, source.in_features)
        weight = source.weight.detach()
        codes, absmax = checked_quantize(rotate(weight, rotation) if rotation else weight)
        layer = cls(source.in_features, source.out_features, source.bias is not None, threshold)
        layer.weight.data, layer.SCB.data, layer.rotation = codes, absmax, rotation
        layer.weight_format = layer.weight_format.to(codes.device)
        if source.bias is not None:
            layer.bias = nn.Parameter(source.bias.detach().clone(), requires_grad=False)
        return layer

    @property
    def mode(self) -> LayerMode:
        """The outlier mode that the layer computes in: `chosen_mode`, or the default for the layer's device.

        A rotated layer has no outliers, which is mode dynamic without a threshold.
        """
        if self.rotation:
            return "dynamic"
        return self.chosen_mode or default_mode(self.SCB.device.type)

    @mode.setter
    def mode(self, value: LayerMode | None) -> None:
        self.chosen_mode = value

    @property
    def weight(self) -> Any:
        """The codes as other code sees them; if a floating-point weight was assigned, that weight unchanged."""
        stored = self._parameters["weight"]
        return stored if stored is None or stored.dtype != torch.int8 else self._view(stored)

    @weight.setter
    def weight(self, value: Any) -> None:  # for type checkers; __setattr__ is called first
        self.__setattr__("weight", value)

    def _view(self, stored: Tensor) -> Int8Weight:
        return Int8Weight(stored.detach(), layer=self)

    def __setattr__(self, name: str, value: Any) -> None:
        """As in nn.Module; a new weight also replaces the packed one."""
        if name == "weight":
            self._packed = None
            if isinstance(value, Int8Weight):
                with torch.inference_mode(False):  # training may follow
                    codes = value.plain()
                    value = nn.Parameter(codes.clone() if codes.is_inference() else codes, requires_grad=False)
        super().__setattr__(name, value)

    def _stored(self) -> Tensor:
        """The weight parameter as a plain tensor, for computing; it has no values while the weight is packed."""
        weight: Any = self._parameters["weight"]
        if weight.dtype != torch.int8:
            raise WeightError(
                f"Int8Linear weight {list(weight.shape)}: is {weight.dtype}, not int8, so the layer cannot compute; "
                "create the layer with Int8Linear.from_float"
            )
        return weight.plain() if isinstance(weight, Int8Weight) else weight

    def stored_codes(self) -> Tensor:
        """The codes int8 [N, K] of the layer itself, unpacked: writing to them changes the layer."""
        self.unpack()
        return self._stored().detach()

    def forward(self, x: Tensor) -> Tensor:
        """Compute the layer for x [..., K]: [..., N] in x's dtype. On a GPU this only launches kernels."""
        flat = x.reshape(-1, self.in_features)
        # In these modes, and rotated, a result must not depend on a token's neighbors or on the batch: sequences that
        # are short enough for the decode path take it in a batch of any size, a few sequences at a time.
        alone = self.rotation or self.mode in STATIC_MODES
        if alone and x.dim() > 2 and x.shape[-2] <= DECODE_TOKENS < len(flat):
            product = torch.cat([self._product(tokens) for tokens in flat.split(DECODE_TOKENS)])
        else:
            product = self._product(flat)
        return product.view(*x.shape[:-1], self.out_features)

    def _product(self, x: Tensor) -> Tensor:
        """The output [M, N] for x [M, K], in x's dtype."""
        product: Tensor
        if not self._packs_for(x):
            if self._packed is not None:
                self.unpack()
            columns = self._static_columns() if self.mode in STATIC_MODES else (None, None)
            how = (self.threshold, self.mode, *columns, self._checked_rotation())
            product = linear(x, self._stored(), self.SCB, self.bias, *how)
        elif torch.compiler.is_compiling():
            how = (self.threshold, self.mode, self.rotation)
            product = packed_linear(x, self.pack().parts, self.bias, self.out_features, *how)
        elif self.mode == "bitsandbytes":
            product = bitsandbytes.linear(x, self.pack(), self.SCB, self.bias, self.threshold)
        else:
            product = self.pack().linear(x, self.bias, self.threshold, self.mode)
        return product

    def _static_columns(self) -> tuple[Tensor, Tensor]:
        """outlier_columns and outlier_weight; empty tensors if the artifact stores none for this layer."""
        columns, weight = self.outlier_columns, self.outlier_weight
        if columns is None or weight is None:
            device = self.SCB.device
            columns = torch.zeros(0, dtype=torch.int32, device=device)
            weight = torch.zeros(self.out_features, 0, dtype=torch.float16, device=device)
        return columns, weight

    def _checked_rotation(self) -> int:
        """`rotation`; WeightError if there are outlier columns, too: they are columns of the weight before it."""
        if self.rotation and self.outlier_columns is not None:
            raise WeightError(
                f"Int8Linear weight {[self.out_features, self.in_features]}: has both a rotation and outlier columns; "
                "convert the model again, with only one of them"
            )
        return self.rotation

    def pack(self) -> PackedWeight:
        """Move the weight into the layout of the CPU's int8 units; `weight` then keeps its shape but has no values."""
        packed, rotation = self._packed, self._checked_rotation()
        if packed is not None and (packed.static is not None, packed.rotation) == (self.mode in STATIC_MODES, rotation):
            return packed
        from quantize8.kernels.packed import PackedWeight

        if packed is not None:
            self.unpack()  # it was packed for another mode or rotation

        with _PACKING, torch.inference_mode(False):  # training may follow, and cannot use tensors of inference mode
            if self._packed is None:
                codes, static = self._stored().data, self.mode in STATIC_MODES
                columns = self._static_columns() if static else (None, None)
                self._packed = PackedWeight(codes, self.SCB.data, None, columns[0], columns[1], rotation)
                self._stored().data = codes.new_zeros(()).expand(codes.shape)
            return self._packed

    @torch.compiler.disable
    def unpack(self) -> None:
        """Give `weight` its values back, which training, moving and saving need."""
        with _PACKING, torch.inference_mode(False):
            if self._packed is not None:
                self._stored().data, self._packed = self._packed.codes(), None

    def codes(self) -> Tensor:
        """The codes int8 [N, K], whether packed or not; the layer stays as it is."""
        return self._stored().data if self._packed is None else self._packed.codes()

    def dequantize(self) -> Tensor:
        """The float32 weight [N, K] that the codes represent, rotated back if they are rotated."""
        weight = self.codes().float() * (self.SCB / INT8_MAX)[:, None]
        return rotate(weight, self.rotation) if self.rotation else weight

    def _packs_for(self, x: Tensor) -> bool:
        """Whether the packed weight can be used: on a CPU, without gradients.

        Weights are not packed while torch.compile traces, so a model should be called once before it is compiled.
        """
        if x.device.type != "cpu" or self._stored().device.type != "cpu":
            return False
        if torch.is_grad_enabled() and (x.requires_grad or (self.bias is not None and self.bias.requires_grad)):
            return False
        if self.mode == "bitsandbytes" and torch.compiler.is_compiling():
            return False  # in this mode the compiled graph has one operator only for a weight that is not packed
        if getattr(self.__dict__.get("_hf_hook"), "offload", False):  # accelerate loads the weight for each call
            return False
        if self._packed is not None:
            return True
        return not torch.compiler.is_compiling()

    def extra_repr(self) -> str:
        """The layer's description in print(model)."""
        outliers = f"threshold={self.threshold}, mode={self.mode}"
        return f"{super().extra_repr()}, int8, {f'rotation={self.rotation}' if self.rotation else outliers}"

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Int8Linear:
        """Move and cast as nn.Module does, but keep SCB in float32, as model.half() must not round scales."""
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
            rest[-1].append(
                f"{name} is {state_dict[name].dtype}, not int8: create the layer with Int8Linear.from_float"
            )
            return
        nn.Linear._load_from_state_dict(self, state_dict, prefix, *rest)

    def __copy__(self) -> Int8Linear:
        """A layer with the same tensors but its own weight parameter, as packing removes the values of a parameter."""
        made, state = type(self).__new__(type(self)), self.__getstate__()
        weight = nn.Parameter(self._stored().data, requires_grad=False)
        made.__dict__.update({**state, "_parameters": {**self._parameters, "weight": weight}})
        return made

    def __getstate__(self) -> dict[str, Any]:
        """The state for copy and pickle, unpacked, as they cannot handle a packed weight."""
        self.unpack()
        return self.__dict__


def quantize(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Quantize a weight row by row on its device, by `reference.quantize_rowwise`.

    Args:
        weight: float16, bfloat16 or float32 [N, K].

    Returns:
        Codes int8 [N, K], and absmax float32 [N], not finite where a row cannot be quantized.
    """
    if weight.is_cuda:
        from quantize8.kernels import gpu

        return gpu.quantize_rowwise(weight)
    from quantize8.kernels import cpu

    if weight.dtype != torch.float32:
        weight = weight.to(torch.float32)  # exact
    codes, absmax = cpu.quantize_rowwise(weight.contiguous().numpy())
    return torch.from_numpy(codes), torch.from_numpy(absmax)


def checked_quantize(weight: Tensor) -> tuple[Tensor, Tensor]:
    """As `quantize`; raises WeightError if a row holds NaN, infinity or a |w| beyond float16."""
    codes, absmax = quantize(weight)
    if not absmax.isfinite().all():
        row = int(absmax.isfinite().int().argmin())
        raise WeightError(
            f"weight row {row} holds NaN, infinity or a |w| beyond float16, and cannot be int8; keep it in float"
        )
    return codes, absmax
