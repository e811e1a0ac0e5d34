"""torch's default dtype and device are for the user's tensors: no step depends on them."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from bnbx.optim import create
from bnbx.optimizers import engine
from bnbx.optimizers.engine import Optimizer8bit
from defaults import DEFAULTS
from optimizers.compare import assert_same
from optimizers.variants import TARGETS

CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "8 bits": ("adamw", {}),
    "4 bits": ("adamw", {"bits": 4}),
    "a type of 3 bits": ("adamw", {"state_types": "dynamic3"}),
    "one absmax": ("adamw", {"block_wise": False}),
    "percentiles": ("adamw", {"percentile_clipping": 5}),
    "an initial value": ("adagrad", {"initial_accumulator_value": 0.3}),
    "norms": ("lamb", {"max_unorm": 0.5}),
    "paged": ("adamw", {"paged": True}),
    "kahan": ("adamw", {"master": "kahan"}),
    "residual": ("adamw", {"master": "residual"}),
    "evaluation": ("schedule_free_adamw", {"master": "residual"}),
}


def stepped(rule: str, arguments: dict[str, Any], *, sparse: bool) -> Optimizer8bit:
    """Three steps, a save and a load, and one more; nothing of its own follows a default."""
    dtype = torch.bfloat16 if "master" in arguments else torch.float32
    generator = torch.Generator("cpu").manual_seed(1)

    def numbers() -> torch.Tensor:
        made = torch.randn(60, 100, generator=generator, dtype=torch.float32, device="cpu")
        return made.to(dtype)

    p = numbers().requires_grad_()
    rows = torch.arange(20, device="cpu")[None]
    optimizer: Optimizer8bit = create(rule, [p], lr=1e-2, **arguments)
    for step in range(4):
        p.grad = numbers()
        if sparse:
            p.grad = torch.sparse_coo_tensor(
                rows, p.grad[:20], (60, 100), device="cpu", check_invariants=True
            )
        optimizer.step(grad_scale=2.0)
        if step == 2:
            optimizer.eval()
            optimizer.train()
            saved = optimizer.state_dict()
            optimizer = create(rule, [p], lr=1e-2, **arguments)
            optimizer.load_state_dict(saved)
    return optimizer


@pytest.mark.parametrize("kind", ["dense", "dense, by the reference", "sparse"])
@pytest.mark.parametrize("default", DEFAULTS)
@pytest.mark.parametrize("case", CASES)
def test_steps_do_not_follow_defaults(
    case: str, default: str, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    (rule, arguments), sparse = CASES[case], kind == "sparse"
    monkeypatch.setattr(engine, "launch", TARGETS["reference" if "reference" in kind else "cpu"])
    with DEFAULTS[default]():  # first, for what is kept must not follow it either
        optimizer = stepped(rule, arguments, sparse=sparse)
    assert_same(optimizer, stepped(rule, arguments, sparse=sparse))
