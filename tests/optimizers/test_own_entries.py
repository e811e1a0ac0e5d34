"""Entries of a user or a subclass beside a rule's states: left alone, saved, loaded as they are."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch

from bnbx import optim
from bnbx.errors import BnbxWarning, CheckpointError
from bnbx.optim import create
from bnbx.optimizers.engine import Optimizer8bit
from bnbx.optimizers.state import ENGINE_KEYS
from bnbx.registry.checks import ENGINE_STATES
from optimizers.compare import assert_same, equal
from optimizers.saved import refuse, through_a_file, train
from optimizers.variants import copies, parameters

SHAPES = [(5000,), (20,)]


class Averaging(optim.AdamW8bit):
    """Keeps an average of its parameters, and counts."""

    @torch.no_grad()
    def update_step(self, group: Any, p: Any, gindex: int, pindex: int) -> None:
        self.state[p]["calls"] = self.state[p].get("calls", 0) + 1
        super().update_step(group, p, gindex, pindex)
        average = self.state[p].setdefault("ema", p.detach().double())
        average.lerp_(p.detach().double(), 0.1)


def trained(optimizer: Any, steps: int = 3) -> Any:
    train(optimizer, [p for g in optimizer.param_groups for p in g["params"]], 0, steps)
    return optimizer


def test_what_a_subclass_keeps_goes_on_after_loading() -> None:
    straight = trained(Averaging(parameters(torch.float32, SHAPES), lr=1e-2))
    params = list(straight.state)
    resumed = Averaging(copies(params), lr=1e-2)
    saved = straight.state_dict()
    resumed.load_state_dict(through_a_file(saved))
    others = resumed.param_groups[0]["params"]
    for optimizer, each in ((straight, params), (resumed, others)):
        train(optimizer, each, 3, 2)
    assert_same(straight, resumed)
    for p, q in zip(params, others, strict=True):
        assert resumed.state[q]["ema"].dtype == torch.float64
        assert equal(straight.state[p]["ema"], resumed.state[q]["ema"])
        assert resumed.state[q]["calls"] == 5


@pytest.mark.parametrize(
    "again", [copy.deepcopy, lambda o: pickle.loads(pickle.dumps(o))], ids=["deepcopy", "pickle"]
)
def test_copies_keep_them(again: Callable[[Any], Any]) -> None:
    twin = trained(again(trained(Averaging(parameters(torch.float32, SHAPES)))), 1)
    assert [saved["calls"] for saved in twin.state.values()] == [4, 4]


def test_entries_of_a_user() -> None:
    """Before the first step, under a name that ends like a label of ours, and in a nest."""
    (p,) = parameters(torch.float32, [(5000,)])
    optimizer = optim.AdamW8bit([p])
    tensor = torch.arange(4, dtype=torch.float16)
    own = {"tag": 1, "layer_type": "attention", 7: None, "nest": {"a": [tensor]}}
    optimizer.state[p].update(own)
    trained(optimizer, 2)
    other = optim.AdamW8bit(copies([p]))
    other.load_state_dict(through_a_file(optimizer.state_dict()))
    (q,) = other.param_groups[0]["params"]
    assert {key: other.state[q][key] for key in own if key != "nest"} == {
        key: own[key] for key in own if key != "nest"
    }
    found = other.state[q]["nest"]["a"][0]
    assert equal(found, tensor)
    assert found.data_ptr() != tensor.data_ptr()
    for each, parameter in ((optimizer, p), (other, q)):
        del each.state[parameter]["nest"]
        trained(each, 1)
    assert_same(optimizer, other)


def test_modes_do_not_mind_them() -> None:
    params = parameters(torch.float32, SHAPES)
    optimizer = trained(create("schedule_free_adamw", params))
    optimizer.state[params[0]]["tag"] = 1
    optimizer.eval()
    optimizer.train()
    assert optimizer.state[params[0]]["tag"] == 1


def adamw(**arguments: Any) -> Optimizer8bit:
    found: Optimizer8bit = trained(create("adamw", parameters(torch.float32, SHAPES), **arguments))
    return found


def emptied() -> torch.Tensor:
    tensor = torch.zeros(5000)
    tensor.untyped_storage().resize_(0)
    return tensor


@pytest.mark.parametrize("header", [True, False], ids=["with header", "without"])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"m1": torch.zeros(5000)}, "unexpected 'm1', a state of 'ademamix'.* name that no rule"),
        ({"z_type": "dynamic8"}, "unexpected 'z_type', a state of 'schedule_free_adamw'"),
        ({"vmax_absmax": torch.zeros(20)}, "unexpected 'vmax_absmax'; expected"),
        ({"ema": emptied()}, "'ema' has memory for 0 of 5000"),
        ({"ema": torch.zeros(3, device="meta")}, "malformed"),
    ],
)
def test_states_of_other_rules_are_none(change: dict[str, Any], message: str, header: bool) -> None:
    optimizer = adamw()
    saved = copy.deepcopy(optimizer.state_dict())
    saved["state"][0].update(change)
    if not header:
        del saved["bnbx"]
    refuse(optimizer, saved, message)


def test_a_misspelled_state_is_missing() -> None:
    optimizer = adamw()
    saved = copy.deepcopy(optimizer.state_dict())
    saved["state"][1]["mm"] = saved["state"][1].pop("m")
    refuse(optimizer, saved, "'m' is missing")


def test_bitsandbytes_gets_none() -> None:
    optimizer = adamw()
    optimizer.state[optimizer.param_groups[0]["params"][0]]["tag"] = 1
    with pytest.warns(BnbxWarning, match="entries that are no state's are left out: 'tag'"):
        saved = optimizer.state_dict(save_as="bitsandbytes")
    assert "tag" not in saved["state"][0]


def test_a_lost_step_is_not_begun_anew() -> None:
    optimizer = adamw(percentile_clipping=50)
    del optimizer.state[optimizer.param_groups[0]["params"][0]]["step"]
    with pytest.raises(CheckpointError, match="'step' is None"):
        trained(optimizer, 1)


def test_states_cannot_have_the_engines_names() -> None:
    assert ENGINE_STATES == ENGINE_KEYS  # so a spec is refused that has one of them
