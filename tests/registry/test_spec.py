"""Specs are data: they travel as JSON and pickles, compare by content, and never change."""

from __future__ import annotations

import copy
import json
import os
import pickle
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import pytest

from bnbx.errors import SpecError
from bnbx.registry import (
    Constraint,
    GroupFormat,
    Hyper,
    Optimizer,
    QuantType,
    State,
    fraction,
    optimizers,
    quant_types,
    rate,
)
from bnbx.registry.quant_type import Scale
from bnbx.registry.spec import Spec

SPECS: list[Spec] = [*optimizers(), *quant_types()]
OPTIMIZER: dict[str, Any] = dict(
    name="r",
    summary="a rule",
    source="a page",
    states=(State(name="m"),),
    hyper=dict(lr=rate(1e-3), beta=fraction(0.9), eps=rate(1e-8)),
    packs=dict(pair=("lr", "beta")),
    constraints=(Constraint(condition="lr < 1", message="large"),),
    step_code="c = 1 - beta**step",
    element_code="m = where(beta, beta * m + g, g)\np = p - lr * m / c + eps",
)
VALUES = (-1.0, -0.5, 0.5, 1.0)
QUANT_TYPE: dict[str, Any] = dict(
    name="q2",
    summary="a type",
    source="a page",
    bits=2,
    values=VALUES,
    unsigned_values=(0.0, 0.25, 0.5, 1.0),
    block_size=128,
)


def with_hyper(**changes: Any) -> dict[str, Any]:
    """The hyperparameters of OPTIMIZER with another `beta`."""
    return {**OPTIMIZER["hyper"], "beta": Hyper(**{**dict(default=0.9, minimum=0.0), **changes})}


# One change for every field of a spec and of its parts.
OPTIMIZER_CHANGES: dict[str, dict[str, Any]] = {
    "name": dict(name="r2"),
    "summary": dict(summary="A rule"),
    "source": dict(source=""),
    "states": dict(states=(State(name="m"), State(name="b")), element_code="m = g\nb = g\n"
                   "p = m * beta * c * lr * eps"),
    "states.name": dict(states=(State(name="n"),), element_code=OPTIMIZER["element_code"].replace(
        "m", "n")),
    "states.signed": dict(states=(State(name="m", signed=False),)),
    "states.when": dict(states=(State(name="m", when="beta"),)),
    "states.initial": dict(states=(State(name="m", initial="eps"),)),
    "states.initial of p": dict(states=(State(name="m", initial="p", quantized=False),)),
    "states.quantized": dict(states=(State(name="m", quantized=False),)),
    "states.saved_as": dict(states=(State(name="m", saved_as={"torch": "exp_avg"}),),
                            saved_as={"torch.R": GroupFormat()}),
    "states.saved_as key": dict(states=(State(name="m", saved_as={"torch": "state1"}),),
                                saved_as={"torch.R": GroupFormat()}),
    "hyper": dict(hyper={**OPTIMIZER["hyper"], "warm": rate(0.0)}, step_code="c = 1 - beta**warm"),
    "hyper order": dict(hyper=dict(reversed(OPTIMIZER["hyper"].items()))),
    "hyper.default": dict(hyper=with_hyper(default=0.95)),
    "hyper.default of none": dict(hyper=with_hyper(default=None)),
    "hyper.default last bit": dict(hyper=with_hyper(default=0.9000000000000001)),
    "hyper.minimum": dict(hyper=with_hyper(minimum=None)),
    "hyper.below": dict(hyper=with_hyper(below=2.0)),
    "hyper.positive": dict(hyper=with_hyper(positive=True)),
    "hyper.optional": dict(hyper=with_hyper(optional=True)),
    "hyper.flag": dict(hyper=with_hyper(default=True, flag=True)),
    "packs": dict(packs={}),
    "packs.name": dict(packs=dict(both=("lr", "beta"))),
    "packs.members": dict(packs=dict(pair=("beta", "lr"))),
    "constraints": dict(constraints=()),
    "constraints.condition": dict(constraints=(Constraint(condition="lr < 2", message="large"),)),
    "constraints.message": dict(constraints=(Constraint(condition="lr < 1", message="Large"),)),
    "saved_as": dict(saved_as={"torch.R": GroupFormat()}),
    "saved_as counts": dict(saved_as={"torch.R": GroupFormat(counts=False)}),
    "step_code": dict(step_code="c = 1 - beta ** step"),
    "element_code": dict(element_code=OPTIMIZER["element_code"] + "\n"),
    "apply_code": dict(element_code="m = where(beta, beta * m + g, g)",
                       apply_code="p = p - lr * m / c + eps"),
    "tensor_code": dict(element_code="m = where(beta, beta * m + g, g)",
                        tensor_code="t = norm_m", apply_code="p = p - lr * m / c + eps * t"),
    "eval_code": dict(eval_code="p = p + m", train_code="p = p - m"),
    "train_code": dict(eval_code="p = p + m", train_code="p = p - m + 0"),
}  # fmt: skip
QUANT_TYPE_CHANGES: dict[str, dict[str, Any]] = {
    "name": dict(name="q"),
    "summary": dict(summary="A type"),
    "source": dict(source=""),
    "bits": dict(bits=3, values=VALUES * 2, unsigned_values=(0.0, 0.25, 0.5, 1.0) * 2),
    "values": dict(values=(-1.0, -0.25, 0.5, 1.0)),
    "values order": dict(values=VALUES[::-1]),
    "values sign of zero": dict(values=(-1.0, -0.0, 0.5, 1.0)),
    "values zero": dict(values=(-1.0, 0.0, 0.5, 1.0)),
    "unsigned_values": dict(unsigned_values=(0.0, 0.25, 0.75, 1.0)),
    "unsigned_values none": dict(unsigned_values=None),
    "values none": dict(values=(-1.0, None, 0.5, 1.0)),
    "unit": dict(unit=1.0000001192092896),
    "decode_only": dict(decode_only=(1,)),
    "ties": dict(ties="even"),
    "grid": dict(grid=255),
    "block_size": dict(block_size=64),
    "scale": dict(scale=Scale(dtype="bfloat16")),
    "scale.per": dict(scale=Scale(per="row")),
    "scale.dtype": dict(scale=Scale(dtype="e4m3")),
    "scale.tensor_scale": dict(scale=Scale(dtype="e4m3", tensor_scale=True)),
    "scale.centered": dict(scale=Scale(centered=True)),
    "state_default": dict(state_default=True),
    "scale_default": dict(scale_default=True),
}


@pytest.mark.parametrize(
    ("kind", "fields", "changes"),
    [
        (Optimizer, OPTIMIZER, OPTIMIZER_CHANGES),
        (QuantType, QUANT_TYPE, QUANT_TYPE_CHANGES),
    ],
)
def test_the_digest_tells_any_two_specs_apart(
    kind: type[Spec], fields: dict[str, Any], changes: dict[str, dict[str, Any]]
) -> None:
    changed = {label: kind(**{**fields, **change}) for label, change in changes.items()}
    everything = {"as it is": kind(**fields), **changed}
    digests = {label: spec.digest for label, spec in everything.items()}
    assert len(set(digests.values())) == len(digests), digests
    assert len(set(everything.values())) == len(digests)
    assert {label.split(".")[0].split(" ")[0] for label in changes} == set(kind.model_fields)


def test_every_field_of_a_part_is_in_the_table_of_changes() -> None:
    parts: dict[str, type[Hyper | State | Constraint]] = {
        "hyper": Hyper,
        "states": State,
        "constraints": Constraint,
    }
    wanted = {f"{name}.{field}" for name, part in parts.items() for field in part.model_fields}
    assert wanted <= set(OPTIMIZER_CHANGES)
    assert {f"scale.{field}" for field in Scale.model_fields} <= set(QUANT_TYPE_CHANGES)


def test_equal_fields_are_equal_specs() -> None:
    one, other = Optimizer(**OPTIMIZER), Optimizer(**OPTIMIZER)
    assert one is not other
    assert one == other
    assert hash(one) == hash(other)
    assert one.digest == other.digest
    assert one != Optimizer(**{**OPTIMIZER, "name": "s"})
    assert one != one.digest
    assert {one: 1}[other] == 1


def test_a_whole_number_is_the_float_it_stands_for() -> None:
    whole = Optimizer(**{**OPTIMIZER, "hyper": with_hyper(default=1)})
    assert whole == Optimizer(**{**OPTIMIZER, "hyper": with_hyper(default=1.0)})


def test_digests_are_the_same_in_every_process() -> None:
    script = (
        "from bnbx.registry import optimizers, quant_types\n"
        "for spec in [*optimizers(), *quant_types()]: print(spec.name, spec.digest)\n"
    )
    expected = "".join(f"{spec.name} {spec.digest}\n" for spec in SPECS)
    for seed in ("0", "1"):
        environment = {**os.environ, "PYTHONHASHSEED": seed}
        command = [sys.executable, "-c", script]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
        assert done.stdout == expected


def test_a_digest_is_sixteen_hex_digits() -> None:
    for spec in SPECS:
        assert len(spec.digest) == 16
        assert int(spec.digest, 16) >= 0


def round_trips(spec: Spec) -> Iterator[Spec]:
    yield type(spec).from_json(spec.to_json())
    yield type(spec).from_json(json.dumps(json.loads(spec.to_json()), indent=2))
    for protocol in range(pickle.HIGHEST_PROTOCOL + 1):
        yield pickle.loads(pickle.dumps(spec, protocol))
    yield copy.copy(spec)
    yield copy.deepcopy(spec)
    yield copy.deepcopy([spec])[0]


@pytest.mark.parametrize("spec", SPECS, ids=lambda spec: spec.name)
def test_a_spec_survives_every_way_to_travel(spec: Spec) -> None:
    for traveled in round_trips(spec):
        assert type(traveled) is type(spec)
        assert traveled == spec
        assert traveled.to_json() == spec.to_json()
        for field in type(spec).model_fields:
            assert getattr(traveled, field) == getattr(spec, field)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "null",
        "1",
        "[1]",
        '"adam"',
        "{}",
        '{"name": "r"}',
        '{"self": 1}',
        '{"name": "r", "extra": 1}',
        Optimizer(**OPTIMIZER).to_json().replace("m = where", "m = when"),
        Optimizer(**OPTIMIZER).to_json().replace("0.9", "NaN"),
    ],
)
def test_json_that_is_no_spec(text: str) -> None:
    with pytest.raises(SpecError, match=r"^Optimizer spec from JSON: "):
        Optimizer.from_json(text)


@pytest.mark.parametrize("spec", SPECS, ids=lambda spec: spec.name)
def test_a_spec_never_changes(spec: Spec) -> None:
    with pytest.raises(ValueError, match="frozen"):
        spec.name = "other"  # type: ignore[misc]
    with pytest.raises(ValueError, match="frozen"):
        del spec.name


def test_the_tables_of_a_spec_never_change() -> None:
    spec: Any = Optimizer(**OPTIMIZER)
    for table in (spec.hyper, spec.packs):
        with pytest.raises(TypeError, match="does not support item assignment"):
            table["lr"] = None
    with pytest.raises(ValueError, match="frozen"):
        spec.hyper["lr"].default = 1.0
    with pytest.raises(ValueError, match="frozen"):
        spec.states[0].name = "n"


def test_tables_given_to_a_spec_stay_the_callers_own() -> None:
    hyper, packs = dict(OPTIMIZER["hyper"]), dict(OPTIMIZER["packs"])
    spec = Optimizer(**{**OPTIMIZER, "hyper": hyper, "packs": packs})
    hyper.clear()
    packs.clear()
    assert spec == Optimizer(**OPTIMIZER)
    assert list(spec.hyper) == ["lr", "beta", "eps"]


def test_a_copy_with_changes_leaves_the_original_alone() -> None:
    original = Optimizer(**OPTIMIZER)
    before = original.to_json(), original.digest
    changed = original.model_copy(update={"summary": "another"})
    assert (original.to_json(), original.digest) == before
    assert original.summary == "a rule"
    assert changed == Optimizer(**{**OPTIMIZER, "summary": "another"})
    assert changed.digest != original.digest
