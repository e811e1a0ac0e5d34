"""One linear layer with a weight in codes, for any registered type: `QuantLinear`.

It is a `torch.nn.Linear` whose weight is frozen and quantized; the product reads the codes, there
is no dense copy of the weight. Gradients flow to the input and the bias, which is what adapters
on a quantized base train by (QLoRA, arXiv:2305.14314).
"""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import Tensor, nn

from bnbx.errors import BnbxWarning, OptionError
from bnbx.kernels.coding import FLOATS
from bnbx.kernels.fit import check_method
from bnbx.layers.module import QuantizedModule
from bnbx.layers.parameter import QuantParameter
from bnbx.layers.products import autocast_dtype, multiply
from bnbx.registry import QuantType


class QuantLinear(QuantizedModule, nn.Linear):
    """A linear layer, y = x @ weight.T + bias, with a quantized weight.

    The weight begins dense and is quantized when the layer moves to a device, `.to("cpu")`
    included. x is float32, bfloat16 or float16, (..., in_features); y has its dtype, or that of
    autocast where that is on, as with `torch.nn.Linear`.

    Attributes:
        compute_dtype: see the constructor; may be set.
        compute_type_is_set: if False, float32 and bfloat16 inputs are used as they are, whatever
            `compute_dtype` is; may be set.
        quant_storage: dtype of the codes' memory.
        quant_state: scales, type and shape of the weight; None until it is quantized.
    """

    kind: type[QuantParameter] = QuantParameter
    """The class of the weight."""

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        quant_type: str | QuantType = "nf4",
        compute_dtype: torch.dtype | None = None,
        block_size: int | None = None,
        double: bool = False,
        quant_storage: torch.dtype = torch.uint8,
        device: torch.device | str | int | None = None,
        dtype: torch.dtype | None = None,
        *,
        fit: str | None = None,
    ) -> None:
        """Make a layer with random weights, not quantized yet.

        Args:
            in_features: columns of the weight.
            out_features: rows of the weight.
            bias: whether there is a bias; it is not quantized.
            quant_type: name of a registered type, or a spec.
            compute_dtype: what x is converted to; by default it is used as it is.
            block_size: elements that share a scale; the type's own by default.
            double: whether scales are quantized too.
            quant_storage: dtype of the codes' memory.
            device: of the dense weight; "meta" for none.
            dtype: of the dense weight.
            fit: how scales are chosen, see `bnbx.kernels.fit`; None for absmax.

        Raises:
            UnknownNameError: no such quant type.
            OptionError: a block size or storage that the type cannot have, no such `fit`, or a
                `compute_dtype` that is no dtype of products.
        """
        super().__init__(in_features, out_features, bias, device, dtype)
        check_method(fit)
        self.quant_state = None
        self.fit = fit
        self.compute_dtype = compute_dtype
        self.compute_type_is_set = compute_dtype is not None
        self.quant_storage = quant_storage
        self.weight = self.kind(
            self.weight.data,
            quant_type=quant_type,
            blocksize=block_size,
            compress_statistics=double,
            quant_storage=quant_storage,
            module=self,
        )

    @property
    def weight_shape(self) -> tuple[int, int]:
        """Of the dense weight."""
        return self.out_features, self.in_features

    def __setattr__(self, name: str, value: Any) -> None:
        """As in torch; `compute_dtype` may be set at any time, to a dtype that products have."""
        if name == "compute_dtype" and value is not None and value not in FLOATS:
            raise OptionError(
                f"compute_dtype={value!r:.200}; expected one of {', '.join(map(str, FLOATS))}, or "
                "None to use inputs as they are"
            )
        super().__setattr__(name, value)

    def forward(self, x: Tensor) -> Tensor:
        """The product.

        Raises:
            QuantizedDataError: the weight is not quantized yet.
            UnsupportedTensorError: x has a dtype, a device or a last dimension that does not fit.
        """
        result = autocast_dtype(x) or x.dtype
        weight = self.weight
        bias: Tensor | None = self.bias
        if not getattr(weight, "bnb_quantized", False) and weight.is_meta:
            return nn.functional.linear(x, weight, bias)  # shapes only
        state = getattr(weight, "quant_state", None) or self.state_of_weight()
        dtype = self._dtype_of_product(x, result)
        found = multiply(x, weight.detach(), state, bias, dtype)
        return found if dtype == result else found.to(result)

    def _dtype_of_product(self, x: Tensor, result: torch.dtype) -> torch.dtype:
        wanted = self.compute_dtype
        if wanted is None or wanted == result:
            return result
        if not self.compute_type_is_set and x.dtype in (torch.float32, torch.bfloat16):
            return result
        if wanted == torch.float32 and x.dtype == torch.float16:
            _warn_of_slow_product(type(self).__name__)
        return wanted

    def to_dense(self, dtype: torch.dtype | None = None) -> nn.Linear:
        """A `torch.nn.Linear` with the dequantized weight, and this bias."""
        weight = self.dequantized_weight(dtype)
        bias: Tensor | None = self.bias
        new = nn.Linear(self.in_features, self.out_features, bias is not None, "meta", weight.dtype)
        new.weight = nn.Parameter(weight, requires_grad=False)
        new.bias = self.bias
        return new.train(self.training)

    def extra_repr(self) -> str:
        """Sizes, and how the weight is kept."""
        return f"{super().extra_repr()}, {self.how()}"


def _warn_of_slow_product(name: str) -> None:
    if torch.compiler.is_compiling():
        return
    warnings.warn(
        f"Input type into {name} is torch.float16, but compute_dtype=torch.float32 (bitsandbytes: "
        "bnb_4bit_compute_dtype): every input is converted, which leads to slow inference and "
        "training. Set the layer's compute_dtype to None or torch.float16",
        BnbxWarning,
        stacklevel=4,
    )
