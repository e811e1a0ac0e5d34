"""Every argument of every class does something: a change to be seen, or an error that says why.

An argument that is accepted and ignored is the worst kind of default. For each class and argument
two optimizers run two steps, one with the argument left out; what they hold afterwards must differ.
Kernels are not the point here: steps run on the torch reference.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from bnbx import optim
from bnbx.errors import NotYetError, OptionError
from bnbx.kernels import reference
from optimizers.compare import equal

CLASSES: dict[str, Any] = {
    name: getattr(optim, name)
    for name in optim.__all__
    if isinstance(getattr(optim, name), type)
    and issubclass(getattr(optim, name), optim.RuleOptimizer)
    and getattr(optim, name) is not optim.RuleOptimizer
}
SAME = object()  # no value of it may change anything, as its documentation says
QUANTIZED = {"state_types": "dynamic8"}

# By argument: a value that is no class's default, and what has to be there for it to matter.
TRIALS: dict[str, tuple[Any, dict[str, Any]]] = {
    "lr": (0.3, {}),
    "momentum": (0.5, {}),
    "dampening": (0.5, {}),
    "weight_decay": (0.2, {}),
    "nesterov": (True, {}),
    "centered": (True, {}),
    "amsgrad": (True, {}),
    "bias_correction": (False, {}),
    "adam_w_mode": (False, {"weight_decay": 0.1}),
    "decoupled_weight_decay": (True, {"weight_decay": 0.1}),
    "eps": (0.5, {}),
    "lr_decay": (0.5, {}),
    "initial_accumulator_value": (0.5, {}),
    "alpha": (0.5, {}),
    "t_alpha": (100, {}),
    "t_beta3": (100, {}),
    "max_unorm": (1e-4, {}),
    "args": (SimpleNamespace(percentile_clipping=5), {}),
    "min_8bit_size": (10**6, QUANTIZED),
    "block_wise": (False, QUANTIZED),
    "percentile_clipping": (5, {}),
    "skip_zeros": (True, {"weight_decay": 0.1}),
    "master": ("kahan", {"dtype": torch.bfloat16}),
    "maximize": (True, {}),
    "state_types": ("linear8", {}),
    "overrides": ({"w": {"lr": 0.3}}, {}),
    "page_dir": ("pages", {"paged": True}),
    "foreach": (True, {}),
    "fused": (True, {}),
}
BITS, PAGES = ("bits", "optim_bits"), ("paged", "is_paged")
REFUSED = {
    "capturable": (NotYetError, "capturable=True: a captured CUDA graph would freeze"),
    "differentiable": (OptionError, "differentiable=True: steps write parameters in place"),
}


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(autouse=True)
def by_reference(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("bnbx.optimizers.engine.launch", reference.run)
    monkeypatch.setattr("bnbx.optimizers.paging.SMALLEST", 1)
    monkeypatch.setenv("BNBX_PAGE_DIR", str(tmp_path / "usual"))


def arguments_of(made: Any) -> Iterator[str]:
    yield from (name for name in inspect.signature(made).parameters if name != "params")


def observed(made: Any, dtype: torch.dtype = torch.float32, **arguments: Any) -> dict[str, Any]:
    """What there is after three steps: the parameter, its states, and where they lie.

    The gradient of the first step is small, and that of the others zero in places.
    """
    generator = torch.Generator().manual_seed(0)
    p = torch.randn(64, 64, generator=generator).to(dtype).requires_grad_()
    optimizer = made([("w", p)], **arguments)
    for scale in (0.01, 1.0, 0.1):
        grad = scale * torch.randn(64, 64, generator=generator)
        grad[:32] *= scale == 0.01
        p.grad = grad.to(dtype)
        optimizer.step()
    pages = optimizer.pages
    return {
        "p": p.detach(),
        **optimizer.state[p],
        "where": pages.directory if pages.nbytes else "ordinary memory",
    }


def same(a: dict[str, Any], b: dict[str, Any]) -> bool:
    return a.keys() == b.keys() and all(equal(a[key], b[key]) for key in a)


def company(name: str, argument: str) -> dict[str, Any]:
    """Arguments without which a class has no states, or an argument means nothing."""
    found = dict(TRIALS[argument][1]) if argument in TRIALS else {}
    if "SGD" in name or "LARS" in name:
        found["momentum"] = 0.9 if argument != "momentum" else 0.0
    return found


def value_of(made: Any, argument: str) -> Any:
    if argument == "betas":
        return tuple(0.5 for _ in inspect.signature(made).parameters["betas"].default)
    return TRIALS[argument][0]


@pytest.mark.parametrize("name", CLASSES)
def test_every_argument_changes_something(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    made = CLASSES[name]
    plain: dict[str, dict[str, Any]] = {}
    for argument in arguments_of(made):
        if argument in (*BITS, *PAGES, *REFUSED):
            continue
        value = value_of(made, argument)
        given = company(name, argument)
        default = inspect.signature(made).parameters[argument].default
        assert value != default, argument
        key = repr(sorted(given.items()))
        if key not in plain:
            plain[key] = observed(made, **given)
        changed = observed(made, **{**given, argument: value})
        expected = argument in ("foreach", "fused")
        assert same(plain[key], changed) == expected, f"{name}({argument}={value!r})"


@pytest.mark.parametrize("name", CLASSES)
def test_bits_and_paging_change_something_or_contradict_the_class(name: str) -> None:
    made = CLASSES[name]
    momentum: dict[str, Any] = {"momentum": 0.9} if "nesterov" in arguments_of(made) else {}
    plain = observed(made, **momentum)
    for argument, value, fixed in (
        *((argument, 4, name.endswith("bit") or name == "PytorchLARS") for argument in BITS),
        *((argument, not name.startswith("Paged"), name.startswith("Paged")) for argument in PAGES),
    ):
        if fixed:
            with pytest.raises(OptionError, match=f"{name}: .* contradicts the class"):
                made([torch.zeros(1, requires_grad=True)], **{argument: value})
        else:
            assert not same(plain, observed(made, **{**momentum, argument: value})), argument


@pytest.mark.parametrize("name", CLASSES)
def test_what_is_refused_says_why(name: str) -> None:
    for argument, (error, message) in REFUSED.items():
        with pytest.raises(error, match=message):
            CLASSES[name]([torch.zeros(1, requires_grad=True)], **{argument: True})
    for argument in ("foreach", "fused"):
        with pytest.raises(OptionError, match=f"{argument}='yes': expected one of"):
            CLASSES[name]([torch.zeros(1, requires_grad=True)], **{argument: "yes"})


def test_every_value_of_args_changes_something() -> None:
    """What `args` holds is as good as an argument."""
    for field, value in (
        ("optim_bits", 8),
        ("min_8bit_size", 10**6),
        ("percentile_clipping", 5),
        ("block_wise", False),
        ("max_unorm", 1e-4),
        ("skip_zeros", True),
    ):
        given: dict[str, Any] = {"weight_decay": 0.1}
        given |= QUANTIZED if field in ("min_8bit_size", "block_wise") else {}
        by_args = observed(optim.AdamW, args=SimpleNamespace(**{field: value}), **given)
        assert same(by_args, observed(optim.AdamW, **{**given, field: value}))
        assert not same(by_args, observed(optim.AdamW, **given)), field


LEGACY = {
    "adam": ("lr betas eps weight_decay", (0.5, 0.5)),
    "lamb": ("lr betas eps weight_decay max_unorm", (0.5, 0.5)),
    "ademamix": ("lr betas eps weight_decay alpha t_alpha t_beta3", (0.5, 0.5, 0.5)),
    "momentum": ("lr betas weight_decay", (0.5, 0.5)),
    "lars": ("lr betas weight_decay max_unorm", (0.5, 0.5)),
    "lion": ("lr betas weight_decay", (0.5, 0.5)),
    "rmsprop": ("lr betas eps weight_decay", (0.5, 0.5)),
    "adagrad": ("lr eps weight_decay", (0.5, 0.5)),
}
OPTIONS = "optim_bits min_8bit_size max_unorm skip_zeros is_paged args".split()


@pytest.mark.parametrize("rule", LEGACY)
def test_every_argument_of_the_bases_changes_something_or_is_refused(rule: str) -> None:
    effective, betas = LEGACY[rule]
    default = (0.9, 0.8, 0.99)[: len(betas)]
    default = default if rule != "adagrad" else (0.9, 0.999)

    def made(params: Any, **arguments: Any) -> Any:
        return optim.Optimizer2State(rule, params, **{"betas": default, **arguments})

    values = {**{name: value for name, (value, _) in TRIALS.items()}, "betas": betas}
    values |= {"optim_bits": 8, "is_paged": True, "alpha": 2.0}
    for argument in list(inspect.signature(optim.Optimizer2State).parameters)[2:15]:
        given: dict[str, Any] = {"weight_decay": 0.1} if argument == "skip_zeros" else {}
        given |= QUANTIZED if argument == "min_8bit_size" else {}
        given |= {"alpha": 1.0} if argument == "t_alpha" else {}
        value = values[argument]
        if argument in effective.split() or argument in OPTIONS:
            changed = observed(made, **{**given, argument: value})
            assert not same(observed(made, **given), changed), argument
        else:
            with pytest.raises(OptionError, match=f"but the rule has no {argument}"):
                made([torch.zeros(1, requires_grad=True)], **{argument: value})
