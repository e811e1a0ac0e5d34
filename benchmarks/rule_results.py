"""What the table of rules is made of: times beside bytes moved, and what bnbx aims for.

The traffic-equivalent of a rule is the time that torch's fused AdamW takes, scaled by the bytes
that each moves. A factor is the rule's time over its traffic-equivalent: 1 where both use memory
equally well. "Bytes moved" can be read in several ways, so there is a factor for each.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from statistics import median

from benchmarks.contenders import REFERENCE
from benchmarks.results import Row, count, ratios_within
from benchmarks.rule_contenders import OURS, key_of

OWN, ONE_PASS, IN_FLOAT32 = "own_traffic", "own_traffic_one_pass", "float32_traffic"
READINGS: Mapping[str, str] = {
    OWN: "what this rule moves in this width, in both passes where it needs two",
    ONE_PASS: "the same, but the pass that only reads is not counted",
    IN_FLOAT32: "what the same rule moves, in all its passes, where its states are float32",
}
"""What stands for "bytes moved"."""

FIRST_BITS = 8
"""The width that the aims are about, and that others are compared with."""
NARROW_BITS = 4
MOST_ONE_PASS, MOST_TWO_PASS = 1.5, 2.5
"""Times its traffic-equivalent, with 8-bit states in float32 on one thread."""
MOST_NARROW = 2.0
"""Times the 8-bit step, with 4-bit states."""


@dataclass(frozen=True)
class RuleJob:
    """One rule to measure, in a process of its own.

    Attributes:
        rule: its name in bnbx.
        bits: widths of the states.
        only: libraries to time.
        dtype: of parameter and gradient.
        threads: of every library.
        numel: elements of the one parameter.
        seconds: for the rounds.
    """

    rule: str
    bits: tuple[int, ...]
    only: tuple[str, ...]
    dtype: str
    threads: int
    numel: int
    seconds: float

    def conditions(self) -> str:
        """For a heading."""
        return f"{self.dtype}, {count(self.threads, 'thread')}, {count(self.numel, 'parameter')}"

    @property
    def aimed_at(self) -> bool:
        """Whether bnbx's aims are about these conditions."""
        return self.dtype == "float32" and self.threads == 1


@dataclass(frozen=True)
class Moved:
    """Bytes for each parameter that a step of bnbx moves, by the readings, in one or two passes."""

    own: float
    one_pass: float
    float32: float
    two_pass: bool

    def by(self, reading: str) -> float:
        """The bytes by one of READINGS."""
        return {OWN: self.own, ONE_PASS: self.one_pass, IN_FLOAT32: self.float32}[reading]


@dataclass
class RuleMeasurement:
    """A rule measured.

    Attributes:
        job: what was asked.
        load_average: of the machine over the last minute, when the job began.
        renewal_s: seconds between rounds, in which the gradient is renewed; in no figure.
        peak_rss_bytes: the most memory that the process had.
        rows: one for each contender; keys are those of `rule_contenders.contenders`.
        reference_bytes: moved by torch's fused AdamW for each parameter.
        moved: by the rows of bnbx.
    """

    job: RuleJob
    load_average: float
    renewal_s: float
    peak_rss_bytes: int
    rows: list[Row]
    reference_bytes: float
    moved: dict[str, Moved]

    @property
    def two_pass(self) -> bool:
        """Whether the rule needs a first pass to measure its tensors."""
        return any(moved.two_pass for moved in self.moved.values())

    def row(self, key: str) -> Row | None:
        """The row of a contender that has figures."""
        return next((r for r in self.rows if r.key == key and r.problem is None), None)

    def ratios(self, row: Row, reference: str = REFERENCE) -> list[float]:
        """The row's time over another's, round by round."""
        return ratios_within(self.rows, row, reference)

    def ratio(self, key: str, reference: str = REFERENCE) -> float | None:
        """The median of `ratios`; None if either has no figures."""
        row = self.row(key)
        found = self.ratios(row, reference) if row else []
        return median(found) if found else None

    def factor(self, key: str, reading: str) -> float | None:
        """Time over the traffic-equivalent: (time / torch's time) / (bytes / torch's bytes)."""
        ratio = self.ratio(key)
        if ratio is None or key not in self.moved:
            return None
        return ratio / (self.moved[key].by(reading) / self.reference_bytes)

    def most(self) -> float:
        """The largest factor that bnbx aims for."""
        return MOST_TWO_PASS if self.two_pass else MOST_ONE_PASS

    def meets(self, bits: int, reading: str) -> bool | None:
        """Whether a factor is as aimed for; None where no aim is set or nothing was measured."""
        factor = self.factor(key_of(OURS, bits), reading)
        if factor is None or bits != FIRST_BITS or not self.job.aimed_at:
            return None
        return factor <= self.most()

    def narrow_ratio(self) -> float | None:
        """The 4-bit step over the 8-bit step."""
        return self.ratio(key_of(OURS, NARROW_BITS), key_of(OURS, FIRST_BITS))

    def narrow_meets(self) -> bool | None:
        """Whether that is as aimed for; None where no aim is set or nothing was measured."""
        ratio = self.narrow_ratio()
        return None if ratio is None or not self.job.aimed_at else ratio <= MOST_NARROW

    def failures(self) -> list[Row]:
        """The rows of bnbx that have no figures."""
        return [row for row in self.rows if row.problem and row.key.startswith(f"{OURS}-")]
