"""Docstrings of the familiar classes, from their specs and signatures."""

from __future__ import annotations

from collections.abc import Mapping
from inspect import Signature
from textwrap import dedent, fill, indent
from typing import Any

from bnbx.registry import Optimizer as OptimizerSpec
from bnbx.registry.options import ALIASES, TABLE

WIDTH = 96
OTHERS: Mapping[str, str] = {
    "params": "parameters, named parameters or groups of them, as for any torch optimizer",
    "args": "object with any of the attributes optim_bits, min_8bit_size, percentile_clipping, "
    "block_wise, max_unorm and skip_zeros, whose values are taken",
    "bits": "width of the states: 8, 4, or 32 for float32",
    "state_types": "quant type for all states, or by state; wins over bits",
    "min_8bit_size": "parameters with fewer elements keep their states in float32",
    "block_wise": "whether each block of a state has a scale of its own, or one serves the tensor",
    "percentile_clipping": "hold a gradient's norm to this percentile of its last 100; 100 is off",
    "skip_zeros": "leave elements alone whose gradient is zero",
    "max_unorm": "hold the update's norm to this share of the parameter's; 0 is off",
    "master": "what keeps the digits that a 16-bit parameter loses",
    "maximize": "go up the gradient",
    "paged": "keep states in files (on a CPU) or in host memory (on CUDA), or 'managed'",
    "overrides": "{pattern on parameter names: {argument: value}}",
    "page_dir": "directory for the files of paged states",
    "foreach": "as in torch.optim, where it chooses an implementation; here it changes nothing",
    "fused": "as foreach; every step is fused",
    "capturable": "only False: a step cannot be captured in a CUDA graph",
    "differentiable": "only False: a step is no part of an autograd graph",
    "decoupled_weight_decay": "whether weight decay is AdamW's",
}


def docstring(spec: OptimizerSpec, signature: Signature, fixed: Mapping[str, Any]) -> str:
    """What a class does, its arguments with defaults and ranges, and the text of its rule."""
    sort = {"bits": "{}-bit states", "paged": "paged states"}
    told = "".join(f", {sort[name].format(value)}" for name, value in fixed.items())
    lines = [f"{spec.summary[0].upper()}{spec.summary[1:]}{told} ({spec.source}).", "", "Args:"]
    for name, parameter in signature.parameters.items():
        text = f"{name}: {_about(spec, name)}"
        if parameter.default is not parameter.empty:
            text += f" (default {parameter.default!r})"
        lines.append(fill(f"{text}.", WIDTH, initial_indent="    ", subsequent_indent=" " * 8))
    lines += ["", "Each step, for each parameter p with gradient g::", ""]
    sections = (spec.step_code, spec.element_code, spec.tensor_code, spec.apply_code)
    lines += [indent(dedent(code).strip("\n").rstrip(), "    ") for code in sections if code]
    raised = (
        "UnknownNameError: a keyword that is none of these; with the nearest.",
        "OptionError: a value out of range, or one that contradicts the class.",
        "TypeError: too many arguments, or one given twice.",
    )
    lines += ["", "Raises:", *(f"    {line}" for line in raised)]
    return "\n".join(lines)


def _about(spec: OptimizerSpec, name: str) -> str:
    if name in ALIASES:
        return f"another name of {ALIASES[name]}"
    if name in spec.packs:
        parts = (f"{member} {_range(spec, member)}" for member in spec.packs[name])
        return f"the tuple of {', '.join(parts)}"
    if name in spec.hyper:
        return _range(spec, name)
    words = TABLE[name].words if name in TABLE else ""
    return "; ".join(part for part in (OTHERS.get(name, ""), words) if part)


def _range(spec: OptimizerSpec, name: str) -> str:
    hyper = spec.hyper[name]
    return hyper.range if hyper.flag else f"a number {hyper.range}"
