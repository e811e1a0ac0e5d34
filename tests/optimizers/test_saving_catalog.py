"""Every rule of the catalog, in every width and with every master, goes on from a file.

What is loaded is what was saved, and the steps after it are the same to the last bit.
"""

from __future__ import annotations

import copy
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save

from bnbx.optim import create
from bnbx.optimizers import engine
from bnbx.optimizers.engine import Optimizer8bit
from bnbx.registry import optimizers
from bnbx.registry.options import MASTERS
from optimizers.compare import assert_same, equal, parameters_of
from optimizers.saved import through_a_file, train
from optimizers.variants import CASES, TARGETS, VARIANTS, copies, parameters

SHAPES = [(5000,), (17, 241), (64, 70), (100,), (), (0, 3)]
WIDTHS = [(torch.float32, "none"), *((torch.bfloat16, master) for master in MASTERS)]


@pytest.fixture(autouse=True)
def _reference(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every target computes the same bits; this one need not be compiled for each case."""
    monkeypatch.setattr(engine, "launch", TARGETS["reference"])


def made(rule: str, variant: str, params: list[Tensor], **arguments: Any) -> Optimizer8bit:
    groups = [
        {"params": params[number::2], **hyper}
        for number, hyper in enumerate(VARIANTS[rule][variant])
    ]
    optimizer: Optimizer8bit = create(rule, groups, **arguments)
    return optimizer


def bare(rule: str, params: list[Tensor], **arguments: Any) -> Optimizer8bit:
    """An optimizer whose hyperparameters all have to come from what it loads."""
    required: dict[str, Any] = {"warmup_steps": 0.0} if rule == "schedule_free_adamw" else {}
    groups = [{"params": params[::2]}, {"params": params[1::2]}]
    optimizer: Optimizer8bit = create(rule, groups, lr=0.5, **required, **arguments)
    return optimizer


@pytest.mark.parametrize(("dtype", "master"), WIDTHS, ids=str)
@pytest.mark.parametrize("bits", [32, 8, 4])
@pytest.mark.parametrize(("rule", "variant"), CASES)
def test_a_run_goes_on_from_a_file(
    rule: str, variant: str, bits: int, dtype: torch.dtype, master: str
) -> None:
    arguments: dict[str, Any] = dict(bits=bits, master=master)
    params = parameters(dtype, SHAPES)
    straight = made(rule, variant, params, **arguments)
    train(straight, parameters_of(straight), 0, 3)
    saved = through_a_file(straight.state_dict())
    second = bare(rule, copies(params), **arguments)
    second.load_state_dict(saved)
    assert_same(straight, second)
    train(straight, parameters_of(straight), 3, 2)
    train(second, parameters_of(second), 3, 2)
    assert_same(straight, second)


def test_every_rule_is_there() -> None:
    assert {rule for rule, _ in CASES} == set(optimizers().names())


@pytest.mark.parametrize("mode", ["eval", "train"])
def test_the_mode_goes_along(mode: str) -> None:
    rules = [s.name for s in optimizers() if s.eval_code]
    assert rules
    for rule in rules:
        params = parameters(torch.float32, SHAPES)
        straight = made(rule, "", params)
        train(straight, params, 0, 3)
        if mode == "eval":
            straight.eval()
        second = bare(rule, copies(params))
        second.load_state_dict(through_a_file(straight.state_dict()))
        assert second.mode == mode
        for optimizer in (straight, second):
            optimizer.train()
            train(optimizer, parameters_of(optimizer), 3, 2)
        assert_same(straight, second)


def test_a_clipped_run_keeps_its_norms() -> None:
    params = parameters(torch.float32, SHAPES[:3])
    straight = create("adamw", params, percentile_clipping=50)
    train(straight, params, 0, 5)
    second = create("adamw", copies(params))
    second.load_state_dict(through_a_file(straight.state_dict()))
    assert second.param_groups[0]["percentile_clipping"] == 50
    assert_same(straight, second)
    train(straight, params, 5, 3)
    train(second, parameters_of(second), 5, 3)
    assert_same(straight, second)


def test_overrides_of_parameters_hold_for_what_is_loaded() -> None:
    named = [(f"layer{n}.weight", p) for n, p in enumerate(parameters(torch.float32, SHAPES[:3]))]
    overrides = {"layer1.*": {"bits": 32}}
    straight = create("adamw", named, overrides=overrides)
    train(straight, [p for _, p in named], 0, 3)
    again = [(name, copies([p])[0]) for name, p in named]
    second = create("adamw", again, overrides=overrides)
    second.load_state_dict(through_a_file(straight.state_dict()))
    assert_same(straight, second)
    assert second.state[again[1][1]]["m"].dtype == torch.float32
    assert second.state[again[0][1]]["m"].dtype == torch.uint8


def test_deepcopies_of_a_dict_load() -> None:
    params = parameters(torch.float32, SHAPES)
    straight = made("adamw", "", params)
    train(straight, params, 0, 2)
    second = bare("adamw", copies(params))
    second.load_state_dict(copy.deepcopy(straight.state_dict()))
    assert_same(straight, second)


@pytest.mark.parametrize("flat", [False, True], ids=["nested", "flat"])
@pytest.mark.parametrize(
    "arguments",
    [{}, dict(bits=4), dict(block_wise=False), dict(rule="schedule_free_adamw")],
    ids=str,
)
def test_distributed_checkpoints(arguments: dict[str, Any], flat: bool, tmp_path: Path) -> None:
    """torch.distributed.checkpoint names parameters, and drops our header."""
    options = StateDictOptions(flatten_optimizer_state_dict=flat)
    arguments = {"rule": "adamw", **arguments}
    models: list[torch.nn.Module] = []
    made_of: list[Optimizer8bit] = []
    for _ in range(2):
        torch.manual_seed(len(models))
        models.append(torch.nn.Sequential(torch.nn.Linear(80, 80), torch.nn.Linear(80, 1)))
        made_of.append(create(params=models[-1].parameters(), lr=1e-2, **arguments))
    model, straight = models[0], made_of[0]
    train(straight, list(model.parameters()), 0, 3)
    straight.eval()
    state = get_optimizer_state_dict(model, straight, options=options)
    models[1].load_state_dict(model.state_dict())
    target = get_optimizer_state_dict(models[1], made_of[1], options=options)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        save({"optim": state}, checkpoint_id=tmp_path, no_dist=True)
        load({"optim": target}, checkpoint_id=tmp_path, no_dist=True)
    set_optimizer_state_dict(models[1], made_of[1], target, options=options)
    assert made_of[1].mode == straight.mode
    models[1].load_state_dict(model.state_dict())  # in the mode that it was saved in
    assert_same(straight, made_of[1])
    for optimizer in made_of:
        optimizer.train()
    train(straight, list(model.parameters()), 3, 2)
    train(made_of[1], list(models[1].parameters()), 3, 2)
    assert all(map(equal, model.parameters(), models[1].parameters()))
