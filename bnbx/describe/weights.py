"""Trained weights that quant types are tried on: small, shipped with bnbx, and made by its demo.

`weights.npy` holds every other row of three matrices of the third block of the demo's model (size
small, 600 steps of torch's AdamW from seed 0 on the source of Python 3.11's standard library), as
float16: query, key and value (240 rows), attention out (80), feed in (320).
`python -m bnbx.describe.weights` trains them again, which takes minutes.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bnbx.demo.settings import Size

PATH = Path(__file__).with_name("weights.npy")
SIZE = Size.SMALL
STEPS = 600
BLOCK = 2


@lru_cache(maxsize=1)
def trained_weights() -> Tensor:
    """The weights (640, 160), float32."""
    return torch.from_numpy(np.load(PATH, allow_pickle=False)).float()


def train_weights() -> Tensor:
    """Train the demo's model once more; the weights (640, 160) of its third block."""
    from bnbx.demo.corpus import load_corpus
    from bnbx.demo.runs import REFERENCE, Run
    from bnbx.demo.settings import Settings
    from bnbx.demo.train import train

    settings = Settings(SIZE, STEPS)
    parameters: list[Any] = []

    def make(params: Iterable[Any], rate: float) -> torch.optim.Optimizer:
        parameters.extend(params)
        return REFERENCE.make(parameters, rate)

    corpus = load_corpus(window=settings.shape.context)
    train(Run("weights", "weights", make), corpus, settings, lambda *_: None)
    width, per_block = settings.shape.width, 8  # two norms of two, four matrices
    block = parameters[1 + per_block * BLOCK : 1 + per_block * (BLOCK + 1)]
    matrices = [p.detach() for p in block if p.dim() == 2 and p.shape[1] == width]
    return torch.cat(matrices)[::2]


if __name__ == "__main__":
    np.save(PATH, train_weights().half().numpy())
