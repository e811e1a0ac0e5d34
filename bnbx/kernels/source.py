"""Renders a plan to source text, for C++ and for CUDA.

Templates hold the loops around a rule; what is in them comes from the plan: the rule's statements,
the dtypes, a traits struct per quantized state. The text of a plan is the same on every machine.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import jinja2

from bnbx.kernels.c_code import c_statements, comment
from bnbx.kernels.codebook import tables
from bnbx.kernels.lower import text
from bnbx.kernels.plan import Plan, Storage
from bnbx.kernels.signature import make_signature

C_TYPES = {"float32": "float", "bfloat16": "bfloat16", "float16": "float16"}


@lru_cache(maxsize=1)
def _templates() -> jinja2.Environment:
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("bnbx.kernels", "templates"),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        autoescape=False,
    )
    loader = environment.loader
    assert loader is not None
    environment.globals["include"] = lambda name: loader.get_source(environment, name)[0]
    return environment


def render(plan: Plan, template: str) -> str:
    """Source text of `plan` from the template of a target ("optimizer.cpp.j2")."""
    return _templates().get_template(template).render(_names(plan))


def _names(plan: Plan) -> dict[str, Any]:
    declared = ["p", "g", *(storage.state.name for storage in plan.storages)]
    return {
        "plan": plan,
        "title": comment(plan.describe()),
        "subtitle": comment(f"{plan.spec.summary} ({plan.spec.source or 'no source given'})."),
        "signature": make_signature(plan),
        "parameter": C_TYPES[plan.parameter],
        "gradient": C_TYPES[plan.gradient],
        "staged": plan.parameter == plan.gradient == "float16",
        "scalars": [(name, text(value)) for name, value in plan.lowered.scalars.items()],
        "statements": c_statements(plan.lowered.statements, declared),
        "types": [_type(storage) for storage in plan.codebooks],
        "states": [(s, type_name(s) if s.quant_type else "") for s in plan.storages],
    }


def type_name(storage: Storage) -> str:
    """Name of the traits struct of a quantized storage; states that share a codebook share it."""
    assert storage.quant_type is not None
    kind = "signed" if storage.state.signed else "unsigned"
    return f"{storage.quant_type.name}_{kind}"


def _type(storage: Storage) -> dict[str, Any]:
    """The traits of a codebook, as the templates name them."""
    found = tables(storage.codebook)
    buckets, segments = found.buckets, found.segments
    return {
        "name": type_name(storage),
        "block": storage.block_size,
        "shift": buckets.shift if buckets else 0,
        "half": buckets.half if buckets else 0,
        "entries": len(buckets.entries) if buckets else 0,
        "floor": f"{buckets.floor if buckets else 0:#010x}u",
        "ceiling": f"{buckets.ceiling if buckets else 0:#010x}u",
        "zero_code": found.zero_code,
        "signed": _bool(buckets is not None and buckets.signed),
        "ordered": _bool(found.ordered),
        "segments": _bool(segments is not None),
    }


def _bool(value: bool) -> str:
    return "true" if value else "false"
