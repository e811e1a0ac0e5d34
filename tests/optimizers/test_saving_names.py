"""States go by the names of parameters where both sides have them, whatever the groups."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import Tensor

from bnbx import optim
from bnbx.errors import BnbxWarning, CheckpointError
from bnbx.optim import create
from bnbx.optimizers.engine import Optimizer8bit
from optimizers.saved import refuse, through_a_file
from optimizers.variants import gradients, parameters

Split = list[dict[str, str]]  # by group: names that parameters have there, and what they are


def fresh() -> dict[str, Tensor]:
    """Four parameters of one shape."""
    return {name: torch.zeros(8, 8, requires_grad=True) for name in "abcd"}


def over(params: Mapping[str, Tensor], split: Split, make: Any = create, **more: Any) -> Any:
    """An optimizer whose group i has weight_decay i."""
    groups: list[dict[str, Any]] = [
        {"params": [(name, params[p]) for name, p in group.items()], "weight_decay": float(i)}
        for i, group in enumerate(split)
    ]
    return make("adamw", groups, **more) if make is create else make(groups, **more)


def trained(split: Split, **more: Any) -> dict[str, Any]:
    """The state dict of a step in which each parameter has another gradient."""
    params = fresh()
    optimizer = over(params, split, **more)
    for i, p in enumerate(params.values()):
        p.grad = torch.full((8, 8), i + 1.0)
    optimizer.step()
    return through_a_file(optimizer.state_dict())


def loaded(saved: dict[str, Any], split: Split) -> tuple[Optimizer8bit, dict[str, int | None]]:
    """An optimizer that has loaded it, and by parameter whose states it has: 1 for those of a."""
    params = fresh()
    optimizer = over(params, split)
    optimizer.load_state_dict(saved)
    found: dict[str, int | None] = {}
    for name, p in params.items():
        m = optimizer.state[p]["m"] if p in optimizer.state else None
        found[name] = None if m is None else round(float(m[0, 0]) * 10)
    return optimizer, found


def same(*groups: str) -> Split:
    """Names that are those of the parameters: "ab", "cd"."""
    return [{name: name for name in group} for group in groups]


BY_NAME = dict(a=1, b=2, c=3, d=4)


@pytest.mark.parametrize(
    "split", [same("ab", "cd"), same("ac", "bd"), same("dc", "ba"), same("abc", "d")]
)
def test_names_are_found_in_any_group(split: Split) -> None:
    """Values of groups stay with the groups, whose number is the same."""
    optimizer, found = loaded(trained(same("ab", "cd")), split)
    assert found == BY_NAME
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.0, 1.0]
    names = [group["param_names"] for group in optimizer.param_groups]
    assert names == [list(group) for group in split]


def test_names_on_one_side_only_are_told() -> None:
    saved = trained(same("ab", "cd"))
    message = "does not have 'zz', which begin without.*does not have 'd', whose states"
    with pytest.warns(BnbxWarning, match=message) as caught:
        _, found = loaded(saved, [{"b": "b", "a": "a"}, {"zz": "d", "c": "c"}])
    assert found == {**BY_NAME, "d": None}
    assert [warning.filename for warning in caught] == [__file__]
    with pytest.warns(BnbxWarning, match=r"not have 'd', whose states are left out\. Rename"):
        assert loaded(saved, same("b", "ca"))[1] == {**BY_NAME, "d": None}
    many = [{f"x{i}": p for i, p in enumerate("abc")}, {"d": "d"}]
    with pytest.warns(BnbxWarning, match="'x0', 'x1', 'x2', which begin"):
        assert loaded(saved, many)[1] == dict(a=None, b=None, c=None, d=4)


def test_names_that_are_all_new_are_a_wrapper_of_the_model() -> None:
    split = [{f"module.{n}": n for n in group} for group in ("ba", "dc")]
    assert loaded(trained(same("ab", "cd")), split)[1] == dict(a=2, b=1, c=4, d=3)
    other = over(fresh(), [{f"module.{n}": n for n in group} for group in ("abc", "d")])
    refuse(other, trained(same("ab", "cd")), r"groups of \[2, 2\].*\[3, 1\]")


def test_two_models_may_have_the_same_names() -> None:
    """Then a name tells a parameter from others of its group."""
    saved = trained([{"w": "a", "v": "b"}, {"w": "c", "v": "d"}])
    assert loaded(saved, [{"v": "a", "w": "b"}, {"w": "c", "v": "d"}])[1] == dict(
        a=2, b=1, c=3, d=4
    )
    doubled = through_a_file(saved)
    doubled["param_groups"][0]["param_names"] = ["w", "w"]
    assert loaded(doubled, [{"v": "a", "w": "b"}, {"w": "c", "v": "d"}])[1] == BY_NAME


def test_without_names_places_count() -> None:
    saved = trained(same("ab", "cd"))
    for group in saved["param_groups"]:
        del group["param_names"]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert loaded(saved, same("dc", "ba"))[1] == dict(a=4, b=3, c=2, d=1)
    with pytest.raises(CheckpointError, match="groups of"):
        loaded(saved, same("abc", "d"))


def test_another_number_of_groups_is_refused() -> None:
    """There would be no telling whose the values are."""
    refuse(over(fresh(), same("abcd")), trained(same("ab", "cd")), r"\[2, 2\].*\[4\]")


class Halving(optim.Optimizer8bit):
    """Without a rule."""

    def __init__(self, params: Any) -> None:
        super().__init__(params, dict(lr=0.5))

    @torch.no_grad()
    def update_step(self, group: Any, p: Any, gindex: int, pindex: int) -> None:
        self.state[p]["seen"] = p.grad.clone()


def test_optimizers_without_a_rule() -> None:
    saved = trained(same("ab", "cd"), make=Halving)
    params = fresh()
    other = over(params, same("dc", "ba"), Halving)
    other.load_state_dict(saved)
    assert [int(other.state[params[n]]["seen"][0, 0]) for n in "abcd"] == [1, 2, 3, 4]
    assert other.param_groups[0]["param_names"] == ["d", "c"]


def test_states_go_by_name_where_both_sides_have_the_same_names() -> None:
    """Parameters of equal shapes in another order would get each other's states unseen."""
    q, k = parameters(torch.float32, [(70, 70), (70, 70)])
    optimizer = create("adamw", [("q", q), ("k", k)])
    for p, g in zip((q, k), gradients([q, k]), strict=True):
        p.grad = g
    optimizer.step()
    turned = create("adamw", [("k", k), ("q", q)])
    turned.load_state_dict(optimizer.state_dict())
    assert not torch.equal(optimizer.state[q]["m"], optimizer.state[k]["m"])
    for p in (q, k):
        assert torch.equal(turned.state[p]["m"], optimizer.state[p]["m"])
    renamed = create("adamw", [("module.k", k), ("module.q", q)])
    renamed.load_state_dict(optimizer.state_dict())  # as torch: by place
    assert torch.equal(renamed.state[k]["m"], optimizer.state[q]["m"])
