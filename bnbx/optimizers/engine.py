"""The one engine: a `torch.optim.Optimizer` that runs any rule on any quant types.

It keeps states, resolves each parameter's values, gathers the tensors of a step into batches of
equal plans, and hands them to `bnbx.kernels.launch`. It knows no rule and no type by name.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from bnbx.errors import OptionError
from bnbx.kernels.launch import Choice, choose, launch
from bnbx.kernels.threads import safe_after_fork
from bnbx.optimizers import compiled, hooks, saving
from bnbx.optimizers import state as states
from bnbx.optimizers.clipping import NORMS, clip_factor
from bnbx.optimizers.gather import (
    Gathering,
    Item,
    Slot,
    Slots,
    check_gradient,
    check_parameter,
    is_left_alone,
)
from bnbx.optimizers.manager import GlobalOptimManager
from bnbx.optimizers.modes import Modes
from bnbx.optimizers.overrides import compile_overrides, split_names
from bnbx.optimizers.paging import Pages
from bnbx.optimizers.resolution import Resolution
from bnbx.optimizers.scaling import Scaling, combined, overflow_flag
from bnbx.optimizers.staged import Staging
from bnbx.optimizers.switches import IMPLEMENTATION, check_capture, check_implementation
from bnbx.registry import Optimizer as OptimizerSpec
from bnbx.registry import optimizers, quant_types
from bnbx.registry.config import Resolved, check_known, resolve
from bnbx.registry.optimizer import STEP
from bnbx.registry.options import unaliased

OVERRIDES = "_overrides"  # of parameters, in a pickle: the manager knows those of a process
TYPES = "_quant_types"  # of states, in a pickle: a registered type may be another elsewhere


class Optimizer8bit(torch.optim.Optimizer):
    """An optimizer with quantized states, driven by a spec.

    Args:
        params: parameters, named parameters or groups of them, as for any torch optimizer; of
            dtype float32, bfloat16 or float16.
        rule: an optimizer's name in the registry, or a spec.
        overrides: {pattern on parameter names: {argument: value}}; see `bnbx.optimizers.overrides`.
        page_dir: directory for the files of paged states; see `bnbx.optimizers.paging`.
        foreach, fused: accepted as by torch.optim, where they choose between implementations of
            one result; here every step is fused over all tensors.
        capturable, differentiable: only False.
        arguments: the rule's hyperparameters, such as lr, and the options of
            `bnbx.registry.options`: bits, state_types, min_8bit_size, block_wise, ... A group may
            override each of them.

    A parameter's gradient must have its device and shape. A NaN or infinite gradient spreads as in
    torch.optim to its own element at once; where the state is quantized, the block that holds the
    element reads as NaN from the next step on, and no other block is touched.

    Raises:
        UnknownNameError, OptionError: before anything is allocated.
        UnsupportedTensorError: a parameter that cannot be updated.
    """

    _step_supports_amp_scaling = True  # torch.amp.GradScaler leaves unscaling to the step

    def __init__(
        self,
        params: ParamsT,
        rule: str | OptimizerSpec,
        *,
        overrides: Mapping[str, Mapping[str, Any]] | None = None,
        page_dir: str | os.PathLike[str] | None = None,
        foreach: bool | None = None,
        fused: bool | None = None,
        capturable: bool = False,
        differentiable: bool = False,
        **arguments: Any,
    ) -> None:
        if isinstance(params, torch.nn.Module):
            raise OptionError("params is a module; pass its parameters: model.parameters()")
        if not isinstance(rule, (str, OptimizerSpec)):
            raise OptionError(f"rule={rule!r}: expected a name or a bnbx.registry.Optimizer")
        check_implementation(foreach, fused, capturable, differentiable)
        self.spec = optimizers().get(rule) if isinstance(rule, str) else rule
        given = {name: _plain(value) for name, value in unaliased(arguments).items()}
        check_known(self.spec, given)
        resolve(self.spec, quant_types(), [("argument", given)])
        self._resolution = Resolution(self.spec, given, compile_overrides(overrides))
        self._pages = Pages(page_dir)
        self._start()
        super().__init__(_listed(params), dict(self._resolution.defaults))
        self._resolution.patterns.check_named(self.param_groups)
        self._resolution.patterns.check_all_used(self._resolution.parameter_names.values())

    def _start(self) -> None:
        """What is not saved or pickled."""
        self._slots = Slots(self.spec)
        self._scaling = Scaling()
        self._staging = Staging()
        self._handle = compiled.register(self)
        self._modes = Modes(self.spec)

    # ---- groups

    def __repr__(self) -> str:
        text = super().__repr__()
        if type(self).__name__ != Optimizer8bit.__name__:
            return text
        return text.replace(" (", f" of {self.spec.name} (", 1)  # what `create` makes

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group; its own hyperparameters and options win over the optimizer's.

        Raises:
            UnknownNameError: a key that looks like a misspelled argument.
            OptionError: a value out of range.
            UnsupportedTensorError: a parameter that cannot be updated.
        """
        if isinstance(param_group, Mapping):
            given = {key: _plain(value) for key, value in unaliased(param_group).items()}
            self._resolution.check_keys(key for key in given if key != "params")
            check_implementation(**{key: given[key] for key in IMPLEMENTATION if key in given})
            param_group = split_names(given)
        super().add_param_group(param_group)
        try:
            *others, group = self.param_groups
            self._modes.put([group], self._modes.of(others))
            self._resolution.add_names(group)
            values_of = self._resolution.values_in(group)
            if len(set(group["params"])) < len(group["params"]):
                raise OptionError("a parameter is given twice in one group; give it once")
            for p in group["params"]:
                if is_left_alone(p):
                    continue
                check_parameter(p)
                own = values_of(p)
                states.prepare(p, own, self._pages)
                if p.numel() >= own.min_8bit_size:
                    states.warn_of_signed_tables(self.spec, own)
        except Exception:
            self._resolution.forget(self.param_groups.pop())
            raise

    def resolved(self, p: Tensor) -> Resolved:
        """The values of one of the optimizer's parameters.

        Raises:
            OptionError: it is none of them.
        """
        for group in self.param_groups:
            if any(p is each for each in group["params"]):
                return self._resolution.values_in(group)(p)
        raise OptionError(f"a tensor of shape {tuple(p.shape)} is no parameter of this optimizer")

    def choice(self, p: Tensor, resolved: Resolved | None = None) -> Choice:
        """The target that updates a parameter, and why not a faster one; may compile its kernel."""
        gradient = p.dtype if p.grad is None else p.grad.dtype
        plan = self._slots.plan(p, gradient, resolved or self.resolved(p))
        return choose(plan, p.device.type)

    @property
    def resolution(self) -> Resolution:
        """What resolves the values of groups and parameters."""
        return self._resolution

    @property
    def pages(self) -> Pages:
        """What makes paged states."""
        return self._pages

    @property
    def modes(self) -> Modes:
        """What turns the parameters into those to evaluate, and back."""
        return self._modes

    @property
    def mode(self) -> str:
        """The mode that the parameters are in: train or eval."""
        return self._modes.of(self.param_groups)

    # ---- the step

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None, *, grad_scale: Any = None) -> Any:
        """Update every parameter that has a gradient.

        Args:
            closure: computes the loss anew and returns it.
            grad_scale: a number or tensor that gradients are divided by on the way in, as they
                come out of a scaled loss; they themselves stay as they are.

        Returns:
            What the closure returned, else None.

        Raises:
            UnsupportedTensorError: a gradient that cannot be used; then nothing was updated.
            OptionError: the optimizer is in evaluation mode.
        """
        if torch.compiler.is_compiling():
            return compiled.step_in_graph(self, self._handle, closure, grad_scale)
        self._modes.check_training(self.param_groups)
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        with safe_after_fork():
            self._update(self._with_gradient(), grad_scale)
        return loss

    @torch.no_grad()
    def update(
        self, params: Sequence[Tensor], grads: Sequence[Tensor], places: Sequence[int]
    ) -> None:
        """Update some parameters by these gradients, whatever `p.grad` is.

        Args:
            params: the parameters' memory: themselves, or tensors of their shape and dtype that
                get the new values in their place.
            grads: their gradients.
            places: which parameters they are, counted over all groups.

        Raises:
            UnsupportedTensorError: memory or a gradient that cannot be used; nothing was updated.
            OptionError: the optimizer is in evaluation mode, or has no such parameters.
        """
        self._modes.check_training(self.param_groups)
        every = [(p, group) for group in self.param_groups for p in group["params"]]
        compiled.check_places(places, (len(params), len(grads)), len(every))
        items = []
        for memory, grad, place in zip(params, grads, places, strict=True):
            p, group = every[place]
            compiled.check_memory(p, memory)
            resolved = self._resolution.values_in(group)(p)
            items.append(Item(p, memory, grad, resolved))
        with safe_after_fork():
            self._update(items, None)
        self._opt_called = True  # else torch's schedulers warn: they look out for `step`

    def _update(self, items: Iterable[Item], grad_scale: Any, first: int = 0) -> None:
        """Update items; `first` tells the noise of one call of a step from that of another."""
        check_capture()
        self._scaling.settle()
        found_inf = overflow_flag(getattr(self, "found_inf", None))
        if self._scaling.overflowed(found_inf):
            return
        scale = combined(grad_scale, getattr(self, "grad_scale", None))
        self._pages.check_process()
        gathering = Gathering()
        items = list(items)  # all are resolved, and found good, before anything is kept
        before = [len(self.state.get(item.p, ())) for item in items]
        try:
            slots = [self._slot(item) for item in items]
            for item, slot in zip(items, slots, strict=True):
                factor = self._factor(gathering, item, slot.saved, scale, found_inf)
                self._slots.add(gathering, item, slot, factor)
            batches = gathering.batches(found_inf, first)
        except BaseException:
            self._forget_new(items, before)
            raise
        self._staging.launch(batches, launch)
        gathering.finish()
        self._scaling.remember(found_inf, gathering.stepped)

    def _forget_new(self, items: Sequence[Item], before: Sequence[int]) -> None:
        """Forget the states that were made, as one of the items turned out to be unusable."""
        for item, count in zip(items, before, strict=True):
            saved = self.state.get(item.p, {})
            if len(saved) > count:
                self._slots.forget(item.p)
            while len(saved) > count:
                saved.popitem()
            if not saved:
                self.state.pop(item.p, None)

    def _slot(self, item: Item) -> Slot:
        p, grad, resolved = item.p, item.grad, item.resolved
        saved = self.state.get(p)
        if saved is None or not p.is_contiguous():
            check_parameter(p)
            check_gradient(p, grad)
        # percentile_clipping keeps norms beside, which a slot does not know of
        elif resolved.options["percentile_clipping"] >= 100 and (
            slot := self._slots.kept(p, grad, saved, resolved)
        ):
            return slot
        return self._slots.slot(p, grad, self._states_of(p, resolved), resolved)

    def _with_gradient(self) -> Iterator[Item]:
        for group in self.param_groups:
            values_of = self._resolution.values_in(group)
            for p in group["params"]:
                if p.grad is not None:
                    yield Item(p, p, p.grad, values_of(p))

    def _factor(
        self,
        gathering: Gathering,
        item: Item,
        saved: states.ParameterState,
        grad_scale: Any,
        found_inf: Tensor | None,
    ) -> Tensor:
        """What the kernel multiplies a gradient by."""
        options = item.resolved.options
        factor = self._scaling.factor(item.p.device, options["maximize"], grad_scale)
        percentile = options["percentile_clipping"]
        if percentile < 100:
            step = saved[STEP] + 1
            clip, norms = clip_factor(
                item.grad, saved[NORMS], step, percentile, scale=factor, found_inf=found_inf
            )
            gathering.copies.append((saved[NORMS], norms))
            factor = factor * clip
        return factor

    def _states_of(self, p: Tensor, resolved: Resolved) -> states.ParameterState:
        saved: states.ParameterState = self.state[p]
        if STEP not in saved and not saved.keys() & states.rule_keys(self.spec):
            saved[STEP] = 0  # there may be entries of somebody's own
        for state in self.spec.active_states(resolved.switches):
            if state.name not in saved:  # new, or switched on by a change of its hyperparameter
                make = states.maker(p, resolved, self._pages)
                saved.update(states.new_state(p, state, resolved, make))
        for key in states.engine_entries(p, resolved):
            if key not in saved:
                saved.update(states.new_engine_state(p, key, resolved))
        states.settle(p, saved, resolved)
        return saved

    # ---- evaluation

    def eval(self) -> None:
        """Turn the parameters into those to evaluate, for rules that tell them apart."""
        self._modes.switch(self, "eval")

    def train(self) -> None:
        """Turn the parameters back into those to train; the mode of a new optimizer."""
        self._modes.switch(self, "train")

    # ---- saving

    def state_dict(self, *, save_as: str = "bnbx") -> dict[str, Any]:
        """As torch's, plus a "bnbx" entry that says which rule and tables the states belong to.

        Args:
            save_as: "bnbx", or "bitsandbytes" for what its optimizers load.

        Raises:
            OptionError: another name.
            CheckpointError: that format cannot hold these states.
        """
        self._scaling.settle()
        return saving.written(self, super().state_dict(), save_as)

    @torch.no_grad()
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over states, and the hyperparameters of groups.

        As in torch, the saved hyperparameters win over those given here. How states are stored
        (bits, state_types, paged, ...) is this optimizer's choice: states of another type are
        converted, with a warning.

        Raises:
            CheckpointError: it does not fit; then the optimizer is as before.
        """
        groups, loaded = saving.read(self, state_dict)
        self._slots.clear()
        self.param_groups = groups
        self.state.clear()
        self.state.update(loaded)
        self._resolution.clear()
        hooks.after_loading(self)

    def __getstate__(self) -> dict[str, Any]:
        self._scaling.settle()
        params = (p for group in self.param_groups for p in group["params"])
        own = {"spec": self.spec, "_resolution": self._resolution, "_pages": self._pages}
        own[TYPES] = saving.types_of(self)
        overrides = GlobalOptimManager.get_instance().overrides_of(params)
        return {**super().__getstate__(), **own, OVERRIDES: overrides}

    def __setstate__(self, state: dict[str, Any]) -> None:
        saving.check_types(state.get(TYPES, {}))
        self.spec = state["spec"]
        self._start()
        super().__setstate__({key: state[key] for key in state if key not in (OVERRIDES, TYPES)})
        self._resolution.clear()
        GlobalOptimManager.get_instance().adopt(state.get(OVERRIDES, []))


def _listed(params: Any) -> Any:
    """Parameters that torch takes: pairs of names and tensors go into a group of their own."""
    if isinstance(params, (Tensor, Mapping)):
        return params
    params = list(params)
    if params and all(isinstance(item, tuple) for item in params):
        return [{"params": params}]
    return params


def _plain(value: Any) -> Any:
    """NumPy scalars as Python's own numbers, so that a checkpoint holds nothing else."""
    return value.item() if isinstance(value, np.generic) else value
