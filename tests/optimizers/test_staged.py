"""Steps in pieces, as paged states take them on a device: the bits of steps at once.

There is no device here: any batch with states counts as far away, and what moves pieces does so
within host memory.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from bnbx.kernels import reference
from bnbx.kernels.batch import Batch
from bnbx.kernels.master import load
from bnbx.kernels.staging import ImmediateOperations, Stager
from bnbx.optimizers import engine, staged
from bnbx.optimizers.engine import Optimizer8bit
from bnbx.optimizers.staged import Staging, is_far
from bnbx.registry import optimizers
from optimizers.compare import assert_same, equal
from optimizers.variants import (
    CASES,
    STORAGES,
    VARIANTS,
    copies,
    gradients,
    make,
    parameters,
    set_gradients,
    state_types,
)

PIECE_BYTES = 4096
SHAPES = ((), (257,), (17, 241), (3, 1000), (2050,))
CPU = torch.device("cpu")


class Launches:
    """A launcher that counts."""

    def __init__(self) -> None:
        self.sizes: list[list[int]] = []

    def __call__(self, batches: Sequence[Batch]) -> None:
        for batch in batches:
            self.sizes.append([row[0].numel() for row in batch.tensors])
        reference.run(batches)


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> Launches:
    found = Launches()
    monkeypatch.setattr(engine, "launch", found)
    monkeypatch.setattr(staged, "is_far", lambda batch: bool(batch.plan.storages))
    return found


def immediate(device: torch.device) -> Stager:
    return Stager(device, ImmediateOperations(), PIECE_BYTES)


def in_pieces(optimizer: Optimizer8bit) -> Optimizer8bit:
    optimizer._staging = Staging(immediate, PIECE_BYTES)
    return optimizer


def at_once(optimizer: Optimizer8bit) -> Optimizer8bit:
    optimizer._staging = Staging(immediate, 1 << 40)
    return optimizer


def steps(optimizer: Optimizer8bit, params: Sequence[Tensor], count: int = 3) -> None:
    for step in range(count):
        torch.manual_seed(step)
        set_gradients(params, gradients(params))
        optimizer.step()


@pytest.mark.parametrize("storage", STORAGES)
@pytest.mark.parametrize(("rule", "variant"), CASES)
def test_a_step_in_pieces_has_the_bits_of_one_at_once(
    rule: str, variant: str, storage: str, launches: Launches, monkeypatch: pytest.MonkeyPatch
) -> None:
    params = parameters(torch.float32, SHAPES)
    other = copies(params)
    staged_one = in_pieces(make(rule, variant, params, storage))
    steps(staged_one, params)
    assert rule in ("sgd", "lars") or len(launches.sizes) > 3 * 2, "nothing was cut"
    monkeypatch.setattr(staged, "is_far", is_far)
    direct = make(rule, variant, other, storage)
    steps(direct, other)
    assert_same(staged_one, direct)


@pytest.mark.parametrize(
    "options",
    [
        {"block_wise": False},
        {"max_unorm": 0.01},
        {"skip_zeros": True, "maximize": True},
        {"percentile_clipping": 5},
    ],
    ids="-".join,
)
@pytest.mark.parametrize("bits", [32, 8, 4])
def test_options_in_pieces(
    bits: int, options: dict[str, Any], launches: Launches, monkeypatch: pytest.MonkeyPatch
) -> None:
    params = parameters(torch.bfloat16, SHAPES)
    other = copies(params)
    arguments = {"bits": bits, "min_8bit_size": 0, **VARIANTS["adamw"][""][0], **options}
    ours = in_pieces(Optimizer8bit(params, "adamw", **arguments))
    steps(ours, params)
    assert len(launches.sizes) > 3
    monkeypatch.setattr(staged, "is_far", is_far)
    direct = Optimizer8bit(other, "adamw", **arguments)
    steps(direct, other)
    assert_same(ours, direct)


@pytest.mark.parametrize("master", ["kahan", "residual"])
@pytest.mark.parametrize("bits", [32, 8, 4])
def test_masters_in_pieces(
    bits: int, master: str, launches: Launches, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Their noise is another: states are the same, parameters as far as residuals resolve them."""
    params = parameters(torch.bfloat16, SHAPES)
    other = copies(params)
    arguments = {"bits": bits, "min_8bit_size": 0, **VARIANTS["adamw"][""][0], "master": master}
    ours = in_pieces(Optimizer8bit(params, "adamw", **arguments))
    largest = [p.detach().abs().float() for p in params]

    def look(*_: Any) -> None:
        largest[:] = [
            torch.maximum(x, p.detach().abs()) for x, p in zip(largest, params, strict=True)
        ]

    ours.register_step_post_hook(look)
    steps(ours, params)
    assert len(launches.sizes) > 3
    monkeypatch.setattr(staged, "is_far", is_far)
    direct = Optimizer8bit(other, "adamw", **arguments)
    steps(direct, other)
    for p, q in zip(params, other, strict=True):
        saved, expected = ours.state[p], direct.state[q]
        assert all(equal(saved[name], expected[name]) for name in saved if name != "residual")
        exact, again = (
            load(master, t.detach(), state["residual"]) for t, state in ((p, saved), (q, expected))
        )
        # A residual is precise to 1/254 of the distance of neighbors, which is at most 2**-7 |p|.
        most = 3 * 2 * 2.0**-7 / 254 * largest.pop(0) + 1e-30
        assert ((exact - again).abs() <= most).all()


def test_pieces_are_of_whole_blocks_and_measured_tensors_stay_whole(launches: Launches) -> None:
    for rule, variant in (("adamw", ""), ("lamb", "")):
        launches.sizes.clear()
        p = torch.randn(10_000, requires_grad=True)
        steps(in_pieces(make(rule, variant, [p], "dynamic8")), [p], 1)
        sizes = [size for row in launches.sizes for size in row]
        assert sum(sizes) == 10_000
        if rule == "lamb":
            assert sizes == [10_000]
        else:
            assert len(sizes) > 4
            assert all(size % 256 == 0 for size in sizes[:-1])


def test_small_parameters_share_a_piece(launches: Launches) -> None:
    params = parameters(torch.float32, [(3,)] * 40)
    steps(in_pieces(make("adamw", "", params)), params, 1)
    assert len(launches.sizes) < 40


def test_stochastic_rounding_in_pieces(launches: Launches) -> None:
    """Its noise is another, but no piece has that of its neighbor, and both neighbors occur."""
    p = torch.full((8192,), 1.0, dtype=torch.bfloat16).requires_grad_()
    optimizer = Optimizer8bit([p], "sgd", lr=2.0**-10, momentum=0.9, bits=32, master="stochastic")
    p.grad = torch.ones(8192, dtype=torch.bfloat16)  # the step is a quarter of an ulp below 1
    in_pieces(optimizer).step()
    assert len(launches.sizes) > 4
    assert set(p.tolist()) == {1.0, 1.0 - 2.0**-8}
    moved = p.detach() != 1
    assert 0.2 < moved.float().mean() < 0.3
    pieces = moved[: 8192 // 512 * 512].view(-1, 512)
    assert len({tuple(piece.tolist()) for piece in pieces}) == len(pieces)


def test_an_overflow_leaves_pieces_as_they_are(launches: Launches) -> None:
    """A flag on a device is read by the kernel; here it is set on batches by hand."""
    params = parameters(torch.float32, SHAPES)
    optimizer = in_pieces(make("adamw", "", params, "dynamic8"))
    steps(optimizer, params)
    saved = [p.detach().clone() for p in params]
    states = [optimizer.state[p] for p in params]
    copied = [{k: v.clone() for k, v in s.items() if isinstance(v, Tensor)} for s in states]
    optimizer._scaling.overflowed = lambda found_inf: False  # type: ignore[method-assign]
    optimizer.found_inf = torch.ones(1)  # type: ignore[attr-defined]
    optimizer.step()
    for p, before, state, copy in zip(params, saved, states, copied, strict=True):
        assert equal(p.detach(), before)
        assert all(equal(state[name], value) for name, value in copy.items())


def test_near_and_far_batches_side_by_side(
    launches: Launches, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Paged and unpaged groups: only the far ones travel."""
    params = parameters(torch.float32, [(5000,), (5000,)])
    other = copies(params)
    spec = optimizers().get("adamw")
    far = []

    def is_far_here(batch: Batch) -> bool:
        far.append(batch.tensors[0][0].data_ptr() == params[1].data_ptr())
        return far[-1]

    monkeypatch.setattr(staged, "is_far", is_far_here)
    ours = in_pieces(
        Optimizer8bit(
            [{"params": params[n : n + 1], "paged": n == 1} for n in (0, 1)],
            spec,
            state_types=state_types(spec, "dynamic8"),
        )
    )
    steps(ours, params)
    assert True in far
    assert False in far
    monkeypatch.setattr(staged, "is_far", is_far)
    direct = Optimizer8bit(other, spec, state_types=state_types(spec, "dynamic8"))
    steps(direct, other)
    assert_same(ours, direct)


def test_nothing_is_far_on_the_cpu() -> None:
    p = torch.zeros(5000, requires_grad=True)
    optimizer = Optimizer8bit([p], "adamw", paged=True)
    p.grad = torch.ones(5000)
    seen: list[bool] = []
    optimizer._staging.launch = (  # type: ignore[method-assign]
        lambda batches, launch: seen.extend(map(is_far, batches))
    )
    optimizer.step()
    assert seen == [False]


def test_states_in_host_memory_of_a_parameter_elsewhere_are_far() -> None:
    """The meta device stands for one that is not the host."""
    p = torch.zeros(5000, requires_grad=True)
    optimizer = Optimizer8bit([p], "adamw")
    p.grad = torch.ones(5000)
    found: list[Batch] = []
    optimizer._staging.launch = (  # type: ignore[method-assign]
        lambda batches, launch: found.extend(batches)
    )
    optimizer.step()
    (batch,) = found
    row = batch.tensors[0]
    batch.tensors = [(row[0].to("meta"), row[1].to("meta"), *row[2:])]
    assert is_far(batch)
    batch.tensors = [tuple(t.to("meta") for t in row)]
    assert not is_far(batch)


def test_a_failed_launch_leaves_the_count_of_steps(
    launches: Launches, monkeypatch: pytest.MonkeyPatch
) -> None:
    p = torch.randn(10_000, requires_grad=True)
    optimizer = in_pieces(make("adamw", "", [p], "dynamic8"))
    steps(optimizer, [p], 1)
    before = p.detach().clone()

    def fail(batches: Sequence[Batch]) -> None:
        raise MemoryError

    monkeypatch.setattr(engine, "launch", fail)
    with pytest.raises(MemoryError):
        optimizer.step()
    assert optimizer.state[p]["step"] == 1
    assert equal(p.detach(), before)
    monkeypatch.setattr(engine, "launch", launches)
    optimizer.step()
    assert optimizer.state[p]["step"] == 2
