"""bnbx: low-bit optimizers and quantized layers for PyTorch, as a plugin framework.

Importing this package imports nothing else: no torch, no compiler, no CUDA context, no scan for
plugins. The sub-modules load when they are first named (`bnbx.optim`), as do the few functions
and classes that have a name here too (`bnbx.quantize_`).
"""

from __future__ import annotations

import importlib
from typing import Any

__version__ = "0.1.0"
__all__ = [
    "MatmulLtState",
    "QuantTensor",
    "dequantize",
    "dequantize_",
    "errors",
    "functional",
    "matmul",
    "matmul_4bit",
    "nn",
    "optim",
    "quantize",
    "quantize_",
    "registry",
]

# Where the names that are no sub-modules come from.
_HOMES = {
    "MatmulLtState": "bnbx.layers.matmul",
    "QuantTensor": "bnbx.functional",
    "dequantize": "bnbx.functional",
    "dequantize_": "bnbx.nn",
    "matmul": "bnbx.layers.matmul",
    "matmul_4bit": "bnbx.layers.matmul",
    "quantize": "bnbx.functional",
    "quantize_": "bnbx.nn",
}


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(importlib.import_module(_HOMES[name]), name)
    if name in __all__:
        return importlib.import_module(f"{__name__}.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*__all__, "__version__"])
