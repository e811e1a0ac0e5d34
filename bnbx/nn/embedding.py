"""Embeddings under their familiar names: in floats for stable training, and in codes."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bnbx.layers.embedding import QuantEmbedding
from bnbx.nn.linear import Params4bit
from bnbx.optimizers.manager import GlobalOptimManager
from bnbx.registry import QuantType

Device = torch.device | str | int | None


class Embedding(nn.Embedding):
    """`torch.nn.Embedding` for training with 8-bit optimizers.

    The table begins Xavier-uniform, and its optimizer states stay in 32 bits: few of its rows get
    a gradient in one step, which quantized states take badly (arXiv:2110.02861, section 2.3).
    """

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        padding_idx: int | None = None,
        max_norm: float | None = None,
        norm_type: float = 2.0,
        scale_grad_by_freq: bool = False,
        sparse: bool = False,
        _weight: Tensor | None = None,
        device: Device = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        """Make a table; arguments are those of `torch.nn.Embedding`."""
        super().__init__(
            num_embeddings,
            embedding_dim,
            padding_idx,
            max_norm,
            norm_type,
            scale_grad_by_freq,
            sparse,
            _weight,
            device=device,
            dtype=dtype,
        )
        self._keep_states_wide()

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        self._keep_states_wide()  # of a copy, which the manager does not know

    def _keep_states_wide(self) -> None:
        manager = GlobalOptimManager.get_instance()
        manager.register_module_override(self, "weight", {"bits": 32})

    def reset_parameters(self) -> None:
        """Draw the table anew: Xavier-uniform, zeros at `padding_idx`."""
        nn.init.xavier_uniform_(self.weight)
        self._fill_padding_idx_with_zero()


class StableEmbedding(Embedding):
    """`Embedding` with a layer norm of the vectors (arXiv:2110.02861, section 2.3).

    Attributes:
        norm: the layer norm, computed in torch's default dtype.
    """

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        padding_idx: int | None = None,
        max_norm: float | None = None,
        norm_type: float = 2.0,
        scale_grad_by_freq: bool = False,
        sparse: bool = False,
        _weight: Tensor | None = None,
        device: Device = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        """Make a table and a norm; arguments are those of `torch.nn.Embedding`."""
        super().__init__(
            num_embeddings,
            embedding_dim,
            padding_idx,
            max_norm,
            norm_type,
            scale_grad_by_freq,
            sparse,
            _weight,
            device,
            dtype,
        )
        self.norm = nn.LayerNorm(embedding_dim, device=device)

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 - torch's name
        """The normalized vectors, in the dtype of the table."""
        found = super().forward(input)
        wide, norm = torch.get_default_dtype(), self.norm
        if norm.weight.dtype == wide:
            normal: Tensor = norm(found.to(wide))
            return normal.to(self.weight.dtype)
        weight, bias = norm.weight.to(wide), norm.bias.to(wide)
        normal = F.layer_norm(found.to(wide), norm.normalized_shape, weight, bias, norm.eps)
        return normal.to(self.weight.dtype)


class Embedding4bit(QuantEmbedding):
    """A frozen table in 4 bits; any other registered type may be named too.

    It is `bnbx.layers.embedding.QuantEmbedding` with the arguments of bitsandbytes, and unlike
    there it can be saved.
    """

    kind = Params4bit

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        dtype: torch.dtype | None = None,
        quant_type: str | QuantType = "fp4",
        quant_storage: torch.dtype = torch.uint8,
        device: Device = None,
    ) -> None:
        """Make a table of random vectors, not quantized yet.

        Args:
            num_embeddings: rows.
            embedding_dim: columns.
            dtype: of the dense table, and of the vectors.
            quant_type: name of a registered type, or a spec.
            quant_storage: dtype of the codes' memory.
            device: of the dense table; "meta" for none.

        Raises:
            UnknownNameError: no such quant type.
            OptionError: a storage that it cannot have.
        """
        super().__init__(
            num_embeddings,
            embedding_dim,
            quant_type=quant_type,
            quant_storage=quant_storage,
            device=device,
            dtype=dtype,
        )


class _Named(Embedding4bit):
    """Base of the classes of one type."""

    type_name: str

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        dtype: torch.dtype | None = None,
        quant_storage: torch.dtype = torch.uint8,
        device: Device = None,
    ) -> None:
        """As `Embedding4bit`, without the type."""
        super().__init__(
            num_embeddings, embedding_dim, dtype, self.type_name, quant_storage, device
        )


class EmbeddingFP4(_Named):
    """`Embedding4bit` in fp4."""

    type_name = "fp4"


class EmbeddingNF4(_Named):
    """`Embedding4bit` in nf4."""

    type_name = "nf4"
