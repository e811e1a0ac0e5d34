"""State dicts of int8 layers: how entries are read, and checked before a kernel reads them.

    weight         int8 codes, or floats
    SCB            absmax of the rows of codes, float32
    weight_format  uint8 0: rows

They are those of bitsandbytes. A layer takes over either kind of weight, whichever it has itself.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from bnbx.errors import BnbxError, QuantizedDataError
from bnbx.kernels.int8 import check_weight
from bnbx.kernels.state_dict import plain_tensor
from bnbx.layers.int8_params import Int8Params

ROW_FORMAT = 0  # of `weight_format`; there were others, for GPUs, which nothing writes any more
ENTRIES = ("weight", "SCB", "weight_format")


class LoadsInt8(nn.Module):
    """Base of int8 layers: `load_state_dict`."""

    weight: Any

    @property
    def weight_shape(self) -> tuple[int, int]:
        """Of the weight."""
        raise NotImplementedError

    def _keeps_floats(self) -> bool:
        """Whether floats stay floats when they move."""
        return False

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
        entries = {name: state_dict.get(prefix + name) for name in ENTRIES}
        assign = bool(local_metadata.get("assign_to_params_buffers", False))
        taken = False
        if isinstance(entries["weight"], Tensor):  # of anything else torch says what it is
            try:
                taken = self._load_weight(entries, assign)
            except BnbxError as error:
                error_msgs.append(f"{prefix}weight: {error}")
                taken = True
        ours = {prefix + name for name in (ENTRIES if taken else ENTRIES[1:])}
        rest = {name: value for name, value in state_dict.items() if name not in ours}
        lacking: list[str] = []
        super()._load_from_state_dict(
            rest, prefix, local_metadata, strict, lacking, unexpected_keys, error_msgs
        )
        missing_keys += [name for name in lacking if not (taken and name == f"{prefix}weight")]

    def _load_weight(self, entries: Mapping[str, Any], assign: bool) -> bool:
        """Take the entries over; False if torch may copy them: floats to floats.

        Raises:
            BnbxError: they do not fit one another, or not the layer.
        """
        given: Tensor = plain_tensor("the weight", entries["weight"], meta=True, repeats=True)
        _check_format(entries["weight_format"], meta=given.is_meta)
        in_codes = self.weight.dtype == torch.int8
        if torch.int8 not in (given.dtype, self.weight.dtype) and not assign:
            return False
        if tuple(given.shape) != self.weight_shape:
            raise QuantizedDataError(f"shape {tuple(given.shape)}; expected {self.weight_shape}")
        if given.dtype == torch.int8:
            self._take(*_codes(given, entries["SCB"]), assign)
            return True
        if not given.is_floating_point():
            raise QuantizedDataError(f"{given.dtype}; expected int8 codes, or floats")
        if not in_codes:
            kept = self._keeps_floats()
            self.weight = Int8Params(given, requires_grad=kept, has_fp16_weights=kept)
            return True
        given = plain_tensor("the weight", given, repeats=True)
        new = Int8Params(given, requires_grad=False)
        new.quantize(given.device if assign else self.weight.device)
        assert new.SCB is not None
        self._take(new.detach(), new.SCB, assign, given.dtype)
        return True

    def _take(
        self, codes: Tensor, absmax: Tensor, assign: bool, dtype: torch.dtype | None = None
    ) -> None:
        """Become these codes, of floats of this dtype, if that is known."""
        del dtype
        weight = self.weight
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


def _check_format(given: Any, *, meta: bool) -> None:
    """Raise QuantizedDataError unless codes lie in rows, or nobody says how they lie."""
    kind = given
    if isinstance(given, Tensor):
        plain = plain_tensor("weight_format", given, meta=meta)
        if plain.is_meta:
            return  # as all else is
        kind = plain.item() if plain.numel() == 1 else tuple(plain.shape)
    if kind not in (None, ROW_FORMAT, "row"):
        raise QuantizedDataError(
            f"weight_format is {kind!r:.200}: only the 'row' weight format ({ROW_FORMAT}) is "
            "supported; save the checkpoint anew with a current version of bitsandbytes"
        )


def _codes(codes: Tensor, absmax: Any) -> tuple[Tensor, Tensor]:
    """Codes and the absmax of their rows, without gaps in memory."""
    if absmax is None:
        raise QuantizedDataError("int8 codes without the absmax of their rows: no entry 'SCB'")
    absmax = plain_tensor("SCB", absmax, meta=codes.is_meta)
    codes = plain_tensor("the weight", codes, meta=True)
    check_weight(codes, absmax)
    return codes.contiguous(), absmax.reshape(-1).contiguous()
