"""Who steps beside whom in the table of rules: bnbx in each width, and what the peers have.

bnbx's rules and widths come from its catalogs. The classes of the peers are listed here: a rule
that none of them has stands alone. All libraries are imported where they are used.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterable, Mapping
from functools import partial
from typing import TYPE_CHECKING, Any

from benchmarks.contenders import CONTENDERS, REFERENCE, Contender
from bnbx.registry import optimizers, quant_types

if TYPE_CHECKING:
    import torch

OURS = "bnbx"
FLOAT32_BITS = 32
"""What bnbx calls states without a quant type."""
MOMENTUM = 0.9
"""Of every rule that has a momentum: without it, its state would not exist."""
REQUIRED_LR = 1e-3
"""Where a rule has no default."""

PEERS: Mapping[str, Mapping[tuple[str, int], str]] = {
    "bitsandbytes": {
        ("adam", 8): "Adam8bit",
        ("adamw", 8): "AdamW8bit",
        ("ademamix", 8): "AdEMAMix8bit",
        ("lion", 8): "Lion8bit",
        ("sgd", 8): "SGD8bit",
        ("rmsprop", 8): "RMSprop8bit",
        ("adagrad", 8): "Adagrad8bit",
        ("lamb", 8): "LAMB8bit",
        ("lars", 8): "LARS8bit",
    },
    "torchao": {
        ("adam", 8): "Adam8bit",
        ("adam", 4): "Adam4bit",
        ("adamw", 8): "AdamW8bit",
        ("adamw", 4): "AdamW4bit",
    },
}


def rules() -> tuple[str, ...]:
    """Every registered rule."""
    return optimizers().names()


def widths() -> tuple[int, ...]:
    """The bits that states can be asked for, 8 first, and float32 last."""
    low = {t.bits for t in quant_types() if t.state_default}
    return (*sorted(low, reverse=True), FLOAT32_BITS)


def hyper(rule: str) -> dict[str, Any]:
    """What all libraries are given for a rule: bnbx's default rate, and a momentum if it has one.

    Everything else is left at the defaults of each library.
    """
    spec = optimizers().get(rule)
    given = {}
    if "lr" in spec.hyper:
        rate = spec.default("lr")
        given["lr"] = REQUIRED_LR if rate is None else rate
    if "momentum" in spec.hyper:
        given["momentum"] = MOMENTUM
    return given


def key_of(library: str, bits: int) -> str:
    """The key of a contender and its row."""
    return f"{library}-{bits}"


def contenders(rule: str, bits: Iterable[int], only: Iterable[str]) -> dict[str, Contender]:
    """Who is timed for a rule, in the order of running.

    Args:
        rule: its name in bnbx.
        bits: widths of states; a peer runs in those that it has.
        only: libraries; without the reference there will be no ratios.

    Returns:
        Contenders by key: the reference's own, or `key_of(library, bits)`. All but the reference
        are optional: one rule that fails costs its row only.
    """
    only = tuple(only)
    found = {REFERENCE: CONTENDERS[REFERENCE]} if REFERENCE in only else {}
    for width in bits:
        if OURS in only:
            make = partial(_bnbx, rule, width)
            found[key_of(OURS, width)] = Contender(OURS, OURS, "-e .", make, optional=True)
        for library, classes in PEERS.items():
            if library in only and (rule, width) in classes:
                peer, make = (
                    CONTENDERS[library],
                    partial(_peer, library, classes[rule, width], rule),
                )
                found[key_of(library, width)] = Contender(
                    library, peer.module, peer.requirement, make, optional=True
                )
    return found


def _bnbx(rule: str, bits: int, params: Iterable[torch.nn.Parameter]) -> torch.optim.Optimizer:
    import bnbx.optim

    made: torch.optim.Optimizer = bnbx.optim.create(rule, list(params), bits=bits, **hyper(rule))
    return made


def _peer(
    library: str, name: str, rule: str, params: Iterable[torch.nn.Parameter]
) -> torch.optim.Optimizer:
    module = importlib.import_module(f"{library}.optim")
    made: torch.optim.Optimizer = getattr(module, name)(params, **hyper(rule))
    return made
