"""What `quantize_` did, what it left and why, and the bytes of each."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from io import StringIO

from rich.console import Console
from rich.table import Table


@dataclass(frozen=True)
class Entry:
    """One parameter of a model.

    Attributes:
        name: of the parameter.
        shape: of the dense numbers.
        before: bytes that it took.
        after: bytes that it takes, scales included.
        how: what it is kept in, in words; None if it was left.
        why: the reason why it was left; None if it was not.
        shared: other names of the same parameter.
        remark: what is wrong with it, if something is.
    """

    name: str
    shape: tuple[int, ...]
    before: int
    after: int
    how: str | None = None
    why: str | None = None
    shared: tuple[str, ...] = ()
    remark: str | None = None

    @property
    def quantized(self) -> bool:
        """Whether it was quantized."""
        return self.how is not None


@dataclass(frozen=True)
class QuantizationReport:
    """All parameters of a model, in its order; each parameter that is shared counts once.

    Print it, in a terminal or a notebook, for a summary; `entries` has every parameter.
    """

    entries: tuple[Entry, ...]

    @property
    def quantized(self) -> tuple[Entry, ...]:
        """What was quantized."""
        return tuple(entry for entry in self.entries if entry.quantized)

    @property
    def left(self) -> tuple[Entry, ...]:
        """What was not, each with the reason."""
        return tuple(entry for entry in self.entries if not entry.quantized)

    @property
    def before(self) -> int:
        """Bytes that all parameters took."""
        return sum(entry.before for entry in self.entries)

    @property
    def after(self) -> int:
        """Bytes that all parameters take."""
        return sum(entry.after for entry in self.entries)

    def __rich__(self) -> Table:
        """A table with a row for each way of keeping parameters, and for each reason."""
        table = Table(title=f"{len(self.quantized)} of {len(self.entries)} parameters quantized")
        for title in ("parameters", "bytes before", "after"):
            table.add_column(title, justify="right", no_wrap=True)
        table.add_column("kept in, or left because", overflow="fold")
        table.add_column("such as", overflow="fold")
        for key, entries in _groups(self.entries).items():
            table.add_row(*_row(entries), *key, entries[0].name)
        table.add_section()
        table.add_row(*_row(self.entries), "all", "")
        return table

    def __str__(self) -> str:
        console = Console(file=StringIO(), width=120, force_terminal=False, color_system=None)
        with console.capture() as capture:
            console.print(self)
        return capture.get()


def _groups(entries: Iterable[Entry]) -> dict[tuple[str], list[Entry]]:
    found: dict[tuple[str], list[Entry]] = {}
    ordered = sorted(entries, key=lambda entry: (not entry.quantized, -entry.before))
    for entry in ordered:
        key = entry.how if entry.how is not None else f"left: {entry.why}"
        key += "" if entry.remark is None else f"; {entry.remark}"
        found.setdefault((key,), []).append(entry)
    return found


def _row(entries: Iterable[Entry]) -> tuple[str, str, str]:
    entries = list(entries)
    before, after = (sum(getattr(e, key) for e in entries) for key in ("before", "after"))
    return f"{len(entries):,}", f"{before:,}", f"{after:,}"
