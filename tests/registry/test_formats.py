"""What specs say of other libraries' checkpoints is checked where it is said."""

from __future__ import annotations

from typing import Any

import pytest

from bnbx.registry import GroupFormat, Optimizer, State, rate

SPEC: dict[str, Any] = dict(
    name="r",
    summary="a rule",
    states=(State(name="v", signed=False), State(name="mean")),
    hyper=dict(lr=rate(1e-3)),
    element_code="v = v + g\nmean = mean + g\np = p - lr * v * mean",
)


@pytest.mark.parametrize(
    ("saved_as", "message"),
    [
        ({"torch": GroupFormat()}, r"saved_as: 'torch'; expected 'library.Class'"),
        ({"a.B": GroupFormat(nonzero=("rate",))}, r"saved_as\['a.B'\] names 'rate'; there are lr"),
        (
            {"a.B": GroupFormat(read_code="v = v - average")},
            r"saved_as\['a.B'\]: read_code names 'average'; the states are v, mean",
        ),
        ({"a.B": GroupFormat(read_code="w = v")}, "read_code names 'w'"),
        ({"a.B": GroupFormat(read_code="v = exp(v)")}, "read_code line 1"),
    ],
)
def test_a_format_names_what_there_is(saved_as: dict[str, GroupFormat], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Optimizer(**SPEC, saved_as=saved_as)


def test_states_without_the_class_that_has_them_are_refused() -> None:
    """They would do nothing: a checkpoint is read by the class whose groups it fits."""
    state = State(name="v", saved_as={"a": "exp_avg"})
    fields = {**SPEC, "states": (state, State(name="mean"))}
    with pytest.raises(ValueError, match=r"'v': saved_as has 'a'.*{'a\.Class': GroupFormat\("):
        Optimizer(**fields, saved_as={"b.C": GroupFormat()})
    assert Optimizer(**fields, saved_as={"a.B": GroupFormat()}).states[0] == state


def test_code_that_reads_states_is_part_of_the_spec() -> None:
    plain, coded = (
        Optimizer(**SPEC, saved_as={"a.B": GroupFormat(read_code=text)}) for text in ("", "v = -v")
    )
    assert plain != coded
    assert coded.saved_as["a.B"].read.writes == ("v",)
