"""Finds the specs of a package of ours: one file each, so that a new one is a new file, no more."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Iterator
from typing import TypeVar

from bnbx.errors import SpecError
from bnbx.registry.spec import Spec

S = TypeVar("S", bound=Spec)


def specs_in(package: str, kind: type[S]) -> tuple[S, ...]:
    """The specs of a package, by name: in the file `lion.py`, the one that is called `lion`.

    Files without any spec hold what others share.

    Raises:
        SpecError: a file holds specs, and none of its own name.
    """
    return tuple(_found(package, kind))


def _found(package: str, kind: type[S]) -> Iterator[S]:
    paths = importlib.import_module(package).__path__
    for name in sorted(info.name for info in pkgutil.iter_modules(paths)):
        module = importlib.import_module(f"{package}.{name}")
        specs = [value for value in vars(module).values() if isinstance(value, kind)]
        own = getattr(module, name, None)
        if isinstance(own, kind) and own.name == name:
            yield own
        elif specs:
            raise SpecError(
                f"{module.__name__} has specs named {', '.join(spec.name for spec in specs)}; "
                f"expected one named {name!r}, in a variable of that name"
            )
