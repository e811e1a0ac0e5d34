"""`bnbx demo --qlora`: adapters on a base in NF4, beside the same adapters on a base in bfloat16.

A small model learns the source of Python's library. Its weights are then frozen, and adapters teach
it another text, the language reference, twice: on the weights in bfloat16, and on the weights in 4
bits with quantized scales. Seeds, batches and the optimizer, AdamW in 8 bits, are the same. In the
end the adapters are merged into the 4-bit weights, which is where quality is usually lost.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from rich.console import Console
from torch import nn

from bnbx import optim
from bnbx.demo import qlora_report as report
from bnbx.demo.adapters import (
    RANK,
    SCALING,
    Kept16,
    adapt,
    adapters_of,
    base_bytes,
    linear_layers,
)
from bnbx.demo.compare import DemoInterruptedError, can_draw, cpu_threads, say_where
from bnbx.demo.corpus import Corpus, load_corpus, load_documentation
from bnbx.demo.model import ByteTransformer, build_model
from bnbx.demo.progress import Reporter, reporting
from bnbx.demo.qlora_report import Adaptation, Merge, Outcome
from bnbx.demo.runs import BETAS, LOW_BIT, Params
from bnbx.demo.settings import MIN_STEPS, Settings
from bnbx.demo.train import Result, train_model, validation_loss
from bnbx.kernels import processor
from bnbx.nn import QuantLinear, merge_lora, quantize_

ADAPTER_LR = 1e-2
PRETRAINING = "pretraining, 32 bits"


@dataclass(frozen=True)
class Base:
    """What the adapters stand on: `label` names it everywhere, `freeze` makes it of the model."""

    key: str
    label: str
    freeze: Callable[[ByteTransformer], object]


def _in_16_bits(model: ByteTransformer) -> None:
    for module, name, layer in linear_layers(model.blocks):
        setattr(module, name, Kept16.of(layer))


def _in_4_bits(model: ByteTransformer) -> object:
    return quantize_(model.blocks, "nf4", double=True)


SIXTEEN = Base("bfloat16", "LoRA on bfloat16", _in_16_bits)
FOUR = Base("nf4", "QLoRA on NF4", _in_4_bits)
BASES = (SIXTEEN, FOUR)


def compare_bases(
    settings: Settings, picture: Path, json_path: Path | None, console: Console
) -> None:
    """Do all runs, then print the table and write the picture and, if asked, the JSON."""
    window = settings.shape.context
    source, documentation = load_corpus(window=window), load_documentation(window=window)
    drawing = can_draw(console)
    steps = adapter_steps(settings)
    with cpu_threads(settings.threads):
        console.print(
            report.introduction(source, documentation, settings, steps, activations()),
            highlight=False,
        )
        with reporting(console) as reporter:
            outcome = run_all(source, documentation, settings, reporter)
        text = report.as_json(outcome, settings)
    console.print(report.table(outcome))
    console.print(report.verdict(outcome), highlight=False)
    if drawing:
        from bnbx.demo.plot import draw_runs

        draw_runs(outcome.runs, report.notes(outcome), picture, report.title(outcome, settings))
    say_where(console, picture if drawing else None, json_path, text)


def run_all(
    source: Corpus, documentation: Corpus, settings: Settings, reporter: Reporter
) -> Outcome:
    """Pretrain, adapt on each base, merge."""
    model = build_model(settings.shape, settings.seed)
    outcome = Outcome(Result("pretraining", PRETRAINING, _count(model)), activations())
    try:
        optimizer = LOW_BIT.make(model.parameters(), settings.shape.lr)
        reporter.start(PRETRAINING, settings.steps)
        train_model(
            model,
            optimizer,
            settings.shape.lr,
            source,
            settings,
            outcome.pretraining,
            reporter.step,
        )
        for base in BASES:
            steps = adapter_steps(settings)
            reporter.start(base.label, steps)
            adapted = copy.deepcopy(model).to(torch.bfloat16)
            adapted = adapted.to(getattr(torch, outcome.activations))
            run = adapt_on(base, adapted, documentation, replace(settings, steps=steps), reporter)
            outcome.runs.append(run)
    except KeyboardInterrupt:
        label = BASES[len(outcome.runs)].label if outcome.pretraining.seconds else PRETRAINING
        raise DemoInterruptedError(f"Interrupted during {label}: no file written.") from None
    outcome.merge = merge_all(adapted, documentation, settings.shape.context)
    return outcome


def activations() -> str:
    """What adapted models compute in, whose weights are rounded to bfloat16 first.

    In float32 that takes a tenth of the time where the processor is slow with 16 bits.
    """
    return "float32" if processor.lacks_16_bits() else "bfloat16"


def adapter_steps(settings: Settings) -> int:
    """Adapters get half as many steps as the pretraining."""
    return max(MIN_STEPS, settings.steps // 2)


def adapt_on(
    base: Base,
    model: ByteTransformer,
    corpus: Corpus,
    settings: Settings,
    reporter: Reporter,
) -> Adaptation:
    """Freeze the model as this base, and train adapters on it."""
    base.freeze(model)
    trained = adapt(model, settings.seed)
    result = Adaptation(base.key, base.label, sum(p.numel() for p in trained))
    result.base_bytes = base_bytes(model)
    result.base_parameters = sum(
        adapted.base.in_features * adapted.base.out_features for adapted in adapters_of(model)
    )
    train_model(
        model, _adapter_optimizer(trained), ADAPTER_LR, corpus, settings, result, reporter.step
    )
    return result


def merge_all(model: nn.Module, corpus: Corpus, context: int) -> Merge:
    """Merge the adapters of a model into its quantized weights, plainly and with fitted scales."""
    losses = {}
    for fit in (None, "mse"):
        merged = copy.deepcopy(model)
        survived = total = 0.0
        for adapted in adapters_of(merged):
            assert isinstance(adapted.base, QuantLinear)
            found = merge_lora(
                adapted.base, adapted.a, adapted.b, SCALING, fit=fit, in_place=True
            ).report
            energy = float((adapted.b @ adapted.a).detach().square().sum())
            survived, total = survived + found.survived * energy, total + energy
            nn.init.zeros_(adapted.b)
        losses[fit] = validation_loss(merged, corpus.validation, context)
    return Merge(losses["mse"], losses[None], survived / total if total else 1.0)


def _adapter_optimizer(params: Params) -> torch.optim.Optimizer:
    # Adapters are small; by default, states of tensors this small would stay in 32 bits.
    optimizer: torch.optim.Optimizer = optim.create(
        "adamw", params, bits=8, lr=ADAPTER_LR, betas=BETAS, weight_decay=0.0, min_8bit_size=RANK
    )
    return optimizer


def _count(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())
