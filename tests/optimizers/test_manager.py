"""GlobalOptimManager keeps what was said, about the right tensors, and keeps nothing alive."""

from __future__ import annotations

import gc
import threading
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import pytest
from torch import Tensor, nn

from bnbx.errors import BnbxError, OptionError, UnknownNameError
from bnbx.optimizers.manager import UNSET, GlobalOptimManager
from bnbx.registry import optimizers, quant_types
from bnbx.registry.config import resolve
from bnbx.registry.options import ALIASES, OPTIONS
from optimizers.managing import forgetful_manager, merged, tensor

BY_CONFIG = "GlobalOptimManager.override_config"
BY_MODULE = "GlobalOptimManager.register_module_override(Linear, 'weight')"


@pytest.fixture(autouse=True)
def manager() -> Iterator[GlobalOptimManager]:
    with forgetful_manager() as found:
        yield found


# ---- one instance


def test_there_is_one(manager: GlobalOptimManager) -> None:
    class Mine(GlobalOptimManager):
        pass

    assert GlobalOptimManager.get_instance() is manager
    assert Mine.get_instance() is manager
    for made in (GlobalOptimManager, Mine):
        with pytest.raises(RuntimeError, match=r"get_instance\(\)") as caught:
            made()
        assert isinstance(caught.value, BnbxError)


def test_initialize_forgets_and_optimizers_notice(manager: GlobalOptimManager) -> None:
    p, module = tensor(), nn.Linear(2, 2)
    assert manager.empty
    manager.override_config(p, "bits", 32)
    assert not manager.empty
    manager.register_module_override(module, "weight", {"bits": 32})
    before = manager.version
    manager.initialize()
    assert manager.empty
    assert manager.version > before
    assert manager.layers_for(p) == manager.layers_for(module.weight) == ()


# ---- override_config

FORMS: Mapping[str, Callable[[Tensor, Tensor], Any]] = {
    "list": lambda p, q: [p, q],
    "tuple": lambda p, q: (p, q),
    "set": lambda p, q: {p, q},
    "generator": lambda p, q: (x for x in (p, q)),
    "named": lambda p, q: iter([("a", p), ("b.c", q)]),
    "group": lambda p, q: {"params": (x for x in (p, q)), "lr": 1.0},
    "groups": lambda p, q: [{"params": p}, {"params": [("b", q)], "weight_decay": 0.0}],
}


@pytest.mark.parametrize("form", FORMS)
def test_parameters_come_in_any_form(manager: GlobalOptimManager, form: str) -> None:
    p, q, other = tensor(), tensor(), tensor()
    manager.override_config(FORMS[form](p, q), "bits", 32)
    for each in (p, q):
        assert manager.layers_for(each) == ((BY_CONFIG, {"bits": 32}),)
    assert manager.layers_for(other) == ()
    manager.register_parameters(FORMS[form](p, q))


def test_parameters_of_equal_values_are_not_the_same(manager: GlobalOptimManager) -> None:
    p, q = tensor(), tensor()
    manager.override_config(p, key="lr", value=0.5)
    assert manager.layers_for(q) == manager.layers_for(p.detach()) == manager.layers_for(p[:]) == ()


def test_key_value_dict_is_copied(manager: GlobalOptimManager) -> None:
    p = tensor()
    types = {"m": "linear8"}
    given = {"lr": 0.5, "betas": (0.8, 0.9), "state_types": types}
    manager.override_config(parameters=p, key_value_dict=given)
    expected = ((BY_CONFIG, {**given, "state_types": {"m": "linear8"}}),)
    given["lr"] = 1.0
    types["m"] = "dynamic8"
    assert manager.layers_for(p) == expected
    manager.layers_for(p)[0][1]["lr"] = 2.0  # type: ignore[index]
    assert manager.layers_for(p) == expected


def test_bitsandbytes_names_are_translated(manager: GlobalOptimManager) -> None:
    assert ALIASES["optim_bits"] == "bits"
    for old, new in ALIASES.items():
        p = tensor()
        manager.override_config(p, old, 8)
        assert manager.layers_for(p) == ((BY_CONFIG, {new: 8}),)
    with pytest.raises(OptionError, match="bits is given twice"):
        manager.override_config(tensor(), key_value_dict={"bits": 8, "optim_bits": 32})


def test_none_is_a_value(manager: GlobalOptimManager) -> None:
    p = tensor()
    manager.override_config(p, "state_types", None)
    assert manager.layers_for(p) == ((BY_CONFIG, {"state_types": None}),)


def test_every_argument_of_every_rule_is_known(manager: GlobalOptimManager) -> None:
    arguments = {argument for spec in optimizers() for argument in spec.arguments}
    assert len(arguments) > 5
    for key in (*arguments, *OPTIONS):
        p = tensor()
        manager.override_config(p, key, 1)
        assert merged(manager, p) == {key: 1}


P = tensor()
MISTAKES: Mapping[str, tuple[type[Exception], str, tuple[Any, ...]]] = {
    "unknown key": (
        UnknownNameError,
        "'bit'; did you mean 'bits'.*there are: .*betas",
        (P, "bit", 32),
    ),
    "near an alias": (UnknownNameError, "did you mean 'optim_bits'", (P, "optm_bits", 32)),
    "nothing near": (UnknownNameError, "argument 'xyzzy'; there are", (P, "xyzzy", 32)),
    "key of a number": (UnknownNameError, "an argument 3", (P, 3, 32)),
    "one key of two": (UnknownNameError, "'lrr'", (P, None, UNSET, {"lr": 1.0, "lrr": 1.0})),
    "no value": (OptionError, r"key='bits' without a value", (P, "bits")),
    "no key": (OptionError, "no key; expected", (P,)),
    "value alone": (OptionError, "no key; expected", (P, None, 32)),
    "module": (
        OptionError,
        r"is a module; .*module\.parameters\(\)",
        (nn.Linear(1, 1), "bits", 32),
    ),
    "name": (OptionError, "'fc1.weight' is no tensor", ("fc1.weight", "bits", 32)),
    "number": (OptionError, "3 is no tensor", (3, "bits", 32)),
    "none": (OptionError, "None is no tensor", (None, "bits", 32)),
    "one of several": (OptionError, "'x' is no tensor", ([P, "x"], "bits", 32)),
    "group without params": (OptionError, "is no tensor", ({"lr": 1.0}, "bits", 32)),
    "empty": (OptionError, "no parameters.*generator", ([], "bits", 32)),
    "group of none": (OptionError, "no parameters", ([{"params": []}], "bits", 32)),
}


@pytest.mark.parametrize("what", MISTAKES)
def test_mistakes_are_named_and_change_nothing(manager: GlobalOptimManager, what: str) -> None:
    error, message, arguments = MISTAKES[what]
    before = manager.version
    with pytest.raises(error, match=f"(?s){message}") as caught:
        manager.override_config(*arguments)
    assert isinstance(caught.value, BnbxError)
    assert "override_config" in str(caught.value)
    assert manager.empty
    assert manager.version == before


@pytest.mark.parametrize("both", [{"key": "lr"}, {"value": 3}, {"key": "lr", "value": 3}])
def test_key_and_dict_exclude_each_other(manager: GlobalOptimManager, both: Any) -> None:
    with pytest.raises(OptionError, match="not both"):
        manager.override_config(P, key_value_dict={"bits": 32}, **both)
    assert manager.empty


@pytest.mark.parametrize("config", [{}, "bits", 32, [("bits", 32)], None])
def test_an_override_is_a_mapping(manager: GlobalOptimManager, config: Any) -> None:
    module = nn.Linear(2, 2)
    with pytest.raises(OptionError, match="is no override"):
        manager.register_module_override(module, "weight", config)
    with pytest.raises(OptionError, match=r"is no override|no key"):
        manager.override_config(module.weight, key_value_dict=config)
    assert manager.empty


def test_a_used_generator_is_an_error(manager: GlobalOptimManager) -> None:
    params = nn.Linear(2, 2).parameters()
    manager.register_parameters(params)
    with pytest.raises(OptionError, match="empty once it was used"):
        manager.override_config(params, "bits", 32)
    with pytest.raises(OptionError, match="register_parameters"):
        manager.register_parameters(params)


# ---- which one wins


def test_later_override_of_a_key_wins(manager: GlobalOptimManager) -> None:
    module = nn.Linear(2, 2)
    p = module.weight
    manager.override_config(p, key_value_dict={"lr": 1.0, "bits": 8})
    manager.override_config(p, "lr", 2.0)
    assert merged(manager, p) == {"lr": 2.0, "bits": 8}
    manager.register_module_override(module, "weight", {"lr": 3.0, "weight_decay": 0.0})
    assert merged(manager, p) == {"lr": 3.0, "bits": 8, "weight_decay": 0.0}
    manager.override_config(p, "lr", 4.0)
    layers = manager.layers_for(p)
    assert merged(manager, p) == {"lr": 4.0, "bits": 8, "weight_decay": 0.0}
    assert [origin for origin, _ in layers] == [BY_CONFIG, BY_MODULE, BY_CONFIG]
    manager.register_module_override(module, "weight", {"lr": 5.0})
    assert merged(manager, p)["lr"] == 5.0


def test_resolve_takes_the_layers(manager: GlobalOptimManager) -> None:
    module = nn.Linear(2, 2)
    manager.register_module_override(module, "weight", {"optim_bits": 32})
    manager.override_config(module.weight, "lr", 0.25)
    spec = optimizers().get("adamw")
    layers = [("create()", {"lr": 0.5, "bits": 8}), *manager.layers_for(module.weight)]
    found = resolve(spec, quant_types(), layers)
    assert found.hyper["lr"] == 0.25
    assert set(found.state_types.values()) == {"float32"}
    assert (found.origins["bits"], found.origins["lr"]) == (BY_MODULE, BY_CONFIG)
    manager.override_config(module.weight, "bits", 7)
    with pytest.raises(OptionError, match="bits=7"):
        resolve(spec, quant_types(), manager.layers_for(module.weight))


def test_overrides_in_a_loop_take_no_memory(manager: GlobalOptimManager) -> None:
    p = tensor()
    for step in range(1000):
        manager.override_config(p, "lr", step / 1000)
    assert manager.layers_for(p) == ((BY_CONFIG, {"lr": 0.999}),)


def test_version_changes_with_every_override(manager: GlobalOptimManager) -> None:
    p, module = tensor(), nn.Linear(2, 2)
    versions = [manager.version]
    for value in (1.0, 1.0, 2.0):
        manager.override_config(p, "lr", value)
        versions.append(manager.version)
        manager.register_module_override(module, "weight", {"lr": value})
        versions.append(manager.version)
    assert len(set(versions)) == len(versions)
    manager.layers_for(p)
    manager.register_parameters([p])
    assert manager.version == versions[-1]


# ---- weak references


def test_nothing_is_kept_alive(manager: GlobalOptimManager) -> None:
    module, p = nn.Linear(2, 2), tensor()
    manager.override_config(p, "bits", 32)
    manager.override_config(module.parameters(), "bits", 32)
    manager.register_module_override(module, "weight", {"bits": 32})
    manager.layers_for(module.weight)
    del p
    assert not manager.empty
    del module
    gc.collect()
    assert manager.empty


def test_a_new_parameter_at_an_old_address_is_new(manager: GlobalOptimManager) -> None:
    seen = set()
    for _ in range(200):
        p = tensor()
        assert manager.layers_for(p) == ()
        seen.add(id(p))
        manager.override_config(p, "bits", 32)
        del p
    assert len(seen) < 200  # addresses were used again, or this tests nothing


def test_a_parameter_that_only_autograd_holds_for_a_while(manager: GlobalOptimManager) -> None:
    """Its Python object may go and come back; the override stays."""
    p = tensor()
    manager.override_config(p, "bits", 32)
    doubled = p * 2
    del p
    gc.collect()
    backward: Any = doubled.grad_fn
    (accumulate,) = [edge for edge, _ in backward.next_functions if edge is not None]
    assert merged(manager, accumulate.variable) == {"bits": 32}


# ---- threads


def test_many_threads(manager: GlobalOptimManager) -> None:
    modules = [nn.Linear(2, 2) for _ in range(50)]
    failures: list[BaseException] = []

    def work(number: int) -> None:
        try:
            for module in modules[number::2]:
                manager.register_module_override(module, "weight", {"bits": 32})
                manager.override_config(module.bias, "bits", 32)
                manager.override_config(tensor(), "bits", 32)
                assert merged(manager, module.weight) == {"bits": 32}
        except BaseException as error:  # noqa: BLE001 - shown below
            failures.append(error)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
    for module in modules:
        assert merged(manager, module.weight) == merged(manager, module.bias) == {"bits": 32}
