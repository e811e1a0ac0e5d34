"""The trainings that are compared for quality, as data: torch's AdamW, and bnbx's in 8 and 4 bits.

The last one is a warning: its 4-bit type differs from bnbx's in one number. The smallest entry of
the table for second moments, which bnbx keeps above zero, is zero: so all second moments far below
the largest of their block become zero, and their updates are divided by eps.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Any

import torch

from bnbx import optim
from bnbx.demo.runs import BETAS, LOW_BIT, REFERENCE, WEIGHT_DECAY, Params, Run
from bnbx.registry import QuantType, hookimpl, quant_types
from bnbx.registry.plugins import plugins

PLUGIN = "benchmarks.quality"


class WithZero:
    """A plugin with one type: the default for 4-bit states, with a zero for second moments."""

    def __init__(self) -> None:
        default = quant_types().find(lambda t: t.state_default and t.bits == 4)
        assert default is not None
        levels = default.codebook(signed=False).levels
        least = min(levels)
        table = tuple(0.0 if value == least else value for value in levels)
        self.quant_type = default.model_copy(
            update=dict(
                name="naive4",
                summary="4 bits with a zero in the table of second moments",
                unsigned_values=table,
                state_default=False,
            )
        )

    @hookimpl
    def register_quant_types(self, register: Callable[[QuantType], None]) -> None:
        """Register it."""
        register(self.quant_type)


@lru_cache(maxsize=1)
def with_zero() -> QuantType:
    """The naive type, registered the first time."""
    plugin = WithZero()
    plugins().load(PLUGIN, plugin)
    return plugin.quant_type


def _adamw(**options: Any) -> Callable[[Params, float], torch.optim.Optimizer]:
    def make(params: Params, lr: float) -> torch.optim.Optimizer:
        optimizer: torch.optim.Optimizer = optim.create(
            "adamw", params, lr=lr, betas=BETAS, weight_decay=WEIGHT_DECAY, **options
        )
        return optimizer

    return make


def runs() -> tuple[Run, ...]:
    """What is trained; the first is the one that others are compared with."""
    return (
        REFERENCE,
        LOW_BIT,
        Run("bnbx-4bit", "bnbx AdamW, 4 bits", _adamw(bits=4)),
        Run("naive-4bit", "naive 4 bits, with a zero", _adamw(state_types=with_zero().name)),
    )
