"""Training and evaluation modes, for rules whose parameters in training are not those to evaluate.

`eval_code` and `train_code` of a spec run here with torch operations: they are no part of a step.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from bnbx.errors import OptionError
from bnbx.kernels.evaluate import evaluate, tensor_operations
from bnbx.optimizers.state import storage_of, values_of
from bnbx.registry import Optimizer as OptimizerSpec
from bnbx.registry.checks import select
from bnbx.registry.config import Resolved
from bnbx.registry.rule import names

if TYPE_CHECKING:
    from bnbx.optimizers.engine import Optimizer8bit


class Modes:
    """The mode that the parameters of an optimizer are in."""

    def __init__(self, spec: OptimizerSpec) -> None:
        self.spec = spec
        self.mode = "train"

    def check_training(self) -> None:
        """Raise OptionError if the parameters are those to evaluate."""
        if self.mode != "train":
            raise OptionError(
                f"{self.spec.name}: step() in evaluation mode; call optimizer.train() before "
                "training goes on"
            )

    @torch.no_grad()
    def switch(self, optimizer: Optimizer8bit, mode: str) -> None:
        """Turn the parameters into those of `mode`; nothing if they are already."""
        if not self.spec.modes[mode].statements or mode == self.mode:
            return
        for group in optimizer.param_groups:
            for p in group["params"]:
                if saved := optimizer.state.get(p):
                    self._run(p, saved, optimizer.resolved(p), mode)
        self.mode = mode

    def _run(self, p: Tensor, saved: dict[str, Any], resolved: Resolved, mode: str) -> None:
        statements = self.spec.modes[mode].statements
        read = {name for s in statements for name in names(s.value)}
        values: dict[str, Any] = {"p": p.float()}
        for name, number in resolved.hyper.items():
            values[name] = torch.tensor(float(number), dtype=torch.float64)
        for state in self.spec.active_states(resolved.switches):
            if state.name in read:
                storage = storage_of(state, resolved, p.numel())
                values[state.name] = values_of(storage, saved, p.shape).to(p.device)
        operations = tensor_operations(torch.float32, p.device)
        for statement in statements:
            value = select(statement.value, resolved.switches)
            values[statement.target] = evaluate(value, values, operations)
        p.copy_(values["p"])
