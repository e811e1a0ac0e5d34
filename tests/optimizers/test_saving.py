"""A run that was saved and loaded goes on to the same bits; what does not fit changes nothing."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from bnbx import optim
from bnbx.optim import create
from bnbx.optimizers import engine
from bnbx.optimizers.engine import Optimizer8bit
from optimizers.compare import assert_same, equal
from optimizers.saved import same_values, through_a_file, train
from optimizers.variants import TARGETS, copies, gradients, parameters, set_gradients

SHAPES = [(5000,), (64, 70), (100,), ()]
SETTINGS: dict[str, tuple[str, dict[str, Any]]] = {
    "adamw, 8 bits": ("adamw", dict(lr=1e-2)),
    "adamw, 32 bits": ("adamw", dict(lr=1e-2, bits=32)),
    "adam, mixed": ("adam", dict(state_types={"m": "linear8", "v": "float32"}, weight_decay=0.1)),
    "lion, all quantized": ("lion", dict(min_8bit_size=0)),
    "sgd, nesterov": ("sgd", dict(lr=1e-2, momentum=0.9, nesterov=True)),
    "sgd, no state": ("sgd", dict(lr=1e-2)),
}


def made(
    name: str, params: list[Tensor], dtype: torch.dtype = torch.float32
) -> tuple[Optimizer8bit, list[Tensor]]:
    """An optimizer of two groups over `params`, or over fresh ones."""
    rule, arguments = SETTINGS[name]
    params = params or parameters(dtype, SHAPES)
    groups: list[dict[str, Any]] = [
        {"params": params[:2]},
        {"params": params[2:], "lr": 3e-3, "weight_decay": 0.2},
    ]
    return create(rule, groups, **arguments), params


# ---- going on


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", SETTINGS)
def test_five_steps_a_file_and_five_steps_are_ten(name: str, dtype: torch.dtype) -> None:
    straight, params = made(name, [], dtype)
    others = copies(params)
    first, _ = made(name, others)
    train(straight, params, 0, 10)
    train(first, others, 0, 5)
    second, later = made(name, copies(others))
    second.load_state_dict(through_a_file(first.state_dict()))
    assert_same(first, second)
    train(second, later, 5, 5)
    assert_same(straight, second)


@pytest.mark.parametrize(
    "again",
    [copy.deepcopy, lambda optimizer: pickle.loads(pickle.dumps(optimizer))],
    ids=["deepcopy", "pickle"],
)
@pytest.mark.parametrize("name", SETTINGS)
def test_copied_optimizers_go_on(name: str, again: Callable[[Any], Any]) -> None:
    straight, params = made(name, [])
    train(straight, params, 0, 5)
    twin = again(straight)
    theirs = [p for group in twin.param_groups for p in group["params"]]
    assert_same(straight, twin)
    assert not {p.data_ptr() for p in params} & {p.data_ptr() for p in theirs}
    train(straight, params, 5, 3)
    train(twin, theirs, 5, 3)
    assert_same(straight, twin)


def test_classes_survive_pickling() -> None:
    made_by: Any = optim.AdamW8bit
    optimizer = made_by(parameters(torch.float32), lr=1e-2)
    again = pickle.loads(pickle.dumps(optimizer))
    assert type(again) is made_by
    assert repr(again) == repr(optimizer)
    again.add_param_group({"params": torch.zeros(3, requires_grad=True), "lr": 5e-3})
    assert again.param_groups[1]["betas"] == (0.9, 0.999)


def test_before_the_first_step_there_are_no_states() -> None:
    optimizer, params = made("adamw, 8 bits", [])
    saved = through_a_file(optimizer.state_dict())
    assert saved["state"] == {}
    other, others = made("adamw, 8 bits", copies(params))
    other.load_state_dict(saved)
    train(optimizer, params, 0, 2)
    train(other, others, 0, 2)
    assert_same(optimizer, other)


def test_loaded_states_are_copies() -> None:
    optimizer, params = made("adamw, 8 bits", [])
    train(optimizer, params, 0, 3)
    saved = optimizer.state_dict()
    kept = copy.deepcopy(saved)
    other, others = made("adamw, 8 bits", copies(params))
    other.load_state_dict(saved)
    train(other, others, 3, 2)
    assert same_values(saved, kept)


def test_the_values_of_groups_are_loaded() -> None:
    optimizer, params = made("adamw, 8 bits", [])
    optimizer.param_groups[1].update(lr=0.5, betas=(0.1, 0.2), skip_zeros=True, note="mine")
    train(optimizer, params, 0, 1)
    other, others = made("adamw, 8 bits", copies(params))
    other.load_state_dict(through_a_file(optimizer.state_dict()))
    for key in ("lr", "skip_zeros", "note"):
        assert other.param_groups[1][key] == optimizer.param_groups[1][key]
    assert tuple(other.param_groups[1]["betas"]) == (0.1, 0.2)
    assert other.param_groups[1]["params"] == others[2:]
    train(optimizer, params, 1, 2)
    train(other, others, 1, 2)
    assert_same(optimizer, other)


def test_schedulers_go_on_with_the_optimizer() -> None:
    optimizer, params = made("adamw, 8 bits", [])
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=0.1, total_steps=20)
    for step in range(4):
        train(optimizer, params, step, 1)
        scheduler.step()
    other, others = made("adamw, 8 bits", copies(params))
    second = torch.optim.lr_scheduler.OneCycleLR(other, max_lr=0.1, total_steps=20)
    other.load_state_dict(through_a_file(optimizer.state_dict()))
    second.load_state_dict(scheduler.state_dict())
    for step in range(4, 8):
        train(optimizer, params, step, 1)
        train(other, others, step, 1)
        scheduler.step()
        second.step()
    assert optimizer.param_groups[0]["lr"] == other.param_groups[0]["lr"]
    assert_same(optimizer, other)


def test_how_states_are_stored_is_the_choice_of_the_optimizer_that_loads() -> None:
    optimizer, params = made("adamw, 8 bits", [])
    optimizer.param_groups[1].update(bits=32, min_8bit_size=0, block_wise=False, paged=True)
    other, _ = made("adamw, 8 bits", params)
    other.load_state_dict(through_a_file(optimizer.state_dict()))
    group = other.param_groups[1]
    assert [group[key] for key in ("bits", "min_8bit_size", "block_wise", "paged")] == [
        8,
        4096,
        True,
        False,
    ]


# ---- hooks


def test_hooks_of_saving_and_loading_run() -> None:
    optimizer, params = made("adamw, 8 bits", [])
    train(optimizer, params, 0, 1)
    events: list[str] = []
    optimizer.register_state_dict_pre_hook(lambda _: events.append("before saving"))

    def after_saving(_: Any, saved: dict[str, Any]) -> dict[str, Any]:
        events.append("after saving")
        return {**saved, "extra": 1}

    def before_loading(_: Any, saved: dict[str, Any]) -> dict[str, Any]:
        events.append("before loading")
        assert saved.pop("extra") == 1
        saved["param_groups"] = [{**group, "lr": 0.25} for group in saved["param_groups"]]
        return saved

    optimizer.register_state_dict_post_hook(after_saving)
    optimizer.register_load_state_dict_pre_hook(before_loading)
    optimizer.register_load_state_dict_post_hook(lambda _: events.append("after loading"))
    saved = optimizer.state_dict()
    assert saved["extra"] == 1
    optimizer.load_state_dict(saved)
    assert saved["extra"] == 1
    assert saved["param_groups"][0]["lr"] == 1e-2
    assert [group["lr"] for group in optimizer.param_groups] == [0.25, 0.25]
    assert events == ["before saving", "after saving", "before loading", "after loading"]


def test_a_hook_may_wrap_what_is_saved() -> None:
    optimizer, params = made("adamw, 8 bits", [])
    train(optimizer, params, 0, 1)
    optimizer.register_state_dict_post_hook(lambda _, saved: {"wrapped": saved})
    assert set(optimizer.state_dict()) == {"wrapped", "bnbx"}
    optimizer.register_load_state_dict_pre_hook(lambda _, saved: saved["wrapped"])
    optimizer.load_state_dict(optimizer.state_dict())
    train(optimizer, params, 1, 1)


def test_a_changed_width_is_noticed_before_codes_are_misread(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Tensors made for one quant type cannot become those of another by a change of the group.

    On the reference, because a native kernel would write past the end of the codes.
    """
    monkeypatch.setattr(engine, "launch", TARGETS["reference"])
    for change in ({"bits": 32}, {"state_types": "linear8"}):
        optimizer, params = made("adamw, 8 bits", [])
        train(optimizer, params, 0, 2)
        values = [p.detach().clone() for p in params]
        optimizer.param_groups[0].update(change)
        set_gradients(params, gradients(params))
        with pytest.raises(ValueError, match="'m'"):
            optimizer.step()
        assert all(equal(p.detach(), value) for p, value in zip(params, values, strict=True))


def test_checkpoint_of_a_whole_training_run(tmp_path: Path) -> None:
    model = torch.nn.Sequential(torch.nn.Linear(80, 80), torch.nn.Linear(80, 1))
    optimizer = create("adamw", model.parameters())
    path = tmp_path / "checkpoint.pt"

    def loss_of_a_step() -> float:
        optimizer.zero_grad()
        loss = model(torch.ones(4, 80)).square().mean()
        loss.backward()
        optimizer.step()
        return float(loss.detach())

    first = [loss_of_a_step() for _ in range(3)]
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, path)
    rest = [loss_of_a_step() for _ in range(3)]
    loaded = torch.load(path, weights_only=True)
    model.load_state_dict(loaded["model"])
    optimizer.load_state_dict(loaded["optimizer"])
    assert [loss_of_a_step() for _ in range(3)] == rest
    assert rest[-1] < first[0]


def test_states_and_groups_are_enough() -> None:
    """torch.distributed.checkpoint hands on no other entries of a state dict."""
    optimizer, params = made("adamw, 8 bits", [])
    train(optimizer, params, 0, 2)
    saved = optimizer.state_dict()
    del saved["bnbx"]
    other, _ = made("adamw, 8 bits", [])
    other.load_state_dict(saved)
    assert other.param_groups[0]["bits"] == 8


def test_names_of_types_are_tensors_of_bytes_or_text() -> None:
    """A flattened checkpoint holds no text; ours once did."""
    optimizer, params = made("adamw, 8 bits", [])
    train(optimizer, params, 0, 2)
    saved = copy.deepcopy(optimizer.state_dict())
    state = saved["state"][0]
    assert bytes(state["m_type"].tolist()) == b"dynamic8"
    assert optimizer.state[params[0]]["m_type"] == "dynamic8"
    assert state["m_type"].data_ptr() != state["v_type"].data_ptr()  # may be read into
    state["m_type"] = "dynamic8"
    other, _ = made("adamw, 8 bits", copies(params))
    other.load_state_dict(through_a_file(saved))
    assert_same(optimizer, other)


def test_a_tensor_learning_rate_is_not_shared_with_the_checkpoint() -> None:
    first = create("adamw", [torch.zeros(3)], lr=torch.tensor(0.5))
    second = create("adamw", [torch.zeros(3)])
    second.load_state_dict(first.state_dict())
    second.param_groups[0]["lr"].mul_(0.1)
    assert float(first.param_groups[0]["lr"]) == 0.5
