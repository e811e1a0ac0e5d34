"""The optimizer spec: states, hyperparameters and rule text.

From it come the C++ and CUDA kernels, the torch reference, the constructor's signature, the
checks of its arguments and the layout of its state. All checks that need no values are made
when the spec is made; see `bnbx.registry.checks`.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property
from types import MappingProxyType
from typing import Annotated, Any

from pydantic import AfterValidator, BeforeValidator, Field, PlainSerializer, model_validator
from typing_extensions import Self

from bnbx.registry.checks import bare_conditions, check_spec
from bnbx.registry.formats import FormatTable, check_formats
from bnbx.registry.hyper import Hyper, rate
from bnbx.registry.options import CLIP
from bnbx.registry.rule import Code, parse
from bnbx.registry.spec import Frozen, Spec

PARAMETER, GRADIENT, STEP, UPDATE = "p", "g", "step", "u"


def _no_number(value: object) -> object:
    if isinstance(value, (int, float)):
        raise ValueError(f"{value!r} is a number; expected the name of a hyperparameter, or None")
    return value


def _several(value: object) -> object:
    if isinstance(value, Frozen):  # as in `(State(name="m"))`
        kind = type(value).__name__
        raise ValueError(f"a single {kind}; write a tuple, with a comma: ({kind}(...),)")
    return value


HyperName = Annotated[str | None, BeforeValidator(_no_number)]
FrozenTable = Annotated[
    Mapping[str, str],
    AfterValidator(lambda table: MappingProxyType(dict(table))),
    PlainSerializer(dict),
]


class State(Frozen):
    """A tensor kept per parameter, of the parameter's shape.

    Attributes:
        name: as the rule text uses it, and the key in `optimizer.state[p]`.
        signed: False if it never goes below zero; an unsigned quant table then has twice the
            resolution.
        when: name of a hyperparameter; the state exists only while that is not zero.
        initial: its value before the first step: a hyperparameter's, "p" for that of the
            parameter, or None for zero.
        quantized: False for a state that is as precise as the parameter itself and stays float32
            whatever type is asked for.
        saved_as: its key in checkpoints of other libraries, by library; `key[i]` is the i-th of
            several states that are stacked under one key.
    """

    name: str
    signed: bool = True
    when: HyperName = None
    initial: HyperName = None
    quantized: bool = True
    saved_as: FrozenTable = Field(default_factory=dict, validate_default=True)

    @classmethod
    def written(cls, value: object) -> str:
        """A state of this name."""
        return f"State(name={value!r})" if isinstance(value, str) else 'State(name="m")'

    def __hash__(self) -> int:
        return hash((self.name, self.signed, self.when, self.initial, self.quantized))


class Constraint(Frozen):
    """A condition between hyperparameters, in the rule language, that must hold."""

    condition: str
    message: str

    @classmethod
    def written(cls, value: object) -> str:
        """One with this condition."""
        condition = value if isinstance(value, str) else "beta1 < beta2"
        return f"Constraint(condition={condition!r}, message=...)"


HyperTable = Annotated[
    Mapping[str, Hyper],
    AfterValidator(lambda table: MappingProxyType(dict(table))),
    PlainSerializer(dict),
]
PackTable = Annotated[
    Mapping[str, tuple[str, ...]],
    AfterValidator(lambda table: MappingProxyType(dict(table))),
    PlainSerializer(dict),
]


class Optimizer(Spec):
    """An update rule.

    Attributes:
        step_code: runs on the host in float64 once a step; sees the hyperparameters and `step` (1
            on the first).
        element_code: runs on the device in float32 for each element; sees also `p` (the
            parameter), `g` (its gradient), the states, and the results of step_code. It writes
            every state. Scalar parts of it (`1 - beta1`, `lr / c1`) are computed in float64 on
            the host, rounded once.
        tensor_code: runs on the device in float64 once a tensor, after element_code has run for
            all of its elements; sees `numel` and, for any name x of element_code, `norm_x`, the
            Euclidean norm of x over the tensor.
        apply_code: runs for each element after tensor_code, and sees what both have computed. `p`
            is written in apply_code if there is one, else in element_code.
        eval_code, train_code: what `optimizer.eval()` and `optimizer.train()` do to `p`, for
            rules whose parameters in training are not the ones to evaluate.
        packs: joins hyperparameters into tuples that users pass and groups store under one name,
            such as betas.
        saved_as: how other libraries write its parameter groups, by "library.Class".
    """

    states: Annotated[tuple[State, ...], BeforeValidator(_several)] = ()
    hyper: HyperTable
    packs: PackTable = Field(default_factory=dict, validate_default=True)
    constraints: Annotated[tuple[Constraint, ...], BeforeValidator(_several)] = ()
    step_code: str = ""
    element_code: str
    tensor_code: str = ""
    apply_code: str = ""
    eval_code: str = ""
    train_code: str = ""
    saved_as: FormatTable = Field(default_factory=dict, validate_default=True)

    @model_validator(mode="after")
    def _check(self) -> Self:
        check_spec(self)
        check_formats(self)
        return self

    @cached_property
    def step(self) -> Code:
        """Parsed `step_code`."""
        return parse(self.step_code, "step_code")

    @cached_property
    def element(self) -> Code:
        """Parsed `element_code`."""
        return parse(self.element_code, "element_code")

    @cached_property
    def tensor(self) -> Code:
        """Parsed `tensor_code`."""
        return parse(self.tensor_code, "tensor_code")

    @cached_property
    def apply(self) -> Code:
        """Parsed `apply_code`."""
        return parse(self.apply_code, "apply_code")

    @cached_property
    def modes(self) -> Mapping[str, Code]:
        """Parsed `eval_code` and `train_code`, by mode."""
        codes = {"eval": self.eval_code, "train": self.train_code}
        return {mode: parse(code, f"{mode}_code") for mode, code in codes.items()}

    @cached_property
    def sections(self) -> tuple[Code, ...]:
        """The sections that a step runs, in order."""
        return (self.step, self.element, self.tensor, self.apply)

    @cached_property
    def switches(self) -> tuple[str, ...]:
        """Hyperparameters whose truth is compiled in: flags, and conditions of states."""
        statements = [s for code in self.sections for s in code.statements]
        bare = {name for s in statements for name in bare_conditions(s) if name in self.hyper}
        bare |= {state.when for state in self.states if state.when}
        bare |= {name for name, hyper in self.hyper.items() if hyper.flag}
        return tuple(name for name in self.hyper if name in bare)

    @cached_property
    def arguments(self) -> tuple[str, ...]:
        """What users pass: hyperparameters in order, each pack in the place of its first."""
        packed = {name: pack for pack, members in self.packs.items() for name in members}
        return tuple(dict.fromkeys(packed.get(name, name) for name in self.hyper))

    def default(self, argument: str) -> Any:
        """The default of an argument, None if it is required or optional."""
        if argument not in self.packs:
            return self.hyper[argument].default
        values = tuple(self.hyper[name].default for name in self.packs[argument])
        return None if None in values else values

    def required(self, argument: str) -> bool:
        """Whether users have to give an argument."""
        return any(self.hyper[name].required for name in self.packs.get(argument, (argument,)))

    def active_states(self, switches: Mapping[str, bool]) -> tuple[State, ...]:
        """The states that exist when the switches have these truth values."""
        return tuple(s for s in self.states if s.when is None or switches[s.when])

    @property
    def clips_itself(self) -> bool:
        """Whether the rule has a `max_unorm` of its own."""
        return CLIP in self.hyper

    @property
    def can_clip(self) -> bool:
        """Whether the norm of its update can be bounded: it has an update `u` and apply_code."""
        return not self.clips_itself and UPDATE in self.element.writes and bool(self.apply_code)

    @cached_property
    def clipped(self) -> Optimizer:
        """The rule with the norm of its update bounded by max_unorm times that of the parameter.

        As bitsandbytes' max_unorm, but a parameter that is zero throughout may leave zero.
        """
        names = {*self.element.writes, *self.tensor.writes, *self.apply.writes, *self.hyper}
        names |= {*self.step.writes, *(state.name for state in self.states)}
        clip = "clip_u"
        while clip in names:
            clip += "u"
        # an update that has no norm, since one gradient is no number, moves nothing else
        scale = (
            f"{clip} = where(norm_p > 0, where(norm_u > {CLIP} * norm_p, "
            f"{CLIP} * norm_p / norm_u, 1), 1)\n"
            f"{clip} = where(norm_u >= 0, {clip}, 0)"
        )
        return self.model_copy(
            update=dict(
                hyper={**self.hyper, CLIP: rate(0.0)},
                tensor_code=f"{self.tensor_code}\n{scale}",
                apply_code=f"{UPDATE} = {clip} * {UPDATE}\n{self.apply_code}",
            )
        )
