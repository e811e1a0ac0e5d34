"""Fake forms of operations: what results look like, for torch.compile and for the meta device.

torch runs the fake form of an operation as soon as one of its tensors is on the meta device,
wherever the others are. A result would then be memory that nothing was written to, and an
operation that changes its arguments would not change them, without a word. So every fake form of
this package is registered here, where such a mixture is an error.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from bnbx.errors import DeviceError
from bnbx.kernels.encoding import from_label

registered: list[str] = []
"""Names of the operations; the tests hold each of the package to be among them."""


def register_fake(
    name: str, fake: Callable[..., Any], lib: Any = None, anywhere: Collection[str] = ()
) -> None:
    """Register the fake form of an operation, which raises DeviceError for a mixture.

    Args:
        name: of the operation, "bnbx::linear".
        fake: the arguments of the operation, to results without numbers.
        lib: the `torch.library.Library` that defines the operation, if one does.
        anywhere: arguments that may be elsewhere while all others are on the meta device.
    """
    registered.append(name)

    @functools.wraps(fake)
    def checked(*arguments: Any, **named: Any) -> Any:
        if any(map(_on_meta, _tensors([*arguments, *named.values()]))):
            check_meta(name, _by_name(name, arguments, named), anywhere)
        return fake(*arguments, **named)

    torch.library.register_fake(name, checked, lib=lib)


def check_meta(
    what: str, tensors: Iterable[tuple[str, Tensor]], anywhere: Collection[str] = ()
) -> None:
    """Raise DeviceError if some tensors are on the meta device and others are not.

    Args:
        what: is done with them.
        tensors: by name.
        anywhere: see `register_fake`.
    """
    places: dict[torch.device, list[str]] = {}
    lacking = []
    for name, tensor in tensors:
        if _on_meta(tensor):
            lacking.append(name)
        elif name not in anywhere:
            places.setdefault(tensor.device, []).append(name)
    if lacking and places:
        elsewhere = "; ".join(f"{', '.join(names)} on {device}" for device, names in places.items())
        raise DeviceError(
            f"{what}: {', '.join(lacking)} on the meta device, which holds no numbers; "
            f"{elsewhere}. Load what has no numbers: load_state_dict(..., assign=True), or "
            f"to_empty(device={str(next(iter(places)))!r}) and then load_state_dict. For shapes "
            "alone, put all on the meta device"
        )


def _on_meta(tensor: Tensor) -> bool:
    return tensor.device.type == "meta"


def _tensors(values: Iterable[Any]) -> Iterator[Tensor]:
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, (list, tuple)):
            yield from _tensors(value)


def _by_name(
    operation: str, arguments: Sequence[Any], named: Mapping[str, Any]
) -> Iterator[tuple[str, Tensor]]:
    """The tensors of a call; those of a tensor in codes by what they are there."""
    space, _, bare = operation.partition("::")
    schema = getattr(getattr(torch.ops, space), bare).default._schema
    values = dict(zip((each.name for each in schema.arguments), arguments, strict=False))
    values.update(named)
    for key, value in values.items():
        if isinstance(value, Tensor):
            yield key, value
        elif key == "parts":
            yield from zip(from_label(values["encoding"]).parts, value, strict=False)
        elif isinstance(value, (list, tuple)):
            yield from ((f"{key}[{i}]", t) for i, t in enumerate(value) if isinstance(t, Tensor))
