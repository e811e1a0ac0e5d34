"""Modules that become modules of another class: the same objects, with all that is put on them.

Two things go along. torch gives a module with parametrized parameters a class of its own, below
the one that it had. And libraries keep a bound method of the class that they found, and put a
`forward` on the instance that calls it, as hooks of accelerate do.
"""

from __future__ import annotations

from types import MethodType

from torch import nn
from torch.nn.utils import parametrize


def class_of(module: nn.Module) -> type[nn.Module]:
    """The class of a module, without what torch makes of it where parameters are parametrized."""
    found: type[nn.Module] = parametrize.type_before_parametrizations(module)
    return found


def change_class(module: nn.Module, kind: type[nn.Module]) -> None:
    """Let a module be of another class.

    A parametrized one gets a class that no other module has: torch makes one when it parametrizes,
    but a deepcopy shares it, and what is registered in one or removed from it then would be so in
    both.
    """
    kept = _methods(module)
    new = kind
    if parametrize.is_parametrized(module):
        body = {k: v for k, v in vars(type(module)).items() if k not in ("__dict__", "__weakref__")}
        new = type(f"Parametrized{kind.__name__}", (kind,), body)
    module.__class__ = new
    for name, method in kept.items():
        found = getattr(kind, method, None)
        if found is not None:
            module.__dict__[name] = MethodType(found, module)


def calls_its_class(module: nn.Module) -> bool:
    """Whether a call comes to the `forward` of its class, by way of a patched one or not.

    If not, nobody knows what is done with its weights, nor how to let that follow another class.
    """
    return "forward" not in vars(module) or "forward" in _methods(module).values()


def _methods(module: nn.Module) -> dict[str, str]:
    """Attributes that are bound methods of a module's class, and which."""
    kind = class_of(module)
    return {
        name: value.__func__.__name__
        for name, value in vars(module).items()
        if isinstance(value, MethodType)
        and value.__self__ is module
        and getattr(kind, value.__func__.__name__, None) is value.__func__
    }
