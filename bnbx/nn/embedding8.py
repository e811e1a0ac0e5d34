"""The int8 embedding, `Embedding8bit`: a scale for each row, as in int8 linear layers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from typing_extensions import Self

from bnbx.errors import QuantizedDataError
from bnbx.kernels.fakes import check_meta
from bnbx.kernels.memory import moved
from bnbx.layers.int8_params import Int8Params, absmax_of
from bnbx.layers.int8_saving import ROW_FORMAT, LoadsInt8
from bnbx.layers.moving import MovingModule

LARGEST = 127.0  # the code that absmax gets


class Embedding8bit(LoadsInt8, MovingModule, nn.Embedding):
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

    @property
    def weight_shape(self) -> tuple[int, int]:
        """Of the table."""
        return self.num_embeddings, self.embedding_dim

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
        codes = F.embedding(ids, weight.detach())
        found = F.embedding(ids, absmax.reshape(-1, 1))
        # By a tensor: CUDA multiplies by the inverse of a number, which rounds twice.
        step = found / torch.full((), LARGEST, dtype=found.dtype, device=found.device)
        return (codes * step).to(self.dtype)

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
            destination[f"{prefix}weight_format"] = torch.tensor(
                ROW_FORMAT, dtype=torch.uint8, device="cpu"
            )

    def _take(
        self, codes: Tensor, absmax: Tensor, assign: bool, dtype: torch.dtype | None = None
    ) -> None:
        super()._take(codes, absmax, assign, dtype)
        self._keep()
