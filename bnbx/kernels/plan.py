"""What is asked of a kernel: a rule, the dtypes it meets, and how each state is stored.

A plan is immutable and hashable. Tensors whose plans are equal share one kernel and one launch;
everything that a kernel's source depends on is in the plan.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from functools import cached_property

from bnbx.kernels.dtypes import C_TYPES
from bnbx.kernels.host_code import HostFunction, host_function
from bnbx.kernels.lower import Lowered, lower
from bnbx.registry.optimizer import Optimizer, State
from bnbx.registry.quant_type import Codebook, QuantType

DTYPES = tuple(C_TYPES)
MIN_CHUNK = 256
FLOAT_CHUNK = 1024  # elements a worker takes at a time where no state has blocks


@dataclass(frozen=True)
class Storage:
    """How a state is kept: in float32 (`quant_type` None), or as codes and absmax.

    With `block_wise` False one absmax serves the whole tensor.
    """

    state: State
    quant_type: QuantType | None
    block_wise: bool = True

    @property
    def codebook(self) -> Codebook:
        """The table of the codes; only for quantized storage."""
        assert self.quant_type is not None
        return self.quant_type.codebook(signed=self.state.signed)

    @property
    def block_size(self) -> int:
        """Elements that a kernel encodes together; they share one absmax."""
        assert self.quant_type is not None
        return self.quant_type.block_size if self.block_wise else MIN_CHUNK

    @property
    def whole(self) -> bool:
        """Whether one absmax serves the whole tensor."""
        return self.quant_type is not None and not self.block_wise


@dataclass(frozen=True)
class Plan:
    """One kernel: `spec` with its switches fixed, on tensors of these dtypes and storages.

    Attributes:
        spec: the rule; with its `clipped` form where max_unorm is on.
        switches: truth of the switches.
        parameter: dtype of the parameter.
        gradient: dtype of the gradient.
        storages: the active states.
        master: what keeps the bits that a 16-bit parameter loses; see `bnbx.kernels.master`.
        skip_zeros: whether elements with gradient zero stay as they are.
    """

    spec: Optimizer
    switches: tuple[tuple[str, bool], ...]
    parameter: str
    gradient: str
    storages: tuple[Storage, ...]
    master: str = "none"
    skip_zeros: bool = False

    def __hash__(self) -> int:
        return self._hash

    @cached_property
    def _hash(self) -> int:
        """Kept, since every step looks up what belongs to a plan."""
        return hash(tuple(getattr(self, own.name) for own in fields(self)))

    @cached_property
    def lowered(self) -> Lowered:
        """The rule as the kernel runs it."""
        return lower(self.spec, dict(self.switches), skip_zeros=self.skip_zeros)

    @cached_property
    def host(self) -> HostFunction:
        """What gives the kernel's scalars and inputs, from the hyperparameters and the step."""
        lowered = self.lowered
        return host_function(self.spec.step.statements, lowered.scalars.values(), lowered.inputs)

    @cached_property
    def quantized(self) -> tuple[Storage, ...]:
        """The storages that have codes."""
        return tuple(s for s in self.storages if s.quant_type is not None)

    @cached_property
    def whole(self) -> tuple[Storage, ...]:
        """The storages whose codes share one absmax."""
        return tuple(s for s in self.storages if s.whole)

    @cached_property
    def measured(self) -> bool:
        """Whether a first pass has to measure each tensor before a second updates it."""
        return bool(self.lowered.tensor_scalars or self.whole)

    @cached_property
    def chunk(self) -> int:
        """Elements that one worker updates at a time: a whole number of blocks of every state."""
        return max((max(s.block_size, MIN_CHUNK) for s in self.quantized), default=FLOAT_CHUNK)

    @cached_property
    def span(self) -> int:
        """Elements of the shortest block, or of a chunk if that is shorter."""
        return min([self.chunk, *(s.block_size for s in self.quantized)])

    @cached_property
    def longest(self) -> int:
        """Elements of the longest block that is encoded together; 0 where no state is quantized."""
        return max((s.block_size for s in self.quantized), default=0)

    @cached_property
    def codebooks(self) -> tuple[Storage, ...]:
        """One storage for each different codebook; a kernel gets the tables of these, in order."""
        found = {(s.quant_type, s.state.signed, s.whole): s for s in reversed(self.quantized)}
        return tuple(reversed(found.values()))

    def describe(self) -> str:
        """One line: rule, switches, dtypes, storages."""
        on = [name if value else f"no {name}" for name, value in self.switches]
        parts = [self.spec.name, *on, f"{self.parameter} parameters", f"{self.gradient} gradients"]
        parts += [f"{s.state.name}: {_describe(s)}" for s in self.storages]
        parts += [f"master: {self.master}"] if self.master != "none" else []
        parts += ["skip_zeros"] if self.skip_zeros else []
        return ", ".join(parts)


def _describe(storage: Storage) -> str:
    if storage.quant_type is None:
        return "float32"
    return storage.quant_type.name + (" per tensor" if storage.whole else "")


def make_plan(
    spec: Optimizer,
    switches: Mapping[str, bool],
    parameter: str,
    gradient: str,
    types: Mapping[str, QuantType | None],
    *,
    block_wise: bool = True,
    master: str = "none",
    skip_zeros: bool = False,
) -> Plan:
    """The plan for `spec`; `types` gives each active state's quant type, None for float32."""
    storages = tuple(
        Storage(s, types[s.name], block_wise or types[s.name] is None)
        for s in spec.active_states(switches)
    )
    switched = tuple(switches.items())
    return Plan(spec, switched, parameter, gradient, storages, master, skip_zeros)
