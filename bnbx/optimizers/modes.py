"""Training and evaluation modes, for rules whose parameters in training are not those to evaluate.

`eval_code` and `train_code` of a spec run here with torch operations: they are no part of a step.
The mode is kept in the groups, as the package schedulefree keeps it: what rebuilds a state dict of
states and groups alone (torch.distributed.checkpoint) hands it on.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, MutableMapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from bnbx.errors import CheckpointError, OptionError
from bnbx.kernels.evaluate import evaluate, tensor_operations
from bnbx.kernels.master import load, store
from bnbx.kernels.signature import RESIDUAL
from bnbx.kernels.threads import safe_after_fork
from bnbx.optimizers.state import check_states, master_of, settle, storage_of, values_of
from bnbx.registry import Optimizer as OptimizerSpec
from bnbx.registry.checks import select
from bnbx.registry.config import Resolved
from bnbx.registry.rule import names

if TYPE_CHECKING:
    from bnbx.optimizers.engine import Optimizer8bit

TRAIN, EVAL = "train", "eval"
KEY = "train_mode"  # of groups, where the rule has modes


class Modes:
    """The modes that the parameters of an optimizer may be in."""

    def __init__(self, spec: OptimizerSpec) -> None:
        self.spec = spec
        self.several = any(code.statements for code in spec.modes.values())

    def of(self, groups: Iterable[Mapping[str, Any]]) -> str:
        """The mode that the parameters of groups are in."""
        training = not self.several or all(group.get(KEY, True) for group in groups)
        return TRAIN if training else EVAL

    def put(self, groups: Iterable[MutableMapping[str, Any]], mode: str) -> None:
        """Say in groups that their parameters are in a mode; nothing if there is one mode."""
        for group in groups if self.several else ():
            group[KEY] = mode == TRAIN

    def saved(self, groups: Iterable[Mapping[str, Any]], header: str | None) -> str:
        """The mode of a state dict with these groups, whose header says `header` if there is one.

        Raises:
            CheckpointError: there is no such mode, or there are two.
        """
        said = {} if header is None else {header: "its header"}
        for number, group in enumerate(groups if self.several else ()):
            value = group.get(KEY)
            if value not in (None, True, False):
                raise CheckpointError(
                    f"state dict, group {number}: {KEY!r} is {value!r}; expected True or False"
                )
            if value is not None:
                said.setdefault(TRAIN if value else EVAL, f"group {number}")
        known = (TRAIN, EVAL) if self.several else (TRAIN,)
        for mode in said:
            if mode not in known:
                raise CheckpointError(
                    f"the state dict is in mode {mode!r}, which {self.spec.name!r} lacks"
                )
        if len(said) > 1:
            words = " and ".join(f"{mode!r} by {where}" for mode, where in said.items())
            raise CheckpointError(f"the state dict is in two modes: {words}")
        return next(iter(said), TRAIN)

    def check_training(self, groups: Iterable[Mapping[str, Any]]) -> None:
        """Raise OptionError if the parameters are those to evaluate."""
        if self.of(groups) != TRAIN:
            raise OptionError(
                f"{self.spec.name}: step() in evaluation mode; call optimizer.train() before "
                "training goes on"
            )

    @torch.no_grad()
    def switch(self, optimizer: Optimizer8bit, mode: str) -> None:
        """Turn the parameters into those of `mode`; nothing if they are already.

        Raises:
            CheckpointError: a state is not what its parameter asks for; then none has changed.
        """
        if mode == self.of(optimizer.param_groups) or not self.several:
            return
        found = []
        for group in optimizer.param_groups:
            values_of = optimizer.resolution.values_in(group)
            for p in group["params"]:
                if saved := optimizer.state.get(p):
                    resolved = values_of(p)
                    label = f"the state of a parameter of shape {tuple(p.shape)}"
                    settle(p, saved, resolved)
                    check_states(label, p, saved, self.spec, resolved)
                    found.append((p, saved, resolved))
        with safe_after_fork():
            for each in found:
                self._run(*each, mode)
        self.put(optimizer.param_groups, mode)

    def _run(self, p: Tensor, saved: dict[str, Any], resolved: Resolved, mode: str) -> None:
        statements = self.spec.modes[mode].statements
        read = {name for s in statements for name in names(s.value)}
        master, residual = master_of(p, resolved), saved.get(RESIDUAL)
        flat = p.reshape(-1)
        values: dict[str, Any] = {}
        for name, number in resolved.hyper.items():
            values[name] = torch.tensor(float(number), dtype=torch.float64, device="cpu")
        for state in self.spec.active_states(resolved.switches):
            if state.name in read:
                storage = storage_of(state, resolved, p.numel())
                value = values_of(storage, saved, p.shape)
                values[state.name] = value.to(p.device).reshape(-1)
        residual = None if residual is None else residual.view(-1)
        values["p"] = load(master, flat, residual)
        operations = tensor_operations(torch.float32, p.device)
        for statement in statements:
            value = select(statement.value, resolved.switches)
            values[statement.target] = evaluate(value, values, operations)
        # To the nearest, whatever the master: noise is for steps.
        new = torch.empty_like(flat)
        store("none" if residual is None else master, values["p"], new, residual, 0, 0)
        p.copy_(new.view_as(p))
