"""The int8 linear layer: `Linear8bitLt` (LLM.int8(), arXiv:2208.07339).

State dicts are those of bitsandbytes: `weight` (int8 codes), `SCB` (absmax of its rows) and
`weight_format` (uint8 0: rows), or `weight` alone while it is floats. A layer takes over either.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from typing_extensions import Self

from bnbx.kernels.int8 import check_threshold, dequantize_rows
from bnbx.kernels.memory import moved
from bnbx.layers.int8_params import Int8Params, absmax_of
from bnbx.layers.int8_saving import ROW_FORMAT, LoadsInt8
from bnbx.layers.matmul import MatmulLtState, cast_for_autocast, product, weight_of
from bnbx.layers.moving import MovingModule


class Linear8bitLt(LoadsInt8, MovingModule, nn.Linear):
    """A linear layer, y = x @ weight.T + bias, multiplied in 8-bit integers.

    x is float32, bfloat16 or float16, (..., in_features); y has its dtype, or that of autocast
    where that is on. x is quantized row by row as it comes, but for columns with outliers.

    With `has_fp16_weights` the weight stays floats, quantized anew in each forward pass, and is
    trained; without, it is quantized when the layer moves to a device, `.to("cpu")` included, and
    frozen. Until it has moved it is floats that are quantized in each forward pass. Gradients flow
    to x and the bias in any case.

    Attributes:
        state: `MatmulLtState`: the threshold, and the codes that were used last.
        dtype: of the floats that the weight was, where it is known; it follows conversions.
        index: as it was given; for those who keep an order of columns there.
    """

    weight: Any
    state: MatmulLtState
    dtype: torch.dtype | None
    _used: torch.dtype | None = None  # dtype of the last input, where `dtype` is unknown

    def __init__(
        self,
        input_features: int,
        output_features: int,
        bias: bool = True,
        has_fp16_weights: bool = True,
        threshold: float = 0.0,
        index: Any = None,
        device: torch.device | str | int | None = None,
        *,
        memory_efficient_backward: bool = False,
    ) -> None:
        """Make a layer with random weights, not quantized yet.

        Args:
            input_features: columns of the weight, at most 131071.
            output_features: rows of the weight.
            bias: whether there is a bias; it is not quantized.
            has_fp16_weights: see the class.
            threshold: columns of x with a magnitude of at least this are multiplied in floats; 0
                for none. The paper has 6.0.
            index: becomes the attribute.
            device: of the weights.
            memory_efficient_backward: with `has_fp16_weights`, keep no 8-bit copy of the weight
                between the forward and the backward pass, which makes it again. Without, there is
                none but the weight itself, decoded in parts in the backward pass.

        Raises:
            OptionError: the threshold is negative or NaN.
        """
        check_threshold(threshold)
        super().__init__(input_features, output_features, bias, device)
        self.state = MatmulLtState()
        self.state.threshold = threshold
        self.state.has_fp16_weights = has_fp16_weights
        self.state.memory_efficient_backward = memory_efficient_backward
        self.state.use_pool = threshold > 0 and not has_fp16_weights
        self.index = index
        self.weight = Int8Params(
            self.weight.data, has_fp16_weights=has_fp16_weights, requires_grad=has_fp16_weights
        )

    @property
    def weight_shape(self) -> tuple[int, int]:
        """Of the weight."""
        return self.out_features, self.in_features

    @property
    def dense_dtype(self) -> torch.dtype:
        """What a dense weight is to have here: the dtype that it had, as far as anything tells."""
        if self.weight.is_floating_point():
            found: torch.dtype = self.weight.dtype
            return found
        bias: Tensor | None = self.bias
        beside = None if bias is None else bias.dtype
        return beside or self.dtype or self._used or torch.get_default_dtype()

    def __setattr__(self, name: str, value: Any) -> None:
        """As in torch; a weight that is assigned says what its dtype is, or that nobody knows."""
        super().__setattr__(name, value)
        if name == "weight":
            self.dtype = value.dtype if value.is_floating_point() else None

    def forward(self, x: Tensor) -> Tensor:
        """The product; x is (..., in_features), the result (..., out_features).

        Raises:
            UnsupportedTensorError: x has another dtype, shape, layout or device than the layer.
        """
        if not torch.compiler.is_compiling():
            self.state.is_training = self.training
            if self.dtype is None:
                self._used = x.dtype
        weight = weight_of(self.weight, self.state.SCB)
        return product(cast_for_autocast(x), weight, self.bias, self.state)

    def dequantized_weight(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The weight in floats, (out_features, in_features)."""
        weight: Tensor = self.weight
        if weight.dtype != torch.int8:
            return weight.detach().to(dtype)
        return dequantize_rows(weight.detach(), self._absmax(), dtype)

    def extra_repr(self) -> str:
        """What is shown of the layer."""
        kept = "codes" if self.weight.dtype == torch.int8 else "floats"
        return f"{super().extra_repr()}, threshold={self.state.threshold}, weight in {kept}"

    def init_8bit_state(self) -> None:
        """Let `state` have the codes of the weight, and their absmax where that is known."""
        absmax = getattr(self.weight, "SCB", None)
        if self.weight.dtype == torch.int8:
            self.state.CB = self.weight.detach()
            self.state.SCB = self.state.SCB if absmax is None else absmax

    def _absmax(self) -> Tensor:
        """Absmax of the weight's rows, wherever libraries have left it."""
        return absmax_of(self.weight, self.state.SCB, type(self).__name__)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """As in torch; the absmax goes where the codes go, and stays float32."""
        absmax = self.state.SCB
        was = self.weight.dtype if self.weight.is_floating_point() else self.dtype
        super()._apply(fn, recurse)
        weight = self.weight
        self.dtype = (
            None if was is None else fn(torch.empty(0, dtype=was, device=weight.device)).dtype
        )
        if weight.dtype != torch.int8:
            self.state.reset_grads()
            return self
        if isinstance(weight, Int8Params):
            weight.CB = weight.data
            absmax = absmax if weight.SCB is None else weight.SCB
        absmax = None if absmax is None else moved(absmax, weight.device)
        if isinstance(weight, Int8Params):
            weight.SCB = absmax
        else:
            self.state.SCB = absmax
        self.init_8bit_state()
        return self

    # ---- copies

    def __getstate__(self) -> dict[str, Any]:
        """What is kept of the layer; the codes once, not in its state too."""
        found = self.__dict__.copy()
        if self.weight.dtype == torch.int8:
            found["state"] = state = copy.copy(self.state)
            state.CB = None
            state.SCB = state.SCB if getattr(self.weight, "SCB", None) is None else None
        return found

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        self.init_8bit_state()

    # ---- state dicts

    def _save_to_state_dict(
        self, destination: dict[str, Any], prefix: str, keep_vars: bool
    ) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        weight = self.weight
        if weight.is_meta and getattr(weight, "SCB", None) is self.state.SCB is None:
            return  # transformers makes codes of no memory, and gives them their absmax later
        if weight.dtype == torch.int8:
            absmax = self._absmax()
            destination[f"{prefix}SCB"] = absmax if keep_vars else absmax.detach()
            destination[f"{prefix}weight_format"] = torch.tensor(
                ROW_FORMAT, dtype=torch.uint8, device="cpu"
            )

    def _keeps_floats(self) -> bool:
        return self.state.has_fp16_weights

    def _take(
        self, codes: Tensor, absmax: Tensor, assign: bool, dtype: torch.dtype | None = None
    ) -> None:
        """Become these codes; a layer with `has_fp16_weights` takes their numbers."""
        weight = self.weight
        if not self.state.has_fp16_weights or weight.dtype == torch.int8:
            # What is copied becomes of the dtype that is there, as floats would.
            dtype = dtype if assign else self.dtype
            super()._take(codes, absmax, assign, dtype)
            self.dtype = dtype
            self.init_8bit_state()
            return
        numbers = dequantize_rows(codes, absmax, weight.dtype)
        if assign or weight.is_meta:
            self.weight = Int8Params(numbers, has_fp16_weights=True)
            return
        with torch.no_grad():
            weight.copy_(numbers)
