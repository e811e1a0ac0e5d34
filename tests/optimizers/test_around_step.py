"""What surrounds a step: failures without a trace, closures, hooks, profiles, pages, threads."""

from __future__ import annotations

import copy
import gc
import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from bnbx.errors import (
    BnbxWarning,
    CheckpointError,
    NotYetError,
    OptionError,
    PagingError,
    TargetError,
    UnsupportedTensorError,
)
from bnbx.kernels import launch, reference
from bnbx.kernels.batch import Batch
from bnbx.optimizers import engine
from bnbx.optimizers.engine import Optimizer8bit
from bnbx.optimizers.manager import GlobalOptimManager
from bnbx.optimizers.paging import is_paged
from optimizers.compare import assert_same, equal
from optimizers.variants import CASES, copies, gradients, make, parameters, set_gradients

SHAPES = ((5,), (300,), (17, 241))


def two(**arguments: Any) -> tuple[Optimizer8bit, list[Tensor], Optimizer8bit, list[Tensor]]:
    """Two equal optimizers with their parameters."""
    params = parameters(torch.float32, SHAPES)
    other = copies(params)
    arguments = {"min_8bit_size": 0, "lr": 1e-2, **arguments}
    ours, theirs = (Optimizer8bit(each, "adamw", **arguments) for each in (params, other))
    return ours, params, theirs, other


def random(params: Sequence[Tensor]) -> list[Tensor]:
    return [torch.randn(p.shape).to(p.dtype) for p in params]


# ---- failures leave no trace


def wrong_shape(p: Tensor) -> None:
    p.grad = None
    p.data = torch.zeros(7)
    p.grad = torch.zeros(7)
    p.data = torch.zeros(17, 241)


def sparse_elements(p: Tensor) -> None:
    p.grad = torch.ones(17, 241).to_sparse()


def complex_data(p: Tensor) -> None:
    p.grad = None
    p.data = torch.zeros(17, 241, dtype=torch.float64)
    p.grad = torch.zeros(17, 241, dtype=torch.float64)


def overlapping(p: Tensor) -> None:
    p.grad = None
    p.data = torch.zeros(241).expand(17, 241)
    p.grad = torch.zeros(17, 241)


@pytest.mark.parametrize("spoil", [wrong_shape, sparse_elements, complex_data, overlapping])
@pytest.mark.parametrize("steps", [0, 2])
def test_a_bad_last_gradient_changes_nothing_at_all(
    spoil: Callable[[Tensor], None], steps: int
) -> None:
    ours, params, theirs, other = two(percentile_clipping=5, master="kahan")
    for _ in range(steps):
        values = random(params)
        for optimizer, each in ((ours, params), (theirs, other)):
            set_gradients(each, values)
            optimizer.step()
    set_gradients(params[:2], random(params[:2]))
    good = params[2].data
    spoil(params[2])
    with pytest.raises(UnsupportedTensorError):
        ours.step()
    params[2].grad = None
    params[2].data = good
    assert len(ours.state) == len(theirs.state)
    assert_same(ours, theirs) if steps else None
    assert all(equal(p.detach(), q.detach()) for p, q in zip(params, other, strict=True))


def test_a_state_that_cannot_be_made_leaves_none(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The disk is full when the second parameter gets its pages."""
    params = parameters(torch.float32, [(300, 301), (400, 401)])
    optimizer = Optimizer8bit(params, "adamw", paged=True, page_dir=tmp_path)
    zeros, count = type(optimizer.pages).zeros, 0

    def full(*args: Any) -> Tensor:
        nonlocal count
        count += 1
        if count > 5:  # codes and absmax of the first's states, and codes of the second's
            raise PagingError("no space")
        return zeros(*args)

    set_gradients(params, random(params))
    with monkeypatch.context() as patch:
        patch.setattr(type(optimizer.pages), "zeros", full)
        with pytest.raises(PagingError, match="no space"):
            optimizer.step()
    assert not optimizer.state
    gc.collect()  # the frames of the error
    assert optimizer.pages.nbytes == 0
    optimizer.step()
    assert [optimizer.state[p]["step"] for p in params] == [1, 1]


def test_a_damaged_state_of_the_last_parameter_changes_nothing() -> None:
    ours, params, theirs, other = two(percentile_clipping=5)
    for optimizer, each in ((ours, params), (theirs, other)):
        set_gradients(each, [torch.ones(p.shape) for p in each])
        optimizer.step()
    good = ours.state[params[2]]["m"]
    ours.state[params[2]]["m"] = good[:3]
    with pytest.raises(CheckpointError, match="'m'"):
        ours.step()
    ours.state[params[2]]["m"] = good
    assert_same(ours, theirs)


def test_states_switched_on_by_a_failing_step_are_gone_again() -> None:
    params = parameters(torch.float32, [(300,), (300,)])
    optimizer = Optimizer8bit(params, "sgd", min_8bit_size=0)
    set_gradients(params, random(params))
    optimizer.step()
    before = [dict(optimizer.state[p]) for p in params]
    optimizer.param_groups[0]["momentum"] = 0.9
    params[1].grad = None
    params[1].data = torch.zeros(300, dtype=torch.float64)
    params[1].grad = torch.zeros(300, dtype=torch.float64)
    with pytest.raises(UnsupportedTensorError):
        optimizer.step()
    assert [dict(optimizer.state[p]) for p in params] == before


def test_warnings_as_errors_leave_no_count(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where no compiler is found, the warning may be an error; the next step goes on."""
    ours, params, theirs, other = two(percentile_clipping=5)

    def broken(batches: Sequence[Batch]) -> None:
        raise BnbxWarning("no compiler")

    values = random(params)
    set_gradients(params, values)
    set_gradients(other, values)
    with monkeypatch.context() as patch:
        patch.setattr(engine, "launch", broken)
        with pytest.raises(BnbxWarning):
            ours.step()
    assert all(ours.state[p]["step"] == 0 for p in params)
    assert not any(ours.state[p]["gnorm_vec"].any() for p in params)
    ours.step()
    theirs.step()
    assert_same(ours, theirs)


# ---- closures and hooks


def test_a_closure_is_called_once_with_gradients_enabled() -> None:
    p = torch.ones(10, requires_grad=True)
    optimizer = Optimizer8bit([p], "sgd", lr=0.5)
    called = []

    def closure() -> Tensor:
        called.append(torch.is_grad_enabled())
        optimizer.zero_grad()
        loss = (p * p).sum()
        loss.backward()  # type: ignore[no-untyped-call]
        return loss

    with torch.no_grad():
        loss = optimizer.step(closure)
    assert called == [True]
    assert loss.item() == 10
    assert not p.any()  # 1 - 0.5 * 2
    assert optimizer.step() is None


def test_an_error_in_a_closure_changes_nothing() -> None:
    ours, params, theirs, _ = two()
    set_gradients(params, random(params))

    def closure() -> None:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        ours.step(closure)
    assert not ours.state
    assert_same(ours, theirs) if theirs.state else None


def test_hooks_run_around_a_step_and_see_its_arguments() -> None:
    ours, params, _, _ = two()
    set_gradients(params, random(params))
    seen: list[Any] = []
    before = [p.detach().clone() for p in params]
    pre = ours.register_step_pre_hook(
        lambda o, args, kwargs: seen.append(("pre", equal(params[1].detach(), before[1]), kwargs))
    )
    post = ours.register_step_post_hook(
        lambda o, args, kwargs: seen.append(("post", o.state[params[0]]["step"], kwargs))
    )
    ours.step(grad_scale=2.0)
    assert seen == [("pre", True, {"grad_scale": 2.0}), ("post", 1, {"grad_scale": 2.0})]
    pre.remove()
    post.remove()
    ours.step()
    assert len(seen) == 2


# ---- arguments by which torch chooses an implementation


@pytest.mark.parametrize(
    "given",
    [{"foreach": v} for v in (None, True, False)]
    + [{"fused": v} for v in (None, True, False)]
    + [{"foreach": True, "fused": False}, {"capturable": False, "differentiable": False}],
)
def test_implementations_are_accepted_and_all_the_same(given: dict[str, Any]) -> None:
    params = parameters(torch.float32, SHAPES)
    other = copies(params)
    ours, plain = Optimizer8bit(params, "adamw", **given), Optimizer8bit(other, "adamw")
    values = random(params)
    for optimizer, each in ((ours, params), (plain, other)):
        set_gradients(each, values)
        optimizer.step()
    assert_same(ours, plain)


@pytest.mark.parametrize(
    ("given", "error", "match"),
    [
        ({"foreach": 1}, OptionError, "foreach=1: expected one of None, True, False"),
        ({"fused": "yes"}, OptionError, "fused='yes'"),
        ({"foreach": True, "fused": True}, OptionError, "cannot both be True"),
        ({"capturable": None}, OptionError, "capturable=None: expected one of True, False"),
        ({"capturable": True}, NotYetError, "CUDA graph"),
        ({"differentiable": True}, OptionError, "outside of autograd"),
    ],
)
def test_other_implementations_are_refused(
    given: dict[str, Any], error: type[Exception], match: str
) -> None:
    with pytest.raises(error, match=match):
        Optimizer8bit([torch.zeros(3)], "adamw", **given)


@pytest.mark.parametrize(
    "dtype", [torch.complex64, torch.int32, torch.int8, torch.bool, torch.float64]
)
def test_parameters_of_other_dtypes_are_refused(dtype: torch.dtype) -> None:
    with pytest.raises(UnsupportedTensorError, match=f"{dtype}; expected one of torch.float32"):
        Optimizer8bit([torch.zeros(3, dtype=dtype)], "adamw")
    optimizer = Optimizer8bit([torch.zeros(3)], "adamw")
    with pytest.raises(UnsupportedTensorError, match=str(dtype)):
        optimizer.add_param_group({"params": [torch.zeros(3, dtype=dtype)]})
    assert len(optimizer.param_groups) == 1


# ---- profiles


def test_a_profile_names_steps_and_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    ours, params, _, _ = two()
    set_gradients(params, random(params))
    ours.step()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        ours.step()
    names = [event.key for event in profile.key_averages()]
    assert "Optimizer.step#Optimizer8bit.step" in names
    (kernel,) = [name for name in names if name.startswith("bnbx cpu: ")]
    assert "adamw" in kernel
    assert "m: dynamic8" in kernel
    assert "float32 parameters" in kernel


# ---- pages


def test_pages_by_group_and_by_override() -> None:
    params = parameters(torch.float32, [(300, 301)] * 3)
    other = copies(params)
    groups: list[dict[str, Any]] = [
        {"params": [("a", params[0]), ("b", params[1])], "paged": True},
        {"params": [("c", params[2])]},
    ]
    ours = Optimizer8bit(groups, "adamw", overrides={"b": {"paged": False}})
    plain = Optimizer8bit([{"params": each} for each in (other[:2], other[2:])], "adamw")
    for _ in range(2):
        values = random(params)
        for optimizer, each in ((ours, params), (plain, other)):
            set_gradients(each, values)
            optimizer.step()
    assert [is_paged(ours.state[p]["m"]) for p in params] == [True, False, False]
    assert_same(ours, plain)


@pytest.mark.parametrize(
    "arguments",
    [
        {"paged": "managed"},
        {"overrides": {"p": {"paged": "managed"}}},
        {"group": {"paged": "managed"}},
    ],
    ids=["all", "override", "group"],
)
def test_managed_memory_on_the_cpu_is_refused_when_the_optimizer_is_made(
    arguments: dict[str, Any],
) -> None:
    group = {"params": [("p", torch.zeros(3))], **arguments.pop("group", {})}
    with pytest.raises(TargetError, match=r"needs a CUDA device.*'cpu'.*paged=True"):
        Optimizer8bit([group], "adamw", **arguments)
    optimizer = Optimizer8bit([torch.zeros(3)], "adamw")
    with pytest.raises(TargetError, match="needs a CUDA device"):
        optimizer.add_param_group({"params": [torch.zeros(3)], "paged": "managed"})
    assert len(optimizer.param_groups) == 1


def test_managed_memory_by_a_late_override_leaves_no_trace() -> None:
    p = torch.zeros(5000, requires_grad=True)
    optimizer = Optimizer8bit([p], "adamw")
    p.grad = torch.ones(5000)
    manager = GlobalOptimManager.get_instance()
    try:
        manager.override_config(p, "paged", "managed")
        with pytest.raises(TargetError, match="needs a CUDA device"):
            optimizer.step()
        assert not optimizer.state
    finally:
        manager.initialize()
    optimizer.step()
    assert optimizer.state[p]["step"] == 1


def test_a_directory_for_pages_that_cannot_be_used(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.touch()
    with pytest.raises(PagingError, match="page_dir="):
        Optimizer8bit([torch.zeros(3)], "adamw", paged=True, page_dir=file / "pages")
    Optimizer8bit([torch.zeros(3)], "adamw", page_dir=file / "pages")  # nothing is paged


def test_tests_keep_their_pages_to_themselves() -> None:
    """Guards this folder's conftest."""
    directory = Optimizer8bit([torch.zeros(3)], "adamw", paged=True).pages.directory
    assert str(directory) == os.environ["BNBX_PAGE_DIR"]
    assert Path.home() not in directory.parents or "pytest" in str(directory)


# ---- who shares what


def test_a_parameter_in_two_optimizers_has_states_in_both() -> None:
    p = torch.randn(300, requires_grad=True)
    q = p.detach().clone().requires_grad_()
    first = Optimizer8bit([p], "adamw", min_8bit_size=0)
    second = Optimizer8bit([p], "lion", lr=1e-3)
    other = (Optimizer8bit([q], "adamw", min_8bit_size=0), Optimizer8bit([q], "lion", lr=1e-3))
    for _ in range(3):
        set_gradients([p, q], [torch.randn(300)] * 2)
        first.step()
        second.step()
        for optimizer in other:
            optimizer.step()
    assert equal(p.detach(), q.detach())
    assert set(first.state[p]) != set(second.state[p])


def steps_of(seed: int, **arguments: Any) -> Optimizer8bit:
    """Some steps of an optimizer: dense, sparse, clipped by norms, and a mode's change."""
    generator = torch.Generator().manual_seed(seed)
    p = torch.randn(200, 300, generator=generator).requires_grad_()
    q = torch.randn(200, 300, generator=generator).requires_grad_()
    optimizer = Optimizer8bit([p, q], "schedule_free_adamw", percentile_clipping=5, **arguments)
    for _ in range(3):
        p.grad = torch.randn(200, 300, generator=generator)
        rows = torch.randint(200, (1, 20), generator=generator)
        values = torch.randn(20, 300, generator=generator)
        q.grad = torch.sparse_coo_tensor(rows, values, (200, 300), check_invariants=True)
        optimizer.step()
    optimizer.eval()
    return optimizer


def test_threads_may_step_at_once(two_threads: None) -> None:
    """Python threads, each with optimizers of its own; one is paged."""
    expected = [steps_of(seed) for seed in range(4)]
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda n: steps_of(n % 4, paged=n == 5), range(8)))
    for number, optimizer in enumerate(found):
        assert_same(optimizer, expected[number % 4])


def test_threads_may_compile_the_same_kernel_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("BNBX_CACHE_DIR", str(tmp_path))
    from bnbx.kernels import cpu

    cpu.kernel.cache_clear()
    launch.choose.cache_clear()
    barrier = threading.Barrier(4)

    def one(number: int) -> Optimizer8bit:
        barrier.wait()
        return steps_of(0)

    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(one, range(4)))
    for optimizer in found[1:]:
        assert_same(optimizer, found[0])


@pytest.mark.skipif(sys.platform != "linux", reason="forks")
@pytest.mark.filterwarnings("ignore:.*use of fork:DeprecationWarning")
def test_a_forked_child_does_all_that_its_parent_does(two_threads: None) -> None:
    """Norms, rows and modes are torch's operations, on large tensors: they must not hang."""
    expected = as_bytes(steps_of(0))
    context: Any = multiprocessing.get_context("fork")
    reading, writing = context.Pipe(duplex=False)
    child = context.Process(target=lambda: writing.send_bytes(as_bytes(steps_of(0))))
    child.start()
    killer = threading.Timer(60, os.kill, (child.pid, signal.SIGKILL))
    killer.start()
    writing.close()
    try:
        assert reading.recv_bytes() == expected
    finally:
        child.join()
        killer.cancel()


def as_bytes(optimizer: Optimizer8bit) -> bytes:
    tensors = [p.detach() for group in optimizer.param_groups for p in group["params"]]
    for saved in optimizer.state.values():
        tensors += [value for value in saved.values() if isinstance(value, Tensor)]
    return b"".join(t.contiguous().numpy().tobytes() for t in tensors)


# ---- what changes during a run


@pytest.mark.parametrize(("rule", "variant"), CASES)
def test_states_of_a_late_first_gradient_begin_then(
    rule: str, variant: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine, "launch", reference.run)
    params = parameters(torch.float32, [(300,), (300,)])
    late = copies(params)[1:]
    together = make(rule, variant, params, "dynamic8")
    for step in range(4):
        values = random(params)
        params[0].grad = values[0]
        params[1].grad = values[1] if step >= 2 else None
        together.step()
        if step == 2:
            group = together.param_groups[1]
            hyper = {name: group[name] for name in together.spec.arguments}
            hyper |= {"max_unorm": group["max_unorm"]} if variant == "clipped" else {}
            types = group["state_types"]
            alone = Optimizer8bit(late, rule, state_types=types, min_8bit_size=0, **hyper)
        if step >= 2:
            late[0].grad = values[1].clone()
            alone.step()
    assert equal(params[1].detach(), late[0].detach())
    for name, value in together.state[params[1]].items():
        assert equal(value, alone.state[late[0]][name])


def test_a_group_may_be_added_during_a_run() -> None:
    ours, params, _, _ = two()
    set_gradients(params, random(params))
    ours.step()
    more = torch.randn(300, requires_grad=True)
    alone = more.detach().clone().requires_grad_()
    ours.add_param_group({"params": [more], "lr": 0.5})
    other = Optimizer8bit([alone], "adamw", lr=0.5, min_8bit_size=0)
    set_gradients([more, alone], [torch.randn(300)] * 2)
    ours.step()
    other.step()
    assert equal(more.detach(), alone.detach())
    assert [ours.state[p]["step"] for p in params] == [2, 2, 2]


def test_a_learning_rate_in_a_tensor_is_read_at_each_step() -> None:
    ours, params, theirs, other = two(bits=32)
    rate = torch.tensor(0.1)
    ours.param_groups[0]["lr"] = rate
    for number in range(4):
        value = 0.1 / (number + 1)
        rate.fill_(value)
        theirs.param_groups[0]["lr"] = float(rate)
        values = random(params)
        for optimizer, each in ((ours, params), (theirs, other)):
            set_gradients(each, values)
            optimizer.step()
    assert_same(ours, theirs)


def test_a_tensor_given_as_learning_rate_may_change_and_change_back() -> None:
    params = parameters(torch.float32, [(300,)])
    rate = torch.tensor(0.1)
    optimizer = Optimizer8bit(params, "sgd", lr=rate)
    rate.fill_(0.2)
    assert optimizer.resolved(params[0]).hyper["lr"] == pytest.approx(0.2)
    optimizer._resolution._kept.clear()
    optimizer.param_groups[0]["lr"] = float(torch.tensor(0.1))
    assert optimizer.resolved(params[0]).hyper["lr"] == pytest.approx(0.1)


@pytest.mark.parametrize("shape", [(), (0,), (3, 0), (1,)])
@pytest.mark.parametrize("options", [{}, {"block_wise": False}, {"percentile_clipping": 5}])
def test_small_and_empty_parameters(shape: tuple[int, ...], options: dict[str, Any]) -> None:
    p = torch.ones(shape, requires_grad=True)
    optimizer = Optimizer8bit([p], "adamw", min_8bit_size=0, lr=0.1, **options)
    for _ in range(2):
        p.grad = torch.ones(shape)
        optimizer.step()
    assert optimizer.state[p]["step"] == 2
    assert (p < 0.9).all()
    resumed = Optimizer8bit([p], "adamw", min_8bit_size=0, **options)
    resumed.load_state_dict(optimizer.state_dict())
    resumed.step()


@pytest.mark.parametrize("parameter", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("gradient", [torch.float32, torch.bfloat16, torch.float16])
def test_gradients_of_another_dtype(parameter: torch.dtype, gradient: torch.dtype) -> None:
    """The gradient is read as it is: its values are the same in both dtypes here."""
    p = torch.randn(3000).to(parameter).requires_grad_()
    q = p.detach().clone().requires_grad_()
    if not hasattr(p, "grad_dtype"):
        pytest.skip("this torch gives gradients the dtype of their parameter")
    p.grad_dtype = None
    ours, plain = (Optimizer8bit([each], "adamw", min_8bit_size=0) for each in (p, q))
    for _ in range(2):
        both = (torch.randint(-120, 120, (3000,)) / 64).to(parameter)
        p.grad, q.grad = both.to(gradient), both
        ours.step()
        plain.step()
    assert_same(ours, plain)


def test_a_batch_has_tensors_of_one_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """Else a kernel would follow pointers of another device. Meta stands for that."""
    near = torch.zeros(5000, requires_grad=True)
    far = torch.zeros(5000, device="meta", requires_grad=True)
    optimizer = Optimizer8bit([near, far], "sgd")
    near.grad, far.grad = torch.ones(5000), torch.ones(5000, device="meta")
    seen: list[Batch] = []
    monkeypatch.setattr(engine, "launch", seen.extend)
    optimizer.step()
    devices = [{row[i].device.type for row in b.tensors for i in range(len(row))} for b in seen]
    assert sorted(map(sorted, devices)) == [["cpu"], ["meta"]]


def test_paged_and_unpaged_states_of_equal_parameters_are_in_one_batch_on_the_cpu(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """They are told apart by where they are, not by what was asked for."""
    params = parameters(torch.float32, [(300, 301), (300, 301)])
    optimizer = Optimizer8bit(params, "adamw", paged=True)
    params[0].grad = torch.ones(300, 301)
    optimizer.step()
    optimizer.param_groups[0]["paged"] = False
    params[1].grad = torch.ones(300, 301)
    optimizer.state[params[0]]["step"] = 0
    seen: list[Batch] = []
    monkeypatch.setattr(engine, "launch", seen.extend)
    optimizer.step()
    assert [is_paged(optimizer.state[p]["m"]) for p in params] == [True, False]
    assert [len(batch.tensors) for batch in seen] == [2]


def test_a_model_that_moved_is_looked_at_again() -> None:
    """A slot is for one device; another would have its states checked, which stay behind."""
    p = torch.zeros(5000, requires_grad=True)
    optimizer = Optimizer8bit([p], "adamw")
    p.grad = torch.ones(5000)
    optimizer.step()
    slot = optimizer._slots._slots[p]
    now = (p, p.grad, optimizer.state[p], slot.kernel_key)
    assert slot.fits(*now)
    assert not replace(slot, device=torch.device("meta")).fits(*now)
    assert not slot.far
    assert replace(slot, device=torch.device("meta")).far


def test_a_copy_is_independent() -> None:
    ours, params, _, _ = two(percentile_clipping=5)
    set_gradients(params, gradients(params))
    ours.step()
    other = copy.deepcopy(ours)
    before = [p.detach().clone() for p in params]
    copied = [p for group in other.param_groups for p in group["params"]]
    set_gradients(copied, random(copied))
    other.step()
    assert all(equal(p.detach(), old) for p, old in zip(params, before, strict=True))
    assert ours.state[params[0]]["step"] == 1
    assert other.state[copied[0]]["step"] == 2
