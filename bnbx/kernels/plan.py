"""What is asked of a kernel: a rule, the dtypes it meets, and how each state is stored.

A plan is immutable and hashable. Tensors whose plans are equal share one kernel and one launch;
everything that a kernel's source depends on is in the plan.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

from bnbx.kernels.lower import Lowered, lower
from bnbx.registry.optimizer import Optimizer, State
from bnbx.registry.quant_type import Codebook, QuantType

DTYPES = ("float32", "bfloat16", "float16")
MIN_CHUNK = 256
FLOAT_CHUNK = 1024  # elements a worker takes at a time where no state has blocks


@dataclass(frozen=True)
class Storage:
    """How a state is kept: in float32 (`quant_type` None), or as codes and absmax."""

    state: State
    quant_type: QuantType | None

    @property
    def codebook(self) -> Codebook:
        """The table of the codes; only for quantized storage."""
        assert self.quant_type is not None
        return self.quant_type.codebook(signed=self.state.signed)

    @property
    def block_size(self) -> int:
        """Elements that share one absmax; only for quantized storage."""
        assert self.quant_type is not None
        return self.quant_type.block_size


@dataclass(frozen=True)
class Plan:
    """One kernel: `spec` with its switches fixed, on tensors of these dtypes and storages."""

    spec: Optimizer
    switches: tuple[tuple[str, bool], ...]
    parameter: str
    gradient: str
    storages: tuple[Storage, ...]

    @cached_property
    def lowered(self) -> Lowered:
        """The element code as the kernel runs it."""
        return lower(self.spec, dict(self.switches))

    @cached_property
    def quantized(self) -> tuple[Storage, ...]:
        """The storages that have codes."""
        return tuple(s for s in self.storages if s.quant_type is not None)

    @cached_property
    def chunk(self) -> int:
        """Elements that one worker updates at a time: a whole number of blocks of every state."""
        return max((max(s.block_size, MIN_CHUNK) for s in self.quantized), default=FLOAT_CHUNK)

    @cached_property
    def span(self) -> int:
        """Elements of the shortest block, or of a chunk if that is shorter."""
        return min([self.chunk, *(s.block_size for s in self.quantized)])

    @cached_property
    def codebooks(self) -> tuple[Storage, ...]:
        """One storage for each different codebook; a kernel gets the tables of these, in order."""
        found = {(s.quant_type, s.state.signed): s for s in reversed(self.quantized)}
        return tuple(reversed(found.values()))

    def describe(self) -> str:
        """One line: rule, switches, dtypes, storages."""
        on = [name if value else f"no {name}" for name, value in self.switches]
        states = [
            f"{s.state.name}: {s.quant_type.name if s.quant_type else 'float32'}"
            for s in self.storages
        ]
        parts = [self.spec.name, *on, f"{self.parameter} parameters", f"{self.gradient} gradients"]
        return ", ".join(parts + states)


def make_plan(
    spec: Optimizer,
    switches: Mapping[str, bool],
    parameter: str,
    gradient: str,
    types: Mapping[str, QuantType | None],
) -> Plan:
    """The plan for `spec`; `types` gives each active state's quant type, None for float32."""
    storages = tuple(Storage(s, types[s.name]) for s in spec.active_states(switches))
    return Plan(spec, tuple(switches.items()), parameter, gradient, storages)
