"""Overrides of modules' attributes, and of parameters whose modules move."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations
from torch.nn.utils.parametrize import register_parametrization

from bnbx.errors import BnbxWarning, OptionError, UnknownNameError
from bnbx.optimizers.manager import GlobalOptimManager
from optimizers.managing import forgetful_manager, merged, tensor

BY_CONFIG = "GlobalOptimManager.override_config"
BY_MODULE = "GlobalOptimManager.register_module_override(Linear, 'weight')"


@pytest.fixture(autouse=True)
def manager() -> Iterator[GlobalOptimManager]:
    with forgetful_manager() as found:
        yield found


P = tensor()

# ---- modules that move


def moved(module: nn.Module, how: str) -> nn.Module:
    return {
        "dtype": lambda: module.to(torch.bfloat16),
        "half": module.half,
        "empty": lambda: module.to_empty(device="cpu"),
        "load": lambda: (module.load_state_dict(nn.Linear(2, 2).state_dict()), module)[1],
    }[how]()  # type: ignore[no-untyped-call]


@pytest.mark.parametrize("how", ["dtype", "half", "empty", "load"])
def test_overrides_follow_a_module_that_moves(manager: GlobalOptimManager, how: str) -> None:
    module = nn.Linear(2, 2)
    manager.override_config(module.bias, "bits", 32)
    manager.register_module_override(module, "weight", {"bits": 32})
    moved(module, how)
    assert merged(manager, module.bias) == merged(manager, module.weight) == {"bits": 32}


def test_overrides_follow_from_the_meta_device(manager: GlobalOptimManager) -> None:
    """Its parameters are replaced: the attribute is followed, the parameter cannot be."""
    module = nn.Linear(2, 2, device="meta")
    manager.register_module_override(module, "weight", {"bits": 32})
    module.to_empty(device="cpu")
    assert module.weight.device.type == "cpu"
    assert merged(manager, module.weight) == {"bits": 32}


def test_module_overrides_follow_parameters_that_are_replaced(
    manager: GlobalOptimManager,
) -> None:
    module = nn.Linear(2, 2)
    manager.override_config(module.bias, "bits", 32)
    manager.register_module_override(module, "weight", {"bits": 32})
    weight, bias = module.weight, module.bias
    torch.__future__.set_overwrite_module_params_on_conversion(True)
    try:
        module.to(torch.bfloat16)
    finally:
        torch.__future__.set_overwrite_module_params_on_conversion(False)
    assert module.weight is not weight
    assert merged(manager, module.weight) == {"bits": 32}
    assert manager.layers_for(weight) == ()
    assert manager.layers_for(module.bias) == ()
    assert merged(manager, bias) == {"bits": 32}
    module.weight = nn.Parameter(torch.zeros(3, 3))
    assert merged(manager, module.weight) == {"bits": 32}


def test_where_torch_swaps_parameters(manager: GlobalOptimManager) -> None:
    """Torch refuses to swap a tensor that has weak references, aloud."""
    module, other = nn.Linear(2, 2), nn.Linear(2, 2)
    manager.register_module_override(module, "weight", {"bits": 32})
    manager.layers_for(module.weight)
    manager.override_config(other.weight, "bits", 32)
    torch.__future__.set_swap_module_params_on_conversion(True)
    try:
        module.to(torch.bfloat16)
        with pytest.raises(RuntimeError, match="swap"):
            other.to(torch.bfloat16)
    finally:
        torch.__future__.set_swap_module_params_on_conversion(False)
    assert merged(manager, module.weight) == merged(manager, other.weight) == {"bits": 32}


# ---- register_module_override


def test_module_override_is_about_one_attribute(manager: GlobalOptimManager) -> None:
    module, other = nn.Linear(2, 2), nn.Linear(2, 2)
    manager.register_module_override(module, "weight", {"optim_bits": 32})
    assert manager.layers_for(module.weight) == ((BY_MODULE, {"bits": 32}),)
    for p in (module.bias, *other.parameters()):
        assert manager.layers_for(p) == ()
    manager.register_module_override(module=module, param_name="bias", config={"lr": 0.5})
    assert merged(manager, module.bias) == {"lr": 0.5}


def test_tied_weights_have_the_overrides_of_both(manager: GlobalOptimManager) -> None:
    embed, head = nn.Embedding(3, 2), nn.Linear(2, 3, bias=False)
    head.weight = embed.weight
    manager.register_module_override(embed, "weight", {"bits": 32})
    manager.register_module_override(head, "weight", {"lr": 0.5})
    assert merged(manager, embed.weight) == {"bits": 32, "lr": 0.5}


class Early(nn.Embedding):
    """Registers itself before it is a module at all."""

    def __init__(self) -> None:
        manager = GlobalOptimManager.get_instance()
        manager.register_module_override(self, "weight", {"optim_bits": 32})
        assert manager.layers_for(P) == ()  # nobody is warned meanwhile
        super().__init__(3, 2)


class Middle(nn.Module):
    """Registers itself when it is a module that has no parameters yet, in a helper."""

    def __init__(self, keep: bool) -> None:
        super().__init__()
        self.register()
        GlobalOptimManager.get_instance().layers_for(P)
        if keep:
            self.weight = nn.Parameter(torch.zeros(2))

    def register(self) -> None:
        manager = GlobalOptimManager.get_instance()
        manager.register_module_override(self, "weight", {"optim_bits": 32})


@pytest.mark.parametrize("make", [Early, lambda: Middle(True)])
def test_a_module_may_register_before_its_parameter(
    manager: GlobalOptimManager, make: Callable[[], Any]
) -> None:
    module = make()
    assert merged(manager, module.weight) == {"bits": 32}


def test_a_module_that_never_gets_its_parameter_is_named_once(manager: GlobalOptimManager) -> None:
    module = Middle(False)
    with pytest.warns(BnbxWarning, match=r"\(Middle, 'weight'\) has no effect.*it has: \(none\)"):
        assert manager.layers_for(P) == ()
    assert manager.layers_for(P) == ()  # warnings are errors
    module.weight = nn.Parameter(torch.zeros(2))
    assert merged(manager, module.weight) == {"bits": 32}


def test_a_parameter_that_goes_away_is_nobody_s_mistake(manager: GlobalOptimManager) -> None:
    module = nn.Linear(2, 2)
    manager.register_module_override(module, "weight", {"bits": 32})
    del module.weight
    assert manager.layers_for(P) == ()


def test_wrong_attributes(manager: GlobalOptimManager) -> None:
    model = nn.Sequential(nn.Linear(2, 2))
    register: Any = manager.register_module_override
    with pytest.raises(UnknownNameError, match=r"'wieght'; did you mean 'weight'.*weight, bias"):
        register(model[0], "wieght", {"bits": 32})
    with pytest.raises(UnknownNameError, match=r"belongs to a child.*it has: \(none\)"):
        register(model, "0.weight", {"bits": 32})
    with pytest.raises(UnknownNameError, match="no parameter 'in_features'"):
        register(model[0], "in_features", {"bits": 32})
    with pytest.raises(UnknownNameError, match=r"'bit'; did you mean 'bits'"):
        register(model[0], "weight", {"bit": 32})
    with pytest.raises(OptionError, match=r"expected a torch\.nn\.Module"):
        register(model[0].weight, "weight", {"bits": 32})
    with pytest.raises(OptionError, match="param_name=3"):
        register(model[0], 3, {"bits": 32})
    assert manager.empty


def test_a_bias_that_is_none_may_be_named(manager: GlobalOptimManager) -> None:
    """So that a loop over modules needs no condition."""
    module = nn.Linear(2, 2, bias=False)
    manager.register_module_override(module, "bias", {"bits": 32})
    assert manager.layers_for(module.weight) == ()
    module.bias = nn.Parameter(torch.zeros(2))
    assert merged(manager, module.bias) == {"bits": 32}


def test_a_tensor_that_is_no_parameter(manager: GlobalOptimManager) -> None:
    class Plain(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale = torch.ones(2, requires_grad=True)

    module = Plain()
    manager.register_module_override(module, "scale", {"bits": 32})
    assert merged(manager, module.scale) == {"bits": 32}


def test_computed_weights(manager: GlobalOptimManager) -> None:
    class Negative(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return -x

    one: Any = nn.Linear(2, 2)
    two: Any = nn.Linear(2, 2)
    manager.register_module_override(two, "weight", {"lr": 0.5})
    register_parametrization(one, "weight", Negative())
    parametrizations.weight_norm(two, "weight")
    manager.register_module_override(one, "weight", {"bits": 32})
    assert merged(manager, one.parametrizations.weight.original) == {"bits": 32}
    originals = list(two.parametrizations.weight.parameters())
    assert len(originals) == 2
    assert [merged(manager, p) for p in originals] == [{"lr": 0.5}] * 2

    class Computed(nn.Linear):
        @property
        def twice(self) -> Tensor:
            return self.weight * 2

    with pytest.raises(UnknownNameError, match=r"no parameter 'twice'.*weight, bias"):
        manager.register_module_override(Computed(2, 2), "twice", {"bits": 32})
