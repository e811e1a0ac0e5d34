"""bnbx: low-bit optimizers for PyTorch, as a plugin framework.

Importing this package imports nothing else: no torch, no compiler, no CUDA context, no scan for
plugins. The sub-modules load when they are first named (`bnbx.optim`).
"""

from __future__ import annotations

import importlib
from types import ModuleType

__version__ = "0.1.0"
__all__ = ["errors", "optim", "registry"]


def __getattr__(name: str) -> ModuleType:
    if name in __all__:
        return importlib.import_module(f"{__name__}.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*__all__, "__version__"])
