"""Brings optimizer states that live in host memory to the device, a piece at a time, and back.

A step of paged states is a row of pieces. While the kernel of one runs, the results of the one
before travel back and the states of the one after travel in, through two slots that take turns.
Each is a pinned buffer and a device buffer of equal size:

    host states -> pinned -> device -> kernel -> device -> pinned -> host states
        (host)      (side stream)   (current)   (side stream)    (host)

Nothing waits for the device as a whole: streams wait for events, and the host waits for the event
that ends a piece's way back before it reads the pinned buffer. When `Stager.run` returns, the host
states are written, so whoever reads them next (a checkpoint) sees this step.

What moves data or waits stands behind `Operations`, so that the schedule itself is tested without a
GPU, under every order of events that streams allow.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import torch
from torch import Tensor

from bnbx.errors import TargetError

PIECE_BYTES = 64 << 20
ALIGNMENT = 512  # bytes between tensors of a buffer, as torch's own allocations on CUDA
Stream = Literal["side", "current"]
_cuda: Any = torch.cuda  # whose classes are untyped


@dataclass(frozen=True)
class Part:
    """Elements `start` to `stop` of a parameter, with the host states of just these.

    Attributes:
        owner: whatever tells the launcher which parameter it is.
        states: 1-D slices of the state tensors on the CPU, of any dtypes.
    """

    owner: Any
    start: int
    stop: int
    states: tuple[Tensor, ...]

    @property
    def nbytes(self) -> int:
        """Bytes of a buffer that it takes."""
        return sum(_aligned(t.nbytes) for t in self.states)


@dataclass(frozen=True)
class Piece:
    """Parts that travel together and are updated by one call of the launcher."""

    parts: tuple[Part, ...]

    @property
    def nbytes(self) -> int:
        """Bytes of a buffer that it takes."""
        return sum(part.nbytes for part in self.parts)


Launcher = Callable[[Piece, Sequence[tuple[Tensor, ...]]], None]


def cut(
    owner: Any,
    numel: int,
    states: Sequence[Tensor],
    entries: Sequence[int],
    block: int,
    piece_bytes: int = PIECE_BYTES,
) -> list[Part]:
    """The parts of one parameter: whole blocks, as many as fit into a piece, one at the least.

    Args:
        owner: goes into each part.
        numel: elements of the parameter.
        states: its contiguous state tensors on the CPU.
        entries: for each of them, how many of its entries belong to `block` elements: `block` for
            float32 or 8-bit codes, block / 2 for packed 4-bit codes, 1 for one absmax a block.
        block: elements that cannot be parted; `numel` keeps the parameter whole.
        piece_bytes: how large a part may be.
    """
    if not numel:
        return []
    assert block > 0, block
    blocks = -(-numel // block)
    for state, count in zip(states, entries, strict=True):
        assert state.is_contiguous(), state.stride()
        assert (blocks - 1) * count < state.numel() <= blocks * count, (numel, state.shape)
    flat = [state.view(-1) for state in states]
    # Each tensor of a part may need up to one alignment more than its bytes.
    room = piece_bytes - len(flat) * ALIGNMENT
    of_block = sum(count * t.element_size() for t, count in zip(flat, entries, strict=True))
    step = max(1, room // max(of_block, 1))
    return [
        Part(
            owner,
            first * block,
            min((first + step) * block, numel),
            tuple(
                t[first * count : (first + step) * count]
                for t, count in zip(flat, entries, strict=True)
            ),
        )
        for first in range(0, blocks, step)
    ]


def pack(parts: Sequence[Part], piece_bytes: int = PIECE_BYTES) -> list[Piece]:
    """Put parts together, in order, so that many small ones cost one transfer.

    A part that is larger than `piece_bytes` becomes a piece of its own.
    """
    pieces: list[Piece] = []
    together: list[Part] = []
    size = 0
    for part in parts:
        if together and size + part.nbytes > piece_bytes:
            pieces.append(Piece(tuple(together)))
            together, size = [], 0
        together.append(part)
        size += part.nbytes
    return [*pieces, Piece(tuple(together))] if together else pieces


class Operations(Protocol):
    """What staging asks of a device.

    There are two streams, "side" and "current" (torch's, where kernels are launched). What is
    enqueued on one runs in order; across the two, only events order anything.
    """

    def pinned(self, nbytes: int) -> Tensor:
        """Page-locked host bytes, uint8 of shape (nbytes,)."""

    def on_device(self, nbytes: int) -> Tensor:
        """Device bytes, uint8 of shape (nbytes,), that the side stream may write at once."""

    def copy(self, to: Tensor, source: Tensor) -> None:
        """Enqueue a copy between pinned and device memory on the side stream."""

    def record(self, stream: Stream) -> Any:
        """An event that happens when all that is enqueued on the stream by now is done."""

    def wait(self, stream: Stream, event: Any) -> None:
        """Hold back what is enqueued on the stream from now on until the event has happened."""

    def wait_on_host(self, event: Any) -> None:
        """Return when the event has happened."""


class CudaOperations:
    """Staging on a CUDA device."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.side = _cuda.Stream(device)

    def pinned(self, nbytes: int) -> Tensor:
        """Page-locked host bytes."""
        with _cuda.device(self.device):
            return torch.empty(nbytes, dtype=torch.uint8, device="cpu", pin_memory=True)

    def on_device(self, nbytes: int) -> Tensor:
        """Device bytes; allocated for the side stream, so kernels of others are done with them."""
        with _cuda.stream(self.side):
            return torch.empty(nbytes, dtype=torch.uint8, device=self.device)

    def copy(self, to: Tensor, source: Tensor) -> None:
        """Enqueue a copy on the side stream; the host goes on."""
        with _cuda.stream(self.side):
            to.copy_(source, non_blocking=True)

    def record(self, stream: Stream) -> Any:
        """An event of the stream; a host that waits for it sleeps, rather than spins."""
        event = _cuda.Event(blocking=True)
        event.record(self._stream(stream))
        return event

    def wait(self, stream: Stream, event: Any) -> None:
        """The stream waits, the host does not."""
        self._stream(stream).wait_event(event)

    def wait_on_host(self, event: Any) -> None:
        """The host waits."""
        event.synchronize()

    def _stream(self, stream: Stream) -> Any:
        return self.side if stream == "side" else _cuda.current_stream(self.device)


class ImmediateOperations:
    """Staging on the CPU, where everything happens at once and no wait has work to do."""

    def pinned(self, nbytes: int) -> Tensor:
        """Ordinary bytes."""
        return torch.empty(nbytes, dtype=torch.uint8, device="cpu")

    def on_device(self, nbytes: int) -> Tensor:
        """Ordinary bytes, other than those of `pinned`."""
        return torch.empty(nbytes, dtype=torch.uint8, device="cpu")

    def copy(self, to: Tensor, source: Tensor) -> None:
        """Copy now."""
        to.copy_(source)

    def record(self, stream: Stream) -> Any:
        """No event is needed."""

    def wait(self, stream: Stream, event: Any) -> None:
        """All is done already."""

    def wait_on_host(self, event: Any) -> None:
        """All is done already."""


class _Slot:
    """A pinned and a device buffer, and how far the piece in them has come."""

    def __init__(self) -> None:
        self.pinned = self.device = torch.empty(0, dtype=torch.uint8, device="cpu")
        self.clear()

    def clear(self) -> None:
        """Nothing is in the buffers or on its way to them."""
        self.piece: Piece | None = None
        self.arrived: Any = None  # event: the device buffer holds the states
        self.launched = False
        self.returned: Any = None  # event: the pinned buffer holds the results


class Stager:
    """Runs pieces through two slots on one device; keep it from step to step, for its buffers.

    A stager serves one thread at a time. A CUDA graph cannot capture it: the host takes part.

    Args:
        device: where kernels run.
        operations: how to move data; None for the device's own.
        piece_bytes: size of each of the four buffers; a larger piece makes them grow.

    Raises:
        TargetError: there are no operations for such a device.
    """

    def __init__(
        self,
        device: torch.device,
        operations: Operations | None = None,
        piece_bytes: int = PIECE_BYTES,
    ) -> None:
        if operations is None:
            if device.type not in ("cuda", "cpu"):
                raise TargetError(
                    f"paged optimizer states cannot be staged on device {str(device)!r}; expected "
                    "a CUDA device or the CPU. Use paged=False there"
                )
            operations = CudaOperations(device) if device.type == "cuda" else ImmediateOperations()
        self.device = device
        self.piece_bytes = piece_bytes
        self._do = operations
        self._slots = (_Slot(), _Slot())

    def run(self, work: Sequence[Piece], launch: Launcher) -> None:
        """Update all pieces in order; on return their host states are written.

        Args:
            work: pieces whose host states do not overlap; of `pack`.
            launch: enqueues on the current stream what updates, in place, the tensors it is given:
                for each part of the piece, the device copies of its states. It must not keep them.

        An exception of `launch` leaves this function when all that was enqueued before it is
        written back; what was not is as it was.
        """
        if not work:
            return
        self._reserve(max(piece.nbytes for piece in work))
        try:
            self._send(self._slots[0], work[0])
            for index in range(len(work)):
                slot, other = self._slots[index % 2], self._slots[(index + 1) % 2]
                self._launch(slot, launch)
                # While that runs: empty the other slot and fill it again. What the side stream has
                # to do for this piece comes last, since all behind it waits for the kernel too.
                self._receive(other)
                if index + 1 < len(work):
                    self._send(other, work[index + 1])
                self._return(slot)
            self._drain()
        finally:
            self._drain()  # nothing is left to do, unless a call failed or Ctrl-C came

    def _reserve(self, nbytes: int) -> None:
        """Buffers for the largest piece, before anything has changed: memory may be short."""
        for slot in self._slots:
            slot.clear()
            if slot.device.numel() < nbytes:
                # Free them first.
                slot.pinned = slot.device = torch.empty(0, dtype=torch.uint8, device="cpu")
                capacity = max(nbytes, self.piece_bytes)
                slot.pinned = self._do.pinned(capacity)
                slot.device = self._do.on_device(capacity)

    def _send(self, slot: _Slot, piece: Piece) -> None:
        """Host states to the device; from the pinned buffer on, the host does not wait."""
        for staged, state in _views(slot.pinned, piece):
            staged.copy_(state)
        slot.piece = piece  # from here on, something may be on its way
        self._do.copy(slot.device[: piece.nbytes], slot.pinned[: piece.nbytes])
        slot.arrived = self._do.record("side")

    def _launch(self, slot: _Slot, launch: Launcher) -> None:
        assert slot.piece is not None
        views = _views(slot.device, slot.piece)
        states = [tuple(next(views)[0] for _ in part.states) for part in slot.piece.parts]
        self._do.wait("current", slot.arrived)
        slot.launched = True  # first: what comes back after a failure is what kernels have done
        launch(slot.piece, states)

    def _return(self, slot: _Slot) -> None:
        """The results of the kernel launched last to the pinned buffer, when it is done."""
        assert slot.piece is not None
        nbytes = slot.piece.nbytes
        self._do.wait("side", self._do.record("current"))
        self._do.copy(slot.pinned[:nbytes], slot.device[:nbytes])
        slot.returned = self._do.record("side")

    def _receive(self, slot: _Slot) -> None:
        """The results in the pinned buffer to the host states, once they are there."""
        if slot.piece is None:
            return
        self._do.wait_on_host(slot.returned)
        for staged, state in _views(slot.pinned, slot.piece):
            state.copy_(staged)
        slot.clear()  # last: an interrupted receipt is repeated by `_drain`

    def _drain(self) -> None:
        """Write back what was updated and leave no buffer in use, also after an exception."""
        for slot in self._slots:
            if slot.launched:
                if slot.returned is None:
                    self._return(slot)
                self._receive(slot)
            elif slot.piece is not None:
                self._do.wait_on_host(self._do.record("side"))
                slot.clear()


def _aligned(nbytes: int) -> int:
    return -(-nbytes // ALIGNMENT) * ALIGNMENT


def _views(buffer: Tensor, piece: Piece) -> Iterator[tuple[Tensor, Tensor]]:
    """For each host state of the piece, where it lies in a buffer of bytes, and itself."""
    offset = 0
    for part in piece.parts:
        for state in part.states:
            yield buffer[offset : offset + state.nbytes].view(state.dtype), state
            offset += _aligned(state.nbytes)
