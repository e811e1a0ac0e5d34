"""The optimizers' door: `create` by name, and a class for each familiar name.

Everything here is one engine with arguments; see `bnbx.optimizers.engine.Optimizer8bit`.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from torch.optim.optimizer import ParamsT

from bnbx.errors import OptionError
from bnbx.optimizers.engine import CONSTRUCTOR_ARGUMENTS, Optimizer8bit
from bnbx.registry import Optimizer as OptimizerSpec
from bnbx.registry import optimizers, quant_types
from bnbx.registry.config import check_known, resolve
from bnbx.registry.options import OPTIONS, options_of, unaliased

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
    "RuleOptimizer",
    "SGD8bit",
    "SGD32bit",
    "create",
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
    paged: bool | str = False,
    overrides: Mapping[str, Mapping[str, Any]] | None = None,
    **arguments: Any,
) -> Any:
    """Make the optimizer of a rule: over `params`, or a factory to call with parameters later.

    Args:
        rule: a name ("adamw"; `bnbx.registry.optimizers().names()` lists them) or a spec.
        params: as for any torch optimizer; None for a factory.
        bits: width of the states: 8, 4, or 32 for float32.
        state_types: quant type for all states, or by state ({"m": "linear8"}); overrides `bits`.
        min_8bit_size: parameters with fewer elements keep their states in float32.
        paged: keep states in memory-mapped files (on a CPU) or in host memory (on CUDA);
            "managed" for CUDA's managed memory.
        overrides: {pattern on parameter names: {argument: value}}, for which params have to be
            named: `create("adamw", model.named_parameters(), overrides={"*embed*": {"bits": 32}})`.
        arguments: the rule's hyperparameters, such as lr and betas, and the other options:
            block_wise, percentile_clipping, skip_zeros, max_unorm, master, maximize, page_dir.

    Returns:
        An `Optimizer8bit`, or an `OptimizerFactory` if `params` is None.

    Raises:
        UnknownNameError: an unknown rule, argument, state or quant type; with the nearest.
        OptionError: a value out of range.
    """
    spec = optimizers().get(rule) if isinstance(rule, str) else rule
    if not isinstance(spec, OptimizerSpec):
        raise OptionError(f"rule={rule!r}: expected a name or a bnbx.registry.Optimizer")
    options = {"bits": bits, "state_types": state_types, "min_8bit_size": min_8bit_size}
    chosen = {**arguments, **options, "paged": paged}
    checked = {k: v for k, v in unaliased(chosen).items() if k not in CONSTRUCTOR_ARGUMENTS}
    check_known(spec, checked)
    required = {a: 1e-3 for a in spec.arguments if spec.required(a) and a not in chosen}
    resolve(spec, quant_types(), [("create()", checked), ("the factory's caller", required)])
    factory = OptimizerFactory(spec, {**chosen, "overrides": overrides})
    return factory if params is None else factory(params)


class RuleOptimizer(Optimizer8bit):
    """Base of the familiar classes: a rule and a width of its states, fixed by the class.

        class AdamW8bit(RuleOptimizer, rule="adamw", bits=8): ...

    takes (params, *arguments of the rule in its order, *, bits, state_types, min_8bit_size).
    """

    _spec: ClassVar[OptimizerSpec]

    def __init_subclass__(cls, rule: str | None = None, bits: int = 8, **keywords: Any) -> None:
        super().__init_subclass__(**keywords)
        if rule is None:  # a user's subclass of one of these
            return
        spec = cls._spec = optimizers().get(rule)
        cls.__signature__ = _signature(spec, bits)
        cls.__doc__ = (
            f"{spec.summary[0].upper()}{spec.summary[1:]}, {bits}-bit states ({spec.source}).\n\n"
            "See `Optimizer8bit` for the arguments they have in common."
        )

    __signature__: ClassVar[inspect.Signature]

    def __init__(self, params: ParamsT, *args: Any, **kwargs: Any) -> None:
        check_known(self._spec, kwargs)
        try:
            bound = self.__signature__.bind(params, *args, **kwargs)
        except TypeError as error:
            raise TypeError(f"{type(self).__name__}{self.__signature__}: {error}") from None
        bound.apply_defaults()
        super().__init__(rule=self._spec, **bound.arguments)


def _signature(spec: OptimizerSpec, bits: int) -> inspect.Signature:
    """(params, *arguments of the rule, *, options)."""
    empty, kinds = inspect.Parameter.empty, inspect.Parameter
    parameters = [kinds("params", kinds.POSITIONAL_OR_KEYWORD)]
    for argument in spec.arguments:
        default = spec.default(argument)
        parameters.append(
            kinds(
                argument,
                kinds.POSITIONAL_OR_KEYWORD,
                default=empty if spec.required(argument) else default,
            )
        )
    for option, default in {**options_of(spec), "bits": bits}.items():
        parameters.append(kinds(option, kinds.KEYWORD_ONLY, default=default))
    return inspect.Signature(parameters)


# fmt: off
class Adam(RuleOptimizer, rule="adam", bits=32): ...
class Adam8bit(RuleOptimizer, rule="adam", bits=8): ...
class Adam32bit(RuleOptimizer, rule="adam", bits=32): ...
class AdamW(RuleOptimizer, rule="adamw", bits=32): ...
class AdamW8bit(RuleOptimizer, rule="adamw", bits=8): ...
class AdamW32bit(RuleOptimizer, rule="adamw", bits=32): ...
class Lion(RuleOptimizer, rule="lion", bits=32): ...
class Lion8bit(RuleOptimizer, rule="lion", bits=8): ...
class Lion32bit(RuleOptimizer, rule="lion", bits=32): ...
class SGD(RuleOptimizer, rule="sgd", bits=32): ...
class SGD8bit(RuleOptimizer, rule="sgd", bits=8): ...
class SGD32bit(RuleOptimizer, rule="sgd", bits=32): ...
# fmt: on
