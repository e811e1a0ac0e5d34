"""What a run of the benchmark found, as plain data that goes to the table and to JSON alike."""

from __future__ import annotations

from dataclasses import dataclass, field
from statistics import median, quantiles

from benchmarks.timing import Times, ratios

KERNEL_PARTS = {
    "cpu.render": "derive the tables, render the source",
    "library.find_compiler": "find the compiler",
    "library.load_or_build": "compile, or find in the cache; load",
}
"""The functions by which a kernel is made, as its modules in `bnbx.kernels` call them, and what
they do."""
KERNEL_TOTAL = "in all"


def count(number: int, noun: str) -> str:
    """As in "1 thread", "2 threads"."""
    return f"{number:,} {noun}" + ("s" if number != 1 else "")


@dataclass(frozen=True)
class Job:
    """One configuration to measure, in a process of its own."""

    case: str
    dtype: str
    threads: int
    contenders: tuple[str, ...]
    seconds: float

    def title(self) -> str:
        """For a heading: "large, float32, 1 thread"."""
        return f"{self.case}, {self.dtype}, {count(self.threads, 'thread')}"


@dataclass
class Row:
    """What was measured of one contender; only `key` and `problem` if it could not run.

    Attributes:
        key: its name in `contenders.CONTENDERS`.
        problem: why there are no figures.
        version: of its library.
        period: it ran in every k-th round.
        first_step_s: seconds of the first step, from empty kernel caches.
        state_bytes: size of the optimizer's state tensors.
        times: seconds of each timed step, by the number of the round.
    """

    key: str
    problem: str | None = None
    version: str = ""
    period: int = 1
    first_step_s: float = 0.0
    state_bytes: int = 0
    times: Times = field(default_factory=dict)

    @property
    def median_s(self) -> float:
        """Seconds of the middle step."""
        return median(self.times.values())

    @property
    def min_s(self) -> float:
        """Seconds of the fastest step."""
        return min(self.times.values())


@dataclass
class Measurement:
    """A job done.

    Attributes:
        job: what was asked.
        tensors: the number of parameter tensors.
        parameters: elements in all.
        load_average: of the machine over the last minute, when the job began.
        renewal_s: seconds between rounds, in which gradients are renewed; not in any figure.
        peak_rss_bytes: the most memory that the process had.
        rows: one for each contender.
    """

    job: Job
    tensors: int
    parameters: int
    load_average: float
    renewal_s: float
    peak_rss_bytes: int
    rows: list[Row]

    def ratios(self, row: Row, reference: str) -> list[float]:
        """The row's time over the reference's, round by round; empty if either did not run."""
        return ratios_within(self.rows, row, reference)


def ratios_within(rows: list[Row], row: Row, reference: str) -> list[float]:
    """The row's time over that of the row `reference`, round by round; empty without these."""
    for other in rows:
        if other.key == reference:
            return ratios(row.times, other.times)
    return []


@dataclass
class Startup:
    """Seconds that the first use costs, each figure from several fresh processes.

    Attributes:
        imports: by the statement, the import time of each process.
        compile: by part, the times of making a kernel with an empty cache.
        load: by part, the times of making it when the cache has it.
    """

    imports: dict[str, list[float]]
    compile: dict[str, list[float]]
    load: dict[str, list[float]]


def middle_half(values: list[float]) -> tuple[float, float]:
    """The first and third quartile; the range where there are too few values for quartiles."""
    if len(values) < 4:
        return min(values), max(values)
    first, _, third = quantiles(values, n=4, method="inclusive")
    return first, third
