"""What does not fit an optimizer, by mistake or forged, is refused before anything changes."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from bnbx.errors import BnbxWarning
from bnbx.optim import create
from bnbx.optimizers import engine
from bnbx.optimizers.engine import Optimizer8bit
from bnbx.registry import QuantType, quant_types
from optimizers.compare import equal, parameters_of
from optimizers.saved import refuse, train
from optimizers.variants import TARGETS, copies, parameters

SHAPES = [(5000,), (64, 70), (100,), ()]


@pytest.fixture(autouse=True)
def _reference(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every target computes the same bits; this one need not be compiled for each case."""
    monkeypatch.setattr(engine, "launch", TARGETS["reference"])


def trained(rule: str = "adamw", **arguments: Any) -> Optimizer8bit:
    """An optimizer of two groups after two steps."""
    params = parameters(torch.float32, SHAPES)
    groups: list[dict[str, Any]] = [{"params": params[:2]}, {"params": params[2:], "lr": 3e-3}]
    optimizer: Optimizer8bit = create(rule, groups, **arguments)
    train(optimizer, params, 0, 2)
    return optimizer


def emptied(tensor: Tensor) -> Tensor:
    """The same tensor after its memory was taken away."""
    tensor = tensor.clone()
    tensor.untyped_storage().resize_(0)
    return tensor


def json_of(name: str, **changes: Any) -> str:
    """A quant type's JSON with some fields changed, whatever that makes of it."""
    return json.dumps({**json.loads(quant_types().get(name).to_json()), **changes})


Damage = Callable[[dict[str, Any]], Any]


def _state(key: str, change: Callable[[Any], Any]) -> Damage:
    """Change one entry of the first parameter's state."""

    def damage(saved: dict[str, Any]) -> None:
        saved["state"][0][key] = change(saved["state"][0][key])

    return damage


def _about(key: str, value: Any) -> Damage:
    return lambda saved: saved["bnbx"].update({key: value})


# By what is wrong: how to do it to the state dict of an 8-bit AdamW, and words of the message.
DAMAGES: dict[str, tuple[Damage, str]] = {
    "truncated codes": (_state("m", lambda t: t[:-1]), r"'m'.*4999.*5000"),
    "truncated absmax": (_state("v_absmax", lambda t: t[:-1]), r"'v_absmax'.*\(19,\).*\(20,\)"),
    "absmax of another shape": (_state("m_absmax", lambda t: t[:, None]), r"'m_absmax'.*\(20, 1\)"),
    "codes of another dtype": (_state("m", lambda t: t.to(torch.int8)), r"'m'.*int8.*uint8"),
    "absmax of another dtype": (_state("v_absmax", lambda t: t.double()), r"'v_absmax'.*float64"),
    "codes that are a list": (_state("m", lambda t: t.tolist()), "'m'"),
    "negative step": (_state("step", lambda _: -1), "'step' is -1"),
    "step that is a tensor": (_state("step", lambda _: torch.tensor(3.0)), "'step'"),
    "no step": (lambda saved: saved["state"][0].pop("step"), "'step'"),
    "no absmax": (lambda saved: saved["state"][0].pop("m_absmax"), "'m_absmax' is missing"),
    "no type": (lambda saved: saved["state"][0].pop("m_type"), "'m_type' is missing"),
    "no codes": (lambda saved: saved["state"][0].pop("m"), "'m"),
    "states of another type": (_state("m_type", lambda _: "linear8"), "'m'.*'linear8'.*dynamic8"),
    "a type that is no name": (_state("m_type", lambda _: ["dynamic8"]), "quant type .'dynamic8'."),
    "a type of no name": (_state("m_type", lambda _: None), "quant type None"),
    "a label of another form": (_state("m_type", lambda _: "dynamic8/row"), "'dynamic8/row'"),
    "blocks that claim to be one": (
        _state("m_type", lambda _: "dynamic8/tensor"),
        r"\(20,\).*\(1,\)",
    ),
    "a type of other bytes": (_state("m_type", lambda t: t + 128), "quant type '\ufffd+', which"),
    "a type in floats": (_state("m_type", lambda t: t.float()), "'m_type' has dtype torch.float32"),
    "a type without memory": (_state("m_type", emptied), "'m_type' has memory for 0 of 8"),
    "float32 that claims codes": (_state("m", lambda t: t.float()), "'m' has dtype torch.float32"),
    "codes without memory": (_state("m", emptied), "'m' has memory for 0 of 5000"),
    "codes on meta": (_state("m", lambda t: t.to("meta")), "'m' is .* on meta"),
    "sparse absmax": (_state("m_absmax", lambda t: t.to_sparse()), "'m_absmax' is .*sparse"),
    "steps without end": (_state("step", lambda _: 10**400), "'step' is .* or more"),
    "more steps than can be counted": (_state("step", lambda _: 2**53), "'step' is 9007.* or more"),
    "NaN steps": (_state("step", lambda _: float("nan")), "'step' is nan"),
    "true steps": (_state("step", lambda _: True), "'step' is True"),
    "a residual of another shape": (
        lambda saved: saved["state"][0].update(residual=torch.zeros(3, dtype=torch.int8)),
        r"'residual' is \(3,\)",
    ),
    "a residual of floats": (
        lambda saved: saved["state"][0].update(residual=torch.zeros(5000)),
        "'residual' has dtype torch.float32",
    ),
    "norms that are a number": (
        lambda saved: saved["state"][0].update(gnorm_vec=1.0),
        "'gnorm_vec' is 1.0",
    ),
    "no state": (lambda saved: saved["state"][0].pop("v"), "'v'"),
    "one state too many": (lambda saved: saved["state"][0].update(z=torch.zeros(5000)), "'z'"),
    "a state that is no table": (lambda saved: saved["state"].update({0: [1, 2]}), "parameter 0"),
    "another rule": (_about("rule", "lion"), "'lion'.*'adamw'"),
    "a table that is none": (_about("quant_types", {"dynamic8": "0"}), "'dynamic8'"),
    "an unknown type": (_about("quant_types", {"nf5": "0"}), "'nf5'"),
    "no table": (_about("quant_types", {}), r"'dynamic8', which is not in .*\(none\)"),
    "a table by another name": (
        lambda saved: saved["bnbx"].update(quant_types={"nf4": json_of("dynamic8")}),
        "'nf4' of the state dict: it calls itself 'dynamic8'",
    ),
    "a table of another width": (
        lambda saved: saved["bnbx"].update(quant_types={"dynamic8": json_of("dynamic8", bits=4)}),
        "dynamic8.*256 numbers for 4 bits",
    ),
    "a table out of range": (
        lambda saved: saved["bnbx"].update(
            quant_types={"dynamic8": json_of("dynamic8", values=[1e300] * 256)}
        ),
        r"dynamic8.*values\.0: 1e\+300 is beyond the largest float32 number.*; and 251 more",
    ),
    "a table outside of its unit": (
        lambda saved: saved["bnbx"].update(
            quant_types={"dynamic8": json_of("dynamic8", values=[3.0] * 256)}
        ),
        r"dynamic8.*values\[0\] = 3 is outside \[-1, 1\]",
    ),
    "a table with a block of nothing": (
        lambda saved: saved["bnbx"].update(
            quant_types={"dynamic8": json_of("dynamic8", block_size=0)}
        ),
        "block_size 0",
    ),
    "a huge table": (
        lambda saved: saved["bnbx"].update(
            quant_types={"dynamic8": json_of("dynamic8", values=[0.0] * 10**6)}
        ),
        "at most 100000 characters",
    ),
    "a table that is no text": (_about("quant_types", {"dynamic8": 3}), "expected JSON"),
    "a table that is a spec of code": (
        _about("quant_types", {"dynamic8": '{"name": "dynamic8", "element_code": "p = p"}'}),
        "element_code",
    ),
    "another mode": (_about("mode", "asleep"), "mode 'asleep'"),
    "a mode that the rule lacks": (_about("mode", "eval"), "mode 'eval'"),
    "a header that is none": (lambda saved: saved.update(bnbx=3), "'bnbx'"),
    "no learning rate": (lambda saved: saved["param_groups"][0].pop("lr"), "group 0: lr missing"),
    "no betas": (lambda saved: saved["param_groups"][1].pop("betas"), "group 1: betas missing"),
    "no parameters": (lambda saved: saved["param_groups"][1].pop("params"), "params missing"),
    "parameters that are none": (lambda saved: saved["param_groups"][1].update(params=3), "int"),
    "one parameter twice": (lambda saved: saved["param_groups"][0].update(params=[0, 0]), "twice"),
    "states of no parameter": (
        lambda saved: saved["state"].update({7: saved["state"][0]}),
        "states of parameter 7",
    ),
    "parameters by another name": (
        lambda saved: saved["param_groups"][0].update(params=["a", "b"]),
        "states of parameter [01]",
    ),
    "states in a list": (lambda saved: saved.update(state=[]), "list"),
    "a learning rate of two": (
        lambda saved: saved["param_groups"][0].update(lr=torch.ones(2)),
        "malformed",
    ),
    "a learning rate in words": (lambda saved: saved["param_groups"][0].update(lr="3"), "lr='3'"),
    "an option out of range": (
        lambda saved: saved["param_groups"][0].update(percentile_clipping=1000),
        "percentile_clipping=1000",
    ),
    "another format": (_about("format", 99), "99"),
    "no word of bnbx": (
        lambda saved: (saved.pop("bnbx"), [g.pop("bits") for g in saved["param_groups"]]),
        "bnbx",
    ),
    "groups that are none": (lambda saved: saved.update(param_groups=[None]), "malformed"),
    "tables that are none": (_about("quant_types", None), "malformed"),
    "no states": (lambda saved: saved.pop("state"), "state"),
    "no groups": (lambda saved: saved.pop("param_groups"), "param_groups"),
    "a group too few": (lambda saved: saved["param_groups"].pop(), r"\[2\].*\[2, 2\]"),
    "a parameter too many": (
        lambda saved: saved["param_groups"][0]["params"].append(9),
        r"\[3, 2\].*\[2, 2\]",
    ),
    "a value out of range": (lambda saved: saved["param_groups"][0].update(lr=-1.0), "lr=-1.0"),
}


@pytest.mark.parametrize("what", DAMAGES)
def test_a_state_dict_that_does_not_fit_changes_nothing(what: str) -> None:
    optimizer = trained()
    damage, message = DAMAGES[what]
    saved = copy.deepcopy(optimizer.state_dict())
    damage(saved)
    refuse(optimizer, saved, message)


@pytest.mark.parametrize(
    "other",
    [
        torch.optim.RAdam,
        lambda params: create("lion", params),
        lambda params: create("adam", params),
    ],
    ids=["torch's RAdam", "lion", "adam"],
)
def test_the_state_dict_of_another_optimizer_changes_nothing(other: Any) -> None:
    optimizer = trained()
    others = copies(parameters_of(optimizer))
    theirs = other([{"params": others[:2]}, {"params": others[2:]}])
    train(theirs, others, 0, 2)
    refuse(optimizer, theirs.state_dict(), "bnbx|'lion'|'adam'")


def test_codes_of_another_width() -> None:
    """They take fewer bytes."""
    narrow = QuantType(
        name="narrow3",
        summary="three bits",
        bits=3,
        values=(-1, -0.5, -0.25, 0, 0.125, 0.25, 0.5, 1),
    )
    optimizer = trained()
    saved = copy.deepcopy(optimizer.state_dict())
    saved["bnbx"]["quant_types"]["narrow3"] = narrow.to_json()
    saved["state"][0]["m_type"] = "narrow3"
    refuse(optimizer, saved, r"'m' is \(5000,\); expected a tensor of \(1875,\)")
    saved["state"][0]["m"] = saved["state"][0]["m"][:1875].clone()
    with pytest.warns(BnbxWarning, match="1 x m from narrow3 to dynamic8"):
        optimizer.load_state_dict(saved)


def test_a_table_that_lies_about_its_numbers_is_taken_at_its_word() -> None:
    """The table in the dict says what the codes stand for, whatever is registered by its name."""
    optimizer = trained()
    saved = copy.deepcopy(optimizer.state_dict())
    linear = quant_types().get("linear8")
    forged = linear.model_copy(update=dict(name="dynamic8"))
    saved["bnbx"]["quant_types"]["dynamic8"] = forged.to_json()
    other = trained(bits=32)
    with pytest.warns(BnbxWarning, match="2 x m from dynamic8 to float32"):
        other.load_state_dict(saved)
    state = saved["state"][0]
    scale = state["m_absmax"].repeat_interleave(256)[:5000]
    expected = torch.tensor(linear.values)[state["m"].long()] * scale
    assert equal(other.state[parameters_of(other)[0]]["m"], expected)


def test_words_about_a_type_do_not_make_another_of_it() -> None:
    """A later version may describe the same table in another way."""
    optimizer = trained()
    saved = copy.deepcopy(optimizer.state_dict())
    saved["bnbx"]["quant_types"]["dynamic8"] = json_of("dynamic8", summary="other words")
    optimizer.load_state_dict(saved)


def test_errors_of_hooks_are_their_own() -> None:
    optimizer = trained()

    def hook(_: Any, __: Any) -> None:
        raise KeyError("mine")

    optimizer.register_load_state_dict_pre_hook(hook)
    with pytest.raises(KeyError, match="mine"):
        optimizer.load_state_dict(optimizer.state_dict())


def test_a_rule_that_has_changed_is_named() -> None:
    """Then groups may lack what the rule did not have before."""
    optimizer = trained()
    saved = copy.deepcopy(optimizer.state_dict())
    saved["bnbx"]["rule_digest"] = "0" * 16
    for group in saved["param_groups"]:
        del group["amsgrad"]
    with pytest.warns(BnbxWarning, match="'adamw' has changed") as caught:
        optimizer.load_state_dict(saved)
    assert [warning.filename for warning in caught] == [__file__]
