"""What one demo is asked to do; free of torch, because the command line reads it for its help."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum


class Size(str, Enum):
    """The models that `--size` offers."""

    TINY = "tiny"
    SMALL = "small"
    MEDIUM = "medium"


@dataclass(frozen=True)
class Shape:
    """The shape of a model, and the peak learning rate that suits its width."""

    width: int
    layers: int
    heads: int
    context: int
    """Bytes that the model looks at, which is also the length of a training window."""
    lr: float


SHAPES = {
    Size.TINY: Shape(width=64, layers=2, heads=2, context=64, lr=4e-3),
    Size.SMALL: Shape(width=160, layers=4, heads=5, context=128, lr=3e-3),
    Size.MEDIUM: Shape(width=256, layers=6, heads=8, context=256, lr=2e-3),
}

MIN_STEPS = 5
"""Fewer steps would leave nothing to time once the warm-up steps are set aside."""

MAX_SEED = 2**32 - 1


@dataclass(frozen=True)
class Settings:
    """Everything that the three runs share."""

    size: Size = Size.SMALL
    steps: int = 400
    batch_size: int = 16
    seed: int = 0
    threads: int | None = None
    """None leaves the number of CPU threads to torch."""

    @property
    def shape(self) -> Shape:
        """The model that `size` names."""
        return SHAPES[self.size]
