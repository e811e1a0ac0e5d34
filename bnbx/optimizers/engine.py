"""The one engine: a `torch.optim.Optimizer` that runs any rule on any quant types.

It keeps states, resolves hyperparameters, gathers the tensors of a step into batches of equal
plans, and hands them to `bnbx.kernels.launch`. It knows no rule and no type by name.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Hashable, Iterable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.autograd.graph import increment_version
from torch.optim.optimizer import ParamsT

from bnbx.errors import CheckpointError, OptionError, UnknownNameError
from bnbx.kernels.batch import Batch, step_scalars
from bnbx.kernels.launch import launch
from bnbx.kernels.threads import safe_after_fork
from bnbx.optimizers import state as states
from bnbx.optimizers.gather import Gathering, Slots, check_parameter
from bnbx.registry import Optimizer as OptimizerSpec
from bnbx.registry import optimizers, quant_types
from bnbx.registry.config import OPTIONS, Resolved, check_known, resolve
from bnbx.registry.names import closest
from bnbx.registry.optimizer import STEP

# What torch's schedulers write into groups, which may be used again for a new optimizer.
SCHEDULER_KEYS = frozenset(
    "initial_lr base_lr max_lr min_lr swa_lr base_momentum max_momentum".split()
)
FORMAT = 1  # of state dicts; raised when their layout changes


class Optimizer8bit(torch.optim.Optimizer):
    """An optimizer with quantized states, driven by a spec.

    Args:
        params: parameters, named parameters or groups of them, as for any torch optimizer; of
            dtype float32, bfloat16 or float16.
        rule: an optimizer's name in the registry, or a spec.
        bits: width of the states: 32 for float32, else the bits of a default quant type (8).
        state_types: a quant type's name for all states, or by state; overrides `bits`.
        min_8bit_size: parameters with fewer elements keep their states in float32.
        arguments: the rule's hyperparameters, such as lr; a group may override each of them,
            and the options above.

    A parameter's gradient must have its device and shape. A NaN or infinite gradient spreads as in
    torch.optim to its own element at once; where the state is quantized, the block that holds the
    element (256 elements) reads as NaN from the next step on, and no other block is touched.

    Raises:
        UnknownNameError, OptionError: before anything is allocated.
        UnsupportedTensorError: a parameter that cannot be updated.
    """

    def __init__(
        self,
        params: ParamsT,
        rule: str | OptimizerSpec,
        *,
        bits: int = OPTIONS["bits"],
        state_types: str | Mapping[str, str] | None = None,
        min_8bit_size: int = OPTIONS["min_8bit_size"],
        **arguments: Any,
    ) -> None:
        if isinstance(params, torch.nn.Module):
            raise OptionError("params is a module; pass its parameters: model.parameters()")
        if not isinstance(rule, (str, OptimizerSpec)):
            raise OptionError(f"rule={rule!r}: expected a name or a bnbx.registry.Optimizer")
        self.spec = optimizers().get(rule) if isinstance(rule, str) else rule
        options = {"bits": bits, "state_types": state_types, "min_8bit_size": min_8bit_size}
        given = {**arguments, **options}
        check_known(self.spec, arguments)
        defaults = {a: self.spec.default(a) for a in self.spec.arguments}
        resolve(self.spec, quant_types(), [("argument", given)])
        self._resolved: dict[Any, Resolved] = {}
        self._slots = Slots(self.spec)
        super().__init__(params, {k: _plain(v) for k, v in {**defaults, **given}.items()})

    # ---- groups

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group; its own hyperparameters and options win over the optimizer's.

        Raises:
            UnknownNameError: a key that looks like a misspelled argument.
            OptionError: a value out of range.
            UnsupportedTensorError: a parameter that cannot be updated.
        """
        if isinstance(param_group, Mapping):
            self._check_keys(key for key in param_group if key != "params")
            param_group = {key: _plain(value) for key, value in param_group.items()}
        super().add_param_group(param_group)
        try:
            group = self.param_groups[-1]
            self._resolve(group)
            for p in group["params"]:
                check_parameter(p)
        except Exception:
            self.param_groups.pop()
            raise

    def _check_keys(self, keys: Iterable[str]) -> None:
        """Groups may carry tags of their own (schedulers add some), but no near misses."""
        known = (*self.spec.arguments, *OPTIONS)
        for key in keys:
            near = closest(key, known)
            if near and key not in known and key not in SCHEDULER_KEYS:
                raise UnknownNameError(
                    f"parameter group: {self.spec.name} has no argument {key!r}; "
                    f"did you mean {near!r}? It has: {', '.join(known)}"
                )

    def _resolve(self, group: Mapping[str, Any]) -> Resolved:
        """The group's values, checked again whenever one has changed."""
        names = (*self.spec.arguments, *OPTIONS)
        layer = {name: group[name] for name in names}
        key = tuple(map(_hashable, layer.values()))
        found = self._resolved.get(key)
        if found is None:
            if len(self._resolved) >= 256:  # a schedule makes a new learning rate every step
                self._resolved.clear()
            found = resolve(self.spec, quant_types(), [("param group", layer)])
            self._resolved[key] = found
        return found

    # ---- the step

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update every parameter that has a gradient.

        Args:
            closure: computes the loss anew and returns it.

        Returns:
            What the closure returned, else None.

        Raises:
            UnsupportedTensorError: a gradient that cannot be used; then nothing was updated.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        with safe_after_fork():
            self._update()
        return loss

    def _update(self) -> None:
        gathering = Gathering()
        for number, group in enumerate(self.param_groups):
            resolved = self._resolve(group)
            for p in group["params"]:
                if p.grad is not None:
                    self._slots.add(gathering, number, p, self._states_of(p, resolved), resolved)
        batches = []
        for (number, plan_id, step), tensors in gathering.tensors.items():
            plan, resolved = gathering.about[number, plan_id, step]
            batches.append(Batch(plan, step_scalars(plan, resolved.hyper, step), tensors))
        launch(batches)
        for p, updated in gathering.copies:
            p.copy_(updated)
        for p in gathering.updated:  # kernels write behind autograd's back; tell it
            if not p.is_inference():
                increment_version(p)
        for saved in gathering.stepped:
            saved[STEP] += 1

    def _states_of(self, p: Tensor, resolved: Resolved) -> states.ParameterState:
        saved: states.ParameterState = self.state[p]
        if not saved:
            saved[STEP] = 0
        for state in self.spec.active_states(resolved.switches):
            if state.name not in saved:  # new, or switched on by a change of its hyperparameter
                saved.update(states.new_state(p, state, resolved))
        return saved

    # ---- saving

    def state_dict(self) -> dict[str, Any]:
        """As torch's, plus a "bnbx" entry that says which rule and tables the states belong to."""
        saved = super().state_dict()
        names = {n for g in self.param_groups for n in self._resolve(g).state_types.values()}
        tables = {n: t.digest for n in sorted(names) if (t := states.quantized_type(n))}
        saved["bnbx"] = {"format": FORMAT, "rule": self.spec.name, "quant_types": tables}
        return saved

    @torch.no_grad()
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over the states and the groups' values, exactly as they were saved.

        As in torch, the saved values of groups win over those given here: learning rates, and the
        type of states too (an 8-bit checkpoint makes an 8-bit optimizer).

        Raises:
            CheckpointError: it does not fit; then the optimizer is as before.
        """
        try:
            groups, loaded = self._read(state_dict)
        except (TypeError, KeyError, AttributeError, IndexError, RuntimeError) as error:
            raise CheckpointError(
                f"the state dict is malformed: {type(error).__name__}: {error}"
            ) from error
        self._slots.clear()
        self.param_groups = groups
        self.state.clear()
        self.state.update(loaded)
        for post_hook in self._optimizer_load_state_dict_post_hooks.values():
            post_hook(self)

    def _read(
        self, state_dict: dict[str, Any]
    ) -> tuple[list[dict[str, Any]], dict[Tensor, states.ParameterState]]:
        """The groups and states of a state dict, checked; nothing of the optimizer changes."""
        state_dict = dict(state_dict)
        for hook in self._optimizer_load_state_dict_pre_hooks.values():
            state_dict = hook(self, state_dict) or state_dict
        self._check_format(state_dict)
        groups = _merged_groups(self.param_groups, state_dict["param_groups"])
        return groups, self._checked_states(groups, state_dict)

    def _checked_states(
        self, groups: list[dict[str, Any]], state_dict: Mapping[str, Any]
    ) -> dict[Tensor, states.ParameterState]:
        """The saved states by parameter, on its device; nothing of the optimizer changes."""
        loaded: dict[Tensor, states.ParameterState] = {}
        for number, (group, entry) in enumerate(
            zip(groups, state_dict["param_groups"], strict=True)
        ):
            try:
                resolved = self._resolve(group)
            except (OptionError, UnknownNameError) as error:
                raise CheckpointError(f"state dict, group {number}: {error}") from None
            for p, index in zip(group["params"], entry["params"], strict=True):
                if saved := state_dict["state"].get(index):
                    label = f"state dict, group {number}, parameter {index}"
                    if not isinstance(saved, Mapping):
                        raise CheckpointError(f"{label}: {saved!r}; expected a dict of states")
                    saved = {k: _to_device(value, p.device) for k, value in saved.items()}
                    states.check_states(label, p, saved, self.spec.states, resolved)
                    loaded[p] = saved
        return loaded

    def _check_format(self, state_dict: Mapping[str, Any]) -> None:
        about = state_dict.get("bnbx")
        if about is None and _has_our_groups(state_dict):
            return  # torch.distributed.checkpoint keeps states and groups only
        if not isinstance(about, Mapping) or not {"state", "param_groups"} <= set(state_dict):
            raise CheckpointError(
                "this is no state dict of a bnbx optimizer (of torch.optim or bitsandbytes, "
                f"perhaps): it has the keys {sorted(map(str, state_dict))}; expected 'state', "
                "'param_groups' and 'bnbx'"
            )
        if about.get("format") != FORMAT:
            raise CheckpointError(
                f"the state dict has format {about.get('format')!r}; this version of bnbx "
                f"reads format {FORMAT}. Load it with the version that wrote it."
            )
        if about.get("rule") != self.spec.name:
            raise CheckpointError(
                f"the state dict is of rule {about.get('rule')!r}, this optimizer is "
                f"{self.spec.name!r}"
            )
        for name, digest in about.get("quant_types", {}).items():
            if name not in quant_types():
                raise CheckpointError(
                    f"the state dict has states of quant type {name!r}, which is not registered; "
                    "install the plugin that brings it"
                )
            if quant_types().get(name).digest != digest:
                raise CheckpointError(
                    f"the state dict was written with another table for quant type {name!r}; its "
                    "codes would be read as other numbers"
                )

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "spec": self.spec}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self._resolved = {}
        self._slots = Slots(state["spec"])
        super().__setstate__(state)


def _has_our_groups(state_dict: Mapping[str, Any]) -> bool:
    """Whether every group has the options that only bnbx writes."""
    groups = state_dict.get("param_groups") or []
    return "state" in state_dict and all(set(OPTIONS) <= set(g) for g in groups) and bool(groups)


def _hashable(value: Any) -> Any:
    if isinstance(value, Mapping):
        return tuple(sorted(value.items()))
    if isinstance(value, list):
        return tuple(value)
    if isinstance(value, Tensor):
        return float(value)
    return value if isinstance(value, Hashable) else repr(value)


def _plain(value: Any) -> Any:
    """NumPy scalars as Python's own numbers, so that a checkpoint holds nothing else."""
    return value.item() if isinstance(value, np.generic) else value


def _to_device(value: Any, device: torch.device) -> Any:
    """A copy of a tensor, contiguous and on the parameter's device; anything else as it is."""
    if not isinstance(value, Tensor):
        return value
    return value.to(device, copy=True, memory_format=torch.contiguous_format)


def _merged_groups(
    current: list[dict[str, Any]], saved: list[dict[str, Any]]
) -> list[dict[str, Any]]:
    """The saved groups' values with the current groups' parameters."""
    sizes = [[len(g["params"]) for g in groups] for groups in (current, saved)]
    if sizes[0] != sizes[1]:
        raise CheckpointError(
            f"the state dict has groups of {sizes[1]} parameters, the optimizer has {sizes[0]}"
        )
    kept = ("params", "param_names")
    return [
        {**old, **copy.deepcopy({k: v for k, v in new.items() if k not in kept})}
        for old, new in zip(current, saved, strict=True)
    ]
