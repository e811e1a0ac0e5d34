"""What is asked of a quantization state that comes from a file, before a kernel reads it."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from bnbx.errors import BnbxError, QuantizedDataError
from bnbx.kernels.encoding import Encoding

if TYPE_CHECKING:
    from bnbx.kernels.quant_state import QuantState


def checked_encoding(state: QuantState, what: str) -> Encoding:
    """The encoding, if the state describes one; errors say what the state is of."""
    try:
        found = state.encoding
        if found.block_size != (state.blocksize or 0):
            raise QuantizedDataError(f"{what}: blocksize={state.blocksize}; {found.describe()}")
        return found
    except QuantizedDataError:
        raise
    except BnbxError as error:
        raise type(error)(f"{what}: {error}") from None


def check_table(state: QuantState, encoding: Encoding, what: str) -> None:
    """Raise QuantizedDataError unless the table is that of the type."""
    expected = torch.tensor(encoding.codebook.levels, dtype=torch.float32, device="cpu")
    code = state.code.cpu() if state.code is not None else expected
    same = code.shape == expected.shape and torch.allclose(
        code, expected, rtol=0, atol=1e-6, equal_nan=True
    )
    for half in (torch.bfloat16, torch.float16):
        if not same and torch.equal(code, expected.to(half).float()):
            raise QuantizedDataError(
                f"{what}: quant_map was cast to {half}, and its scales with it: what belongs to "
                "codes must stay as it is where a state dict is cast"
            )
    if not same:
        raise QuantizedDataError(
            f"{what}: quant_map has {tuple(code.shape)} numbers, {code.flatten()[:4].tolist()}...; "
            f"the registered type has {tuple(expected.shape)}, {expected[:4].tolist()}...: the "
            "file was written with another type of this name"
        )


def check_sizes(state: QuantState, encoding: Encoding, what: str) -> None:
    """Raise QuantizedDataError unless scales are as many as the shape demands."""
    for name, (size, dtype) in encoding.shapes(state.shape or ()).items():
        if name in ("codes", "mean"):
            continue
        found = {
            "scale": state.absmax,
            "center": state.center,
            "tensor_scale": state.tensor_scale,
            "second_scale": state.state2.absmax if state.state2 is not None else None,
        }[name]
        # Without a shape, how many there are is checked where the codes come in.
        count = size[0] if state.shape is not None or found is None else found.numel()
        if found is None or found.numel() != count or found.dtype != dtype:
            kind = "nothing" if found is None else f"{found.dtype} of {found.numel()} elements"
            raise QuantizedDataError(
                f"{what}, of shape {tuple(state.shape or ())}: {name} is {kind}; expected {dtype} "
                f"of {size[0]} elements"
            )
