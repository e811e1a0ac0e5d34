"""What an optimizer does with each parameter, and what its states cost: `explain` and `report`.

Both only read: no state is made by asking, and states that do not exist yet are given with the
bytes that they will take. The results are plain values; `str` and `rich.print` show them as tables.
"""

from __future__ import annotations

import math
import shutil
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol, TypeVar

from torch import Tensor

from bnbx.errors import OptionError, UnknownNameError
from bnbx.optimizers import state as states
from bnbx.optimizers.gather import is_left_alone
from bnbx.optimizers.overrides import names_of
from bnbx.optimizers.resolution import ARGUMENT, GROUP, Resolution
from bnbx.registry import Optimizer as OptimizerSpec
from bnbx.registry.config import DEFAULT, Resolved
from bnbx.registry.names import nearest
from bnbx.registry.quant_type import FLOAT32

if TYPE_CHECKING:
    from rich.console import Console, ConsoleOptions, RenderResult

    from bnbx.kernels.launch import Choice

WIDTH = 100  # columns of `str`, or those of the terminal if it has fewer
CODES, FULL = "codes", "float32 states"
FROZEN = "frozen: it gets no gradient"
T = TypeVar("T")


class Explained(Protocol):
    """What is asked of an optimizer."""

    spec: OptimizerSpec
    param_groups: list[dict[str, Any]]
    state: defaultdict[Tensor, Any]

    @property
    def resolution(self) -> Resolution:
        """What gives the values of parameters."""

    def choice(self, p: Tensor, resolved: Resolved) -> Choice:
        """The target that updates a parameter of these values."""


class Value(NamedTuple):
    """An argument's value, and the layer that it came from."""

    value: Any
    origin: str


@dataclass(frozen=True)
class ParameterExplanation:
    """What happens to one parameter.

    Attributes:
        name: its name, or its place ("group 0, parameter 3") if it has none.
        values: every argument and option.
        state_types: by state, the quant type that holds it, or "float32".
        states_why: why these differ from what the values say; empty if they do not.
        state_bytes: by key of `optimizer.state[p]`; of the tensors there, or those to come.
        state_exists: whether they are there.
        target: what updates it: "cpu", "cuda", "reference".
        why: why that and no faster target.
        float32_bytes: what its states would take in float32.
    """

    name: str
    group: int
    shape: tuple[int, ...]
    dtype: str
    device: str
    values: Mapping[str, Value]
    state_types: Mapping[str, str]
    states_why: str
    state_bytes: Mapping[str, int]
    state_exists: bool
    target: str
    why: str
    float32_bytes: int

    @property
    def numel(self) -> int:
        """Elements of the parameter."""
        return math.prod(self.shape)

    @property
    def bytes_by_kind(self) -> dict[str, int]:
        """The bytes of its states by what they are: codes, absmax, float32 states, others."""
        found: Counter[str] = Counter()
        for key, size in self.state_bytes.items():
            found[_kind(key, self.state_types)] += size
        return dict(found)


class _Rendered:
    """Shown as text: by `str`, and by rich wherever it prints."""

    def _parts(self) -> Iterable[Any]:
        raise NotImplementedError

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        yield from self._parts()

    def __str__(self) -> str:
        import io

        from rich.console import Console

        width = min(WIDTH, shutil.get_terminal_size((WIDTH, 0)).columns)
        console = Console(file=io.StringIO(), width=width, color_system=None, legacy_windows=False)
        with console.capture() as captured:
            console.print(self)
        return captured.get().rstrip("\n")


@dataclass(frozen=True)
class MemoryReport(_Rendered):
    """The memory of an optimizer's states, summed.

    Attributes:
        parameters: how many are updated; frozen ones are not counted, and have no states.
        elements: of these.
        bytes_by_kind: codes, absmax, float32 states, and whatever else a rule keeps.
        existing_bytes: of the states that exist; the others will take the rest.
        float32_bytes: what the same states would take in float32.
    """

    rule: str
    parameters: int
    elements: int
    bytes_by_kind: Mapping[str, int]
    existing_bytes: int
    float32_bytes: int

    @property
    def total_bytes(self) -> int:
        """Of all states, those to come included."""
        return sum(self.bytes_by_kind.values())

    @property
    def bytes_per_parameter(self) -> float:
        """Bytes of state for each element of a parameter; 0 if there are none."""
        return self.total_bytes / self.elements if self.elements else 0.0

    @property
    def saved_bytes(self) -> int:
        """How many fewer these are than in float32; negative if they are more."""
        return self.float32_bytes - self.total_bytes

    @property
    def saving(self) -> float:
        """The same as a fraction of `float32_bytes`; 0 if there are no states."""
        return self.saved_bytes / self.float32_bytes if self.float32_bytes else 0.0

    def _parts(self) -> Iterable[Any]:
        from rich.table import Table
        from rich.text import Text

        title = f"{self.rule}: {self.elements:,} elements, parameters: {self.parameters:,}"
        table = Table(title=Text(title))
        table.add_column("states")
        for heading in ("bytes", "per element"):
            table.add_column(heading, justify="right")
        lines = [*sorted(self.bytes_by_kind.items()), ("total", self.total_bytes)]
        for what, size in (*lines, ("in float32", self.float32_bytes)):
            each = size / self.elements if self.elements else 0.0
            style = "bold" if what == "total" else None
            table.add_row(Text(what), f"{size:,}", f"{each:.3f}", style=style)
        yield table
        yield Text(f"saved: {self.saved_bytes:,} bytes ({self.saving:.1%})")
        if self.existing_bytes < self.total_bytes:
            yield Text(f"{self.existing_bytes:,} bytes exist; first gradients make the rest")


@dataclass(frozen=True)
class Explanation(_Rendered):
    """What an optimizer does with each parameter; `explanation["name"]` finds one."""

    rule: str
    parameters: tuple[ParameterExplanation, ...]
    common: Mapping[str, Value] = field(repr=False)
    """The most frequent value of each argument: what a row of the table leaves out."""

    def __getitem__(self, name: str) -> ParameterExplanation:
        """The parameter of this name.

        Raises:
            UnknownNameError: there is none; with the nearest.
        """
        for parameter in self.parameters:
            if parameter.name == name:
                return parameter
        known = [parameter.name for parameter in self.parameters]
        raise UnknownNameError(f"the optimizer has no parameter {name!r}{nearest(name, known)}")

    @property
    def memory(self) -> MemoryReport:
        """The sums."""
        updated = [p for p in self.parameters if p.states_why != FROZEN]
        kinds: Counter[str] = Counter()
        for parameter in updated:
            kinds.update(parameter.bytes_by_kind)
        return MemoryReport(
            rule=self.rule,
            parameters=len(updated),
            elements=sum(parameter.numel for parameter in updated),
            bytes_by_kind=dict(kinds),
            existing_bytes=sum(sum(p.state_bytes.values()) for p in updated if p.state_exists),
            float32_bytes=sum(parameter.float32_bytes for parameter in updated),
        )

    def _parts(self) -> Iterable[Any]:
        from rich.table import Table
        from rich.text import Text

        yield Text(f"{self.rule}, for every parameter unless its row says otherwise:")
        for argument, (value, origin) in self.common.items():
            yield Text(f"  {argument}={_short(value)} ({origin})")
        table = Table()
        for heading in ("parameter", "tensor", "states"):
            table.add_column(heading, overflow="fold")
        table.add_column("bytes", justify="right", no_wrap=True)
        for heading in ("target", "remarks"):
            table.add_column(heading, overflow="fold")
        notes = _Notes()
        for p in self.parameters:
            table.add_row(*map(Text, _cells(p, self.common, notes)))
        yield table
        for text, number in notes.numbers.items():
            yield Text(f"[{number}] {text}")
        if not all(p.state_exists for p in self.parameters):
            yield Text("* so many bytes will be taken when the first gradient comes")
        yield self.memory


class _Notes:
    """Texts below a table, each once, and their numbers in it."""

    def __init__(self) -> None:
        self.numbers: dict[str, int] = {}

    def __call__(self, text: str) -> str:
        return f"[{self.numbers.setdefault(text, len(self.numbers) + 1)}]"


def _cells(p: ParameterExplanation, common: Mapping[str, Value], notes: _Notes) -> list[str]:
    remarks = [p.states_why] if p.states_why else []
    for argument, value in p.values.items():
        if repr(value) != repr(common.get(argument)):
            remarks.append(f"{argument}={_short(value.value)} {notes(value.origin)}")
    return [
        p.name,
        f"{p.dtype} {'x'.join(map(str, p.shape))}".rstrip(),
        _short(p.state_types) if p.state_types else "none",
        f"{sum(p.state_bytes.values()):,}{'' if p.state_exists else ' *'}",
        f"{p.target} {notes(f'{p.target}, on {p.device}: {p.why}')}",
        "\n".join(remarks),
    ]


def explain(optimizer: Explained) -> Explanation:
    """Tell what an optimizer does with each parameter, and why.

    Choosing the target compiles its kernel, as the first step would; nothing else changes.

    Args:
        optimizer: any that `bnbx.optim` makes.

    Raises:
        OptionError: it is none of bnbx.
        UnknownNameError, OptionError: a value of a group or an override is wrong.
    """
    return _explanation(optimizer, with_targets=True)


def report(optimizer: Explained) -> MemoryReport:
    """Sum the memory of an optimizer's states; compiles nothing. See `explain` for the errors."""
    return _explanation(optimizer, with_targets=False).memory


def _explanation(optimizer: Explained, *, with_targets: bool) -> Explanation:
    missing = [name for name in ("spec", "resolution", "choice") if not hasattr(optimizer, name)]
    if missing:
        raise OptionError(
            f"{type(optimizer).__name__} is no optimizer of bnbx: it has no "
            f"{', '.join(map(repr, missing))}; if it wraps one, pass what it wraps"
        )
    parameters = []
    for number, group in enumerate(optimizer.param_groups):
        values_of = optimizer.resolution.values_in(group)
        for name, p in zip(_names(number, group), group["params"], strict=True):
            parameters.append(_explain(optimizer, name, number, p, values_of(p), with_targets))
    values = [parameter.values for parameter in parameters]
    common = {
        argument: _most_frequent(_unforced([v[argument] for v in values if argument in v]))
        for argument in (values[0] if values else ())
    }
    return Explanation(optimizer.spec.name, tuple(parameters), common)


def _names(number: int, group: Mapping[str, Any]) -> list[str]:
    count = len(group["params"])
    return names_of(group) or [f"group {number}, parameter {i}" for i in range(count)]


def _explain(
    optimizer: Explained,
    name: str,
    group: int,
    p: Tensor,
    resolved: Resolved,
    with_target: bool,
) -> ParameterExplanation:
    spec = optimizer.spec
    saved = optimizer.state.get(p) or {}
    held = {key: value for key, value in saved.items() if isinstance(value, Tensor)}
    types, why = _types(spec, p, saved, resolved)
    sizes = {key: t.numel() * t.element_size() for key, t in held.items()}
    if not saved and why != FROZEN:
        sizes = states.state_bytes(p, spec, resolved)
    if is_left_alone(p) or not with_target:
        target, passed_over = "none", FROZEN if with_target else "not asked for"
    else:
        choice = optimizer.choice(p, resolved)
        target, passed_over = choice.target, "; ".join(choice.passed_over)
    return ParameterExplanation(
        name=name,
        group=group,
        shape=tuple(p.shape),
        dtype=str(p.dtype).removeprefix("torch."),
        device=str(p.device),
        values=_values(spec, resolved),
        state_types=types,
        states_why=why,
        state_bytes=sizes,
        state_exists=bool(saved) or not sizes,
        target=target,
        why=passed_over or f"the fastest target for {p.device.type} parameters",
        float32_bytes=4 * p.numel() * len(types),
    )


def _types(
    spec: OptimizerSpec, p: Tensor, saved: Mapping[str, Any], resolved: Resolved
) -> tuple[dict[str, str], str]:
    """What holds each state that exists or will, and why that is not what was asked for."""
    if not saved and not p.requires_grad and p.grad is None:
        return {}, FROZEN
    present = [s for s in spec.states if s.name in saved]
    wanted = {
        s.name: states.label_of(states.storage_of(s, resolved, p.numel()))
        for s in (present if saved else spec.active_states(resolved.switches))
    }
    types = {s.name: saved.get(states.type_key(s.name), FLOAT32) for s in present} or wanted
    if types != wanted:
        return types, "made before the values changed"
    quantized = any(resolved.state_types[name] != FLOAT32 for name in types)
    if quantized and p.numel() < resolved.min_8bit_size:
        return types, f"{p.numel()} elements < min_8bit_size {resolved.min_8bit_size}"
    return types, ""


def _values(spec: OptimizerSpec, resolved: Resolved) -> dict[str, Value]:
    """Every argument as users pass it, then the options."""
    found: dict[str, Any] = {}
    for argument in spec.arguments:
        if argument in spec.packs:
            found[argument] = tuple(resolved.hyper[name] for name in spec.packs[argument])
        else:
            found[argument] = resolved.hyper[argument]
    found |= resolved.options
    return {name: Value(value, resolved.origins[name]) for name, value in found.items()}


def _kind(key: str, types: Mapping[str, str]) -> str:
    """What a state tensor is, from its key: the state's own, or `<state>_<kind>`."""
    if key in types:
        return FULL if types[key] == FLOAT32 else CODES
    for state in sorted(types, key=len, reverse=True):
        if key.startswith(f"{state}_"):
            return key.removeprefix(f"{state}_")
    return key


def _unforced(values: list[Value]) -> list[Value]:
    """Those that no override has changed, if there are any: what the optimizer was made with."""
    return [value for value in values if value.origin in (DEFAULT, ARGUMENT, GROUP)] or values


def _most_frequent(values: list[T]) -> T:
    """Compared as they are written: values may be dicts, which have no hash."""
    counts = Counter(map(repr, values))
    return max(values, key=lambda value: counts[repr(value)])


def _short(value: Any) -> str:
    """A value in few characters: of a mapping, one value where all are the same."""
    if not isinstance(value, Mapping) or not value:
        return repr(value)
    if len(value) > 1 and len({repr(v) for v in value.values()}) == 1:
        return str(next(iter(value.values())))
    return ", ".join(f"{k}: {v}" for k, v in value.items())
