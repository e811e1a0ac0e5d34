"""On a GPU an optimizer does what it does on a CPU: the same bits after the same steps."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import on_gpu
from bnbx import optim
from bnbx.errors import OptionError, UnsupportedTensorError
from bnbx.optim import create, explain
from bnbx.optimizers.engine import Optimizer8bit
from bnbx.registry import optimizers
from on_gpu import (
    all_there,
    assert_same_optimizers,
    assert_there,
    same,
    there,
)
from optimizers.compare import parameters_of
from optimizers.gpu_runs import (
    DENSE,
    SHAPES,
    STEPS,
    STORAGES,
    check,
    give,
    grads_of,
    model_parameters,
    pair,
    train,
)
from optimizers.managing import forgetful_manager
from optimizers.variants import (
    CASES,
    DTYPES,
    VARIANTS,
    copies,
    fill,
    make,
    parameters,
)

pytestmark = pytest.mark.gpu

MASTERS = ("none", "stochastic", "kahan", "residual")
# Every rule with its variants, bits, and a dtype: each meets each somewhere.
PRODUCT = [
    (rule, variant, storage, DTYPES[(number + place) % len(DTYPES)])
    for number, (rule, variant) in enumerate(CASES)
    for place, storage in enumerate(STORAGES)
]

# ---- every rule


@pytest.mark.parametrize(("rule", "variant", "storage", "dtype"), PRODUCT)
def test_every_rule_has_the_bits_of_the_cpu(
    rule: str, variant: str, storage: str, dtype: torch.dtype
) -> None:
    params = model_parameters(dtype)
    others = all_there(params)
    places = [(p.data_ptr(), p.stride()) for p in others]
    here, gpu = (make(rule, variant, each, storage) for each in (params, others))
    check(STEPS, here, gpu)
    assert [(p.data_ptr(), p.stride()) for p in others] == places


@pytest.mark.parametrize("bits", [32, 8, 4])
@pytest.mark.parametrize("rule", optimizers().names())
def test_create_makes_what_the_gpu_runs(rule: str, bits: int) -> None:
    """With parameters named, and defaults: states of small ones are float32."""
    model = nn.Sequential(nn.Linear(70, 90), nn.Linear(90, 3))
    other = copy.deepcopy(model).to(on_gpu.DEVICE)
    here, gpu = (
        create(rule, each.named_parameters(), bits=bits, lr=1e-3) for each in (model, other)
    )
    check(3, here, gpu)
    found = explain(gpu)
    for name, p in other.named_parameters():
        assert found[name].target == p.device.type
        assert found[name].device == str(p.device)
        assert found[name].state_exists
        states = [v for v in gpu.state[p].values() if isinstance(v, Tensor)]
        assert_there(*states)
        assert sum(found[name].state_bytes.values()) == sum(state.nbytes for state in states)


@pytest.mark.parametrize(
    "name", ["Adam8bit", "AdamW", "AdamW8bit", "AdEMAMix8bit", "Lion8bit", "SGD8bit", "LAMB8bit"]
)
def test_familiar_classes(name: str) -> None:
    params = model_parameters()
    made: Callable[..., Optimizer8bit] = getattr(optim, name)
    more = {"momentum": 0.9} if name == "SGD8bit" else {}
    here, gpu = (made(each, lr=1e-2, **more) for each in (params, all_there(params)))
    check(3, here, gpu)


# ---- options


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("master", MASTERS)
@pytest.mark.parametrize("rule", ["adamw", "lion"])
def test_masters(rule: str, master: str, dtype: torch.dtype) -> None:
    """The noise is numbered in the same way, too."""
    check(STEPS, *pair(rule, dtype, master=master))


@pytest.mark.parametrize(
    "options",
    [
        dict(skip_zeros=True),
        dict(block_wise=False),
        dict(block_wise=False, bits=4),
        dict(maximize=True),
        dict(max_unorm=0.01),
        dict(max_unorm=0.01, block_wise=False, skip_zeros=True),
        dict(state_types={"m": "linear8", "v": "float32"}),
    ],
    ids=str,
)
def test_options(options: dict[str, Any]) -> None:
    check(STEPS, *pair(**options))


@pytest.mark.parametrize("bits", [8, 32])
def test_percentile_clipping(bits: int) -> None:
    """Norms are sums in an order that differs between devices: near, not the same."""
    params = [p for p in parameters(torch.float32, SHAPES) if p.numel() > 1]
    others = all_there(params)
    here, gpu = (
        create("adamw", each, percentile_clipping=20, bits=bits, **DENSE)
        for each in (params, others)
    )
    clipped = create("adamw", copies(params), bits=bits, **DENSE)
    for step in range(STEPS):
        values = [torch.randn(p.shape) * (1 + 9 * (step % 2)) for p in params]
        give(values, here, gpu, clipped)
        for optimizer in (here, gpu, clipped):
            optimizer.step()
        for p, q in zip(params, others, strict=True):
            torch.testing.assert_close(
                gpu.state[q]["gnorm_vec"].cpu(), here.state[p]["gnorm_vec"], rtol=1e-5, atol=0
            )
    for p, q, r in zip(params, others, parameters_of(clipped), strict=True):
        assert_there(q, gpu.state[q]["gnorm_vec"])
        # A code that lies between two may be either; one is a small part of an update.
        room = 1e-5 if bits == 32 else 5e-3
        torch.testing.assert_close(q.detach().cpu(), p.detach(), rtol=0, atol=room)
        assert not same(p, r)


def test_learning_rates_of_groups_and_schedules() -> None:
    params = model_parameters()
    runs = []
    for each in (params, all_there(params)):
        groups: list[dict[str, Any]] = [
            {"params": each[::2]},
            {"params": each[1::2], "lr": 1e-3, "bits": 32},
        ]
        optimizer = create("adamw", groups, **DENSE)
        runs.append((optimizer, torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)))
    for _ in range(4):
        give(grads_of(runs[0][0]), *(optimizer for optimizer, _ in runs))
        for optimizer, scheduler in runs:
            optimizer.step()
            scheduler.step()
    assert_same_optimizers(runs[1][0], runs[0][0])


def test_a_learning_rate_in_a_tensor_of_the_device() -> None:
    """As torch's optimizers have it with capturable=True: refused, or used; never wrong."""
    params = parameters(torch.float32, [(300,)])
    here = create("adamw", params, **DENSE)
    others = all_there(params)
    try:
        gpu = create("adamw", others, lr=torch.tensor(1e-2, device=on_gpu.DEVICE), min_8bit_size=0)
    except OptionError:
        return
    check(2, here, gpu)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_bad_gradients_spread_no_further(bad: float) -> None:
    here, gpu = pair()
    train(2, here, gpu)
    values = grads_of(here)
    values[-3].view(-1)[300] = bad
    give(values, here, gpu)
    here.step()
    gpu.step()
    check(2, here, gpu)


# ---- overrides


@pytest.mark.parametrize("moved", ["before", "after"])
def test_global_overrides_and_a_model_that_moves(moved: str) -> None:
    def run(device: Any) -> tuple[nn.Module, Optimizer8bit]:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Embedding(50, 100), nn.Linear(100, 70))
        if moved == "before":
            model.to(device)
        manager.register_parameters(model.parameters())
        manager.register_module_override(model[0], "weight", {"optim_bits": 32})
        manager.override_config(model[1].weight, "bits", 4)
        if moved == "after":
            model.to(device)
        return model, create("adamw", model.parameters(), **DENSE)

    with forgetful_manager() as manager:
        (_, here), (model, gpu) = run("cpu"), run(on_gpu.DEVICE)
        check(3, here, gpu)
        states = [gpu.state[p]["m"] for p in model.parameters()]
        assert [s.dtype for s in states] == [torch.float32, torch.uint8, torch.uint8]
        assert [s.numel() for s in states] == [5000, 3500, 70]


def test_a_model_that_moves_after_its_optimizer_was_made() -> None:
    """`.to` sets the data of parameters: they stay the same objects, so that this is allowed."""
    model, other = nn.Linear(70, 90), nn.Linear(70, 90)
    other.load_state_dict(model.state_dict())
    here, gpu = (create("adamw", each.parameters(), **DENSE) for each in (model, other))
    other.to(on_gpu.DEVICE)
    check(3, here, gpu)


def test_parameters_on_both_devices() -> None:
    params = model_parameters()
    mixed = [there(p) if n % 2 else p for n, p in enumerate(copies(params))]
    here, both = (create("adamw", each, **DENSE) for each in (params, mixed))
    train(STEPS, here, both)
    assert_same_optimizers(both, here)
    for p in mixed:
        assert both.state[p]["m"].device == p.device
    loaded = create("adamw", [p.detach().clone().requires_grad_() for p in mixed], **DENSE)
    loaded.load_state_dict(both.state_dict())
    train(2, here, loaded)
    assert_same_optimizers(loaded, here)


def test_states_of_a_parameter_that_went_elsewhere() -> None:
    """A step either refuses, or finds its states again by `to_gpu`; it does not read far memory."""
    p, q = (torch.ones(5000).requires_grad_() for _ in range(2))
    here, gpu = (optim.AdamW8bit([each], lr=1e-2) for each in (p, q))
    train(2, here, gpu)
    q.data = q.data.to(on_gpu.DEVICE)
    q.grad = None
    gpu.to_gpu()
    check(2, here, gpu)


# ---- sparse gradients


@pytest.mark.parametrize("storage", STORAGES)
@pytest.mark.parametrize("rule", ["adamw", "sgd", "lion", "adagrad"])
def test_sparse_gradients(rule: str, storage: str) -> None:
    bits = {"float32": 32, "dynamic8": 8, "state4": 4}[storage]
    more: dict[str, Any] = {"momentum": 0.9} if rule == "sgd" else {}
    weight = torch.randn(200, 33).requires_grad_()
    runs = [create(rule, [each], bits=bits, **more, **DENSE) for each in (weight, there(weight))]
    for _ in range(4):
        rows = torch.randperm(200)[None, :30]
        rows[0, 1] = rows[0, 0]
        values = torch.randn(30, 33)
        for run in runs:
            (p,) = parameters_of(run)
            made = torch.sparse_coo_tensor(
                rows, values, (200, 33), device=p.device, check_invariants=True
            )
            p.grad = made.coalesce() if _ % 2 else made
            run.step()
    assert_same_optimizers(runs[1], runs[0])


# ---- a model


@pytest.mark.parametrize("rule", [name for name in optimizers().names() if VARIANTS.get(name)])
def test_a_model_trains(rule: str) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 300), nn.ReLU(), nn.Linear(300, 1)).to(on_gpu.DEVICE)
    rate = {"sgd": 1e-2, "lars": 1e-1, "lion": 1e-3, "cautious_lion": 1e-3, "adagrad": 3e-2}
    more: dict[str, Any] = {"momentum": 0.9} if rule in ("sgd", "lars") else {}
    optimizer = create(rule, model.parameters(), lr=rate.get(rule, 1e-2), min_8bit_size=0, **more)
    x = torch.randn(256, 16, device=on_gpu.DEVICE)
    y = x.sin().sum(1, keepdim=True)
    losses = []
    for _ in range(100):
        optimizer.zero_grad()
        loss = (model(x) - y).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
    optimizer.eval()
    assert (model(x) - y).square().mean().item() < losses[0].item() / 1.5


def test_a_tensor_that_a_closure_computes() -> None:
    here, gpu = pair()
    values = grads_of(here)

    def closure_of(optimizer: Optimizer8bit) -> Callable[[], Tensor]:
        def closure() -> Tensor:
            give(values, optimizer)
            return torch.ones((), device=parameters_of(optimizer)[0].device)

        return closure

    assert here.step(closure_of(here)) == gpu.step(closure_of(gpu)).cpu() == 1
    assert_same_optimizers(gpu, here)


def test_a_gradient_of_another_device_is_refused() -> None:
    if on_gpu.DEVICE.type == "cpu":
        pytest.skip("there is one device")
    p = fill(torch.empty(300, device=on_gpu.DEVICE))
    optimizer = create("adamw", [p], **DENSE)
    values = torch.ones(300)

    def step() -> None:
        p.grad = values
        optimizer.step()

    with pytest.raises((UnsupportedTensorError, RuntimeError), match=r"cpu|device"):
        step()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bits", [32, 8])
def test_parameters_to_evaluate(bits: int, dtype: torch.dtype) -> None:
    """The code of modes runs in torch operations, which may not differ by a bit either."""
    here, gpu = pair("schedule_free_adamw", dtype, bits=bits)
    train(3, here, gpu)
    for turn in ("eval", "train"):
        for optimizer in (here, gpu):
            getattr(optimizer, turn)()
        assert_same_optimizers(gpu, here)
    check(2, here, gpu)
