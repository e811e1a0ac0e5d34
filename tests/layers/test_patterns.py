"""Patterns on the names of modules: what they match."""

from __future__ import annotations

import pytest

from bnbx.nn.patterns import compile_pattern


@pytest.mark.parametrize(
    ("text", "matches", "others"),
    [
        ("lm_head", ["lm_head", "model.lm_head", "lm_head.weight"], ["lm_heads", "a.lm_head2"]),
        ("layers.1", ["layers.1", "a.layers.1.b"], ["layers.11", "layers.0.1"]),
        ("*mlp*", ["mlp", "a.mlp.0", "a.my_mlp2.b"], ["a.m.lp"]),
        ("layers.*.mlp", ["layers.0.mlp", "x.layers.0.mlp.up"], ["layers.mlp"]),
        ("regex:^a\\.(q|k)$", ["a.q"], ["a.qk", "b.a.q"]),
        ("layers.[01]", ["layers.1.x"], ["layers.2"]),
    ],
)
def test_patterns(text: str, matches: list[str], others: list[str]) -> None:
    pattern = compile_pattern("skip", text)
    assert [name for name in matches if not pattern.matches(name)] == []
    assert [name for name in others if pattern.matches(name)] == []
