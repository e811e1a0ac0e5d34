"""What tests marked `gpu` share: their device, tensors that go there and back, what is equal.

The kernels of a rule or type have the same bits on each target, so most of these tests run the
same calls on the CPU and compare bytes.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from optimizers.compare import equal, parameters_of

DEVICE = torch.device("cuda")  # without an index, as users write it
_cuda: Any = torch.cuda  # whose classes are untyped


def there(tensor: Tensor) -> Tensor:
    """A copy on the device with the same strides; a leaf that requires what the tensor does."""
    made = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=DEVICE)
    return made.copy_(tensor.detach()).requires_grad_(tensor.requires_grad)


def all_there(tensors: Sequence[Tensor]) -> list[Tensor]:
    return [there(tensor) for tensor in tensors]


def assert_there(*tensors: Tensor) -> None:
    """Assert that the tensors are on the device."""
    for tensor in tensors:
        assert tensor.device.type == DEVICE.type, tensor.device


def same(a: Any, b: Any) -> bool:
    """Whether two values are the same to the last bit, wherever they are; NaN equals NaN."""
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return equal(a.detach().cpu(), b.detach().cpu())
    return equal(a, b)


def assert_same_optimizers(a: torch.optim.Optimizer, b: torch.optim.Optimizer) -> None:
    """Assert that two optimizers hold the same bits, wherever they are."""
    for number, (p, q) in enumerate(zip(parameters_of(a), parameters_of(b), strict=True)):
        where = f"parameter {number}, {p.dtype} of shape {tuple(p.shape)}"
        assert same(p, q), where
        assert list(a.state[p]) == list(b.state[q]), where
        for name, value in a.state[p].items():
            assert same(value, b.state[q][name]), f"{name} of {where}"


@contextmanager
def no_waiting() -> Iterator[None]:
    """Where torch waits for the device, it raises."""
    _cuda.synchronize()
    before = _cuda.get_sync_debug_mode()
    _cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        _cuda.set_sync_debug_mode(before)


@contextmanager
def side_stream() -> Iterator[None]:
    """Work on a stream of its own; what was enqueued before is done, what is enqueued here too."""
    stream, current = _cuda.Stream(DEVICE), _cuda.current_stream(DEVICE)
    stream.wait_stream(current)
    with _cuda.stream(stream):
        yield
    current.wait_stream(stream)


def keep_busy(cycles: int = 50_000_000) -> None:
    """Occupy the current stream, so that what does not wait for it is too early."""
    _cuda._sleep(cycles)
