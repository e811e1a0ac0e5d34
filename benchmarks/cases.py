"""What is stepped: the parameter shapes of each case, as numbers only.

Importing this imports no torch, so the command line can say what it will do before it does it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Case:
    """A list of parameters.

    Attributes:
        summary: what it stands for.
        shapes: one for each parameter.
        torchao_first_step: seconds that torchao's compiled first step took from an empty cache on
            2 cores of a server; used only to say beforehand how long a run takes.
    """

    summary: str
    shapes: tuple[Shape, ...]
    torchao_first_step: float

    @property
    def parameters(self) -> int:
        """Elements in all."""
        return sum(math.prod(shape) for shape in self.shapes)


def gpt2(layers: int, width: int, vocabulary: int, context: int) -> tuple[Shape, ...]:
    """The parameter tensors of GPT-2, in its order; the output layer shares the embedding."""
    norm: tuple[Shape, ...] = ((width,), (width,))
    layer = (
        *norm,
        *((3 * width, width), (3 * width,)),
        *((width, width), (width,)),
        *norm,
        *((4 * width, width), (4 * width,)),
        *((width, 4 * width), (width,)),
    )
    return ((vocabulary, width), (context, width), *layer * layers, *norm)


CASES: Mapping[str, Case] = {
    "large": Case("two matrices of 4096 x 4096", ((4096, 4096),) * 2, 20.0),
    "single": Case("one vector of 2**24", ((1 << 24,),), 15.0),
    "transformer": Case(
        "GPT-2 small: 12 layers of width 768, with a vocabulary of bytes",
        gpt2(layers=12, width=768, vocabulary=256, context=1024),
        45.0,
    ),
    "tiny": Case("a matrix and two vectors: what a step costs before it computes",
                 ((64, 128), (4096,), (128,)), 30.0),
}  # fmt: skip
