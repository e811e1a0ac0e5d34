"""One training run and what is measured during it."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from time import perf_counter
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bnbx.demo.corpus import Corpus, training_starts, validation_starts, windows
from bnbx.demo.model import build_model
from bnbx.demo.runs import Run
from bnbx.demo.settings import Settings

RAMP_SHARE = 0.1
"""Part of the steps over which the learning rate rises; it then falls to zero."""

VALIDATIONS = 10
"""How often a run is validated, besides before its first step."""

VALIDATION_BYTES = 32 * 1024
VALIDATION_BATCH = 64

UNTIMED_STEPS = 3
"""The first steps compile kernels, make state and warm caches; they stay out of the median."""

OnStep = Callable[[int, float], None]
"""Called after each step with the number of steps done and the training loss."""


@dataclass
class Result:
    """What one run measured."""

    key: str
    label: str
    parameters: int
    train_losses: list[float] = field(default_factory=list)
    """Of step i before its update."""
    validation_steps: list[int] = field(default_factory=list)
    validation_losses: list[float] = field(default_factory=list)
    step_seconds: list[float] = field(default_factory=list)
    """Wall time of each optimizer.step() call alone."""
    state_bytes: int = 0
    seconds: float = 0.0
    diverged_at: int | None = None
    """The step whose training loss was not finite; the run ends there."""

    @property
    def validation_loss(self) -> float:
        """Where the run ended, NaN if it diverged."""
        return math.nan if self.diverged_at is not None else self.validation_losses[-1]

    @property
    def first_step_ms(self) -> float:
        """The first step() call, which also compiles or loads the kernel."""
        return 1e3 * self.step_seconds[0] if self.step_seconds else math.nan

    @property
    def step_ms(self) -> float:
        """Median of the step() calls after the warm-up, NaN if the run ended before."""
        timed = self.step_seconds[UNTIMED_STEPS:]
        return 1e3 * statistics.median(timed) if timed else math.nan

    @property
    def state_bytes_per_parameter(self) -> float:
        """Optimizer state alone, without the parameters and their gradients."""
        return self.state_bytes / self.parameters


def train(run: Run, corpus: Corpus, settings: Settings, on_step: OnStep) -> Result:
    """Train one model from the seed's parameters on the seed's batches."""
    model = build_model(settings.shape, settings.seed)
    optimizer = run.make(model.parameters(), settings.shape.lr)
    result = Result(run.key, run.label, sum(p.numel() for p in model.parameters()))
    train_model(model, optimizer, settings.shape.lr, corpus, settings, result, on_step)
    return result


def train_model(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    peak: float,
    corpus: Corpus,
    settings: Settings,
    result: Result,
    on_step: OnStep,
) -> None:
    """Train a model on the seed's batches, up to a `peak` rate, and note what is measured."""
    shape = settings.shape
    starts = training_starts(
        corpus.train, shape.context, settings.steps, settings.batch_size, settings.seed
    )
    validated = validation_steps(settings.steps)
    began = perf_counter()
    for step in range(settings.steps):
        if step in validated:
            _validate(model, corpus.validation, shape.context, step, result)
        text, targets = windows(corpus.train, starts[step], shape.context)
        loss = F.cross_entropy(model(text).float().flatten(0, 1), targets.flatten())
        result.train_losses.append(loss.item())
        if not math.isfinite(result.train_losses[-1]):
            result.diverged_at = step
            break
        optimizer.zero_grad()
        torch.autograd.backward(loss)
        set_rate(optimizer, peak * rate_share(step, settings.steps))
        result.step_seconds.append(_timed_step(optimizer))
        on_step(step + 1, result.train_losses[-1])
    else:
        _validate(model, corpus.validation, shape.context, settings.steps, result)
    result.seconds = perf_counter() - began
    result.state_bytes = state_bytes(optimizer)


def validation_steps(steps: int) -> frozenset[int]:
    """After how many steps a run is validated: more often at first, where the loss falls fast."""
    return frozenset(steps * part**2 // VALIDATIONS**2 for part in range(VALIDATIONS + 1))


def rate_share(step: int, steps: int) -> float:
    """The share of the peak learning rate: up over the first tenth, then down to zero."""
    ramp = max(1, round(RAMP_SHARE * steps))
    return min((step + 1) / ramp, (steps - step) / (steps - ramp + 1))


def set_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Give every group the rate of this step."""
    for group in optimizer.param_groups:
        group["lr"] = rate


def state_bytes(optimizer: torch.optim.Optimizer) -> int:
    """Bytes in the optimizer's state tensors; storage that several tensors share counts once."""
    storages = {
        tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes()
        for tensor in _tensors(optimizer.state)
    }
    return sum(storages.values())


def _tensors(state: Any) -> Iterator[Tensor]:
    """Every tensor in nested state; the keys of a mapping are parameters and names, not state."""
    if isinstance(state, Tensor):
        yield state
    elif isinstance(state, Mapping):
        yield from _tensors(list(state.values()))
    elif isinstance(state, Sequence) and not isinstance(state, str):
        for item in state:
            yield from _tensors(item)


def _timed_step(optimizer: torch.optim.Optimizer) -> float:
    began = perf_counter()
    optimizer.step()
    return perf_counter() - began


def _validate(model: nn.Module, text: Tensor, context: int, step: int, result: Result) -> None:
    """Note the mean loss over the validation windows."""
    result.validation_steps.append(step)
    result.validation_losses.append(validation_loss(model, text, context))


@torch.no_grad()
def validation_loss(model: nn.Module, text: Tensor, context: int) -> float:
    """The mean loss over evenly spaced windows."""
    losses = []
    all_starts = validation_starts(text, context, VALIDATION_BYTES)
    for starts in torch.split(all_starts, VALIDATION_BATCH):
        inputs, targets = windows(text, starts, context)
        logits = model(inputs).float().flatten(0, 1)
        losses.append(F.cross_entropy(logits, targets.flatten(), reduction="none"))
    return torch.cat(losses).mean().item()
