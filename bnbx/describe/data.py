"""The data that quant types are tried on, the same on every machine.

Normal and Laplace numbers are quantiles at evenly spaced probabilities, in an order that a
permutation of integers gives: no generator of floats, which differ between processors, takes part.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache
from types import MappingProxyType

import torch
from torch import Tensor

from bnbx.describe.weights import trained_weights

ROWS, COLUMNS = 512, 256

LABELS: Mapping[str, str] = MappingProxyType(
    {"normal": "normal", "laplace": "Laplace", "weights": "trained weights"}
)
"""What the data sets are called, by key."""


@lru_cache(maxsize=1)
def data_sets() -> Mapping[str, Tensor]:
    """By key: float32 matrices whose rows are what a scale per row covers."""
    return MappingProxyType(
        {
            "normal": torch.special.ndtri(_probabilities(0)).float(),
            "laplace": _laplace(_probabilities(1)).float(),
            "weights": trained_weights(),
        }
    )


def _probabilities(seed: int) -> Tensor:
    """(ROWS, COLUMNS) float64: the middles of as many equal shares, shuffled."""
    generator = torch.Generator().manual_seed(seed)
    count = ROWS * COLUMNS
    order = torch.randperm(count, generator=generator, device="cpu")
    return ((order.double() + 0.5) / count).view(ROWS, COLUMNS)


def _laplace(probability: Tensor) -> Tensor:
    below = 2 * torch.minimum(probability, 1 - probability)
    return -below.log() * (probability - 0.5).sign()
