"""4-bit linear layers under their familiar names, with their familiar arguments."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import Module
from typing_extensions import Self

from bnbx.kernels.quant_state import QuantState
from bnbx.layers.linear import QuantLinear
from bnbx.layers.parameter import QuantParameter
from bnbx.registry import QuantType


class Params4bit(QuantParameter):
    """The weight of a 4-bit layer; any other registered type may be named too.

    It is `bnbx.layers.parameter.QuantParameter` with the defaults of bitsandbytes.
    """

    def __new__(
        cls,
        data: Tensor | None = None,
        requires_grad: bool = False,
        quant_state: QuantState | None = None,
        blocksize: int | None = None,
        compress_statistics: bool | None = True,
        quant_type: str | QuantType = "fp4",
        quant_storage: torch.dtype = torch.uint8,
        module: Module | None = None,
        bnb_quantized: bool = False,
        **others: Any,
    ) -> Self:
        """A parameter of these settings; see `QuantParameter`."""
        return super().__new__(
            cls,
            data,
            requires_grad,
            quant_state,
            blocksize,
            bool(compress_statistics),
            quant_type,
            quant_storage,
            module,
            bnb_quantized,
            **others,
        )


class FP4Params(Params4bit):
    """The name that `Params4bit` had before it knew two types; libraries still look for it."""


class Linear4bit(QuantLinear):
    """A linear layer with a frozen 4-bit weight (QLoRA, arXiv:2305.14314).

    It is `bnbx.layers.linear.QuantLinear` with the arguments of bitsandbytes.
    """

    kind = Params4bit

    def __init__(
        self,
        input_features: int,
        output_features: int,
        bias: bool = True,
        compute_dtype: torch.dtype | None = None,
        compress_statistics: bool = True,
        quant_type: str | QuantType = "fp4",
        quant_storage: torch.dtype = torch.uint8,
        device: torch.device | str | int | None = None,
    ) -> None:
        """Make a layer with random weights, not quantized yet.

        Args:
            input_features: columns of the weight.
            output_features: rows of the weight.
            bias: whether there is a bias; it is not quantized.
            compute_dtype: what inputs are converted to; by default they are used as they are.
            compress_statistics: whether scales are quantized too.
            quant_type: name of a registered type, or a spec.
            quant_storage: dtype of the codes' memory.
            device: of the dense weight; "meta" for none.

        Raises:
            UnknownNameError: no such quant type.
            OptionError: a storage that it cannot have, or a `compute_dtype` that is no dtype of
                products.
        """
        super().__init__(
            input_features,
            output_features,
            bias,
            quant_type,
            compute_dtype,
            double=bool(compress_statistics),
            quant_storage=quant_storage,
            device=device,
        )


class _Named(Linear4bit):
    """Base of the classes of one type."""

    type_name: str

    def __init__(
        self,
        input_features: int,
        output_features: int,
        bias: bool = True,
        compute_dtype: torch.dtype | None = None,
        compress_statistics: bool = True,
        quant_storage: torch.dtype = torch.uint8,
        device: torch.device | str | int | None = None,
    ) -> None:
        """As `Linear4bit`, without the type."""
        super().__init__(
            input_features,
            output_features,
            bias,
            compute_dtype,
            compress_statistics,
            self.type_name,
            quant_storage,
            device,
        )


class LinearFP4(_Named):
    """`Linear4bit` in fp4."""

    type_name = "fp4"


class LinearNF4(_Named):
    """`Linear4bit` in nf4."""

    type_name = "nf4"
