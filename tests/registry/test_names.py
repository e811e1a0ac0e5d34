"""Which names are taken for misspellings: slips of the hand, no names of their own."""

from __future__ import annotations

import pytest

from bnbx.registry.names import closest

KNOWN = ["lr", "eps", "bits", "betas", "paged", "momentum", "weight_decay", "max_unorm"]


@pytest.mark.parametrize(
    ("name", "meant"),
    [
        ("lrs", "lr"),
        ("lr_", "lr"),
        ("LR", "lr"),
        ("bit", "bits"),
        ("btis", "bits"),
        ("beta", "betas"),
        ("ebtas", "betas"),
        ("pagde", "paged"),
        ("_paged", "paged"),
        ("momentmu", "momentum"),
        ("mometnun", "momentum"),
        ("weight_decya", "weight_decay"),
        ("weigth_deacy", "weight_decay"),
        ("weightdecay", "weight_decay"),
        ("max_norm", "max_unorm"),
    ],
)
def test_slips(name: str, meant: str) -> None:
    assert closest(name, KNOWN) == meant


@pytest.mark.parametrize(
    "name",
    [
        "no_weight_decay",
        "weight_decay_mult",
        "weight_decay_x",
        "lr_x",
        "my_momentum",
        "steps",
        "l1",
        "pages_",
        "momentary",
        "",
    ],
)
def test_names_of_their_own(name: str) -> None:
    assert closest(name, KNOWN) is None
