"""What a launch is given: the tensors of one plan, with the scalars of one step."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from torch import Tensor

from bnbx.errors import UnsupportedTensorError
from bnbx.kernels.evaluate import HOST, evaluate
from bnbx.kernels.plan import Plan
from bnbx.registry.optimizer import STEP


@dataclass
class Batch:
    """Tensors that share a plan and a step.

    Attributes:
        plan: what to run.
        scalars: float32 values in the order of the signature.
        tensors: per parameter its contiguous tensors, in the order of the signature's pointer
            columns: p, g, then for each state its values, or its codes and absmax.
    """

    plan: Plan
    scalars: npt.NDArray[np.float32]
    tensors: Sequence[tuple[Tensor, ...]]

    def rows(self) -> tuple[npt.NDArray[np.int64], int]:
        """The row table (with its closing row), and the number of chunks."""
        chunk = self.plan.chunk
        table, chunks = [], 0
        for tensors in self.tensors:
            numel = tensors[0].numel()
            pointers = [*map(Tensor.data_ptr, tensors)]
            if numel and 0 in pointers:
                raise UnsupportedTensorError(
                    f"a tensor of {numel} elements has no memory: the storage of the parameter, "
                    "of its gradient or of its state was freed"
                )
            table.append([*pointers, numel, chunks])
            chunks += -(-numel // chunk)
        width = len(table[0]) if table else 2
        table.append([0] * (width - 1) + [chunks])
        return np.array(table, np.int64), chunks


def step_scalars(
    plan: Plan, hyper: Mapping[str, float | bool], step: int
) -> npt.NDArray[np.float32]:
    """The kernel's scalars of a step: step_code and the scalar parts of element code.

    Everything is computed in float64 and rounded once; what is beyond float32 is infinity.
    """
    values: dict[str, float] = {**hyper, STEP: step}
    for statement in plan.spec.step.statements:
        values[statement.target] = evaluate(statement.value, values, HOST)
    scalars = [evaluate(value, values, HOST) for value in plan.lowered.scalars.values()]
    with np.errstate(over="ignore"):
        return np.array(scalars, np.float64).astype(np.float32)
