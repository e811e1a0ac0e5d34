"""`Optimizer1State` and `Optimizer2State`: bases of optimizers that were made for bitsandbytes.

    super().__init__("adam", params, lr, betas, eps, weight_decay, optim_bits, args, ...)

Arguments are bitsandbytes' in its order, whatever the rule; here they are translated into the
rule's own. Where the rule has no such argument, a value that would change something is an error.
"""

from __future__ import annotations

from collections.abc import Mapping
from inspect import Parameter, Signature
from typing import Any, ClassVar

from bnbx.errors import OptionError
from bnbx.optim.base import Optimizer8bit
from bnbx.optim.legacy_names import betas_of, rule_of
from bnbx.optim.signatures import ARGS, ENGINE, TYPES, bound
from bnbx.optim.values import numbers, plain
from bnbx.registry import Optimizer as OptimizerSpec
from bnbx.registry.options import ALIASES, OPTIONS

TYPES_HERE: Mapping[str, str] = {
    "optimizer_name": "str",
    "lr": "float | Tensor",
    "betas": "Sequence[float] | str",
    "eps": "float",
    "weight_decay": "float",
    "alpha": "float",
    "t_alpha": "float | None",
    "t_beta3": "float | None",
}
ONE_STATE: Mapping[str, Any] = dict(
    lr=1e-3,
    betas=(0.9, 0.0),
    eps=1e-8,
    weight_decay=0.0,
    optim_bits=32,
    args=None,
    min_8bit_size=4096,
    max_unorm=0.0,
    skip_zeros=False,
    is_paged=False,
)
TWO_STATES: Mapping[str, Any] = {
    **ONE_STATE,
    "betas": (0.9, 0.999),
    **dict(alpha=0.0, t_alpha=None, t_beta3=None),
}
BETAS = "betas"
# Of these a rule need not have any.
ELECTIVE = ("eps", "weight_decay", "alpha", "t_alpha", "t_beta3")


def signature_of(defaults: Mapping[str, Any]) -> Signature:
    """(optimizer_name, params, *defaults, *, all other options)."""
    others = {name: value for name, value in OPTIONS.items() if name not in defaults}
    others |= {name: parameter.default for name, parameter in ENGINE.items()}
    others |= {name: defaults[alias] for alias, name in ALIASES.items()}
    named = [(name, Parameter.empty) for name in ("optimizer_name", "params")]
    made = [
        Parameter(name, kind, default=default, annotation=_type_of(name))
        for items, kind in (
            ((*named, *defaults.items()), Parameter.POSITIONAL_OR_KEYWORD),
            (others.items(), Parameter.KEYWORD_ONLY),
        )
        for name, default in items
    ]
    return Signature(made)


def _type_of(name: str) -> str:
    if name in ENGINE:
        return str(ENGINE[name].annotation)
    return TYPES_HERE.get(name) or TYPES[ALIASES.get(name, name)]


class _StateOptimizer(Optimizer8bit):
    """What the two have in common."""

    _defaults: ClassVar[Mapping[str, Any]]
    _places: ClassVar[Signature]
    __signature__: ClassVar[Signature | None]

    def __init_subclass__(cls, defaults: Mapping[str, Any] | None = None, **keywords: Any) -> None:
        super().__init_subclass__(**keywords)
        if defaults is not None:
            cls._defaults = defaults
            cls._places = cls.__signature__ = signature_of(defaults)
        elif "__init__" in vars(cls):
            cls.__signature__ = None  # is in __init__

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        label = type(self).__name__
        given = bound(label, self._places, args, kwargs)
        spec = rule_of(given.pop("optimizer_name"))
        params = given.pop("params")
        values = {ALIASES.get(name, name): value for name, value in self._defaults.items()}
        del values[ARGS]
        values |= plain(label, given)
        own = {name: values.pop(name) for name in (*ELECTIVE, BETAS) if name in values}
        super().__init__(params, spec, **values, **self._translated(spec, own))

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """See the engine's; a group may say `betas` for what the rule calls otherwise."""
        if isinstance(param_group, Mapping):
            lacks = [name for name in ELECTIVE if name not in self.spec.hyper]
            theirs = {name: param_group[name] for name in (*lacks, BETAS) if name in param_group}
            own = {name: value for name, value in param_group.items() if name not in theirs}
            param_group = {**own, **self._translated(self.spec, theirs)}
        super().add_param_group(param_group)

    def _translated(self, spec: OptimizerSpec, values: Mapping[str, Any]) -> dict[str, Any]:
        """The same by the rule's own names.

        Raises:
            OptionError: a value that would change something, of an argument that the rule lacks.
        """
        found = dict(values)
        members = betas_of(spec)
        for name in ELECTIVE:
            if name in found and (name not in spec.hyper or name in members):
                default = self._defaults.get(name)
                _check_neutral(spec, name, found.pop(name), (default, 0.0, None))
        if BETAS not in found:
            return found
        betas = found.pop(BETAS)
        betas = numbers(BETAS, betas) if isinstance(betas, str) else betas
        if not members:
            default = tuple(self._defaults[BETAS])
            _check_neutral(spec, BETAS, betas, (default, (0.0, 0.0)))
            return found
        if spec.packs.get(BETAS) == members:
            return {**found, BETAS: betas}
        if not isinstance(betas, (tuple, list)) or len(betas) != len(members):
            raise OptionError(
                f"{spec.name}: betas={betas!r}: expected {len(members)} numbers "
                f"({', '.join(members)})"
            )
        return {**found, **dict(zip(members, betas, strict=True))}


def _check_neutral(spec: OptimizerSpec, name: str, value: Any, neutral: tuple[Any, ...]) -> None:
    """Raise OptionError for a value that the rule cannot follow."""
    value = tuple(value) if isinstance(value, list) else value
    if not any(value is each or value == each for each in neutral):
        raise OptionError(
            f"{spec.name}: {name}={value!r}, but the rule has no {name}; leave it out"
        )


class Optimizer1State(_StateOptimizer, defaults=ONE_STATE):
    """Base of optimizers with one state, as in bitsandbytes.

    Args:
        optimizer_name: what bitsandbytes calls the rule ("momentum", "lars", "lion", "rmsprop",
            "adagrad", ...), or the name of a registered one. Its "adam" is AdamW.
        params: parameters, named parameters or groups of them; a group may have its own betas.
        lr: learning rate.
        betas: the rule's decay rates: (beta1, beta2), or (momentum, dampening) for "momentum" and
            "lars", or (alpha, momentum) for "rmsprop"; also as text, "(0.9, 0.999)".
        eps, weight_decay: as in the rule, and to be left alone if it has none.
        optim_bits: width of the states.
        args: an object whose attributes of the names of options are taken.
        min_8bit_size, max_unorm, skip_zeros, is_paged: options; see `bnbx.optim.create`, and for
            those that are taken by keyword too. Calls in the order of bitsandbytes before 0.50,
            with percentile_clipping and block_wise after min_8bit_size, work with a warning.

    Raises:
        UnknownNameError: no rule of this name, or no such argument.
        OptionError: a value out of range, or of an argument that the rule does not have.
    """


class Optimizer2State(_StateOptimizer, defaults=TWO_STATES):
    """Base of optimizers with two states, as in bitsandbytes.

    Args:
        optimizer_name: "adam" (which is AdamW), "lamb", "ademamix", or any other rule's name.
        params, lr, betas, eps, weight_decay: see `Optimizer1State`; "ademamix" has three betas.
        optim_bits, args, min_8bit_size, max_unorm, skip_zeros, is_paged: see `Optimizer1State`.
        alpha, t_alpha, t_beta3: those of AdEMAMix.

    Raises:
        UnknownNameError, OptionError: as `Optimizer1State`.
    """
