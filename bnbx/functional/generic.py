"""The doors for any quant type: `quantize(tensor, "nf4")`, `dequantize`, `fake_quantize`.

`quantize` and `dequantize` are also the names of two functions of bitsandbytes 0.0.24, which know
a type by its table; the arguments tell which is meant.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any, overload

import torch
from torch import Tensor

from bnbx.errors import InputError, OptionError
from bnbx.functional import checks, ops, unscaled
from bnbx.functional.tensor import QuantTensor
from bnbx.kernels.encoding import known_block_size, make_encoding
from bnbx.registry import QuantType

Type = str | QuantType


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _label(quant_type: Any, block_size: Any, signed: Any, double: Any) -> str:
    if not isinstance(quant_type, (str, QuantType)):
        raise InputError(f"quant type {quant_type!r:.200}; expected a name or a QuantType")
    size = known_block_size(block_size)
    if size is None and block_size is not None:
        # Not kept: it is refused, but for a 0, and need not even have a hash.
        return make_encoding(quant_type, block_size, signed=signed, double=bool(double)).label
    return _made(quant_type, size, bool(signed), bool(double))


@lru_cache(maxsize=256)
def _made(quant_type: Type, block_size: int | None, signed: bool, double: bool) -> str:
    return make_encoding(quant_type, block_size, signed=signed, double=double).label


def _seed(stochastic: bool, generator: torch.Generator | None) -> Tensor | None:
    """A number for the noise of stochastic rounding (1,), from the generator."""
    if not stochastic:
        if generator is not None:
            raise OptionError("generator is for stochastic=True")
        return None
    if not isinstance(generator, torch.Generator | None):
        raise OptionError(f"generator={generator!r:.200}; expected a torch.Generator")
    device = "cpu" if generator is None else generator.device
    return torch.randint(0, 1 << 32, (1,), generator=generator, device=device)


@overload
def quantize(
    A: Tensor,  # noqa: N803 - the name it has had since 0.0.24
    code: Type,
    *,
    block_size: int | None = None,
    double: bool = False,
    stochastic: bool = False,
    generator: torch.Generator | None = None,
    signed: bool = True,
    fit: str | None = None,
) -> QuantTensor: ...
@overload
def quantize(
    A: Tensor,  # noqa: N803
    code: Tensor | None = None,
    out: Tensor | None = None,
) -> tuple[Tensor, tuple[Tensor, Tensor]]: ...


def quantize(
    A: Tensor,  # noqa: N803
    code: Type | Tensor | None = None,
    out: Tensor | None = None,
    *,
    block_size: int | None = None,
    double: bool = False,
    stochastic: bool = False,
    generator: torch.Generator | None = None,
    signed: bool = True,
    fit: str | None = None,
) -> Any:
    """Quantize a tensor to any registered type, or, as in bitsandbytes 0.0.24, with a table.

    Args:
        A: float32, bfloat16 or float16, any shape and strides.
        code: a quant type, by name or spec; or a table of 2**bits numbers, None for the signed
            dynamic one, which is what bitsandbytes 0.0.24 takes.
        out: memory for the codes (uint8, the shape of A); with a table only.
        block_size: elements that share a scale, in types with a scale per block; the type's own
            by default. This and what follows is for types only.
        double: whether the scales are quantized too (arXiv:2305.14314, section 3).
        stochastic: whether to round up with a probability that is the place between two numbers,
            so that the mean of many roundings is the number itself. Numbers beyond the type's last
            one, which scales rounded down leave (as in mxfp4), become that one each time.
        generator: where the noise comes from.
        signed: False for the table of numbers that are never negative, in types that have one.
        fit: None for scales by the largest magnitude, "mse" for those of the least squared error.

    Returns:
        A `QuantTensor`. With a table: the codes (uint8, the shape of A), and the pair of absmax
        (0-d, float32; of the whole tensor) and table, for `dequantize`.

    Raises:
        UnknownNameError: no such type; the message lists what there is.
        OptionError: the type cannot be used so.
        InputError: A has another dtype or layout, or code is no table.
    """
    checks.floats("A", A)
    if code is None or isinstance(code, Tensor):
        if block_size is not None or double or stochastic or generator or not signed or fit:
            raise OptionError(
                "quantize(A, code): block_size, double, stochastic, generator, signed and fit go "
                "with a quant type: quantize(A, 'name')"
            )
        return unscaled.quantize_whole(A, code, out)
    if out is not None:
        raise OptionError("out is for quantize with a table; a QuantTensor has its own memory")
    if fit is not None and stochastic:
        raise OptionError("fit rounds to the nearest number; it does not go with stochastic=True")
    label = _label(code, block_size, signed, double)
    seed = _seed(stochastic, generator)
    parts = ops.quantize(A.detach(), label, None, seed, fit)
    return QuantTensor(parts, label, A.shape, A.dtype)


def dequantize(
    A: QuantTensor | Tensor,  # noqa: N803
    quant_state: Any = None,
    absmax: Tensor | None = None,
    code: Tensor | None = None,
    out: Tensor | None = None,
    *,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """The numbers of a `QuantTensor`, or, as in bitsandbytes 0.0.24, of codes and a table.

    Args:
        A: what `quantize` returned: a QuantTensor, or codes (uint8).
        quant_state: (absmax, table), as `quantize` with a table returned it. For a QuantTensor the
            dtype may stand here.
        absmax: of the whole tensor, one float32; where there is no quant_state.
        code: the table; where there is no quant_state, and None for the signed dynamic one.
        out: memory for the numbers, the shape of A.
        dtype: float32, bfloat16 or float16; that of the original by default. For a QuantTensor.

    Returns:
        A tensor of the shape of A; float32, where A are codes and out is not given.

    Raises:
        QuantizedDataError: the parts do not fit one another.
        InputError: another dtype or shape than these.
    """
    if not isinstance(A, QuantTensor):
        if dtype is not None:
            raise OptionError("dtype is for a QuantTensor; codes and a table give float32 or out's")
        return unscaled.dequantize_whole(A, quant_state, absmax, code, out)
    if isinstance(quant_state, torch.dtype) and dtype is None:
        quant_state, dtype = None, quant_state
    if quant_state is not None or absmax is not None or code is not None:
        raise OptionError(
            "a QuantTensor has its scales and table in it; quant_state, absmax and "
            "code are for codes alone"
        )
    return A.dequantize(dtype, out=out)


def fake_quantize(
    x: Tensor,
    quant_type: Type,
    *,
    block_size: int | None = None,
    double: bool = False,
    stochastic: bool = False,
    generator: torch.Generator | None = None,
    signed: bool = True,
) -> Tensor:
    """A tensor as it comes back from codes, with a gradient as if nothing had happened to it.

    The straight-through estimator (arXiv:1308.3432) of quantization-aware training.

    Args:
        x: float32, bfloat16 or float16, any shape.
        quant_type: a registered type, by name or spec.
        block_size: elements that share a scale; the type's own by default.
        double: whether the scales are quantized too.
        stochastic: whether to round stochastically, as in `quantize`.
        generator: where the noise comes from.
        signed: False for the table of numbers that are never negative.

    Returns:
        A tensor of the shape and dtype of x.

    Raises:
        UnknownNameError, OptionError, InputError: as `quantize`.
    """
    checks.floats("x", x)
    label = _label(quant_type, block_size, signed, double)
    found: Tensor = ops.fake_quantize(x, label, None, _seed(stochastic, generator))
    return found
