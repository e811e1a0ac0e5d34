"""What the adapter runs measured, as data and in words: the table, the lines under it, the JSON."""

from __future__ import annotations

import platform
from dataclasses import asdict, dataclass, field

from rich.table import Table

from bnbx.demo.adapters import RANK
from bnbx.demo.corpus import Corpus
from bnbx.demo.progress import short_loss
from bnbx.demo.report import json_text
from bnbx.demo.settings import Settings
from bnbx.demo.train import Result

CLOSE = 0.01
"""How far the 4-bit base may end from the 16-bit one, as a part of the loss."""

HEADINGS = (
    "loss\nbefore\n",
    "loss\nafter\n",
    "base\nweights\n(bytes)",
    "bits\nper\nweight",
    "run\n(s)\n",
)


@dataclass
class Adaptation(Result):
    """What an adapter run measured, besides its losses; `parameters` are those of the adapters."""

    base_bytes: int = 0
    """Bytes of the frozen weights under the adapters, scales included."""
    base_parameters: int = 0

    @property
    def bits_per_weight(self) -> float:
        """Of the frozen weights."""
        return 8 * self.base_bytes / self.base_parameters


@dataclass(frozen=True)
class Merge:
    """What merging the adapters into the 4-bit weights costs."""

    loss: float
    """Validation loss with scales that fit."""
    absmax_loss: float
    """Validation loss with plain requantization."""
    survived: float
    """The part of the update that is in the fitted weights, over all layers."""


@dataclass
class Outcome:
    """All that was measured: the 16-bit base first, then the 4-bit one."""

    pretraining: Result
    activations: str
    """What adapted models compute in."""
    runs: list[Adaptation] = field(default_factory=list)
    merge: Merge | None = None

    @property
    def gap(self) -> float:
        """How far above the 16-bit base the 4-bit one ended, as a part of its loss."""
        sixteen, four = (run.validation_loss for run in self.runs)
        return four / sixteen - 1


def introduction(
    source: Corpus,
    documentation: Corpus,
    settings: Settings,
    steps: int,
    activations: str,
) -> str:
    """What is about to happen."""
    shape = settings.shape
    slow = (
        ""
        if activations == "bfloat16"
        else f"\nActivations are {activations}: this processor has no fast products of bfloat16."
    )
    return (
        f"Text: the standard library of Python {platform.python_version()} to pretrain on, "
        f"{len(source.train) / 1e6:.1f} MB; then its language reference, "
        f"{len(documentation.train) / 1e6:.2f} MB to adapt to and "
        f"{len(documentation.validation) / 1e6:.2f} MB of other topics to validate on.\n"
        f"Model: {settings.size.value}, {shape.layers} layers of width {shape.width}, predicting "
        f"bytes. {settings.steps} steps of pretraining, then {steps} steps for the adapters, of "
        f"rank {RANK}, on each base, of {settings.batch_size} x {shape.context} bytes.{slow}"
    )


def table(outcome: Outcome) -> Table:
    """One row a base, narrow enough for 80 columns."""
    rows = Table(title="validation losses in nats/byte", title_justify="left")
    rows.add_column("adapters on a base", no_wrap=True)
    for heading in HEADINGS:
        rows.add_column(heading, justify="right", no_wrap=True)
    for run in outcome.runs:
        rows.add_row(
            run.label,
            short_loss(run.validation_losses[0]),
            short_loss(run.validation_loss),
            f"{run.base_bytes:,}",
            f"{run.bits_per_weight:.2f}",
            f"{run.seconds:.0f}",
        )
    return rows


def verdict(outcome: Outcome) -> str:
    """How near the bases ended to one another, and what a merge does."""
    sixteen, four = outcome.runs
    lines = []
    if any(run.diverged_at is not None for run in outcome.runs):
        lines.append("Warning: a loss stopped being finite; try fewer steps or another seed.")
    else:
        near = "within" if abs(outcome.gap) <= CLOSE else "Warning: not within"
        lines.append(
            f"On the 4-bit base the adapters ended {100 * outcome.gap:+.2f} % from where they did "
            f"on 16 bits ({near} {CLOSE:.0%}), on {sixteen.base_bytes / four.base_bytes:.1f} x "
            "fewer bytes of frozen weights."
        )
    if outcome.merge is not None:
        merge = outcome.merge
        lines.append(
            f"Merged into the 4-bit weights they give {short_loss(merge.loss)} "
            f"({short_loss(merge.absmax_loss)} with plain requantization) against "
            f"{short_loss(four.validation_loss)} beside them: {merge.survived:.0%} of the update "
            "fits into 4 bits."
        )
    return "\n".join(lines)


def notes(outcome: Outcome) -> list[str]:
    """What the picture's legend says of each run, after its loss."""
    return [f"{run.bits_per_weight:.2f} bits per frozen weight" for run in outcome.runs]


def title(outcome: Outcome, settings: Settings) -> str:
    """Of the picture."""
    run = outcome.runs[0]
    return (
        f"bnbx demo --qlora: {run.parameters / 1e3:.0f} k adapter parameters on "
        f"{run.base_parameters / 1e6:.2f} M frozen ones, AdamW in 8 bits, seed {settings.seed}"
    )


def as_json(outcome: Outcome, settings: Settings) -> str:
    """Settings, versions and every measurement; null stands for a number that is not finite."""
    runs = [
        asdict(run)
        | {"validation_loss": run.validation_loss, "bits_per_weight": run.bits_per_weight}
        for run in outcome.runs
    ]
    merge = asdict(outcome.merge) if outcome.merge is not None else None
    pretraining = asdict(outcome.pretraining)
    measured = {"pretraining": pretraining, "runs": runs, "gap": outcome.gap, "merge": merge}
    return json_text(settings, {"activations": outcome.activations, **measured})
