"""What outlier columns are for: activations as large transformers have them.

arXiv:2208.07339 (section 3): from 6.7 billion parameters on, a handful of feature dimensions, the
same for nearly all tokens, reach magnitudes of 20 and more (up to 60 in its figures) where the
others are normal and of a magnitude of one to three. Here: 4096 dimensions, three of them with
magnitudes around 20, 40 and 60 in three quarters of the tokens, and a weight as torch makes it.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn

from bnbx.layers.int8 import Linear8bitLt
from compiled import shared_cache

COLUMNS, OUTS, TOKENS = 4096, 256, 128
OUTLIERS = {117: 20.0, 1400: -40.0, 3071: 60.0}


@pytest.fixture(scope="module", autouse=True)
def _cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with shared_cache(tmp_path_factory):
        yield


def activations() -> Tensor:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(TOKENS, COLUMNS, generator=generator).clamp(-5.5, 5.5)
    for column, magnitude in OUTLIERS.items():
        present = torch.rand(TOKENS, generator=generator) < 0.75
        spread = 1 + 0.1 * torch.randn(TOKENS, generator=generator)
        x[:, column] = torch.where(present, magnitude * spread, x[:, column])
    return x


def error(threshold: float, dtype: torch.dtype) -> float:
    torch.manual_seed(0)
    dense = nn.Linear(COLUMNS, OUTS)
    made = Linear8bitLt(COLUMNS, OUTS, has_fp16_weights=False, threshold=threshold)
    made.load_state_dict(dense.state_dict())
    made.to("cpu")
    x = activations().to(dtype)
    with torch.no_grad():
        got, expected = made(x).double(), dense.double()(x.double())
    if threshold:
        assert made.state.idx is not None
        assert made.state.idx.tolist() == list(OUTLIERS)
    return float((got - expected).norm() / expected.norm())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_outlier_columns_in_floats_keep_the_product_within_a_hundredth(dtype: torch.dtype) -> None:
    decomposed, plain = error(6.0, dtype), error(0.0, dtype)
    assert decomposed <= 1e-2
    assert plain >= 10 * decomposed
