"""Modules that users and libraries made or changed: quantized where that works, else left as is."""

from __future__ import annotations

import copy
import functools
import pickle
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import prune

import bnbx
from bnbx.errors import BnbxWarning
from bnbx.layers.parametrize import keep_in_codes
from bnbx.layers.stacked import Stacked
from bnbx.nn import Embedding8bit, Linear4bit, Linear8bitLt, QuantLinear

X = torch.randn(3, 64, generator=torch.Generator().manual_seed(0))
IDS = torch.tensor([1, 2, 5])


def _near(one: Tensor, two: Tensor, error: float = 0.02) -> bool:
    return float((one - two).detach().norm() / two.detach().norm()) < error


# ---- layers that hold other parameters too


class Doubled(nn.Linear):
    """Of which `extra` may be quantized, and `weight` may not."""

    def __init__(self) -> None:
        super().__init__(64, 64)
        self.extra = nn.Parameter(torch.randn(64, 64) / 8)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(super().forward(x), self.extra)


class Projected(nn.Embedding):
    def __init__(self) -> None:
        super().__init__(64, 64, max_norm=1.0)  # which concerns `weight` alone
        self.extra = nn.Parameter(torch.randn(64, 64) / 8)

    def forward(self, ids: Tensor) -> Tensor:
        return super().forward(ids) @ self.extra


class Mixture(nn.Linear):
    def __init__(self) -> None:
        super().__init__(64, 64)
        self.extra = nn.Parameter(torch.randn(3, 64, 64) / 8)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + sum(F.linear(x, each) for each in self.extra)


@pytest.mark.parametrize(("kind", "given"), [(Doubled, X), (Projected, IDS), (Mixture, X)])
def test_another_parameter_of_a_layer_is_quantized_as_that(kind: Any, given: Tensor) -> None:
    torch.manual_seed(0)
    layer = kind()
    model = nn.Sequential(layer)
    expected = model(given)
    report = bnbx.quantize_(model, "int8", parameters=["extra"])
    assert [entry.name for entry in report.quantized] == ["0.extra"]
    assert isinstance(layer, kind)
    assert type(layer.weight) is nn.Parameter
    assert isinstance(layer.extra, Stacked)
    assert _near(model(given), expected)
    bnbx.dequantize_(model)
    assert type(layer) is kind
    assert _near(model(given), expected)


def _with_adapter() -> Any:
    torch.manual_seed(0)
    layer: Any = nn.Linear(64, 64)
    layer.lora = nn.Parameter(torch.randn(8, 64) / 8)
    return layer


@pytest.mark.parametrize("adapter_first", [False, True])
def test_a_layer_and_another_parameter_of_it_are_both_quantized(adapter_first: bool) -> None:
    """In whichever order: a parameter is quantized where the model uses it first."""
    layer, owner = _with_adapter(), nn.Module()
    owner.lora = layer.lora
    model = nn.ModuleList([owner, layer] if adapter_first else [layer, owner])
    expected, low = layer(X), X @ layer.lora.T
    report = bnbx.quantize_(model, "int8", parameters=["lora"], compute_dtype=torch.bfloat16)
    assert len(report.quantized) == 2
    assert QuantLinear in type(layer).__mro__
    assert layer.compute_dtype == torch.bfloat16
    assert _near(layer(X), expected)
    assert _near(X @ layer.lora.T, low)
    copied: Any
    for copied in (copy.deepcopy(layer), copy.copy(layer), pickle.loads(pickle.dumps(layer))):
        assert torch.equal(copied(X), layer(X))
        assert torch.equal(copied.lora + 0, layer.lora + 0)
    again = _with_adapter()
    again.weight.data.zero_()
    again.lora.data.zero_()
    bnbx.quantize_(again, "int8", parameters=["lora"], compute_dtype=torch.bfloat16)
    again.load_state_dict(layer.state_dict())
    assert torch.equal(again(X), layer(X))
    assert torch.equal(again.lora + 0, layer.lora + 0)
    bnbx.dequantize_(model)
    assert type(layer) is nn.Linear
    assert layer.__dict__.keys() == nn.Linear(1, 1).__dict__.keys()
    assert owner.lora is layer.lora
    assert _near(layer(X), expected)


def test_a_layer_with_a_parameter_in_codes_is_quantized_later() -> None:
    layer = _with_adapter()
    bnbx.quantize_(layer, "int8", skip=["weight"], parameters=["lora"])
    assert len(bnbx.quantize_(layer, "int8", parameters=["lora"]).quantized) == 1
    assert QuantLinear in type(layer).__mro__
    assert isinstance(layer.lora, Stacked)


def _pruned(layer: nn.Linear) -> Any:
    return prune.l1_unstructured(layer, "weight", 0.5)  # type: ignore[no-untyped-call]


def _weight_norm(layer: nn.Linear) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        return nn.utils.weight_norm(layer)


@pytest.mark.parametrize("change", [_pruned, nn.utils.spectral_norm, _weight_norm])
def test_what_a_weight_is_computed_from_is_left(change: Callable[[nn.Linear], Any]) -> None:
    model = nn.ModuleDict({"mlp": change(nn.Linear(64, 64)), "out": nn.Linear(64, 64)})
    model.eval()
    expected = model["mlp"](X)
    report = bnbx.quantize_(model, "nf4", overrides={"*mlp*": "mxfp4"})
    assert [entry.name for entry in report.quantized] == ["out.weight"]
    why = [entry.why for entry in report.left if entry.name.startswith("mlp.weight_")]
    assert why
    assert all("weight is computed from it" in each for each in why if "two" not in each)
    assert torch.equal(model["mlp"](X), expected)


# ---- tensors of other kinds


class Scaled(Tensor):
    """A tensor that keeps its numbers in another one, as quantized and distributed ones do."""

    numbers: Tensor

    @staticmethod
    def __new__(cls: type[Scaled], inner: Tensor) -> Scaled:
        make: Any = torch.Tensor._make_wrapper_subclass
        self: Scaled = make(cls, inner.shape, dtype=inner.dtype)
        self.numbers = inner
        return self

    def __tensor_flatten__(self) -> tuple[list[str], None]:
        return ["numbers"], None

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if func is torch.ops.aten.detach.default:
            return cls(args[0].numbers)
        raise NotImplementedError(func)


@pytest.mark.parametrize(
    ("weight", "kind", "nbytes"),
    [
        (Scaled(torch.ones(64, 64)[:, :2]), "Scaled", 512),
        (torch.eye(64).to_sparse(), "torch.sparse_coo", 16384),
    ],
)
def test_weights_that_are_no_plain_tensors_are_left(weight: Any, kind: str, nbytes: int) -> None:
    model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64))
    model[0].weight = nn.Parameter(weight)
    report = bnbx.quantize_(model)
    assert [entry.name for entry in report.quantized] == ["1.weight"]
    (found,) = [entry for entry in report.left if entry.name == "0.weight"]
    assert found.why == f"it is a tensor of another kind: {kind}"
    assert found.before == found.after == nbytes


# ---- forwards that are patched on an instance


def _hook(layer: Any) -> None:
    """Wrap the forward of one layer, as hooks of accelerate do."""
    layer._old_forward = layer.forward

    def forward(self: Any, x: Tensor) -> Tensor:
        found: Tensor = self._old_forward(x)
        return found

    layer.forward = functools.update_wrapper(functools.partial(forward, layer), layer.forward)


def _unhook(layer: Any) -> None:
    layer.forward = layer._old_forward
    del layer._old_forward


def test_a_hooked_forward_goes_along() -> None:
    layer: Any = nn.Linear(64, 64)
    plain: Any = copy.deepcopy(layer)
    _hook(layer)
    for each in (layer, plain):
        bnbx.quantize_(each, compute_dtype=torch.bfloat16)
    assert torch.equal(layer(X), plain(X))
    _unhook(layer)  # which leaves the bound method on it
    assert torch.equal(layer(X), plain(X))
    for each in (layer, plain):
        bnbx.dequantize_(each)
    assert torch.equal(layer(X), plain(X))


def test_a_layer_that_was_hooked_in_codes_becomes_dense() -> None:
    layer: Any = bnbx.nn.QuantLinear(64, 64).to("cpu")
    _hook(layer)
    expected = layer(X)
    bnbx.dequantize_(layer)
    assert type(layer) is nn.Linear
    assert _near(layer(X), expected, 1e-5)


def _patch(layer: Any) -> None:
    old = layer.forward
    layer.forward = lambda x: 2 * old(x)


def test_a_layer_with_a_forward_of_its_own_is_left() -> None:
    layer: Any = nn.Linear(64, 64)
    _patch(layer)
    report = bnbx.quantize_(layer)
    assert "its forward is patched" in next(e.why for e in report.left if e.name == "weight")
    layer = QuantLinear(64, 64).to("cpu")
    _patch(layer)
    expected = layer(X)
    with pytest.warns(BnbxWarning, match="leaves in codes 'weight': a forward is patched"):
        bnbx.dequantize_(layer)
    assert torch.equal(layer(X), expected)


# ---- classes that are derived from ours


class Twice(Linear4bit):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


class Int8Twice(Linear8bitLt):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


class Rows(Embedding8bit):
    pass


def test_subclasses_stay_in_codes_with_what_they_share() -> None:
    model: Any = nn.ModuleDict(
        {
            "twice": Twice(64, 64),
            "tied": Linear4bit(64, 64),
            "int8": Int8Twice(64, 64, has_fp16_weights=False),
            "rows": Rows(9, 64),
            "plain": Linear4bit(64, 64),
            "owner": nn.Module(),
        }
    )
    model["tied"].weight = model["twice"].weight
    keep_in_codes(model["owner"], "own", model["twice"].weight)
    model.to("cpu")
    expected = model["twice"](X)
    with pytest.warns(BnbxWarning) as caught:
        bnbx.dequantize_(model)
    (told,) = {str(each.message) for each in caught}
    for part in (
        "'twice.weight', 'tied.weight', 'owner.own': Twice is a subclass of Linear4bit",
        "'int8.weight': Int8Twice is a subclass of Linear8bitLt",
        "'rows.weight': Rows is a subclass of Embedding8bit",
    ):
        assert part in told
    assert caught[0].filename == __file__
    kinds = [Twice, Linear4bit, Int8Twice, Rows, nn.Linear]
    assert [type(layer) for layer in model.values()][:-1] == kinds
    assert isinstance(model["owner"].own, Stacked)
    assert model["tied"].weight is model["twice"].weight
    assert torch.equal(model["twice"](X), expected)
