"""The optimizers that the demo compares, as data.

The three runs differ in the optimizer and in nothing else. linear8 is the warning example: its
codes are evenly spaced, so a second moment far below its block's largest is stored as zero.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch

from bnbx import optim

BETAS = (0.9, 0.99)
WEIGHT_DECAY = 0.1

Params = Iterable[torch.nn.Parameter]


@dataclass(frozen=True)
class Run:
    """One training run: `label` names it everywhere, `make` builds its optimizer at a rate."""

    key: str
    label: str
    make: Callable[[Params, float], torch.optim.Optimizer]


def _torch_adamw(params: Params, lr: float) -> torch.optim.Optimizer:
    # Fused is torch's fastest step; the comparison should be with that one.
    return torch.optim.AdamW(params, lr=lr, betas=BETAS, weight_decay=WEIGHT_DECAY, fused=True)


def _bnbx_adamw(**options: Any) -> Callable[[Params, float], torch.optim.Optimizer]:
    def make(params: Params, lr: float) -> torch.optim.Optimizer:
        optimizer: torch.optim.Optimizer = optim.create(
            "adamw", params, bits=8, lr=lr, betas=BETAS, weight_decay=WEIGHT_DECAY, **options
        )
        return optimizer

    return make


REFERENCE = Run("torch-32bit", "torch AdamW, 32 bits", _torch_adamw)
LOW_BIT = Run("bnbx-8bit", "bnbx AdamW, 8 bits", _bnbx_adamw())
WARNING = Run("bnbx-linear8", "bnbx AdamW, linear8", _bnbx_adamw(state_types="linear8"))

RUNS = (REFERENCE, LOW_BIT, WARNING)
