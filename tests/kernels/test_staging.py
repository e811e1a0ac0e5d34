"""The schedule that brings paged states to the device and back, under every order streams allow.

`Simulated` is a device whose two streams run as late as they may, or at random moments. What is
computed through it must be what is computed on the host; and without any one of the waits, some
order gives wrong numbers.
"""

from __future__ import annotations

import contextlib
import itertools
import random
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from bnbx.errors import TargetError
from bnbx.kernels import staging
from bnbx.kernels.staging import (
    ALIGNMENT,
    CudaOperations,
    ImmediateOperations,
    Part,
    Piece,
    Stager,
    Stream,
    cut,
    pack,
)

CPU = torch.device("cpu")
BLOCK = 16
GARBAGE = 0xEE  # what new buffers hold
SEEDS = range(60)


# ---- a device whose streams are late


@dataclass(eq=False)
class Event:
    stream: Stream
    done: bool = False


@dataclass
class Simulated:
    """Two queues, of calls, events to record, and events to wait for.

    Args:
        seed: for running some of what is enqueued at random moments; None for as late as possible.
        dropped: waits, counted from zero, that are forgotten.
        interrupted: the call, counted from zero, before which the user presses Ctrl-C.
    """

    seed: int | None = None
    dropped: frozenset[int] = frozenset()
    interrupted: int = -1
    queues: dict[Stream, deque[tuple[str, Any]]] = field(
        default_factory=lambda: {"side": deque(), "current": deque()}
    )
    trace: list[str] = field(default_factory=list)
    waits: int = 0
    calls: int = 0

    def __post_init__(self) -> None:
        self.random = random.Random(self.seed)
        # In one run the side stream is far ahead, in another far behind.
        self.share = self.random.choice([0.05, 0.3, 0.5, 0.7, 0.95])

    def pinned(self, nbytes: int) -> Tensor:
        return torch.full((nbytes,), GARBAGE, dtype=torch.uint8)

    def on_device(self, nbytes: int) -> Tensor:
        return torch.full((nbytes,), GARBAGE, dtype=torch.uint8)

    def copy(self, to: Tensor, source: Tensor) -> None:
        self.called("copy")
        self.enqueue("side", lambda: to.copy_(source))

    def enqueue(self, stream: Stream, call: Callable[[], Any]) -> None:
        self.queues[stream].append(("call", call))
        self.drift()

    def record(self, stream: Stream) -> Event:
        self.called(f"record {stream}")
        event = Event(stream)
        self.queues[stream].append(("record", event))
        self.drift()
        return event

    def wait(self, stream: Stream, event: Event) -> None:
        self.called(f"{stream} waits for {event.stream}")
        if self.forgotten():
            return
        self.queues[stream].append(("wait", event))
        self.drift()

    def wait_on_host(self, event: Event) -> None:
        self.called(f"host waits for {event.stream}")
        if not self.forgotten():
            self.force(event)

    def called(self, what: str) -> None:
        self.calls += 1
        if self.calls - 1 == self.interrupted:
            raise KeyboardInterrupt
        if not what.startswith("record"):
            self.trace.append(what)

    def forgotten(self) -> bool:
        self.waits += 1
        return self.waits - 1 in self.dropped

    def force(self, event: Event) -> None:
        """Run no more than what the event needs."""
        while not event.done:
            kind, what = self.queues[event.stream][0]
            if kind == "wait":
                self.force(what)
            self.step(event.stream)

    def step(self, stream: Stream) -> None:
        """Run the first entry of a queue, if it can run."""
        if not self.queues[stream]:
            return
        kind, what = self.queues[stream][0]
        if kind == "wait" and not what.done:
            return
        self.queues[stream].popleft()
        if kind == "call":
            what()
        elif kind == "record":
            what.done = True

    def drift(self) -> None:
        """Let the streams run on their own for a while."""
        if self.seed is not None:
            for _ in range(self.random.choice([0, 0, 1, 3, 9])):
                self.step("side" if self.random.random() < self.share else "current")

    @property
    def idle(self) -> bool:
        return not any(self.queues.values())


# ---- work, and what it gives


@dataclass
class Parameter:
    """A parameter with states like those of a quantized rule: codes, one scale a block, floats."""

    p: Tensor
    codes: Tensor
    scales: Tensor
    floats: Tensor

    @classmethod
    def make(cls, numel: int, seed: int) -> Parameter:
        generator = torch.Generator().manual_seed(seed)
        blocks = -(-numel // BLOCK)
        return cls(
            torch.randn(numel, generator=generator),
            torch.randint(0, 256, (numel,), generator=generator, dtype=torch.uint8),
            torch.rand(blocks, generator=generator),
            torch.randn(numel, generator=generator).to(torch.bfloat16),
        )

    def copy(self) -> Parameter:
        return Parameter(*(t.clone() for t in self.tensors))

    @property
    def tensors(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        return self.p, self.codes, self.scales, self.floats

    def parts(self, piece_bytes: int) -> list[Part]:
        states = (self.codes, self.scales, self.floats)
        return cut(self, self.p.numel(), states, (BLOCK, 1, BLOCK), BLOCK, piece_bytes)


def update(p: Tensor, codes: Tensor, scales: Tensor, floats: Tensor) -> None:
    """Each result depends on every old value, so that nothing stale can pass."""
    spread = scales.repeat_interleave(BLOCK)[: p.numel()]
    floats.mul_(0.5).add_(p)
    codes.add_((p > 0).to(torch.uint8)).mul_(3)
    p.sub_(0.01 * codes * spread + floats)
    scales.mul_(0.75).add_(codes[::BLOCK])


def launcher(enqueue: Callable[[Callable[[], Any]], Any]) -> staging.Launcher:
    def launch(piece: Piece, states: Sequence[tuple[Tensor, ...]]) -> None:
        for part, tensors in zip(piece.parts, states, strict=True):
            p = part.owner.p[part.start : part.stop]
            enqueue(partial(update, p, *tensors))

    return launch


def parameters(sizes: Sequence[int] = (5 * BLOCK, 3, 9 * BLOCK + 7, BLOCK)) -> list[Parameter]:
    return [Parameter.make(numel, seed) for seed, numel in enumerate(sizes)]


def agree(found: Sequence[Parameter], expected: Sequence[Parameter]) -> bool:
    pairs = zip(found, expected, strict=True)
    return all(
        torch.equal(x, y) for a, b in pairs for x, y in zip(a.tensors, b.tensors, strict=True)
    )


PIECE = 4 * ALIGNMENT


def run(operations: Simulated, steps: int = 1, piece_bytes: int = PIECE) -> list[Parameter]:
    """The parameters after some steps through the simulated device."""
    found = parameters()
    stager = Stager(CPU, operations, piece_bytes)
    for _ in range(steps):
        work = pack([part for p in found for part in p.parts(piece_bytes)], piece_bytes)
        stager.run(work, launcher(lambda call: operations.enqueue("current", call)))
    return found


def expected_after(steps: int) -> list[Parameter]:
    expected = parameters()
    for _ in range(steps):
        for parameter in expected:
            update(*parameter.tensors)
    return expected


# ---- the schedule


@pytest.mark.parametrize("seed", [None, *SEEDS])
def test_results_are_those_of_the_host_in_every_order(seed: int | None) -> None:
    operations = Simulated(seed)
    found = run(operations, steps=3)
    assert agree(found, expected_after(3))
    assert operations.idle, "a buffer may still be in use"
    assert not agree(found, expected_after(2))


def test_every_wait_is_needed() -> None:
    """Forget one wait at a time: some order of events must give wrong numbers."""
    counted = Simulated()
    run(counted)
    pieces = counted.trace.count("copy") // 2
    assert pieces >= 3, "too few pieces to come back to a slot"
    assert counted.waits == 3 * pieces
    expected = expected_after(1)
    for wait in range(counted.waits):
        outcomes = [agree(run(Simulated(s, frozenset({wait}))), expected) for s in [None, *SEEDS]]
        assert not all(outcomes), f"wait {wait} may be missing and nothing shows it"


def test_a_transfer_overlaps_the_kernels_beside_it() -> None:
    """What is asked of the device, in order.

    The next piece is sent before the side stream waits for the kernel; the host receives a piece
    only when the next kernel is launched.
    """
    operations = Simulated()
    found = parameters([2 * BLOCK] * 3)
    work = [Piece(tuple(p.parts(PIECE))) for p in found]

    def launch(piece: Piece, states: Sequence[tuple[Tensor, ...]]) -> None:
        operations.trace.append("launch")

    Stager(CPU, operations, PIECE).run(work, launch)
    send, go = "copy", ["current waits for side", "launch"]
    leave, receive = ["side waits for current", "copy"], "host waits for side"
    assert operations.trace == [
        *(send, *go, send, *leave),
        *(*go, receive, send, *leave),
        *(*go, receive, *leave, receive),
    ]


def test_on_the_cpu_all_happens_at_once() -> None:
    found = parameters()
    work = pack([part for p in found for part in p.parts(PIECE)], PIECE)
    Stager(CPU, piece_bytes=PIECE).run(work, launcher(lambda call: call()))
    assert agree(found, expected_after(1))


def test_no_work_asks_nothing_of_the_device() -> None:
    operations = Simulated()
    Stager(CPU, operations).run([], launcher(lambda call: call()))
    assert operations.trace == []


def test_buffers_stay_and_grow_for_a_larger_piece() -> None:
    made: list[int] = []

    class Counted(ImmediateOperations):
        def on_device(self, nbytes: int) -> Tensor:
            made.append(nbytes)
            return super().on_device(nbytes)

    stager = Stager(CPU, Counted(), piece_bytes=PIECE)
    small, large = parameters([BLOCK])[0], parameters([4000])[0]
    whole = cut(large, 4000, (large.codes, large.scales, large.floats), (4000, 250, 4000), 4000)
    expected = [small.copy(), large.copy()]
    for parameter in (expected[0], expected[0], expected[1], expected[0]):
        update(*parameter.tensors)
    for parts in (small.parts(PIECE), small.parts(PIECE), whole, small.parts(PIECE)):
        stager.run([Piece(tuple(parts))], launcher(lambda call: call()))
    assert agree([small, large], expected)
    assert made == [PIECE] * 2 + [whole[0].nbytes] * 2
    assert whole[0].nbytes > PIECE


# ---- failures


@pytest.mark.parametrize("kind", [RuntimeError, KeyboardInterrupt])
@pytest.mark.parametrize("seed", [None, *range(10)])
@pytest.mark.parametrize("at", range(4))
def test_a_launch_that_fails_loses_nothing(at: int, seed: int | None, kind: type) -> None:
    operations = Simulated(seed)
    found = parameters([2 * BLOCK] * 4)
    expected = [p.copy() for p in found]
    works = launcher(lambda call: operations.enqueue("current", call))
    work = [Piece(tuple(p.parts(PIECE))) for p in found]

    def fails(piece: Piece, states: Sequence[tuple[Tensor, ...]]) -> None:
        if piece is work[at]:
            raise kind("at this piece")
        works(piece, states)

    stager = Stager(CPU, operations, PIECE)
    with pytest.raises(kind, match="at this piece"):
        stager.run(work, fails)
    for parameter in expected[:at]:
        update(*parameter.tensors)
    assert agree(found, expected)
    assert operations.idle

    stager.run(work[at:], works)
    for parameter in expected[at:]:
        update(*parameter.tensors)
    assert agree(found, expected)


@pytest.mark.parametrize("seed", [None, 1, 2, 3])
def test_an_interruption_at_any_moment_loses_nothing(seed: int | None) -> None:
    """Ctrl-C before each call in turn, to the last: what kernels did is in the host states."""
    whole = Simulated()
    run(whole)
    calls = whole.calls
    assert calls > 30
    for call in range(calls):
        operations = Simulated(seed, interrupted=call)
        found = parameters()
        expected = [p.copy() for p in found]
        launched: list[Part] = []

        def launch(piece: Piece, states: Sequence[tuple[Tensor, ...]]) -> None:
            works(piece, states)  # noqa: B023 - called within this round
            launched.extend(piece.parts)  # noqa: B023

        works = launcher(partial(operations.enqueue, "current"))
        work = pack([part for p in found for part in p.parts(PIECE)], PIECE)
        with pytest.raises(KeyboardInterrupt):
            Stager(CPU, operations, PIECE).run(work, launch)
        for part in launched:
            parameter = expected[[p is part.owner for p in found].index(True)]
            at, blocks = slice(part.start, part.stop), slice(part.start // BLOCK, None)
            states = (parameter.codes[at], parameter.scales[blocks], parameter.floats[at])
            length = -(-(part.stop - part.start) // BLOCK)
            update(parameter.p[at], states[0], states[1][:length], states[2])
        assert agree(found, expected), f"interrupted before call {call}"
        assert operations.idle


def test_what_a_failing_launch_had_enqueued_is_written_back() -> None:
    """Its parameters have changed; the states must not stay behind."""
    found = parameters([BLOCK, BLOCK])
    expected = [p.copy() for p in found]
    update(*expected[0].tensors)
    piece = Piece(tuple(part for p in found for part in p.parts(PIECE)))

    def fails(piece: Piece, states: Sequence[tuple[Tensor, ...]]) -> None:
        update(piece.parts[0].owner.p, *states[0])
        raise RuntimeError("after the first part")

    with pytest.raises(RuntimeError, match="after the first part"):
        Stager(CPU).run([piece], fails)
    assert agree(found, expected)


def test_no_memory_for_buffers_shows_before_anything_changes() -> None:
    class Full(ImmediateOperations):
        room = PIECE * 3

        def on_device(self, nbytes: int) -> Tensor:
            if nbytes > self.room:
                raise MemoryError("no memory")
            return super().on_device(nbytes)

    found = parameters([BLOCK, 4000, BLOCK])
    before = [p.copy() for p in found]
    work = [Piece(tuple(p.parts(1 << 20))) for p in found]
    operations = Full()
    stager = Stager(CPU, operations, PIECE)
    with pytest.raises(MemoryError, match="no memory"):
        stager.run(work, launcher(lambda call: call()))
    assert agree(found, before)
    operations.room = 1 << 20
    stager.run(work, launcher(lambda call: call()))
    for parameter in before:
        update(*parameter.tensors)
    assert agree(found, before)


def test_a_device_without_operations_is_an_error() -> None:
    with pytest.raises(TargetError, match=r"'mps'.*paged=False"):
        Stager(torch.device("mps"))


# ---- cutting and packing


@given(
    numel=st.integers(0, 3000),
    block=st.sampled_from([1, 2, 16, 256, 2048]),
    piece_bytes=st.sampled_from([1, 2048, 4096, 1 << 20]),
    packed=st.booleans(),
)
def test_parts_are_whole_blocks_and_make_up_the_parameter(
    numel: int, block: int, piece_bytes: int, packed: bool
) -> None:
    per_byte = 2 if packed and block > 1 else 1
    codes = torch.arange(-(-numel // per_byte)).to(torch.uint8)
    scales = torch.rand(-(-numel // block))
    entries = (block // per_byte, 1)
    parts = cut("name", numel, (codes, scales), entries, block, piece_bytes)
    assert [part.start for part in parts] == [0, *(part.stop for part in parts)][: len(parts)]
    assert (parts[-1].stop if parts else 0) == numel
    for part in parts:
        assert part.owner == "name"
        assert part.start % block == 0
        assert part.start < part.stop
        length = part.stop - part.start
        assert [t.numel() for t in part.states] == [-(-length // per_byte), -(-length // block)]
        assert part.nbytes <= piece_bytes or length <= block
        assert part.nbytes >= sum(t.nbytes for t in part.states)
    for k, whole in enumerate((codes, scales)):
        pieces = [part.states[k] for part in parts]
        assert torch.equal(torch.cat([whole[:0], *pieces]), whole)
        assert all(t.untyped_storage().data_ptr() == whole.data_ptr() for t in pieces)


@given(st.lists(st.integers(1, 3000), max_size=30), st.sampled_from([512, 2048, 8192]))
def test_pieces_are_as_full_as_they_may_be(sizes: list[int], piece_bytes: int) -> None:
    parts = [
        Part(k, 0, size, (torch.empty(size, dtype=torch.uint8),)) for k, size in enumerate(sizes)
    ]
    pieces = pack(parts, piece_bytes)
    assert [part.owner for piece in pieces for part in piece.parts] == [*range(len(sizes))]
    for piece in pieces:
        assert piece.nbytes <= piece_bytes or len(piece.parts) == 1
    for piece, following in itertools.pairwise(pieces):
        assert piece.nbytes + following.parts[0].nbytes > piece_bytes


def test_states_of_a_wrong_size_are_not_cut() -> None:
    with pytest.raises(AssertionError):
        cut(None, 33, (torch.zeros(2),), (1,), BLOCK)  # three blocks
    with pytest.raises(AssertionError):
        cut(None, 32, (torch.zeros(33),), (BLOCK,), BLOCK)
    with pytest.raises(AssertionError):
        cut(None, 32, (torch.zeros(8, 4).t(),), (BLOCK,), BLOCK)


def test_a_parameter_without_states_is_a_part() -> None:
    part = Part(None, 0, 40, ())
    assert cut(None, 40, (), (), BLOCK) == [part]
    seen: list[Any] = []
    Stager(CPU).run(pack([part]), lambda piece, states: seen.append((piece.parts, states)))
    assert seen == [((part,), [()])]


def test_staged_tensors_are_aligned() -> None:
    """Kernels read several values at a time."""
    found = parameters([3, 5, 7])
    offsets: list[int] = []

    def launch(piece: Piece, states: Sequence[tuple[Tensor, ...]]) -> None:
        offsets.extend(int(t.storage_offset()) * t.element_size() for part in states for t in part)

    Stager(CPU).run(pack([part for p in found for part in p.parts(PIECE)]), launch)
    assert len(set(offsets)) == 9
    assert all(offset % ALIGNMENT == 0 for offset in offsets)


# ---- CUDA


class FakeCuda:
    """Stands for torch.cuda: writes down what is asked of which stream."""

    def __init__(self) -> None:
        self.calls: list[tuple[Any, ...]] = []
        self.active = "current"

    def Stream(self, device: torch.device) -> Any:  # noqa: N802 - as torch names it
        return FakeStream("side", self.calls)

    def current_stream(self, device: torch.device) -> Any:
        return FakeStream("current", self.calls)

    def Event(self, *, blocking: bool) -> Any:  # noqa: N802 - as torch names it
        return FakeEvent(self.calls)

    @contextlib.contextmanager
    def stream(self, stream: Any) -> Iterator[None]:
        self.active = stream.name
        yield
        self.active = "current"


@dataclass
class FakeStream:
    name: str
    calls: list[tuple[Any, ...]]

    def wait_event(self, event: Any) -> None:
        self.calls.append((self.name, "waits", event.stream))


@dataclass
class FakeEvent:
    calls: list[tuple[Any, ...]]
    stream: str = ""

    def record(self, stream: FakeStream) -> None:
        self.stream = stream.name

    def synchronize(self) -> None:
        self.calls.append(("host", "waits", self.stream))


def test_cuda_operations_ask_the_right_stream(monkeypatch: pytest.MonkeyPatch) -> None:
    """As far as this can be seen without a GPU; the test below runs it on one."""
    fake = FakeCuda()
    monkeypatch.setattr(staging, "_cuda", fake)
    operations = CudaOperations(CPU)

    class Seen(Tensor):
        def copy_(self, source: Tensor, non_blocking: bool = False) -> Tensor:
            fake.calls.append((fake.active, "copies", non_blocking))
            return self

    operations.on_device(8)
    operations.copy(torch.zeros(8).as_subclass(Seen), torch.zeros(8))
    side, current = operations.record("side"), operations.record("current")
    operations.wait("side", current)
    operations.wait("current", side)
    operations.wait_on_host(side)
    assert fake.calls == [
        ("side", "copies", True),
        ("side", "waits", "current"),
        ("current", "waits", "side"),
        ("host", "waits", "side"),
    ]


@pytest.mark.gpu
@pytest.mark.parametrize("own_stream", [False, True])
def test_on_a_gpu_results_are_those_of_the_host(own_stream: bool) -> None:
    """Kernels that are slow to start and to end, so that a missing wait would show."""
    device = torch.device("cuda")
    cuda: Any = torch.cuda
    stream = cuda.Stream(device) if own_stream else cuda.current_stream(device)
    sizes = [100_000, 7, 300_000, 65_536]
    found, expected = parameters(sizes), parameters(sizes)
    on_device = {id(p): p.p.to(device) for p in found}
    cuda.synchronize()
    stager = Stager(device, piece_bytes=256 << 10)

    def launch(piece: Piece, states: Sequence[tuple[Tensor, ...]]) -> None:
        cuda._sleep(2_000_000)
        for part, tensors in zip(piece.parts, states, strict=True):
            update(on_device[id(part.owner)][part.start : part.stop], *tensors)
        cuda._sleep(2_000_000)

    with cuda.stream(stream):
        for _ in range(3):
            work = pack([q for p in found for q in p.parts(256 << 10)], 256 << 10)
            assert len(work) > 4
            stager.run(work, launch)
            for parameter in expected:
                update(*parameter.tensors)
    cuda.synchronize()
    for parameter in found:
        parameter.p = on_device[id(parameter)].cpu()
    assert agree(found, expected)
