"""One embedding with a table in codes, for any registered type: `QuantEmbedding`.

A lookup decodes the rows that it returns and no others. An embedding is half of a small model's
memory, so it may share its weight with the output layer, as dense models do: assign the parameter
to a `QuantLinear`, or pass it to `torch.nn.functional.linear`.
"""

from __future__ import annotations

import warnings

import torch
from torch import Tensor, nn

from bnbx.errors import BnbxWarning
from bnbx.kernels.fit import check_method
from bnbx.layers.module import QuantizedModule
from bnbx.layers.parameter import QuantParameter
from bnbx.layers.products import look_up
from bnbx.registry import QuantType


class QuantEmbedding(QuantizedModule, nn.Embedding):
    """A table of vectors, (num_embeddings, embedding_dim), quantized and frozen.

    The table begins dense and is quantized when the layer moves to a device, `.to("cpu")`
    included. ids are int64 or int32 of any shape; the result is (*ids.shape, embedding_dim), of
    the dtype that the dense table had, or that the layer was converted to.

    Attributes:
        quant_storage: dtype of the codes' memory.
        quant_state: scales, type and shape of the table; None until it is quantized.
    """

    kind: type[QuantParameter] = QuantParameter
    """The class of the weight."""

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        padding_idx: int | None = None,
        quant_type: str | QuantType = "nf4",
        block_size: int | None = None,
        double: bool = False,
        quant_storage: torch.dtype = torch.uint8,
        device: torch.device | str | int | None = None,
        dtype: torch.dtype | None = None,
        *,
        fit: str | None = None,
    ) -> None:
        """Make a table of random vectors, not quantized yet.

        Args:
            num_embeddings: rows.
            embedding_dim: columns.
            padding_idx: a row that begins as zeros.
            quant_type: name of a registered type, or a spec.
            block_size: elements that share a scale; the type's own by default.
            double: whether scales are quantized too.
            quant_storage: dtype of the codes' memory.
            device: of the dense table; "meta" for none.
            dtype: of the dense table.
            fit: how scales are chosen, see `bnbx.kernels.fit`; None for absmax.

        Raises:
            UnknownNameError: no such quant type.
            OptionError: a block size or storage that the type cannot have, or no such `fit`.
        """
        super().__init__(num_embeddings, embedding_dim, padding_idx, device=device, dtype=dtype)
        check_method(fit)
        self.quant_state = None
        self.fit = fit
        self.quant_storage = quant_storage
        self.weight = self.kind(
            self.weight.data,
            quant_type=quant_type,
            blocksize=block_size,
            compress_statistics=double,
            quant_storage=quant_storage,
            module=self,
        )
        size = self.weight.blocksize
        if size and embedding_dim % size:
            warnings.warn(
                f"Embedding size {embedding_dim} is not divisible by block size {size}: blocks of "
                "the table cross its rows, which makes lookups slower",
                BnbxWarning,
                stacklevel=2,
            )

    @property
    def weight_shape(self) -> tuple[int, int]:
        """Of the dense table."""
        return self.num_embeddings, self.embedding_dim

    @property
    def dtype(self) -> torch.dtype:
        """Of the vectors."""
        state = getattr(self.weight, "quant_state", None) or self.quant_state
        found: torch.dtype | None = self.weight.dtype if state is None else state.dtype
        return found or torch.float32

    def forward(self, ids: Tensor) -> Tensor:
        """The vectors of ids.

        Raises:
            QuantizedDataError: the table is not quantized yet.
            UnsupportedTensorError: ids are not int64 or int32.
            IndexError: an id that the table does not have.
        """
        weight = self.weight
        if not getattr(weight, "bnb_quantized", False) and weight.is_meta:
            return nn.functional.embedding(ids, weight)  # shapes only
        return look_up(ids, weight.detach(), self.state_of_weight())

    def to_dense(self, dtype: torch.dtype | None = None) -> nn.Embedding:
        """A `torch.nn.Embedding` with the dequantized table, frozen."""
        weight = self.dequantized_weight(dtype)
        new = nn.Embedding(
            self.num_embeddings,
            self.embedding_dim,
            self.padding_idx,
            device="meta",
            dtype=weight.dtype,
        )
        new.weight = nn.Parameter(weight, requires_grad=False)
        return new.train(self.training)

    def extra_repr(self) -> str:
        """Sizes, and how the table is kept."""
        return f"{super().extra_repr()}, {self.how()}"
