"""The engine with the methods and attributes that code written for bitsandbytes expects.

`args` and `optim_bits` are read by trainers; `init_state`, `update_step` and their kin are called
and overridden by optimizers derived from these. While nothing is overridden a step is the engine's:
all tensors at once. Otherwise it goes through the methods, parameter by parameter.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from bnbx.errors import OptionError
from bnbx.kernels.threads import safe_after_fork
from bnbx.optim.custom import CUSTOM, loaded
from bnbx.optim.legacy_names import betas_of, name_of
from bnbx.optimizers import engine, hooks
from bnbx.optimizers import state as states
from bnbx.optimizers.gather import Item
from bnbx.registry import Optimizer as OptimizerSpec
from bnbx.registry.config import Resolved
from bnbx.registry.optimizer import STEP
from bnbx.registry.options import CLIP

HOOKS = ("init_state", "prefetch_state", "update_step")


@dataclass(frozen=True)
class OptimizerArgs:
    """What an optimizer was made with, by bitsandbytes' names; to be read only."""

    optim_bits: int
    min_8bit_size: int
    percentile_clipping: int
    block_wise: bool
    max_unorm: float
    skip_zeros: bool


class Optimizer8bit(engine.Optimizer8bit):
    """An optimizer with quantized states, driven by a rule.

    Args:
        params: parameters, named parameters or groups of them, as for any torch optimizer; of
            dtype float32, bfloat16 or float16.
        rule: an optimizer's name in the registry, or a spec. In a subclass that defines
            `update_step`, it may be a dict of defaults instead, which groups are filled with.
        optim_bits, is_paged: other names of the options `bits` and `paged`.
        defaults: the dict, by the name that it has in bitsandbytes.
        arguments: the rule's hyperparameters and the options; see
            `bnbx.optimizers.engine.Optimizer8bit`, which also lists the errors.

    Subclasses may override `init_state` and `update_step`, and `step` then goes through them.
    """

    initialized: bool = False  # subclasses that bring a `step` of their own set it
    _running: tuple[Item, Any] | None = None

    def __init_subclass__(cls, **keywords: Any) -> None:
        super().__init_subclass__(**keywords)
        if cls.update_step is not Optimizer8bit.update_step:
            # An update that is not the engine's reads p.grad, so that somebody else has to unscale.
            cls._step_supports_amp_scaling = False

    def __init__(
        self,
        params: ParamsT,
        rule: str | OptimizerSpec | Mapping[str, Any] | None = None,
        optim_bits: int | None = None,
        is_paged: bool | str | None = None,
        *,
        defaults: Mapping[str, Any] | None = None,
        **arguments: Any,
    ) -> None:
        rule = defaults if rule is None else rule
        given = {"optim_bits": optim_bits, "is_paged": is_paged}
        arguments |= {name: value for name, value in given.items() if value is not None}
        if not isinstance(rule, Mapping):
            super().__init__(params, rule, **arguments)  # type: ignore[arg-type]
            return
        if type(self).update_step is Optimizer8bit.update_step:
            raise OptionError(
                f"{type(self).__name__}(params, defaults) is for subclasses that define update_step"
                "; without one, name a rule: Optimizer8bit(params, 'adamw')"
            )
        super().__init__(params, CUSTOM, **{"optim_bits": 32, **arguments})
        self.defaults.update(rule)
        for group in self.param_groups:
            for name, value in rule.items():
                group.setdefault(name, value)

    # ---- attributes

    @property
    def args(self) -> OptimizerArgs:
        """The options by bitsandbytes' names, as they were given for all groups."""
        options = {"optim_bits": self.optim_bits, **self.defaults}
        options.setdefault(CLIP, 0.0)
        return OptimizerArgs(**{name: options[name] for name in OptimizerArgs.__annotations__})

    @property
    def optim_bits(self) -> int:
        """Width of the states, as it was given for all groups."""
        return int(self.defaults["bits"])

    @property
    def is_paged(self) -> bool:
        """Whether states are paged, as it was given for all groups."""
        return bool(self.defaults["paged"])

    @property
    def optimizer_name(self) -> str:
        """What bitsandbytes calls the rule."""
        return name_of(self.spec)

    # ---- one parameter at a time

    def get_config(self, gindex: int, pindex: int, group: Mapping[str, Any]) -> dict[str, Any]:
        """The values that hold for a parameter now, overrides included, by bitsandbytes' names.

        Args:
            gindex: which group.
            pindex: which parameter of the group.
            group: the group, `param_groups[gindex]`.
        """
        p = self.param_groups[gindex]["params"][pindex]
        resolved = self._resolved_in(p, group)
        hyper, options = resolved.hyper, resolved.options
        absent: dict[str, Any] = {"eps": 0.0, "alpha": 0.0, "t_alpha": None, "t_beta3": None}
        if self.spec == CUSTOM:
            own = {name: group[name] for name in self.defaults if name not in options}
        else:
            members = self.spec.packs
            own = {
                argument: tuple(hyper[name] for name in members[argument])
                if argument in members
                else hyper[argument]
                for argument in self.spec.arguments
            }
            own["betas"] = tuple(hyper[name] for name in betas_of(self.spec))
        own |= {name: own[name] or None for name in ("t_alpha", "t_beta3") if name in own}
        clip = {CLIP: hyper.get(CLIP, 0.0)}
        return {**absent, **options, **clip, **own, "optim_bits": options["bits"]}

    @torch.no_grad()
    def init_state(self, group: dict[str, Any], p: Tensor, gindex: int, pindex: int) -> None:
        """Make the states of `p` that are not there yet; `step` is 0."""
        self.state[p].setdefault(STEP, 0)
        self._states_of(p, self._resolved_in(p, group))

    def prefetch_state(self, p: Tensor) -> None:
        """Nothing: the update itself brings paged states to the device, in turn."""

    @torch.no_grad()
    def update_step(self, group: dict[str, Any], p: Tensor, gindex: int, pindex: int) -> None:
        """Update `p`, and only it, by its gradient.

        Entries of `state[p]` that are not the rule's are left alone.

        Raises:
            OptionError: it has no gradient, or the optimizer is in evaluation mode.
            UnsupportedTensorError: a gradient that cannot be used.
        """
        self._modes.check_training(self.param_groups)
        item, scale = self._running or (None, None)
        if item is None or item.p is not p:
            if p.grad is None:
                raise OptionError(f"update_step: a parameter of shape {tuple(p.shape)} has no grad")
            item = Item(p, p, p.grad, self._resolved_in(p, group))
        with safe_after_fork():
            super()._update([item], scale, (gindex << 32) + pindex)

    def get_state_buffer(self, p: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
        """Zeros of the shape of `p`, kept where its states are: paged if they are."""
        make = states.maker(p, self.resolved(p), self.pages)
        return make(states.Entry(p.shape, dtype), 0)

    def check_overrides(self) -> None:
        """Raise if a `GlobalOptimManager` override is wrong; they hold without this call."""
        for group in self.param_groups:
            for p in group["params"]:
                self._resolved_in(p, group)

    def to_gpu(self) -> None:
        """Move states to where their parameters are by now; paged ones stay."""
        for group in self.param_groups:
            for p in group["params"]:
                if self._resolved_in(p, group).options["paged"]:
                    continue
                saved = self.state.get(p, {})
                for key, value in saved.items():
                    if isinstance(value, Tensor):
                        saved[key] = value.to(p.device)

    def _update(self, items: Iterable[Item], grad_scale: Any, first: int = 0) -> None:
        if all(getattr(type(self), name) is getattr(Optimizer8bit, name) for name in HOOKS):
            super()._update(items, grad_scale, first)
            return
        found_inf = getattr(self, "found_inf", None)
        if self._scaling.overflowed(found_inf):
            return
        places = {
            p: (group, p, gindex, pindex)
            for gindex, group in enumerate(self.param_groups)
            for pindex, p in enumerate(group["params"])
        }
        try:
            for item in list(items):
                self._running = (item, grad_scale)
                if not self.state[item.p]:
                    self.init_state(*places[item.p])
                self.prefetch_state(item.p)
                self.update_step(*places[item.p])
        finally:
            self._running = None

    def _resolved_in(self, p: Tensor, group: Mapping[str, Any]) -> Resolved:
        return self.resolution.values_in(group)(p)

    @torch.no_grad()
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """See the engine's; states that a subclass makes itself are taken over as they are."""
        if self.spec != CUSTOM:
            super().load_state_dict(state_dict)
            return
        state_dict = hooks.before_loading(self, state_dict)
        self.param_groups, taken = loaded(self.param_groups, state_dict)
        self.state.clear()
        self.state.update(taken)
        hooks.after_loading(self)
