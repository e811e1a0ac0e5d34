"""The int8 linear layer: `Linear8bitLt` (LLM.int8(), arXiv:2208.07339).

State dicts are those of bitsandbytes: `weight` (int8 codes), `SCB` (absmax of its rows) and
`weight_format` (uint8 0: rows), or `weight` alone while it is floats. A layer takes over either.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from typing_extensions import Self

from bnbx.errors import BnbxError, QuantizedDataError
from bnbx.kernels.int8 import check_threshold, check_weight, dequantize_rows
from bnbx.kernels.memory import moved
from bnbx.layers.int8_matmul import MatmulLtState, cast_for_autocast, product, weight_of
from bnbx.layers.int8_params import Int8Params, absmax_of
from bnbx.layers.moving import MovingModule

ROW_FORMAT = 0  # of `weight_format`; there were others, for GPUs, which nothing writes any more
_ENTRIES = ("weight", "SCB", "weight_format")


class Linear8bitLt(MovingModule, nn.Linear):
    """A linear layer, y = x @ weight.T + bias, multiplied in 8-bit integers.

    x is float32, bfloat16 or float16, (..., in_features); y has its dtype, or that of autocast
    where that is on. x is quantized row by row as it comes, but for columns with outliers.

    With `has_fp16_weights` the weight stays floats, quantized anew in each forward pass, and is
    trained; without, it is quantized when the layer moves to a device, `.to("cpu")` included, and
    frozen. Until it has moved it is floats that are quantized in each forward pass. Gradients flow
    to x and the bias in any case.

    Attributes:
        state: `MatmulLtState`: the threshold, and the codes that were used last.
        index: as it was given; for those who keep an order of columns there.
    """

    weight: Any
    state: MatmulLtState

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

    def forward(self, x: Tensor) -> Tensor:
        """The product; x is (..., in_features), the result (..., out_features).

        Raises:
            UnsupportedTensorError: x has another dtype, shape, layout or device than the layer.
        """
        if not torch.compiler.is_compiling():
            self.state.is_training = self.training
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
        super()._apply(fn, recurse)
        weight = self.weight
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
            destination[f"{prefix}weight_format"] = torch.tensor(ROW_FORMAT, dtype=torch.uint8)

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        entries = {name: state_dict.get(prefix + name) for name in _ENTRIES}
        assign = bool(local_metadata.get("assign_to_params_buffers", False))
        taken = False
        if entries["weight"] is not None:
            try:
                taken = self._load_weight(entries, assign)
            except BnbxError as error:
                error_msgs.append(f"{prefix}weight: {error}")
                taken = True
        ours = {prefix + name for name in (_ENTRIES if taken else _ENTRIES[1:])}
        rest = {name: value for name, value in state_dict.items() if name not in ours}
        lacking: list[str] = []
        super()._load_from_state_dict(
            rest, prefix, local_metadata, strict, lacking, unexpected_keys, error_msgs
        )
        missing_keys += [name for name in lacking if not (taken and name == f"{prefix}weight")]

    def _load_weight(self, entries: dict[str, Any], assign: bool) -> bool:
        """Take the entries over; False if torch may copy them: floats to floats.

        Raises:
            BnbxError: they do not fit one another, or not the layer.
        """
        given, absmax, kind = (entries[name] for name in _ENTRIES)
        kind = kind.item() if isinstance(kind, Tensor) and not kind.is_meta else kind
        if kind not in (None, ROW_FORMAT, "row") and not isinstance(kind, Tensor):
            raise QuantizedDataError(
                f"weight_format is {kind!r}: only the 'row' weight format ({ROW_FORMAT}) is "
                "supported; save the checkpoint anew with a current version of bitsandbytes"
            )
        if given.dtype != torch.int8:
            if self.weight.dtype != torch.int8 and not assign:
                return False
            self._check_shape(given)
            if self.weight.dtype != torch.int8:
                kept = self.state.has_fp16_weights
                self.weight = Int8Params(given, requires_grad=kept, has_fp16_weights=kept)
                return True
            new = Int8Params(given.detach(), requires_grad=False)
            new.quantize(given.device if assign else self.weight.device)
            given, absmax = new.detach(), new.SCB
        if not isinstance(absmax, Tensor):
            raise QuantizedDataError("int8 codes without the absmax of their rows: no entry 'SCB'")
        self._check_shape(given)
        check_weight(given, absmax)
        self._take(given, absmax.reshape(-1), assign)
        return True

    def _check_shape(self, given: Tensor) -> None:
        expected = (self.out_features, self.in_features)
        if tuple(given.shape) != expected:
            raise QuantizedDataError(f"shape {tuple(given.shape)}; expected {expected}")

    def _take(self, codes: Tensor, absmax: Tensor, assign: bool) -> None:
        """Become these codes; a layer with `has_fp16_weights` takes their numbers."""
        weight = self.weight
        if self.state.has_fp16_weights and weight.dtype != torch.int8:
            numbers = dequantize_rows(codes, absmax, weight.dtype)
            if assign or weight.is_meta:
                self.weight = Int8Params(numbers, has_fp16_weights=True)
            else:
                with torch.no_grad():
                    weight.copy_(numbers)
            return
        if not assign:
            if weight.is_meta and not codes.is_meta:
                raise QuantizedDataError(
                    "the layer is on the meta device, where nothing can be copied to; pass "
                    "assign=True to load_state_dict, or call to_empty(device=...) first"
                )
            codes = codes.detach().to(weight.device, copy=True)
            absmax = absmax.detach().to(weight.device, copy=True)
        if isinstance(weight, Int8Params) and weight.device == codes.device:
            weight.adopt(codes, absmax)
        else:
            self.weight = Int8Params(codes, requires_grad=False, CB=codes, SCB=absmax)
        self.init_8bit_state()
