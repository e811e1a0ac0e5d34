"""The optimizers' door: `create` by name, and a class for each familiar name.

Everything here is one engine with arguments; see `bnbx.optimizers.engine.Optimizer8bit`.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch.optim.optimizer import ParamsT

from bnbx.errors import NotYetError, OptionError
from bnbx.optimizers.engine import Optimizer8bit
from bnbx.registry import Optimizer as OptimizerSpec
from bnbx.registry import optimizers, quant_types
from bnbx.registry.config import OPTIONS, check_known, resolve

__all__ = [
    "SGD",
    "Adam",
    "Adam8bit",
    "Adam32bit",
    "AdamW",
    "AdamW8bit",
    "AdamW32bit",
    "Lion",
    "Lion8bit",
    "Lion32bit",
    "Optimizer8bit",
    "OptimizerFactory",
    "SGD8bit",
    "SGD32bit",
    "create",
    "optimizer_class",
]


@dataclass(frozen=True)
class OptimizerFactory:
    """An optimizer with its arguments chosen; call it with parameters to make one."""

    spec: OptimizerSpec
    arguments: Mapping[str, Any]

    def __call__(self, params: ParamsT, **arguments: Any) -> Optimizer8bit:
        """The optimizer over `params`; arguments given here win."""
        return Optimizer8bit(params, self.spec, **{**self.arguments, **arguments})


def create(
    rule: str | OptimizerSpec,
    params: ParamsT | None = None,
    *,
    bits: int = OPTIONS["bits"],
    state_types: str | Mapping[str, str] | None = None,
    min_8bit_size: int = OPTIONS["min_8bit_size"],
    paged: bool = False,
    **arguments: Any,
) -> Any:
    """Make the optimizer of a rule: over `params`, or a factory to call with parameters later.

    Args:
        rule: a name ("adamw"; `bnbx.registry.optimizers().names()` lists them) or a spec.
        params: as for any torch optimizer; None for a factory.
        bits: width of the states: 8, or 32 for float32.
        state_types: quant type for all states, or by state ({"m": "linear8"}); overrides `bits`.
        min_8bit_size: parameters with fewer elements keep their states in float32.
        paged: keep states in pageable memory; not in this version.
        arguments: the rule's hyperparameters, such as lr and betas.

    Returns:
        An `Optimizer8bit`, or an `OptimizerFactory` if `params` is None.

    Raises:
        UnknownNameError: an unknown rule, argument, state or quant type; with the nearest.
        OptionError: a value out of range.
        NotYetError: paged=True.
    """
    spec = optimizers().get(rule) if isinstance(rule, str) else rule
    if not isinstance(spec, OptimizerSpec):
        raise OptionError(f"rule={rule!r}: expected a name or a bnbx.registry.Optimizer")
    options = {"bits": bits, "state_types": state_types, "min_8bit_size": min_8bit_size}
    chosen = {**arguments, **options}
    check_known(spec, chosen)
    required = {a: 1e-3 for a in spec.arguments if spec.default(a) is None and a not in chosen}
    resolve(spec, quant_types(), [("create()", chosen), ("the factory's caller", required)])
    if paged:
        raise NotYetError(
            "paged=True: paged states are not in this version of bnbx; leave paged out, the "
            "rest of the call stays as it is"
        )
    factory = OptimizerFactory(spec, chosen)
    return factory if params is None else factory(params)


def optimizer_class(name: str, rule: str, bits: int) -> type[Optimizer8bit]:
    """A class of this name: `rule` with states of `bits`, positional arguments in spec order.

    The class takes (params, *arguments of the rule, *, state_types, min_8bit_size), so code
    written for torch.optim's class of that name works unchanged.
    """
    spec = optimizers().get(rule)
    empty = inspect.Parameter.empty
    parameters = [
        inspect.Parameter("params", inspect.Parameter.POSITIONAL_OR_KEYWORD),
        *(
            inspect.Parameter(
                argument,
                inspect.Parameter.POSITIONAL_OR_KEYWORD,
                default=empty if spec.default(argument) is None else spec.default(argument),
            )
            for argument in spec.arguments
        ),
        *(
            inspect.Parameter(option, inspect.Parameter.KEYWORD_ONLY, default=default)
            for option, default in {**OPTIONS, "bits": bits}.items()
        ),
    ]
    signature = inspect.Signature(parameters)

    def construct(self: Optimizer8bit, params: ParamsT, *args: Any, **kwargs: Any) -> None:
        check_known(spec, kwargs)
        try:
            bound = signature.bind(params, *args, **kwargs)
        except TypeError as error:
            raise TypeError(f"{name}{signature}: {error}") from None
        bound.apply_defaults()
        Optimizer8bit.__init__(self, rule=spec, **bound.arguments)

    return type(
        name,
        (Optimizer8bit,),
        {
            "__init__": construct,
            "__module__": __name__,
            "__signature__": signature,
            "__doc__": f"{spec.summary[0].upper()}{spec.summary[1:]}, {bits}-bit states "
            f"({spec.source}).\n\nSee `Optimizer8bit` for the arguments they have in common.",
        },
    )


Adam = optimizer_class("Adam", "adam", bits=32)
Adam8bit = optimizer_class("Adam8bit", "adam", bits=8)
Adam32bit = optimizer_class("Adam32bit", "adam", bits=32)
AdamW = optimizer_class("AdamW", "adamw", bits=32)
AdamW8bit = optimizer_class("AdamW8bit", "adamw", bits=8)
AdamW32bit = optimizer_class("AdamW32bit", "adamw", bits=32)
Lion = optimizer_class("Lion", "lion", bits=32)
Lion8bit = optimizer_class("Lion8bit", "lion", bits=8)
Lion32bit = optimizer_class("Lion32bit", "lion", bits=32)
SGD = optimizer_class("SGD", "sgd", bits=32)
SGD8bit = optimizer_class("SGD8bit", "sgd", bits=8)
SGD32bit = optimizer_class("SGD32bit", "sgd", bits=32)
