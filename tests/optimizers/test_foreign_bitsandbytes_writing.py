"""Our checkpoints go on in bitsandbytes, and come back unchanged."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from bnbx.errors import BnbxWarning, CheckpointError, OptionError
from bnbx.optim import create
from bnbx.optimizers import engine
from bnbx.optimizers.engine import Optimizer8bit
from bnbx.registry import QuantType, quant_types
from optimizers.bitsandbytes_cases import (
    CASES,
    EVERY,
    LR,
    SHAPES,
    bitsandbytes,
    compare_steps,
    groups_of,
    ours_of,
    same_states,
    theirs_with,
)
from optimizers.compare import equal, parameters_of
from optimizers.saved import through_a_file, train
from optimizers.variants import TARGETS, copies, parameters


@pytest.fixture(autouse=True)
def _reference(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every target computes the same bits; this one need not be compiled for each case."""
    monkeypatch.setattr(engine, "launch", TARGETS["reference"])


# ---- ours, there


@pytest.mark.parametrize(("rule", "bits"), EVERY)
def test_our_run_goes_on_there(rule: str, bits: int) -> None:
    case, params = CASES[rule], parameters(torch.float32, SHAPES)
    ours: Optimizer8bit = create(case.rule, groups_of(params), bits=bits, lr=LR, **case.theirs)
    train(ours, params, 0, 5)
    for step in range(5, 8):
        saved = through_a_file(ours.state_dict(save_as="bitsandbytes"))
        others = copies(params)
        theirs = theirs_with(case, others, bits, **{"lr": 9.0, **case.theirs})
        theirs.load_state_dict(saved)
        same_states(case, ours, theirs)
        assert [group["lr"] for group in theirs.param_groups] == [LR, 5 * LR]
        compare_steps(case, ours, theirs, step)


@pytest.mark.parametrize(("rule", "bits"), EVERY)
def test_there_and_back(rule: str, bits: int) -> None:
    case, params = CASES[rule], parameters(torch.float32, SHAPES)
    ours: Optimizer8bit = create(case.rule, groups_of(params), bits=bits, lr=LR, **case.theirs)
    train(ours, params, 0, 2)
    ours.param_groups[0]["initial_lr"] = 0.5
    again = ours_of(case, copies(params), bits)
    again.load_state_dict(through_a_file(ours.state_dict(save_as="bitsandbytes")))
    for p, q in zip(params, parameters_of(again), strict=True):
        assert ours.state[p].keys() == again.state[q].keys()
        assert all(equal(value, again.state[q][key]) for key, value in ours.state[p].items())
    for group, other in zip(ours.param_groups, again.param_groups, strict=True):
        values = {k: v for k, v in group.items() if k != "params"}
        assert values == {k: v for k, v in other.items() if k != "params"}


@pytest.mark.parametrize(
    "arguments",
    [
        dict(bits=4),
        dict(block_wise=False),
        dict(state_types={"m": "linear8", "v": "float32"}),
        dict(state_types={"m": "dynamic8", "v": "state4"}),
    ],
    ids=str,
)
def test_what_it_has_no_form_for_is_written_in_float32(
    arguments: dict[str, Any],
) -> None:
    case, params = CASES["adamw"], parameters(torch.float32, SHAPES)
    ours: Optimizer8bit = create("adamw", params, lr=LR, **arguments)
    train(ours, params, 0, 2)
    with pytest.warns(BnbxWarning, match="8 bits in blocks of 256") as caught:
        saved = through_a_file(ours.state_dict(save_as="bitsandbytes"))
    assert [w.filename for w in caught] == [__file__]
    wide = create("adamw", copies(params), bits=32)
    with pytest.warns(BnbxWarning, match="converted"):
        wide.load_state_dict(ours.state_dict())
    theirs = bitsandbytes.optim.AdamW8bit(copies(params), lr=1.0)
    theirs.load_state_dict(saved)
    same_states(case, wide, theirs)
    train(theirs, parameters_of(theirs), 2, 1)


def test_another_table_of_8_bits_is_written_as_it_is() -> None:
    params = parameters(torch.float32, SHAPES)
    ours: Optimizer8bit = create("adamw", params, lr=LR, state_types="linear8")
    train(ours, params, 0, 2)
    theirs = bitsandbytes.optim.AdamW8bit(copies(params), lr=1.0)
    theirs.load_state_dict(through_a_file(ours.state_dict(save_as="bitsandbytes")))
    same_states(CASES["adamw"], ours, theirs)
    linear8: QuantType = quant_types().get("linear8")
    tables = theirs.state[parameters_of(theirs)[0]]
    assert tables["qmap1"].tolist() == list(linear8.values)
    assert tables["qmap2"].tolist() == list(linear8.unsigned_values or ())
    train(theirs, parameters_of(theirs), 2, 1)


def test_room_for_the_norm_of_updates() -> None:
    """It is read wherever it clips."""
    for rule, clips in (("lars", True), ("sgd", False)):
        params = parameters(torch.float32, SHAPES)
        ours: Optimizer8bit = create(rule, params, momentum=0.9)
        train(ours, params, 0, 1)
        saved = ours.state_dict(save_as="bitsandbytes")
        assert all(("unorm_vec" in entry) == clips for entry in saved["state"].values())


def test_the_norms_of_percentile_clipping_go_along() -> None:
    """The option does not: bitsandbytes keeps it in the optimizer."""
    params = parameters(torch.float32, SHAPES)
    ours: Optimizer8bit = create("adamw", params, lr=LR, percentile_clipping=50)
    train(ours, params, 0, 3)
    saved = through_a_file(ours.state_dict(save_as="bitsandbytes"))
    theirs = bitsandbytes.optim.AdamW8bit(copies(params), lr=LR)
    theirs.load_state_dict(saved)
    again = create("adamw", copies(params), percentile_clipping=50)
    again.load_state_dict(theirs.state_dict())
    others = zip(parameters_of(theirs), parameters_of(again), strict=True)
    for p, (there, here) in zip(params, others, strict=True):
        norms = ours.state[p]["gnorm_vec"]
        assert norms.count_nonzero() > 0
        assert equal(theirs.state[there]["gnorm_vec"], norms)
        assert equal(again.state[here]["gnorm_vec"], norms)
    for optimizer in (ours, again):
        train(optimizer, parameters_of(optimizer), 3, 2)
    assert all(map(equal, params, parameters_of(again)))


@pytest.mark.parametrize(
    ("rule", "arguments", "message"),
    [
        ("adam", dict(weight_decay=0.1), "weight_decay=0.0 alone.*weight_decay=0.1"),
        ("adamw", dict(amsgrad=True), "amsgrad=True"),
        ("adamw", dict(maximize=True), "maximize=True"),
        ("sgd", dict(momentum=0.9, nesterov=True), "nesterov=True"),
        ("sgd", dict(momentum=0.9, dampening=0.5), "dampening=0.5"),
        ("rmsprop", dict(centered=True), "centered=True"),
        ("adagrad", dict(lr_decay=0.1), "lr_decay=0.1"),
        ("lamb", dict(adam_w_mode=False), "adam_w_mode=False"),
        ("adopt", {}, "bitsandbytes has no 'adopt'"),
    ],
)
def test_what_it_has_no_rule_for_is_refused(
    rule: str, arguments: dict[str, Any], message: str
) -> None:
    params = parameters(torch.float32, SHAPES)
    ours: Optimizer8bit = create(rule, params, **arguments)
    train(ours, params, 0, 1)
    with pytest.raises(CheckpointError, match=f"{message}.*save_as='bnbx'"):
        ours.state_dict(save_as="bitsandbytes")


@pytest.mark.parametrize("save_as", ["torch", "safetensors", None, ["bitsandbytes"]])
def test_other_formats_are_not_written(save_as: Any) -> None:
    with pytest.raises(OptionError, match=r"save_as=.*expected one of bnbx, bitsandbytes"):
        create("adamw", [torch.zeros(3)]).state_dict(save_as=save_as)


def test_the_low_bits_of_a_master_are_named_when_they_are_lost() -> None:
    params = parameters(torch.bfloat16, SHAPES)
    ours: Optimizer8bit = create("adamw", params, master="residual")
    train(ours, params, 0, 1)
    with pytest.warns(BnbxWarning, match="keeps no residual"):
        saved = ours.state_dict(save_as="bitsandbytes")
    theirs = bitsandbytes.optim.AdamW8bit(copies(params), lr=1.0)
    theirs.load_state_dict(saved)
    same_states(CASES["adamw"], ours, theirs)
    train(theirs, parameters_of(theirs), 1, 1)


def test_a_learning_rate_in_a_tensor_becomes_a_number() -> None:
    ours: Optimizer8bit = create("adamw", [torch.zeros(3)], lr=torch.tensor(0.5))
    saved = ours.state_dict(save_as="bitsandbytes")
    assert saved["param_groups"][0]["lr"] == 0.5
    assert isinstance(saved["param_groups"][0]["lr"], float)
