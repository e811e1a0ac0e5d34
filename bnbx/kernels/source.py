"""Renders a plan to source text, for C++ and for CUDA.

Templates hold the loops around a rule; what is in them comes from the plan: the rule's statements,
the dtypes, a traits struct per quantized state. The text of a plan is the same on every machine.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import jinja2

from bnbx.kernels import cuda_module
from bnbx.kernels.c_code import c_expression, c_statements, comment, literal, literal64
from bnbx.kernels.c_struct import declaration
from bnbx.kernels.codebook import Tables, tables
from bnbx.kernels.dtypes import C_TYPES
from bnbx.kernels.lower import text
from bnbx.kernels.plan import Plan, Storage
from bnbx.kernels.signature import JOB, RESIDUAL_TYPES, make_signature


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
    environment.globals |= {
        "struct": declaration,
        "c_types": C_TYPES,
        "cuda": cuda_module.SHAPE,
    }
    return environment


def render(plan: Plan, template: str) -> str:
    """Source text of `plan` from the template of a target ("optimizer.cpp.j2")."""
    return _templates().get_template(template).render(_names(plan))


def fill(template: str, **names: Any) -> str:
    """Source text of a kernel from a template and what it asks for."""
    return _templates().get_template(template).render(names)


def _names(plan: Plan) -> dict[str, Any]:
    lowered, signature = plan.lowered, make_signature(plan)
    declared = ["p", "g", *(storage.state.name for storage in plan.storages)]
    remarks = {name: f", without {text(factor)}" for name, factor in lowered.factors.items()}
    element = c_statements(lowered.element, declared, remarks=remarks)
    written = [statement.target for statement in lowered.element]
    load, store = _parameter(plan)
    return {
        "plan": plan,
        "title": comment(plan.describe()),
        "subtitle": comment(f"{plan.spec.summary} ({plan.spec.source or 'no source given'})."),
        "signature": signature,
        "row": [column.field for column in signature.columns],
        "job": JOB,
        "warps": cuda_module.warps(plan.longest),
        "parameter": C_TYPES[plan.parameter],
        "gradient": C_TYPES[plan.gradient],
        "residual": RESIDUAL_TYPES.get(plan.master, ""),
        # In lanes; a master's noise is numbered by the place of each element.
        "laned": bool(plan.quantized) and plan.master == "none",
        "staged": plan.parameter == plan.gradient == "float16" and plan.master == "none",
        "load_p": load,
        "store_p": store,
        "scalars": [(name, text(value)) for name, value in lowered.scalars.items()],
        "tensor_scalars": [
            (name, text(value), c_expression(value, literal64))
            for name, value in lowered.tensor_scalars.items()
        ],
        "norms": lowered.norms,
        "element_lines": element,
        "tensor_lines": c_statements(lowered.tensor, (), "double", literal64),
        "apply_lines": c_statements(lowered.apply, [*declared, *written], remarks=remarks),
        "types": [_type(storage) for storage in plan.codebooks],
        "states": [(s, type_name(s) if s.quant_type else "") for s in plan.storages],
        "tracked": [(s, type_name(s)) for s in plan.quantized if not s.whole],
    }


def _parameter(plan: Plan) -> tuple[str, str]:
    """How an element of the parameter is read, and how it is written."""
    if plan.master in RESIDUAL_TYPES:
        return (
            "p = load_parameter(P[I], Residual[I]);",
            "store_parameter(p, noise(Seed, PLACE), P[I], Residual[I]);",
        )
    load = "rule_read(P + I, p);"
    if plan.master == "stochastic":
        return load, "round_stochastically(p, noise(Seed, PLACE), P[I]);"
    return load, "rule_write(p, P + I);"


def type_name(storage: Storage) -> str:
    """Name of the traits struct of a quantized storage; states that share a codebook share it."""
    assert storage.quant_type is not None
    kind = "signed" if storage.state.signed else "unsigned"
    return f"{storage.quant_type.name}_{kind}" + ("_whole" if storage.whole else "")


def _type(storage: Storage) -> dict[str, Any]:
    """The traits of a storage's codebook, as the templates name them."""
    assert storage.quant_type is not None
    found, bits = tables(storage.codebook), storage.quant_type.bits
    return codebook_traits(type_name(storage), found, bits, storage.block_size, whole=storage.whole)


def codebook_traits(
    name: str, found: Tables, bits: int, block: int, *, whole: bool = False
) -> dict[str, Any]:
    """What `traits.j2` asks of a codebook."""
    buckets, segments = found.buckets, found.segments
    return {
        "name": name,
        "block": block,
        "shift": buckets.shift if buckets else 0,
        "half": buckets.half if buckets else 0,
        "entries": len(buckets.entries) if buckets else 0,
        "floor": f"{buckets.floor if buckets else 0:#010x}u",
        "ceiling": f"{buckets.ceiling if buckets else 0:#010x}u",
        "zero_code": found.zero_code,
        "unit": literal(found.unit),
        "bits": bits,
        "whole": _bool(whole),
        "signed": _bool(buckets is not None and buckets.signed),
        "ordered": _bool(found.ordered),
        "segments": _bool(segments is not None),
        "mirrored": _bool(found.mirrored),
    }


def _bool(value: bool) -> str:
    return "true" if value else "false"
