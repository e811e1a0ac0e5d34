"""Whole models, quantized in place and back: what is done, what is left, what stays tied."""

from __future__ import annotations

import copy
import gc
import weakref
from typing import Any

import pytest
import torch
from rich.console import Console
from torch import nn

import bnbx
from bnbx.errors import (
    BnbxError,
    BnbxWarning,
    OptionError,
    UnknownNameError,
    UnsupportedTensorError,
)
from bnbx.nn import (
    Embedding8bit,
    Linear4bit,
    Linear8bitLt,
    LinearNF4,
    Params4bit,
    QuantEmbedding,
    QuantLinear,
    QuantParameter,
    dequantize_,
    quantize_,
)
from quantized_layers import LanguageModel, ids, language_model

WEIGHTS = 9  # of the language model, when experts are named


def _error(one: torch.Tensor, two: torch.Tensor) -> float:
    return float((one.detach() - two).norm() / two.norm())


def _how(report: Any) -> dict[str, str]:
    return {entry.name: entry.how for entry in report.quantized}


def _why(report: Any) -> dict[str, str]:
    return {entry.name: entry.why for entry in report.left}


def test_model_computes_about_the_same_in_fewer_bytes() -> None:
    model = language_model()
    expected = model(ids()).detach()
    report = bnbx.quantize_(model, "nf8", parameters=["*experts.up"])
    assert _error(model(ids()), expected) < 0.05
    names = [name for name, _ in language_model().named_parameters()]
    assert [entry.name for entry in report.entries] == names
    assert len(report.quantized) == 10
    assert report.before == sum(p.nbytes for p in language_model().parameters())
    assert report.after < 0.3 * report.before
    found = sum(p.nbytes + _beside(p) for p in model.parameters())
    assert found == report.after
    assert {type(m) for m in model.modules() if isinstance(m, nn.Linear)} == {QuantLinear}


def _beside(p: Any) -> int:
    """Bytes of scales; a table of numbers is there once for all in what bnbx counts."""
    state = getattr(p, "quant_state", None)
    if state is None:
        return 0
    tables = state.code.nbytes + (state.state2.code.nbytes if state.state2 else 0)
    return int(state.nbytes - tables)


def test_report_is_a_table_that_adds_up() -> None:
    model = language_model()
    report = quantize_(model, "nf4", skip=["positions"], overrides={"*mlp*": "int8"})
    text = str(report)
    for part in ("nf4, blocks of 64", "int8, a scale per row", "skip['positions']", "experts.up"):
        assert part in text
    assert f"{report.before:,}" in text
    assert f"{report.after:,}" in text
    assert "7 of 20 parameters quantized" in text
    console = Console(width=80, record=True, file=None, quiet=True)
    console.print(report)
    why = _why(report)
    assert "name it in `parameters`" in why["layers.0.experts.up"]
    assert why["positions.weight"] == "skip['positions']"
    assert why["layers.0.norm.weight"] == "fewer than two dimensions"


def test_tied_weights_stay_tied_and_count_once() -> None:
    model = language_model()
    report = quantize_(model, "nf4")
    assert model.lm_head.weight is model.embed.weight
    (entry,) = [each for each in report.entries if each.name == "embed.weight"]
    assert entry.shared == ("lm_head.weight",)
    assert isinstance(model.lm_head, Linear4bit)
    assert model.lm_head.quant_state is model.embed.weight.quant_state  # type: ignore[attr-defined]
    other = copy.deepcopy(model)
    assert other.lm_head.weight is other.embed.weight
    dequantize_(model)
    assert model.lm_head.weight is model.embed.weight


def test_tie_to_what_is_skipped_is_left() -> None:
    model = language_model()
    report = quantize_(model, "nf4", skip=["lm_head"])
    assert _why(report)["embed.weight"] == "shared with lm_head.weight: skip['lm_head']"
    assert model.lm_head.weight is model.embed.weight
    assert type(model.lm_head) is nn.Linear


def test_tie_between_several_types_is_an_error_that_changes_nothing() -> None:
    model = language_model()
    with pytest.raises(OptionError, match=r"'embed.weight', 'lm_head.weight' are one parameter"):
        quantize_(model, "nf4", overrides={"lm_head": "int8"})
    assert not any(isinstance(p, QuantParameter) for p in model.parameters())
    quantize_(model, "nf4", overrides={"regex:^(lm_head|embed)$": "int8"})


def test_tie_to_a_module_that_cannot_use_codes_is_left() -> None:
    model = nn.ModuleDict({"one": nn.Linear(64, 64), "two": nn.Module()})
    model["two"].own = model["one"].weight
    report = quantize_(model)
    assert "shared with two.own: a parameter of Module" in _why(report)["one.weight"]


def test_overrides_say_how_and_later_ones_win() -> None:
    model = language_model(tied=False)
    report = quantize_(
        model,
        "nf4",
        block_size=128,
        double=True,
        overrides={
            "*mlp*": "mxfp4",
            "layers.1": {"block_size": 32},
            "layers.1.mlp.0": {"quant_type": "fp4"},
            r"regex:attention$": {"double": False, "fit": "mse", "compute_dtype": torch.bfloat16},
            "lm_head": None,
        },
    )
    how = _how(report)
    double = ", scales in dynamic8"
    assert how["embed.weight"] == f"nf4, blocks of 128{double}"
    assert how["layers.0.attention.weight"] == "nf4, blocks of 128"
    assert how["layers.1.attention.weight"] == "nf4, blocks of 32"
    assert how["layers.0.mlp.0.weight"] == "mxfp4, blocks of 32"  # its scales cannot be quantized
    assert how["layers.1.mlp.0.weight"] == "fp4, blocks of 64"  # of mxfp4 before
    assert _why(report)["lm_head.weight"] == "overrides['lm_head'] = None"
    attention: Any = model.get_submodule("layers.0.attention")
    assert attention.compute_dtype == torch.bfloat16
    assert attention.compute_type_is_set


def test_an_override_with_a_type_names_parameters_too() -> None:
    report = quantize_(language_model(), "nf4", overrides={"*experts*": "nf3"})
    assert _how(report)["layers.0.experts.up"] == "nf3, blocks of 64"
    report = quantize_(language_model(), "nf4", overrides={"layers": {"block_size": 32}})
    assert "name it" in _why(report)["layers.0.experts.up"]


def test_fitted_scales_err_less() -> None:
    weight = language_model().get_parameter("layers.0.attention.weight")

    def error(fit: str | None) -> float:
        model = language_model()
        quantize_(model, "linear3", fit=fit)
        found: Any = model.get_submodule("layers.0.attention")
        return _error(found.dequantized_weight(), weight.detach())

    assert error("mse") < 0.95 * error(None)


@pytest.mark.parametrize(
    ("arguments", "kind", "message"),
    [
        ({"skip": ["lm_haed"]}, OptionError, r"skip\['lm_haed'\].*nearest: 'lm_head'"),
        ({"skip": "lm_head"}, OptionError, "expected a list of patterns"),
        ({"skip": [3]}, OptionError, r"skip\[3\]: expected a glob"),
        ({"skip": ["regex:("]}, OptionError, "no regular expression"),
        ({"overrides": {"*mpl*": "int8"}}, OptionError, r"\*mpl\*.*nearest: 'layers.0.mlp.0'"),
        ({"overrides": {"norm": "int8"}}, OptionError, "none of the 11 weights"),
        ({"overrides": {"embed": {"bits": 4}}}, UnknownNameError, "no argument 'bits'"),
        ({"overrides": {"embed": {"blocksize": 4}}}, UnknownNameError, "mean 'block_size'"),
        ({"overrides": {"embed": 4}}, OptionError, "expected a quant type"),
        ({"overrides": ["embed"]}, OptionError, "overrides="),
        ({"overrides": {"positions": "nf44"}}, UnknownNameError, "did you mean 'nf4'"),
        ({"overrides": {"positions": {"block_size": 7}}}, OptionError, r"positions.*size 7"),
        ({"parameters": ["experts.down"]}, OptionError, "none of the 2 parameters"),
        ({"quant_type": "nf44"}, UnknownNameError, "did you mean 'nf4'"),
        ({"quant_type": 4}, OptionError, "quant_type=4"),
        ({"quant_type": "mxfp4", "double": True}, OptionError, "only float32 ones"),
        ({"double": 1}, OptionError, "double=1"),
        ({"fit": "mes"}, OptionError, "fit='mes'; expected one of mse"),
        ({"block_size": 33}, OptionError, "block size 33"),
        ({"compute_dtype": torch.float64}, OptionError, "compute_dtype=torch.float64"),
        ({"progress": "no"}, OptionError, "progress='no'; expected True, False, or None"),
    ],
)
def test_mistakes_are_found_before_anything_is_changed(
    arguments: dict[str, Any], kind: type[BnbxError], message: str
) -> None:
    model = language_model()
    with pytest.raises(kind, match=message):
        quantize_(model, **{"quant_type": "nf4", **arguments})
    assert not any(isinstance(p, QuantParameter) for p in model.parameters())


def test_no_module_is_an_error() -> None:
    wrong: Any = [nn.Linear(2, 2)]
    for call in (quantize_, dequantize_):
        with pytest.raises(OptionError, match=r"expected a torch.nn.Module"):
            call(wrong)


def test_what_cannot_be_in_codes_is_left_with_the_reason() -> None:
    class Own(nn.Linear):
        pass

    model = nn.ModuleDict(
        {
            "own": Own(64, 64),
            "wide": nn.Linear(64, 64, dtype=torch.float64),
            "lazy": nn.LazyLinear(64),
            "empty": nn.Embedding(0, 64),
            "norm": nn.Embedding(10, 64, max_norm=1.0),
            "attention": nn.MultiheadAttention(64, 4),
            "already": LinearNF4(64, 64).to("cpu"),
            "moves": LinearNF4(64, 64),
            "int8": Linear8bitLt(64, 64, has_fp16_weights=False).to("cpu"),
        }
    )
    report = quantize_(model)
    assert report.quantized == ()
    expected = {
        "own.weight": "Own is a subclass of Linear",
        "wide.weight": "torch.float64",
        "lazy.weight": "no shape before the model has run",
        "empty.weight": "empty",
        "norm.weight": "max_norm",
        "attention.out_proj.weight": "NonDynamicallyQuantizableLinear is a subclass",
        "attention.in_proj_weight": "a parameter of MultiheadAttention; name it",
        "already.weight": "quantized already",
        "moves.weight": "left to its LinearNF4",
        "int8.weight": "quantized already",
    }
    for name, reason in expected.items():
        assert reason in _why(report)[name], name


def test_models_of_torch_that_read_weights_themselves() -> None:
    """In evaluation its transformer hands all weights to one fused kernel, if it may."""
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(64, 4, 128, batch_first=True)
    model = nn.TransformerEncoder(layer, 2).eval()
    x = torch.randn(3, 7, 64)
    expected = model(x).detach()
    quantize_(model, "nf8", parameters=["in_proj_weight"])
    with torch.no_grad():
        assert _error(model(x), expected) < 0.05
    assert _error(model.train()(x), expected) < 1
    convolution = nn.Conv2d(3, 8, 3)
    image = torch.randn(1, 3, 9, 9)
    expected = convolution(image).detach()
    quantize_(convolution, "nf8", parameters=["weight"])
    assert _error(convolution(image), expected) < 0.05


def test_a_layer_alone_is_a_model_too() -> None:
    layer = nn.Linear(64, 32)
    quantize_(layer)
    assert type(layer) is Linear4bit
    assert layer(torch.randn(1, 64)).shape == (1, 32)
    assert type(dequantize_(layer)) is nn.Linear


def test_layers_are_the_same_objects_with_their_hooks() -> None:
    model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64)).eval()
    first: Any = model[0]
    calls: list[Any] = []
    first.register_forward_hook(lambda *args: calls.append(args))
    first.note = "kept"
    bias = first.bias
    quantize_(model)
    assert model[0] is first
    assert first.bias is bias
    assert not first.training
    model(torch.randn(1, 64))
    assert len(calls) == 1
    assert first.note == "kept"


def test_again_is_no_more_and_goes_on_where_it_stopped() -> None:
    model = language_model()
    wishes: dict[str, Any] = {"overrides": {"*mlp*": "int8"}, "parameters": ["*experts.up"]}
    quantize_(model, "nf4", skip=["layers.1"], **{**wishes, "parameters": ["0.experts.up"]})
    expected = model(ids())
    del expected
    report = quantize_(model, "nf4", **wishes)
    assert {name.split(".")[1] for name in _how(report)} == {"1"}
    before = model(ids())
    assert quantize_(model, "nf4", **wishes).quantized == ()
    assert torch.equal(model(ids()), before)


class _Interrupted(KeyboardInterrupt):
    pass


@pytest.mark.parametrize("error", [_Interrupted(), UnsupportedTensorError("too odd")])
def test_a_model_in_which_something_fails_works(
    error: BaseException, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, model = language_model(), language_model()
    quantize_(whole, "nf4", parameters=["*experts.up"])
    real = QuantParameter.quantize
    done: list[Any] = []

    def failing(self: Any, *args: Any, **named: Any) -> Any:
        if len(done) == 4:
            raise error
        done.append(self)
        return real(self, *args, **named)

    with monkeypatch.context() as patch:
        patch.setattr(QuantParameter, "quantize", failing)
        with pytest.raises(type(error)) as caught:
            quantize_(model, "nf4", parameters=["*experts.up"])
    if isinstance(error, UnsupportedTensorError):
        assert "layers.0.mlp.2.weight: too odd\n4 of 10 weights" in str(caught.value)
    assert model(ids()).isfinite().all()
    model.load_state_dict(model.state_dict())
    report = quantize_(model, "nf4", parameters=["*experts.up"])
    assert len(report.quantized) == 6
    assert torch.equal(model(ids()), whole(ids()))


def test_dense_weights_are_freed_as_it_goes(monkeypatch: pytest.MonkeyPatch) -> None:
    model = nn.Sequential(*[nn.Linear(64, 64) for _ in range(6)])
    dense = [weakref.ref(layer.weight) for layer in model]
    alive: list[int] = []
    real = QuantParameter.quantize

    def counting(self: Any, *args: Any, **named: Any) -> Any:
        gc.collect()
        alive.append(sum(each() is not None for each in dense))
        return real(self, *args, **named)

    monkeypatch.setattr(QuantParameter, "quantize", counting)
    report = quantize_(model)
    assert alive == [6, 5, 4, 3, 2, 1]
    assert len(report.quantized) == 6
    assert not any(each() for each in dense)


def test_progress_is_shown_when_asked_for(capsys: pytest.CaptureFixture[str]) -> None:
    quantize_(language_model(), progress=True)
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 4
    assert lines[-1].startswith("quantizing: 8 of 8 weights, layers.1.mlp.2.weight")
    quantize_(language_model(), progress=False)
    quantize_(language_model())
    assert capsys.readouterr().err == ""


def test_back_to_what_it_was_but_for_rounding() -> None:
    model, plain = language_model(), language_model()
    quantize_(model, "nf4", overrides={"*mlp*": "int8"}, parameters=["*experts.up"])
    expected = model(ids())
    found = dequantize_(model)
    assert found is model
    assert list(model.state_dict()) == list(plain.state_dict())
    assert repr(model) == repr(plain)
    torch.testing.assert_close(model(ids()), expected, rtol=1e-4, atol=1e-4)
    for module, other in zip(model.modules(), plain.modules(), strict=True):
        assert type(module) is type(other)
        assert module.__dict__.keys() == other.__dict__.keys()
    for p in model.parameters():
        assert p.requires_grad
        assert type(p) is nn.Parameter
    model.load_state_dict(plain.state_dict())
    assert torch.equal(model(ids()), plain(ids()))


def test_all_kinds_of_layers_become_dense() -> None:
    model = nn.ModuleList(
        [
            LinearNF4(64, 64),
            Linear8bitLt(64, 64, has_fp16_weights=False),
            Linear8bitLt(64, 64, has_fp16_weights=True),
            Embedding8bit(9, 64),
            QuantEmbedding(9, 64),
        ]
    ).to("cpu")
    dequantize_(model, torch.bfloat16, requires_grad=False)
    kinds = [nn.Linear] * 3 + [nn.Embedding] * 2
    assert [type(layer) for layer in model] == kinds
    for layer in model:
        assert layer.weight.dtype == torch.bfloat16
        assert not layer.weight.requires_grad
    with pytest.raises(OptionError, match=r"dtype=torch.int8"):
        dequantize_(model, torch.int8)


def test_meta_model_is_quantized_when_it_is_loaded() -> None:
    with torch.device("meta"):
        model: LanguageModel = language_model()
    report = quantize_(model, "nf4")
    assert len(report.quantized) == 7 + 1
    assert report.after < report.before
    assert all(p.is_meta for p in model.parameters())
    model.load_state_dict(language_model().state_dict(), assign=True)
    assert isinstance(model.to("cpu").get_submodule("layers.0.attention").weight, Params4bit)
    dequantize_(model)


def test_adapters_that_will_not_train_are_told_of() -> None:
    model = language_model()
    model.requires_grad_(False)
    adapter = nn.Sequential(nn.Linear(64, 8), nn.Linear(8, 64))
    model.layers[0].adapter = adapter
    with pytest.warns(BnbxWarning, match=r"adapter\.0.*adapter\.1.*before adapters are added"):
        quantize_(copy.deepcopy(model), "nf4")
    quantize_(model, "nf4", skip=["*adapter*"])  # warnings are errors here
    assert all(p.requires_grad for p in adapter.parameters())
    quantize_(language_model(), "nf4")
