"""bnbx under the name bitsandbytes, for the libraries that import that name.

Every name and every module is bnbx's own object, so a class is the same one whichever name it was
imported by, and nothing is loaded twice; but for optimizers, which are subclasses: see `optim.py`.
"""

from __future__ import annotations

import re
import sys
from types import ModuleType

import bnbx
from bitsandbytes import optim
from bnbx import nn
from bnbx.layers import matmul as products  # not the function, which is among the names below

__version__ = "0.50.2"  # of the interface that this stands for; bnbx.__version__ is the code's
features = {"multi_backend"}  # transformers and diffusers ask: there are more devices than CUDA
supported_torch_devices = {"cpu", "cuda"}

globals().update({name: getattr(bnbx, name) for name in bnbx.__all__ if name != "optim"})


def _alias(name: str, module: ModuleType) -> None:
    """Have `import bitsandbytes.<name>` and the attribute of that name give this module."""
    full = f"{__name__}.{name}"
    parent, _, last = full.rpartition(".")
    sys.modules[full] = module
    if getattr(sys.modules[parent], last, None) is not module:
        setattr(sys.modules[parent], last, module)


# The modules that both have, with all that is in them; parents come first. Left to Python, an
# import of bitsandbytes.nn.linear would find bnbx's file and run it a second time.
for _path, _module in sorted(sys.modules.items()):
    if re.match(r"bnbx\.(functional|nn)\b", _path):
        _alias(_path.removeprefix("bnbx."), _module)

# Modules that only bitsandbytes has: those of its optimizers are called as the rules are.
for _path, _module in {
    "autograd": products,
    "autograd._functions": products,
    "nn.modules": nn,
    "optim.optimizer": optim,
    "utils": nn,
}.items():
    _alias(_path, _module)
for _class in optim.FAMILIAR:
    _alias(f"optim.{_class._spec.name}", optim)
