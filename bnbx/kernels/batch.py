"""What a launch is given: the tensors of one plan, with the scalars of one step."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
from torch import Tensor

from bnbx.errors import UnsupportedTensorError
from bnbx.kernels.memory import is_wrapper, name_of
from bnbx.kernels.plan import Plan
from bnbx.registry.optimizer import STEP

F64 = npt.NDArray[np.float64]


@dataclass
class Batch:
    """Tensors that share a plan and a step.

    Attributes:
        plan: what to run.
        scalars: float32 values in the order of the signature.
        tensors: per parameter its contiguous tensors, in the order of the signature's pointer
            columns: p, g, its residual if the master has one, then for each state its values, or
            its codes and absmax; then the number that gradients are multiplied by (float32).
        inputs: float64 values in the order of the signature.
        seed: of the noise that rounds stochastically; 32 bits.
        found_inf: a number (float32, on the tensors' device) that stops the update where it is
            not zero, or None.
    """

    plan: Plan
    scalars: npt.NDArray[np.float32]
    tensors: Sequence[tuple[Tensor, ...]]
    inputs: F64 = field(default_factory=lambda: np.zeros(0))
    seed: int = 0
    found_inf: Tensor | None = None

    def rows(self) -> tuple[npt.NDArray[np.int64], int]:
        """The row table (with its closing row), and the number of chunks."""
        chunk = self.plan.chunk
        table, chunks = [], 0
        for number, tensors in enumerate(self.tensors):
            numel = tensors[0].numel()
            pointers = [*map(Tensor.data_ptr, tensors)]
            if numel and 0 in pointers:
                tensors = self._written_out(number)
                pointers = [*map(Tensor.data_ptr, tensors)]
            table.append([*pointers, numel, chunks])
            chunks += -(-numel // chunk)
        width = len(table[0]) if table else 2
        table.append([0] * (width - 1) + [chunks])
        return np.array(table, np.int64), chunks

    def _written_out(self, number: int) -> tuple[Tensor, ...]:
        """A parameter's tensors, its gradient in memory if torch has put off to write zeros.

        Raises:
            UnsupportedTensorError: another of them has no memory, or the gradient for another
                reason.
        """
        p, g, *rest = self.tensors[number]
        written = (p, g.clone() if g._is_zerotensor() else g, *rest)
        for what, tensor in zip(("parameter", "gradient"), written, strict=False):
            if is_wrapper(tensor):
                raise UnsupportedTensorError(
                    f"the {what} of {p.numel()} elements is a {name_of(tensor)}, which stands for "
                    "other tensors and has no memory of its own; expected a plain tensor"
                )
        if 0 in map(Tensor.data_ptr, written):
            raise UnsupportedTensorError(
                f"a tensor of {p.numel()} elements has no memory: the storage of the parameter, "
                "of its gradient or of its state was freed"
            )
        self.tensors = [*self.tensors[:number], written, *self.tensors[number + 1 :]]
        return written

    def first_chunks(self) -> list[int]:
        """The number of the chunk that each tensor begins with; noise is numbered by it."""
        found, chunks = [], 0
        for tensors in self.tensors:
            found.append(chunks)
            chunks += -(-tensors[0].numel() // self.plan.chunk)
        return found

    def packed_inputs(self) -> F64:
        """The inputs as a kernel gets them, the seed last."""
        return np.array([*self.inputs, self.seed], np.float64)


def step_scalars(
    plan: Plan, hyper: Mapping[str, float | bool], step: int
) -> tuple[npt.NDArray[np.float32], F64]:
    """The kernel's scalars of a step, and its inputs.

    Everything is computed in float64, and scalars are rounded once; what is beyond float32 is
    infinity.
    """
    scalars, inputs = plan.host({**hyper, STEP: step})
    with np.errstate(over="ignore"):
        return np.array(scalars, np.float32), np.array(inputs, np.float64)


def seed_of(step: int, number: int) -> int:
    """The seed of the noise of a step's batch: 32 bits, far apart for neighbors."""
    mixed = (step * 0x9E3779B97F4A7C15 + number * 0xD1B54A32D192ED03) & (2**64 - 1)
    return ((mixed ^ (mixed >> 29)) * 0xBF58476D1CE4E5B9 >> 32) & 0xFFFFFFFF
