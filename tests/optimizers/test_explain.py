"""`explain` and `report` on optimizers made for the purpose; the bytes are counted by hand."""

from __future__ import annotations

import io
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import FrozenInstanceError
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from rich.console import Console
from torch import Tensor

from bnbx.errors import OptionError, UnknownNameError
from bnbx.optimizers.explain import Value, explain, report
from bnbx.registry import optimizers, quant_types
from bnbx.registry.config import Layer, Resolved, resolve
from bnbx.registry.options import options_of

REASON = "cpu: no compiler was found"


class Fake:
    """As much of an optimizer as is asked: layers by name, states as a test sets them."""

    def __init__(
        self,
        named: Mapping[str, Tensor],
        overrides: Mapping[str, Mapping[str, Any]] | None = None,
        rule: str = "adamw",
        **arguments: Any,
    ) -> None:
        self.spec = optimizers().get(rule)
        self.names = {id(p): name for name, p in named.items()}
        self.overrides = overrides or {}
        self.arguments = arguments
        self.param_groups: list[dict[str, Any]] = [
            {"params": list(named.values()), "param_names": list(named)}
        ]
        self.state: defaultdict[Tensor, Any] = defaultdict(dict)
        self.slow: set[str] = set()
        self.asked = 0

    @property
    def resolution(self) -> Any:
        return SimpleNamespace(values_in=lambda group: self.resolved)

    def resolved(self, p: Tensor) -> Resolved:
        name = self.names[id(p)]
        layers: list[Layer] = [("create()", self.arguments)]
        layers += [(f"overrides[{name!r}]", self.overrides[name])] if name in self.overrides else []
        return resolve(self.spec, quant_types(), layers)

    def choice(self, p: Tensor, resolved: Resolved) -> Any:
        self.asked += 1
        assert resolved == self.resolved(p)
        if self.names[id(p)] in self.slow:
            return SimpleNamespace(target="reference", passed_over=(REASON,))
        return SimpleNamespace(target="cpu", passed_over=())


def parameter(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.zeros(shape, dtype=dtype, requires_grad=True)


def model() -> dict[str, Tensor]:
    return {
        "embed.weight": parameter(100, 50),
        "body.weight": parameter(50, 101, dtype=torch.bfloat16),
        "body.bias": parameter(101),
    }


OVERRIDES: Mapping[str, Mapping[str, Any]] = {
    "embed.weight": {"bits": 32},
    "body.bias": {"weight_decay": 0.0},
}
# 5050 elements in blocks of 256 are 20 blocks; 4 bytes each for absmax.
BODY = {"m": 5050, "m_absmax": 80, "v": 5050, "v_absmax": 80}


def test_explain_tells_values_and_where_they_came_from() -> None:
    found = explain(Fake(model(), OVERRIDES, lr=0.5, bits=8))
    assert found.rule == "adamw"
    assert [p.name for p in found.parameters] == list(model())
    embed, body, bias = found.parameters
    spec = optimizers().get("adamw")
    assert embed.values == {
        **{argument: (spec.default(argument), "default") for argument in spec.arguments},
        "lr": (0.5, "create()"),
        "betas": ((0.9, 0.999), "default"),
        **{option: (value, "default") for option, value in options_of(spec).items()},
        "bits": (32, "overrides['embed.weight']"),
    }
    assert body.values["bits"] == Value(8, "create()")
    assert bias.values["weight_decay"] == Value(0.0, "overrides['body.bias']")
    assert (body.group, body.shape, body.dtype, body.device) == (0, (50, 101), "bfloat16", "cpu")
    assert found.common == body.values


def test_explain_tells_states_that_will_be_made() -> None:
    optimizer = Fake(model(), OVERRIDES)
    embed, body, bias = explain(optimizer).parameters
    assert not optimizer.state
    assert embed.state_types == {"m": "float32", "v": "float32"}
    assert embed.state_bytes == {"m": 20000, "v": 20000}
    assert embed.states_why == ""
    assert body.state_types == {"m": "dynamic8", "v": "dynamic8"}
    assert body.state_bytes == BODY
    assert bias.state_types == {"m": "float32", "v": "float32"}
    assert bias.state_bytes == {"m": 404, "v": 404}
    assert bias.states_why == "101 elements < min_8bit_size 4096"
    assert not embed.state_exists
    assert [p.float32_bytes for p in (embed, body, bias)] == [40000, 40400, 808]


def test_explain_tells_states_that_are_there() -> None:
    """As they are, whatever the values would make of them now."""
    named = model()
    optimizer = Fake(named, {"embed.weight": {"bits": 32}})
    optimizer.state[named["embed.weight"]] = {
        "step": 3,
        "m": torch.zeros(100, 50, dtype=torch.uint8),
        "m_absmax": torch.zeros(20),
        "m_type": "linear8",
        "v": torch.zeros(100, 50),
        "v_residual": torch.zeros(100, 50, dtype=torch.bfloat16),
    }
    embed, body, _ = explain(optimizer).parameters
    assert embed.state_exists
    assert embed.state_types == {"m": "linear8", "v": "float32"}
    assert embed.states_why == "made before the values changed"
    assert embed.state_bytes == {"m": 5000, "m_absmax": 80, "v": 20000, "v_residual": 10000}
    assert embed.bytes_by_kind == {
        "codes": 5000,
        "absmax": 80,
        "float32 states": 20000,
        "residual": 10000,
    }
    assert not body.state_exists


def test_states_that_the_values_switch_on() -> None:
    """A rule's state that exists only with some hyperparameter."""
    spec = optimizers().get("sgd")
    assert any(state.when == "momentum" for state in spec.states)
    named = {"with": parameter(5000), "without": parameter(5000)}
    on, off = explain(Fake(named, {"with": {"momentum": 0.9}}, "sgd", lr=0.1)).parameters
    assert sum(on.state_bytes.values()) == 5080
    assert on.float32_bytes == 20000
    assert off.state_bytes == {}
    assert off.state_types == {}
    assert off.float32_bytes == 0


def test_frozen_and_empty_parameters_take_nothing() -> None:
    named = {"frozen": parameter(5000), "empty": parameter(0), "scalar": parameter()}
    named["frozen"].requires_grad_(False)
    frozen, empty, scalar = explain(Fake(named)).parameters
    assert frozen.state_bytes == {}
    assert frozen.states_why == "frozen: it gets no gradient"
    assert sum(empty.state_bytes.values()) == empty.float32_bytes == 0
    assert scalar.state_bytes == {"m": 4, "v": 4}
    assert (frozen.numel, empty.numel, scalar.numel) == (5000, 0, 1)
    assert (report(Fake(named)).parameters, report(Fake(named)).elements) == (2, 1)
    named["frozen"].grad = torch.zeros(5000)
    assert sum(explain(Fake(named))["frozen"].state_bytes.values()) == 2 * 5080


def test_explain_tells_the_target_and_why() -> None:
    optimizer = Fake(model())
    optimizer.slow.add("body.bias")
    embed, _, bias = explain(optimizer).parameters
    assert (embed.target, embed.why) == ("cpu", "the fastest target for cpu parameters")
    assert (bias.target, bias.why) == ("reference", REASON)


def test_parameters_without_names_have_places() -> None:
    optimizer = Fake(model())
    (group,) = optimizer.param_groups
    optimizer.param_groups = [
        {"params": group["params"][:1]},
        {"params": []},
        {"params": group["params"][1:]},
    ]
    names = [p.name for p in explain(optimizer).parameters]
    assert names == ["group 0, parameter 0", "group 2, parameter 0", "group 2, parameter 1"]
    assert explain(optimizer).parameters[2].group == 2


def test_a_parameter_is_found_by_name() -> None:
    found = explain(Fake(model()))
    assert found["body.bias"] is found.parameters[2]
    with pytest.raises(UnknownNameError, match=r"'body\.bais'; did you mean 'body\.bias'"):
        found["body.bais"]


@pytest.mark.parametrize(
    "wrong", [None, torch.nn.Linear(1, 1), torch.optim.SGD([torch.zeros(1)], lr=0.1)]
)
def test_only_optimizers_of_bnbx(wrong: Any) -> None:
    for ask in (explain, report):
        with pytest.raises(OptionError, match="is no optimizer of bnbx: it has no 'spec'"):
            ask(wrong)


# ---- sums


def test_report_sums() -> None:
    named = model()
    optimizer = Fake(named, OVERRIDES)
    optimizer.state[named["body.bias"]] = {"step": 1, "m": torch.zeros(101), "v": torch.zeros(101)}
    found = report(optimizer)
    assert optimizer.asked == 0  # it would compile kernels
    assert found == explain(optimizer).memory
    assert (found.rule, found.parameters, found.elements) == ("adamw", 3, 5000 + 5050 + 101)
    assert found.bytes_by_kind == {"codes": 10100, "absmax": 160, "float32 states": 40808}
    assert found.total_bytes == 51068
    assert found.existing_bytes == 808
    assert found.float32_bytes == 8 * found.elements == 81208
    assert found.saved_bytes == 30140
    assert found.saving == pytest.approx(30140 / 81208)
    assert found.bytes_per_parameter == pytest.approx(51068 / 10151)


def test_report_of_nothing() -> None:
    found = report(Fake({}))
    assert found.total_bytes == found.float32_bytes == found.saved_bytes == 0
    assert found.saving == found.bytes_per_parameter == 0.0
    assert str(found)
    assert str(explain(Fake({})))


def test_results_do_not_change() -> None:
    found = explain(Fake(model()))
    results: tuple[Any, ...] = (found, found.parameters[0], found.memory)
    for result in results:
        with pytest.raises(FrozenInstanceError):
            result.rule = "x"


# ---- text


@pytest.mark.parametrize("columns", [60, 80, 300])
def test_text_fits_the_terminal(columns: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", str(columns))
    lines = str(explain(Fake(model(), OVERRIDES))).splitlines()
    assert max(map(len, lines)) <= min(columns, 100)


def test_text_is_a_table(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "100")
    named = model()
    optimizer = Fake(named, OVERRIDES, lr=0.5)
    optimizer.slow.add("body.bias")
    text = str(explain(optimizer))
    lines = text.splitlines()
    assert max(map(len, lines)) <= 100
    assert "\x1b" not in text
    for words in (
        "  lr=0.5 (create())",
        "  bits=8 (default)",
        "bits=32 [1]",
        "[1] overrides['embed.weight']",
        f"reference, on cpu: {REASON}",
        "cpu, on cpu: the fastest target for cpu parameters",
        "adamw: 10,151 elements, parameters: 3",
        "saved: 30,140 bytes (37.1%)",
        "0 bytes exist; first gradients make the rest",
    ):
        assert words in text
    (row,) = [line for line in lines if "embed.weight" in line and "100x50" in line]
    assert "float32 100x50" in row
    assert "40,000 *" in row
    (row,) = [line for line in lines if "body.weight" in line]
    assert "bfloat16 50x101" in row
    assert "dynamic8" in row
    assert "10,260 *" in row


def test_text_of_states_that_exist() -> None:
    p = parameter(5000)
    optimizer = Fake({"p": p}, bits=32)
    optimizer.state[p] = {"step": 1, "m": torch.zeros(5000), "v": torch.zeros(5000)}
    text = str(explain(optimizer))
    assert "40,000" in text
    assert "*" not in text
    assert "exist" not in text
    assert "saved: 0 bytes (0.0%)" in text


def test_names_are_not_markup() -> None:
    name = "[bold]x[/b].w"
    assert name in str(explain(Fake({name: parameter(10)})))


def test_rich_prints_at_the_width_of_the_terminal() -> None:
    console = Console(file=io.StringIO(), width=60)
    with console.capture() as captured:
        console.print(explain(Fake(model(), OVERRIDES)))
        console.print(report(Fake(model(), OVERRIDES)))
    lines = captured.get().splitlines()
    assert max(map(len, lines)) <= 60
    assert sum("float32 states" in line for line in lines) == 2
