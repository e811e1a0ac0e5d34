"""Products with quantized weights as functions: `matmul` (LLM.int8()) and `matmul_4bit`.

LLM.int8() is arXiv:2208.07339. What its products keep is in a `MatmulLtState`.
"""

from __future__ import annotations

import warnings
from typing import Any, NamedTuple

import torch
from torch import Tensor

from bnbx.errors import OptionError, UnsupportedTensorError
from bnbx.kernels.coding import FLOATS, check_factor, check_tensor
from bnbx.kernels.int8 import check_threshold
from bnbx.kernels.quant_state import QuantState
from bnbx.layers import int8_ops, ops
from bnbx.layers.products import autocast_dtype

_COMPARED = (
    *("force_no_igemmlt", "CB", "CxB", "SB", "SCB", "SBt", "CBt", "CxBt", "subB", "outlier_pool"),
    *("idx", "threshold", "has_accumulated_gradients", "has_fp16_weights", "is_training"),
    *("use_pool", "formatB", "memory_efficient_backward"),
)


class MatmulLtState:
    """What an int8 product keeps of its weight, and how it is made.

    Attributes:
        CB: codes of the weight, (out, in) int8; None before there are any.
        SCB: absmax of its rows, (out,) float32.
        threshold: columns of the input with a magnitude of at least this are multiplied in floats;
            0 for none.
        has_fp16_weights: whether the weight is floats, quantized anew in each product.
        memory_efficient_backward: with `has_fp16_weights`, keep no codes for the gradient, and make
            them again for it.
        outliers: (in,) bool, the columns of the last input that held an outlier.
        is_training: whether the layer was in training mode, for those who ask.
        SB, SBt, CBt, CxB, CxBt, subB, formatB: layouts for GPUs that this package has no use for;
            None unless somebody sets them, as are `force_no_igemmlt`, `use_pool`, `outlier_pool`
            and `has_accumulated_gradients`.
    """

    def __init__(
        self,
        force_no_igemmlt: bool = False,
        CB: Tensor | None = None,  # noqa: N803 - the names they have in bitsandbytes
        SB: Tensor | None = None,  # noqa: N803
        SCB: Tensor | None = None,  # noqa: N803
        SBt: Tensor | None = None,  # noqa: N803
        CBt: Tensor | None = None,  # noqa: N803
        subB: Tensor | None = None,  # noqa: N803
        outlier_pool: Any = None,
        idx: Tensor | None = None,
    ) -> None:
        self.force_no_igemmlt = force_no_igemmlt
        self.CB, self.SB, self.SCB = CB, SB, SCB
        self.SBt, self.CBt, self.subB = SBt, CBt, subB
        self.CxB: Tensor | None = None
        self.CxBt: Tensor | None = None
        self.formatB: Any = None
        self.outlier_pool = outlier_pool
        self.has_accumulated_gradients = False
        self.threshold = 0.0
        self.is_training = True
        self.has_fp16_weights = True
        self.memory_efficient_backward = False
        self.use_pool = False
        self.outliers: Tensor | None = None
        self._idx = idx

    @property
    def idx(self) -> Tensor | None:
        """Numbers of the columns in `outliers`, int64, ascending; None without a threshold.

        They are found when they are asked for: on a GPU that waits for the product.
        """
        return self._idx if self.outliers is None else self.outliers.nonzero()[:, 0]

    @idx.setter
    def idx(self, idx: Tensor | None) -> None:
        self.outliers, self._idx = None, idx

    def reset_grads(self) -> None:
        """Forget the codes: the next product makes them from its weight."""
        self.CB = self.SB = self.SCB = self.SBt = self.CBt = self.CxB = self.CxBt = None

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, MatmulLtState):
            return NotImplemented
        return all(_same(getattr(self, name), getattr(other, name)) for name in _COMPARED)

    __hash__ = None  # type: ignore[assignment] # it changes with every product

    def __repr__(self) -> str:
        shape = None if self.CB is None else tuple(self.CB.shape)
        return (
            f"MatmulLtState(codes={shape}, threshold={self.threshold}, "
            f"has_fp16_weights={self.has_fp16_weights})"
        )


def _same(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        alike = a.dtype == b.dtype and a.device == b.device and a.shape == b.shape
        return a is b or (alike and bool(torch.equal(a, b)))
    return type(a) is type(b) and bool(a == b)


def matmul(
    A: Tensor,  # noqa: N803 - the names they have in bitsandbytes
    B: Tensor,  # noqa: N803
    out: Tensor | None = None,
    state: MatmulLtState | None = None,
    threshold: float = 0.0,
    bias: Tensor | None = None,
) -> Tensor:
    """The product A @ B.T + bias in 8-bit integers.

    Each row of A and each row of B is quantized to 8 bits by its absmax. Columns of A that hold an
    outlier are multiplied in floats (LLM.int8(), arXiv:2208.07339). Nothing is converted to
    float16; the result has the dtype of A. Gradients go straight through the rounding: to A, to the
    bias, and to B where it is floats.

    Args:
        A: (..., in) float32, bfloat16 or float16, any strides; there may be no rows.
        B: the weight: floats (out, in), quantized in this call; or its codes (int8), if `state` or
            the parameter itself has their absmax (`SCB`).
        out: memory for the result, (..., out) of the dtype of A; not with gradients.
        state: codes to use, if it has any and `has_fp16_weights` is False; gets what was used.
        threshold: see `MatmulLtState`; if it is not 0, `state` gets it.
        bias: (out,).

    Returns:
        (..., out); `out` if it is given.

    Raises:
        UnsupportedTensorError: a tensor has another dtype, shape, layout or device, or codes come
            without an absmax.
        OptionError: the threshold is negative, or gradients are to flow through `out`.
    """
    check_factor("A", A)
    check_tensor("B", B)
    state = MatmulLtState() if state is None else state
    check_threshold(threshold)
    if threshold > 0:
        state.threshold = threshold
    if B.dtype == torch.int8 or state.has_fp16_weights or state.CB is None or state.SCB is None:
        weight = weight_of(B, state.SCB)
    else:
        weight = Weight(state.CB, state.SCB)
    found = product(A, weight, bias, state)
    return found if out is None else _written(found, out)


class Weight(NamedTuple):
    """Codes of a weight, absmax of its rows, and the floats that they are of, if it is floats."""

    codes: Tensor
    absmax: Tensor
    master: Tensor | None = None


def weight_of(given: Tensor, absmax: Tensor | None) -> Weight:
    """The weight in codes; they are made here, if it is floats.

    Args:
        given: floats, or int8 codes (out, in).
        absmax: of codes that do not have it with them, as `SCB`.

    Raises:
        UnsupportedTensorError: codes without absmax.
    """
    if given.dtype != torch.int8:
        codes, found, _ = int8_ops.quantize(given.detach(), 0.0)
        return Weight(codes, found, given)
    own = getattr(given, "SCB", None)
    absmax = absmax if own is None else own
    if absmax is None:
        raise UnsupportedTensorError(
            f"int8 codes of shape {tuple(given.shape)} come without the absmax of their rows: set "
            f"SCB of the weight or of the state, float32 of shape ({len(given)},)"
        )
    return Weight(given.detach(), absmax)


def product(x: Tensor, weight: Weight, bias: Tensor | None, state: MatmulLtState) -> Tensor:
    """The product as `state` wants it made; it gets what was used, but not in compiled code."""
    y, outliers = int8_ops.linear(
        x, *weight, bias, state.threshold, not state.memory_efficient_backward
    )
    if not torch.compiler.is_compiling():
        keep = weight.master is None or not state.memory_efficient_backward
        state.CB, state.SCB = weight[:2] if keep else (None, None)
        state.idx = None
        state.outliers = outliers if state.threshold > 0 else None
    found: Tensor = y
    return found


def matmul_4bit(
    A: Tensor,  # noqa: N803 - the names they have in bitsandbytes
    B: Tensor,  # noqa: N803
    quant_state: QuantState,
    out: Tensor | None = None,
    bias: Tensor | None = None,
) -> Tensor:
    """The product A @ weight.T + bias with a weight in codes, of any registered type.

    Args:
        A: (..., in) float32, bfloat16 or float16, any strides; there may be no rows.
        B: the packed codes of the weight, of any shape and order of strides: (n, 1), or its
            transpose, as it is written for bitsandbytes.
        quant_state: of the weight, whose shape is (out, in).
        out: memory for the result, (..., out) of the dtype of A; not with gradients.
        bias: (out,).

    Returns:
        (..., out), of the dtype of A; `out` if it is given. Gradients flow to A and the bias.

    Raises:
        OptionError: there is no quantization state, or gradients are to flow through `out`.
        QuantizedDataError: codes and state do not fit one another.
        UnsupportedTensorError: a tensor has another dtype, shape or device.
    """
    if not isinstance(quant_state, QuantState):
        raise OptionError(_no_state(quant_state))
    check_factor("A", A)
    check_tensor("B", B)
    shape = quant_state.shape
    if shape is None or len(shape) != 2:
        raise OptionError(
            f"matmul_4bit: quant_state.shape must be 2D (out, in), not {shape and tuple(shape)}"
        )
    parts = quant_state.parts(B.detach().reshape(-1))
    if bias is not None and bias.dtype != A.dtype:
        bias = bias.to(A.dtype)
    columns = A.shape[-1] if A.dim() else None
    found: Tensor
    if columns == shape[0] and columns != shape[1]:
        _warn_of_orientation(tuple(shape))
        label, size = quant_state.label, list(shape)
        found = ops.linear_grad_input(A, parts, label, size)
        found = found if bias is None else found + bias
    else:
        found = ops.linear_product(A, parts, bias, quant_state.label, list(shape))
    return found if out is None else _written(found, out)


def _no_state(given: Any) -> str:
    kind = type(given)
    name = kind.__name__ if kind.__module__ == "builtins" else f"{kind.__module__}.{kind.__name__}"
    known = f"{QuantState.__module__}.{QuantState.__name__}"
    found = (
        f"quant_state is {name}; expected the {known} that quantizing the weight gave: quant_state "
        "is required"
    )
    if hasattr(given, "as_dict"):  # that of bitsandbytes has the same entries
        found += ". bnbx.nn.QuantState.from_dict(quant_state.as_dict(), B.device) makes one of it"
    return found


def _warn_of_orientation(shape: tuple[int, ...]) -> None:
    if not torch.compiler.is_compiling():
        warnings.warn(
            f"matmul_4bit: weight was quantized from a [K, N] tensor (quant_state.shape={shape}). "
            "Quantize the weight as (out_features, in_features): bitsandbytes will refuse others.",
            DeprecationWarning,
            stacklevel=3,
        )


def _written(found: Tensor, out: Tensor) -> Tensor:
    """The result in the memory that was given for it."""
    if found.requires_grad or out.requires_grad:
        raise OptionError(
            "gradients do not flow through `out`: leave it out, or call this under torch.no_grad()"
        )
    if out.shape != found.shape or out.dtype != found.dtype or out.device != found.device:
        raise UnsupportedTensorError(
            f"out is {out.dtype} of shape {tuple(out.shape)} on {out.device}; expected "
            f"{found.dtype} of shape {tuple(found.shape)} on {found.device}"
        )
    return out.copy_(found)


def cast_for_autocast(x: Tensor) -> Tensor:
    """The tensor in the dtype that autocast wants of a product, where it is on.

    Raises:
        UnsupportedTensorError: x is not a tensor of floats.
    """
    check_factor("x", x)
    dtype = autocast_dtype(x) if x.dtype in FLOATS else None
    return x if dtype is None else x.to(dtype)
