"""Says what was measured of the rules: a table for each width with a row a rule, and JSON."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.table import Table

from benchmarks.report import row_json, three_digits
from benchmarks.results import Row, middle_half
from benchmarks.rule_contenders import MOMENTUM, OURS, PEERS, key_of
from benchmarks.rule_results import (
    FIRST_BITS,
    IN_FLOAT32,
    MOST_NARROW,
    MOST_ONE_PASS,
    MOST_TWO_PASS,
    NARROW_BITS,
    ONE_PASS,
    OWN,
    READINGS,
    RuleMeasurement,
)

OVER = "!"
NOTHING = "-"
HEADINGS = {
    "ns /\npar.": "time of a step for each parameter, median",
    "times\ntorch": "median, over the rounds that both ran in, of its time over fused AdamW's",
    "middle\nhalf": "quartiles of the same",
    "moved\nbytes": READINGS[OWN] + ", for each parameter",
}
FACTORS = {OWN: "over\nown", ONE_PASS: "over\none\npass", IN_FLOAT32: "over\nfloat\n32"}
STATE = "state\nbytes"


def tables(measurements: list[RuleMeasurement]) -> Iterator[Table]:
    """A table for each width that was measured."""
    for bits in dict.fromkeys(bits for m in measurements for bits in m.job.bits):
        yield _table(measurements, bits)


def _table(measurements: list[RuleMeasurement], bits: int) -> Table:
    """One row a rule: bnbx's figures, then the peers' times."""
    title = f"{bits}-bit states, {measurements[0].job.conditions()}"
    made = Table(
        title=title,
        title_justify="left",
        box=SIMPLE_HEAD,
        padding=0,
        pad_edge=False,
        min_width=len(title),
    )
    peers = [name for name, classes in PEERS.items() if any(b == bits for _, b in classes)]
    asked = {name for m in measurements for name in m.job.only}
    peers = [name for name in peers if name in asked]
    made.add_column("bnbx", overflow="fold")
    headings = [*HEADINGS, *FACTORS.values(), *_narrow_heading(bits), STATE]
    for heading in [*headings, *(f"{_short(name)}\ntimes\ntorch" for name in peers)]:
        made.add_column(heading, justify="right", no_wrap=True)
    for m in measurements:
        cells = (*_figures(m, bits), *(_times(m.ratio(key_of(name, bits))) for name in peers))
        made.add_row(m.job.rule + (" (2)" if m.two_pass else ""), *cells)
    return made


def _figures(m: RuleMeasurement, bits: int) -> list[str]:
    """The cells of bnbx."""
    key = key_of(OURS, bits)
    row, ratio = m.row(key), m.ratio(key)
    narrow = [_marked(m.narrow_ratio(), m.narrow_meets())] if _narrow_heading(bits) else []
    if row is None:
        return [NOTHING] * (len(HEADINGS) + len(FACTORS) + len(narrow) + 1)
    return [
        f"{row.median_s * 1e9 / m.job.numel:.2f}",
        _times(ratio),
        NOTHING if ratio is None else "-".join(map(three_digits, middle_half(m.ratios(row)))),
        f"{m.moved[key].own:.2f}",
        *(_marked(m.factor(key, reading), m.meets(bits, reading)) for reading in FACTORS),
        *narrow,
        f"{row.state_bytes / m.job.numel:.2f}",
    ]


def _narrow_heading(bits: int) -> list[str]:
    return [f"over\n{FIRST_BITS}\nbits"] if bits == NARROW_BITS else []


def _short(library: str) -> str:
    """As narrow as a figure is."""
    return {"bitsandbytes": "bnb", "torchao": "ao"}.get(library, library)


def _times(ratio: float | None) -> str:
    return NOTHING if ratio is None else three_digits(ratio)


def _marked(value: float | None, meets: bool | None) -> str:
    return _times(value) + (OVER if meets is False else "")


def legend() -> Iterator[str]:
    """What the columns mean."""
    yield f"(2): the rule takes two passes. Rules with a momentum run with {MOMENTUM}."
    for heading, meaning in HEADINGS.items():
        yield f"{_flat(heading)}: {meaning}."
    yield "over own, one pass, float 32: times torch / (bytes moved / bytes that torch moves), by"
    for reading, heading in FACTORS.items():
        yield f"  {_flat(heading)}: {READINGS[reading]}."
    yield f"{_flat(STATE)}: of optimizer state for each parameter. bnb: bitsandbytes; ao: torchao."
    yield (
        f"{OVER}: over what bnbx aims for, in float32 on one thread: factors of {MOST_ONE_PASS:g} "
        f"at {FIRST_BITS} bits, {MOST_TWO_PASS:g} for (2); {NARROW_BITS} bits {MOST_NARROW:g} "
        f"times {FIRST_BITS} bits."
    )


def _flat(heading: str) -> str:
    return " ".join(heading.split())


def summary(m: RuleMeasurement) -> str:
    """One line as soon as a rule is measured."""
    keys = [key_of(OURS, bits) for bits in m.job.bits]
    found = [f"{key} {_times(m.ratio(key))}" for key in keys if m.row(key)]
    return f"{m.job.rule}: times torch {', '.join(found)}" if found else f"{m.job.rule}: no figures"


def verdicts(measurements: list[RuleMeasurement]) -> Iterator[str]:
    """How many rules are as aimed for, by each reading, and which are not."""
    for reading, heading in FACTORS.items():
        found = {m.job.rule: m.meets(FIRST_BITS, reading) for m in measurements}
        yield from _verdict(f"{FIRST_BITS} bits, {_flat(heading)}", found)
    narrow = {m.job.rule: m.narrow_meets() for m in measurements}
    yield from _verdict(f"{NARROW_BITS} bits over {FIRST_BITS} bits", narrow)


def _verdict(what: str, found: dict[str, bool | None]) -> Iterator[str]:
    judged = {rule: met for rule, met in found.items() if met is not None}
    missed = [rule for rule, met in judged.items() if not met]
    if judged:
        which = f"; not {', '.join(missed)}" if missed else ""
        yield f"{what}: {len(judged) - len(missed)} of {len(judged)} rules as aimed for{which}"


def problems(measurements: list[RuleMeasurement]) -> Iterator[str]:
    """Why contenders have no figures; what holds for all rules is said once."""
    rules: dict[tuple[str, str], list[str]] = {}
    for m in measurements:
        for row in m.rows:
            if row.problem is not None:
                reason = _first_line(row)
                rules.setdefault((row.key, reason), []).append(m.job.rule)
    for (key, reason), names in rules.items():
        yield f"{key} ({', '.join(names)}): {reason}"


def _first_line(row: Row) -> str:
    """Some libraries put a whole trace in a message; all of it is in the JSON."""
    lines = (row.problem or "").strip().splitlines()
    return lines[0] if lines else ""


def write_json(path: Path, machine: dict[str, object], measurements: list[RuleMeasurement]) -> None:
    """Write everything measured so far."""
    aims = {
        "one_pass": MOST_ONE_PASS,
        "two_pass": MOST_TWO_PASS,
        f"{NARROW_BITS}_bits_over_{FIRST_BITS}": MOST_NARROW,
    }
    report = {
        "machine": machine,
        "aims": aims,
        "readings": dict(READINGS),
        "rules": [_measurement_json(m) for m in measurements],
    }
    path.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


def _measurement_json(m: RuleMeasurement) -> dict[str, Any]:
    return asdict(m) | {
        "two_pass": m.two_pass,
        "rows": [row_json(row, m.ratios(row)) | _counted_json(m, row) for row in m.rows],
        f"{NARROW_BITS}_bits_over_{FIRST_BITS}": m.narrow_ratio(),
        f"{NARROW_BITS}_bits_meets": m.narrow_meets(),
        "meets": {reading: m.meets(FIRST_BITS, reading) for reading in READINGS},
    }


def _counted_json(m: RuleMeasurement, row: Row) -> dict[str, Any]:
    """What follows from the size of the parameter, and from the bytes moved."""
    if row.problem is not None:
        return {}
    return {
        "ns_per_parameter": row.median_s * 1e9 / m.job.numel,
        "state_bytes_per_parameter": row.state_bytes / m.job.numel,
        "factors": {reading: m.factor(row.key, reading) for reading in READINGS},
    }
