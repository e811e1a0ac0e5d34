"""Who is measured: bnbx's 8-bit AdamW, torch's own, and the 8-bit AdamW of two other libraries.

Each is given the same hyperparameters. Libraries are imported where they are used, so a peer that
is not installed costs a line in the table and nothing else.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

    Make = Callable[[Iterable[torch.nn.Parameter]], torch.optim.Optimizer]

HYPER: Mapping[str, Any] = {
    "lr": 1e-3,
    "betas": (0.9, 0.999),
    "eps": 1e-8,
    "weight_decay": 1e-2,
}
REFERENCE = "torch"
"""The contender that ratios are taken to."""


@dataclass(frozen=True)
class Contender:
    """An optimizer to time.

    Attributes:
        label: for the table.
        module: what has to be importable.
        requirement: what to give to pip if it is not.
        make: the optimizer over some parameters.
        optional: a peer, without which the run goes on.
    """

    label: str
    module: str
    requirement: str
    make: Make
    optional: bool = False

    def installed(self) -> bool:
        """Whether its library is there; asks without importing it."""
        return importlib.util.find_spec(self.module) is not None

    def advice(self) -> str:
        """What to say where it is not."""
        return f"not installed: pip install {self.requirement}"


def _bnbx(params: Iterable[torch.nn.Parameter]) -> torch.optim.Optimizer:
    import bnbx.optim

    made: torch.optim.Optimizer = bnbx.optim.create("adamw", list(params), bits=8, **HYPER)
    return made


def _torch(params: Iterable[torch.nn.Parameter]) -> torch.optim.Optimizer:
    import torch

    return torch.optim.AdamW(params, fused=True, **HYPER)


def _bitsandbytes(params: Iterable[torch.nn.Parameter]) -> torch.optim.Optimizer:
    import bitsandbytes

    made: torch.optim.Optimizer = bitsandbytes.optim.AdamW8bit(params, **HYPER)
    return made


def _torchao(params: Iterable[torch.nn.Parameter]) -> torch.optim.Optimizer:
    import torchao.optim

    made: torch.optim.Optimizer = torchao.optim.AdamW8bit(params, **HYPER)
    return made


CONTENDERS: Mapping[str, Contender] = {
    "bnbx": Contender("bnbx", "bnbx", "-e .", _bnbx),
    "torch": Contender("torch fused", "torch", "torch", _torch),
    "bitsandbytes": Contender(
        "bitsandbytes", "bitsandbytes", "bitsandbytes==0.50.2", _bitsandbytes, optional=True
    ),
    "torchao": Contender(
        "torchao", "torchao", "torchao==0.18.0", _torchao, optional=True
    ),
}  # fmt: skip
