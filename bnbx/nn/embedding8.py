"""The int8 embedding, `Embedding8bit`: a scale for each row, as in int8 linear layers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from typing_extensions import Self

from bnbx.errors import BnbxError, QuantizedDataError, UnsupportedTensorError
from bnbx.kernels.fakes import check_meta
from bnbx.kernels.memory import moved
from bnbx.layers.int8 import ROW_FORMAT
from bnbx.layers.int8_params import Int8Params, absmax_of
from bnbx.layers.moving import MovingModule

LARGEST = 127.0  # the code that absmax gets


class Embedding8bit(MovingModule, nn.Embedding):
    """A frozen table in int8, each row with its own absmax.

    The table begins dense and is quantized when the layer moves to a device, `.to("cpu")`
    included. Its state dict has the entries of `Linear8bitLt`: `weight`, `SCB`, `weight_format`.

    Attributes:
        dtype: of the vectors; it follows conversions of the layer.
    """

    weight: Any
    dtype: torch.dtype

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        device: torch.device | str | int | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        """Make a table of random vectors, not quantized yet.

        Args:
            num_embeddings: rows.
            embedding_dim: columns.
            device: of the dense table; "meta" for none.
            dtype: of the dense table, and of the vectors.
        """
        super().__init__(num_embeddings, embedding_dim, device=device, dtype=dtype)
        self.dtype = self.weight.dtype
        self._kept: Tensor | None = None
        self.weight = Int8Params(self.weight.data, has_fp16_weights=False, requires_grad=False)

    def __setattr__(self, name: str, value: Any) -> None:
        """As in torch; the absmax of a weight is kept here too, see `absmax_of`."""
        super().__setattr__(name, value)
        if name == "weight":
            self._keep()

    def _keep(self) -> None:
        absmax = getattr(self.weight, "SCB", None)
        if absmax is not None:
            self._kept = absmax

    def forward(self, ids: Tensor) -> Tensor:
        """The vectors, (*ids.shape, embedding_dim).

        Raises:
            QuantizedDataError: the table is not quantized yet.
            DeviceError: some of it, or the ids alone, are on the meta device.
        """
        weight = self.weight
        if weight.is_meta and weight.dtype != torch.int8:
            return F.embedding(ids, weight)  # shapes only
        absmax = self._absmax()
        if ids.is_meta or weight.is_meta or absmax.is_meta:
            named = (("ids", ids), ("weight", weight), ("SCB", absmax))
            check_meta(type(self).__name__, named, anywhere=("ids",))
        step = absmax.reshape(-1, 1) / LARGEST
        codes = F.embedding(ids, weight.detach())
        return (codes * F.embedding(ids, step)).to(self.dtype)

    def _absmax(self) -> Tensor:
        if self.weight.dtype != torch.int8:
            raise QuantizedDataError(
                'the Embedding layer is not quantized yet: move it to a device, such as .to("cpu") '
                "or .cuda(), after its weights are loaded"
            )
        return absmax_of(self.weight, self._kept, type(self).__name__)

    def dequantized_weight(self, dtype: torch.dtype | None = None) -> Tensor:
        """The dense table, in the dtype of the vectors or in another."""
        found: Tensor = self.weight.dequantize(dtype or self.dtype)
        return found

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """As in torch; a dtype reaches the vectors, the absmax goes where the codes go."""
        super()._apply(fn, recurse)
        weight = self.weight
        self.dtype = fn(torch.empty(0, dtype=self.dtype, device=weight.device)).dtype
        if isinstance(weight, Int8Params) and weight.SCB is not None:
            weight.CB = weight.data
            weight.SCB = moved(weight.SCB, weight.device)
            self._keep()
        elif self._kept is not None:
            self._kept = moved(self._kept, weight.device)
        return self

    # ---- state dicts

    def _save_to_state_dict(
        self, destination: dict[str, Any], prefix: str, keep_vars: bool
    ) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        weight = self.weight
        if weight.dtype == torch.int8 and not (weight.is_meta and weight.SCB is None):
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
        names = ("weight", "SCB", "weight_format")
        given, absmax, kind = (state_dict.get(prefix + name) for name in names)
        kind = int(kind) if isinstance(kind, Tensor) else kind
        assign = bool(local_metadata.get("assign_to_params_buffers", False))
        plain = given is None or torch.int8 not in (given.dtype, self.weight.dtype)
        rest = {
            key: value
            for key, value in state_dict.items()
            if key not in [prefix + name for name in (names[1:] if plain else names)]
        }
        lacking: list[str] = []
        super()._load_from_state_dict(
            rest, prefix, local_metadata, strict, lacking, unexpected_keys, error_msgs
        )
        if plain:
            missing_keys += lacking
            if isinstance(self.weight, Int8Params):
                return
            # torch assigned a plain parameter
            self.weight = Int8Params(self.weight.data, has_fp16_weights=False, requires_grad=False)
            return
        try:
            self._take(given, absmax, kind, assign)
        except BnbxError as error:
            error_msgs.append(f"{prefix}weight: {error}")

    def _take(self, given: Any, absmax: Any, kind: Any, assign: bool) -> None:
        """Become these codes, or quantize these numbers."""
        shape = (self.num_embeddings, self.embedding_dim)
        if kind not in (None, ROW_FORMAT, "row"):
            raise QuantizedDataError(f"weight_format is {kind!r}; expected {ROW_FORMAT}: rows")
        if tuple(given.shape) != shape:
            raise QuantizedDataError(f"shape {tuple(given.shape)}; expected {shape}")
        if self.weight.is_meta and not assign and not given.is_meta:
            raise QuantizedDataError(
                "the layer is on the meta device, where nothing can be copied to; pass assign=True "
                "to load_state_dict, or call to_empty(device=...) first"
            )
        device = given.device if assign else self.weight.device
        new = Int8Params(given.detach(), requires_grad=False)
        if given.dtype != torch.int8:
            if not given.is_floating_point():
                raise UnsupportedTensorError(f"{given.dtype}; expected int8 codes, or floats")
            new.quantize(device)
        else:
            if not isinstance(absmax, Tensor) or absmax.numel() != shape[0]:
                found = tuple(absmax.shape) if isinstance(absmax, Tensor) else absmax
                raise QuantizedDataError(
                    f"int8 codes with SCB={found!r:.80}; expected the absmax of {shape[0]} rows"
                )
            scale = absmax.detach().reshape(-1).to(device, torch.float32, copy=not assign)
            new.adopt(given.detach().to(device, copy=not assign), scale)
        if isinstance(self.weight, Int8Params) and not assign and not self.weight.is_meta:
            self.weight.adopt(new.detach(), new.SCB)
            self._keep()
        else:
            self.weight = new
