"""A rule's variables are local to loops of the rendered kernels: no name may clash there.

What those loops call besides (helpers, types) is reserved in the rule language; here the rendered
kernels are searched for words that are not.
"""

from __future__ import annotations

import keyword
import re
from collections.abc import Iterator

import pytest

from bnbx.kernels import cpu, cuda
from bnbx.kernels.plan import Plan
from bnbx.kernels.source import render, type_name
from bnbx.registry.rule import FUNCTIONS, NAME, RESERVED
from plans import Case, one_of_each

SCOPES = (r"for \(int I = 0;", r"DEVICE void find_values\(")


def bodies(source: str) -> Iterator[str]:
    """What is in the braces after each place where a rule's lines may stand."""
    code = re.sub(r"//.*", "", source)
    for place in re.finditer("|".join(SCOPES), code):
        start = code.index("{", place.start())
        depth = 0
        for end in range(start, len(code)):
            depth += (code[end] == "{") - (code[end] == "}")
            if depth == 0:
                break
        yield code[start:end]


def own_names(plan: Plan) -> set[str]:
    """The names of the rule itself, and those that it is given."""
    lowered = plan.lowered
    lines = (*lowered.element, *lowered.apply, *lowered.tensor)
    found = {"p", "g", "numel", *lowered.inputs, *(f"norm_{name}" for name in lowered.norms)}
    found |= {state.name for state in plan.spec.states} | {line.target for line in lines}
    return found | {type_name(storage) for storage in plan.quantized}


@pytest.mark.parametrize("case", one_of_each(), ids=lambda case: case.name)
@pytest.mark.parametrize("target", ["cpu", "cuda"])
def test_what_surrounds_a_rule_is_reserved(case: Case, target: str) -> None:
    source = cuda.source(case.plan) if target == "cuda" else render(case.plan, cpu.TEMPLATE)
    scopes = list(bodies(source))
    assert scopes
    words = {word for body in scopes for word in re.findall(r"(?<![.\w])[a-z]\w*", body)}
    free = {
        word
        for word in words - own_names(case.plan) - RESERVED - FUNCTIONS.keys()
        if NAME.match(word) and not word.startswith("rule_") and not keyword.iskeyword(word)
    }
    assert not free, f"reserve these in bnbx/registry/rule.py: {sorted(free)}"
