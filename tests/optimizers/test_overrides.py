"""Overrides by name: what matches, which wins, and that nothing is silently without effect."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable, Mapping
from fnmatch import fnmatchcase
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from bnbx.errors import OptionError
from bnbx.optimizers.overrides import compile_overrides, names_of, split_names
from bnbx.registry import optimizers, quant_types
from bnbx.registry.config import resolve

NAMES = [
    "embed.weight",
    "layers.0.attention.weight",
    "layers.0.attention.bias",
    "layers.0.norm.weight",
    "layers.1.attention.weight",
    "layers.1.attention.bias",
    "layers.1.norm.weight",
    "head.weight",
]
SOME = {"bits": 32}


def matched(pattern: str) -> list[str]:
    patterns = compile_overrides({pattern: SOME})
    return [name for name in NAMES if patterns.layers_for(name)]


# ---- matching


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        ("*", NAMES),
        ("embed.weight", NAMES[:1]),
        ("*embed*", NAMES[:1]),
        ("embed", []),  # the whole name is matched
        ("weight", []),
        ("*.bias", [NAMES[2], NAMES[5]]),
        ("layers.[0].*", NAMES[1:4]),
        ("layers.?.norm.weight", [NAMES[3], NAMES[6]]),
        ("layers.[!0].norm.*", [NAMES[6]]),
        ("*EMBED*", []),  # case counts on every system
        ("layersX0.norm.weight", []),
        ("regex:bias", [NAMES[2], NAMES[5]]),
        (r"regex:\.bias$", [NAMES[2], NAMES[5]]),
        (r"regex:^layers\.\d+\.norm", [NAMES[3], NAMES[6]]),
        ("regex:^weight", []),
        ("regex:(?i)EMBED|HEAD", [NAMES[0], NAMES[7]]),
    ],
)
def test_patterns(pattern: str, expected: list[str]) -> None:
    assert matched(pattern) == expected


@given(st.text("ab.*?[]!-", min_size=1, max_size=8), st.text("ab.]\n", max_size=8))
def test_globs_are_those_of_fnmatch(pattern: str, name: str) -> None:
    found = compile_overrides({pattern: SOME}).layers_for(name)
    assert bool(found) == fnmatchcase(name, pattern)


def test_each_pattern_is_a_layer_in_the_order_given() -> None:
    overrides: dict[str, dict[str, float]] = {
        "*": {"lr": 1.0, "bits": 32},
        "head.*": {"lr": 2.0},
        "regex:^e": {"bits": 8},
    }
    patterns = compile_overrides(overrides)
    assert patterns.layers_for("head.weight") == (
        ("overrides['*']", {"lr": 1.0, "bits": 32}),
        ("overrides['head.*']", {"lr": 2.0}),
    )
    assert [origin for origin, _ in patterns.layers] == [f"overrides[{key!r}]" for key in overrides]
    found = resolve(optimizers().get("adamw"), quant_types(), patterns.layers_for("head.weight"))
    assert found.hyper["lr"] == 2.0
    assert found.origins["lr"] == "overrides['head.*']"
    assert found.origins["bits"] == "overrides['*']"


def test_without_overrides() -> None:
    nothing: tuple[dict[str, Any] | None, ...] = (None, {})
    for patterns in map(compile_overrides, nothing):
        assert not patterns
        assert patterns.layers_for("x") == patterns.layers == ()
        patterns.check_all_used([])
        patterns.check_named([{"params": [torch.zeros(1)]}])


def test_values_are_copied() -> None:
    types = {"m": "linear8"}
    given_: dict[str, Any] = {"*": {"state_types": types}}
    patterns = compile_overrides(given_)
    types["m"] = "dynamic8"
    given_["*"]["bits"] = 32
    given_["head.*"] = SOME
    assert patterns.layers_for("head.weight") == (
        ("overrides['*']", {"state_types": {"m": "linear8"}}),
    )


@pytest.mark.parametrize("again", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))])
def test_they_travel_with_an_optimizer(again: Callable[[Any], Any]) -> None:
    patterns = compile_overrides({"*.bias": SOME, "regex:^e": {"lr": 1.0}})
    patterns.layers_for("embed.weight")
    other = again(patterns)
    assert other == patterns
    assert other != compile_overrides({"*.bias": SOME})
    for name in NAMES:
        assert other.layers_for(name) == patterns.layers_for(name)


# ---- mistakes

MISTAKES: Mapping[str, tuple[str, Any]] = {
    "list": (r"overrides=\[\('\*', 3\)\]: expected", [("*", 3)]),
    "text": (r"overrides='\*': expected", "*"),
    "key of a number": ("the key 3 is no pattern", {3: SOME}),
    "empty pattern": ("the key '' is no pattern", {"": SOME}),
    "empty expression": ("the key 'regex:' is no pattern", {"regex:": SOME}),
    "value": (r"overrides\['\*'\]: 32; expected arguments by name", {"*": 32}),
    "empty value": (r"overrides\['\*'\]: \{\}; expected arguments", {"*": {}}),
    "argument of a number": (r"overrides\['\*'\]: the key 8 is no argument", {"*": {8: "bits"}}),
    "expression": (
        r"overrides\['regex:a\(b'\] is no regular expression: .*unterminated.*\n  a\(b\n   \^",
        {"regex:a(b": SOME},
    ),
    "glob as expression": (
        r"nothing to repeat.*\n  \*embed\*\n  \^\n.*glob needs no prefix",
        {"regex:*embed*": SOME},
    ),
}


@pytest.mark.parametrize("what", MISTAKES)
def test_mistakes_are_named(what: str) -> None:
    message, overrides = MISTAKES[what]
    with pytest.raises(OptionError, match=message):
        compile_overrides(overrides)


def test_a_pattern_without_effect_is_an_error() -> None:
    compile_overrides({"*": SOME, "*.bias": SOME}).check_all_used(NAMES)
    patterns = compile_overrides({"*": SOME, "*embd*": SOME})
    with pytest.raises(
        OptionError,
        match=r"overrides\['\*embd\*'\] matches none of the 8 parameters; "
        r"the nearest: 'embed\.weight'$",
    ):
        patterns.check_all_used(iter(NAMES))


@pytest.mark.parametrize(
    ("pattern", "words"),
    [
        ("embed", "nearest: 'embed.weight'"),
        ("layers.2.norm.weight", "nearest: 'layers.0.norm.weight', 'layers.1.norm.weight'"),
        (r"regex:\.biass$", "nearest: 'layers.0.attention.bias', 'layers.1.attention.bias'"),
        ("*.HEAD.*", "nearest: 'head.weight'"),
        ("zzz", "there are: 'embed.weight', .*, ... .3 more."),
        ("???", "there are: 'embed.weight'"),
    ],
)
def test_the_nearest_names_are_shown(pattern: str, words: str) -> None:
    with pytest.raises(OptionError, match=words) as caught:
        compile_overrides({pattern: SOME}).check_all_used(NAMES)
    if "nearest" in words:
        assert str(caught.value).endswith(words)


def test_no_names_at_all() -> None:
    with pytest.raises(OptionError, match=r"none of the 0 parameters; there are: \(none\)"):
        compile_overrides({"*": SOME}).check_all_used([])


# ---- names in groups


def test_parameters_without_names_are_an_error() -> None:
    patterns = compile_overrides({"*.bias": SOME})
    named = {"params": [torch.zeros(1)], "param_names": ["a"]}
    patterns.check_named([named, {"params": []}])
    with pytest.raises(
        OptionError, match=r"\['\*\.bias'\].*group 1 have none: pass model\.named_parameters\(\)"
    ):
        patterns.check_named([named, {"params": [torch.zeros(1)]}])


def test_names_are_split_from_parameters() -> None:
    model = nn.Linear(2, 3)
    group = {"params": model.named_parameters(), "lr": 0.5}
    found = split_names(group)
    assert found["param_names"] == names_of(found) == ["weight", "bias"]
    assert found["lr"] == 0.5
    for p, expected in zip(found["params"], model.parameters(), strict=True):
        assert p is expected
    assert "param_names" not in group


def test_torch_takes_a_group_that_was_split() -> None:
    """So an engine may split for itself whatever the version of torch."""
    model = nn.Linear(2, 3)
    ours = torch.optim.SGD([split_names({"params": model.named_parameters()})], lr=0.5)
    theirs = torch.optim.SGD(
        [{"params": list(model.parameters()), "param_names": ["weight", "bias"]}], lr=0.5
    )
    assert ours.param_groups == theirs.param_groups
    assert ours.state_dict() == theirs.state_dict()
    again = split_names(ours.param_groups[0])
    assert names_of(again) == ["weight", "bias"]


def test_groups_without_pairs_stay_as_they_are() -> None:
    p, q = torch.zeros(1), torch.zeros(2)
    for params in ([p, q], (p, q), iter([p, q])):
        found = split_names({"params": params})
        assert found["params"][0] is p
        assert found["params"][1] is q
        assert names_of(found) is None
    named = {"params": [p], "param_names": ["a"]}
    assert names_of(split_names(named)) == ["a"]
    assert names_of({"params": [p, q], "param_names": ["a"]}) is None  # no telling which


@pytest.mark.parametrize("params", [{torch.zeros(1)}, 3, "weights", None])
def test_what_torch_refuses_is_left_to_torch(params: Any) -> None:
    assert split_names({"params": params})["params"] is params
    assert split_names({"lr": 1.0}) == {"lr": 1.0}


def test_a_single_tensor() -> None:
    p = torch.zeros(2)
    found: Tensor = split_names({"params": p})["params"]
    assert found is p


@pytest.mark.parametrize(
    ("params", "words"),
    [
        ([("a", torch.zeros(1)), torch.zeros(1)], "1 of the 2 parameters of a group have names"),
        ([(1, torch.zeros(1))], "a parameter has the name 1; expected a string"),
    ],
)
def test_names_in_part(params: Any, words: str) -> None:
    with pytest.raises(OptionError, match=words):
        split_names({"params": params})
