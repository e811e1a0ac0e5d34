"""`create`: the optimizer of any rule by name, or a factory to call with parameters later."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, overload

from torch.optim.optimizer import ParamsT

from bnbx.errors import OptionError
from bnbx.optim.base import Optimizer8bit
from bnbx.optim.signatures import ENGINE, check_names
from bnbx.optim.values import with_numbers
from bnbx.registry import Optimizer as OptimizerSpec
from bnbx.registry import optimizers, quant_types
from bnbx.registry.config import resolve
from bnbx.registry.options import OPTIONS, options_of, unaliased


@dataclass(frozen=True)
class OptimizerFactory:
    """An optimizer with its arguments chosen; call it with parameters to make one."""

    spec: OptimizerSpec
    arguments: Mapping[str, Any]

    def __call__(self, params: ParamsT, **arguments: Any) -> Optimizer8bit:
        """The optimizer over `params`; arguments given here win."""
        given = with_numbers(self.spec, unaliased(arguments))
        return Optimizer8bit(params, self.spec, **{**self.arguments, **given})


@overload
def create(
    rule: str | OptimizerSpec, params: None = None, **arguments: Any
) -> OptimizerFactory: ...


@overload
def create(rule: str | OptimizerSpec, params: ParamsT, **arguments: Any) -> Optimizer8bit: ...


def create(
    rule: str | OptimizerSpec,
    params: ParamsT | None = None,
    *,
    bits: int | None = None,
    state_types: str | Mapping[str, str] | None = None,
    min_8bit_size: int = OPTIONS["min_8bit_size"],
    paged: bool | str | None = None,
    overrides: Mapping[str, Mapping[str, Any]] | None = None,
    **arguments: Any,
) -> OptimizerFactory | Optimizer8bit:
    """Make the optimizer of a rule: over `params`, or a factory to call with parameters later.

    Args:
        rule: a name ("adamw"; `bnbx.registry.optimizers().names()` lists them) or a spec.
        params: as for any torch optimizer; None for a factory.
        bits: width of the states: 8 (the default), 4, or 32 for float32.
        state_types: quant type for all states, or by state ({"m": "linear8"}); overrides `bits`.
        min_8bit_size: parameters with fewer elements keep their states in float32.
        paged: keep states in memory-mapped files (on a CPU) or in host memory (on CUDA);
            "managed" for CUDA's managed memory. Default: False.
        overrides: {pattern on parameter names: {argument: value}}, for which params have to be
            named: `create("adamw", model.named_parameters(), overrides={"*embed*": {"bits": 32}})`.
        arguments: the rule's hyperparameters, such as lr and betas, and the other options:
            block_wise, percentile_clipping, skip_zeros, max_unorm, master, maximize, page_dir;
            also optim_bits and is_paged, bitsandbytes' names of bits and paged.

    Returns:
        An `Optimizer8bit`, or an `OptimizerFactory` if `params` is None.

    Raises:
        UnknownNameError: an unknown rule, argument, state or quant type; with the nearest.
        OptionError: a value out of range.
    """
    spec = optimizers().get(rule) if isinstance(rule, str) else rule
    if not isinstance(spec, OptimizerSpec):
        raise OptionError(f"rule={rule!r}: expected a name or a bnbx.registry.Optimizer")
    options = {"bits": bits, "paged": paged, "state_types": state_types}
    if min_8bit_size != OPTIONS["min_8bit_size"]:
        options["min_8bit_size"] = min_8bit_size
    given = {**arguments, **{name: value for name, value in options.items() if value is not None}}
    chosen = with_numbers(spec, unaliased(given))
    check_names(spec.name, chosen, [*spec.arguments, *options_of(spec), *ENGINE])
    checked = {name: value for name, value in chosen.items() if name not in ENGINE}
    required = {a: 1e-3 for a in spec.arguments if spec.required(a) and a not in chosen}
    resolve(spec, quant_types(), [("create()", checked), ("the factory's caller", required)])
    factory = OptimizerFactory(spec, {**chosen, "overrides": overrides})
    return factory if params is None else factory(params)
