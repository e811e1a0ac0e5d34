"""`explain` and `report` say what a real optimizer then does, to the byte."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from bnbx import optim
from bnbx.errors import OptionError
from bnbx.optimizers.manager import GlobalOptimManager
from bnbx.registry import optimizers
from optimizers.managing import forgetful_manager


@pytest.fixture(autouse=True)
def manager() -> Iterator[GlobalOptimManager]:
    with forgetful_manager() as found:
        yield found


def model() -> nn.Module:
    return nn.ModuleDict(
        {"embed": nn.Embedding(100, 50), "body": nn.Linear(50, 101), "head": nn.Linear(100, 50)}
    )


def held(optimizer: torch.optim.Optimizer) -> int:
    """Bytes of all state tensors."""
    return sum(
        value.numel() * value.element_size()
        for saved in optimizer.state.values()
        for value in saved.values()
        if isinstance(value, Tensor)
    )


def step(optimizer: torch.optim.Optimizer) -> None:
    for group in optimizer.param_groups:
        for p in group["params"]:
            p.grad = torch.ones_like(p)
    optimizer.step()


@pytest.mark.parametrize("rule", optimizers().names())
@pytest.mark.parametrize("bits", [8, 32])
def test_what_is_foretold_comes(rule: str, bits: int) -> None:
    spec = optimizers().get(rule)
    needed: dict[str, Any] = {a: 1e-3 for a in spec.arguments if spec.required(a)}
    optimizer = optim.create(
        rule, model().named_parameters(), bits=bits, overrides={"head.*": {"bits": 32}}, **needed
    )
    before = optim.explain(optimizer)
    assert not any(optimizer.state.values())
    step(optimizer)
    after = optim.explain(optimizer)
    for told, true in zip(before.parameters, after.parameters, strict=True):
        assert told.state_bytes == true.state_bytes, told.name
        assert told.state_types == true.state_types, told.name
        assert true.state_exists
    assert before.memory.total_bytes == after.memory.total_bytes == held(optimizer)
    assert after.memory.existing_bytes == held(optimizer)
    assert optim.report(optimizer) == after.memory
    if before.memory.float32_bytes and bits == 8:
        assert 0 < after.memory.saving < 0.75


def test_origins(manager: GlobalOptimManager) -> None:
    module = model()
    head: Any = module.get_submodule("head")
    groups: list[dict[str, Any]] = [
        {"params": module.get_submodule("embed").named_parameters("embed"), "lr": 0.25},
        {"params": module.get_submodule("body").named_parameters("body")},
        {"params": head.named_parameters("head")},
    ]
    optimizer = optim.create("adamw", groups, lr=0.5, overrides={"*.bias": {"weight_decay": 0.0}})
    manager.register_module_override(head, "weight", {"optim_bits": 32})
    manager.override_config(head.bias, "eps", 1e-6)
    found = optim.explain(optimizer)
    lr = {name: found[name].values["lr"] for name in ("embed.weight", "body.weight")}
    assert [value.value for value in lr.values()] == [0.25, 0.5]
    assert lr["embed.weight"].origin != lr["body.weight"].origin
    assert "group" in lr["embed.weight"].origin
    assert found["body.weight"].values["eps"] == (1e-8, "default")
    assert found["body.bias"].values["weight_decay"] == (0.0, "overrides['*.bias']")
    assert found["head.bias"].values["eps"] == (1e-6, "GlobalOptimManager.override_config")
    assert found["head.weight"].values["bits"] == (
        32,
        "GlobalOptimManager.register_module_override(Linear, 'weight')",
    )
    assert set(found["head.weight"].state_types.values()) == {"float32"}


def test_targets() -> None:
    optimizer = optim.create("adamw", model().named_parameters())
    for parameter in optim.explain(optimizer).parameters:
        assert parameter.target == optimizer.choice(optimizer.param_groups[0]["params"][0]).target
        assert parameter.why


def test_some_states_exist() -> None:
    module = model()
    optimizer = optim.create("adamw", module.named_parameters())
    module.get_parameter("embed.weight").grad = torch.ones(100, 50)
    optimizer.step()
    found = optim.explain(optimizer)
    assert [p.name for p in found.parameters if p.state_exists] == ["embed.weight"]
    assert 0 < found.memory.existing_bytes == held(optimizer) < found.memory.total_bytes
    assert "embed.weight" in str(found)


def test_without_names() -> None:
    optimizer = optim.create("adamw", model().parameters())
    assert optim.explain(optimizer).parameters[2].name == "group 0, parameter 2"
    other: Any = torch.optim.SGD(model().parameters())
    with pytest.raises(OptionError, match="no optimizer of bnbx"):
        optim.explain(other)


@pytest.mark.parametrize(
    "options",
    [
        {"block_wise": False},
        {"percentile_clipping": 50},
        {"master": "kahan"},
        {"master": "residual", "bits": 32},
        {"min_8bit_size": 0},
    ],
    ids=str,
)
def test_options_that_change_what_is_kept(options: dict[str, Any]) -> None:
    module = model().to(torch.bfloat16)
    optimizer = optim.create("adamw", module.named_parameters(), **options)
    before = optim.explain(optimizer)
    step(optimizer)
    after = optim.explain(optimizer)
    assert before.memory.total_bytes == after.memory.total_bytes == held(optimizer)
    assert before.memory.bytes_by_kind == after.memory.bytes_by_kind
    for told, true in zip(before.parameters, after.parameters, strict=True):
        assert (told.state_types, told.states_why) == (true.state_types, true.states_why)
        assert "made before" not in true.states_why
