"""What `describe` says of a type is true of it: tables, sizes and errors, computed another way."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch

from bnbx.demo.model import build_model
from bnbx.demo.settings import SHAPES, Size
from bnbx.describe import page, weights
from bnbx.describe.data import LABELS, data_sets
from bnbx.describe.facts import Facts, as_json, facts_of, levels_of
from bnbx.describe.text import percent, short, shown
from bnbx.errors import OptionError, UnknownNameError
from bnbx.kernels.encoding import make_encoding
from bnbx.quant_types.dynamic8 import dynamic8
from bnbx.quant_types.fp8_e4m3 import fp8_e4m3
from bnbx.quant_types.int8 import int8
from bnbx.quant_types.linear4 import linear4
from bnbx.quant_types.mxfp4 import mxfp4
from bnbx.quant_types.nf4 import nf4
from bnbx.registry import QuantType, quant_types

ROOT = Path(__file__).parent.parent.parent
mine = QuantType(name="mine", summary="two", bits=2, values=(-1.0, 0.0, 0.25, 1.0), block_size=32)


@pytest.fixture(scope="module")
def nf4_facts() -> Facts:
    return facts_of("nf4")


# ---- data


def test_data_are_what_they_are_called() -> None:
    found = data_sets()
    assert set(found) == set(LABELS)
    for x in found.values():
        assert x.dtype == torch.float32
        assert abs(float(x.mean())) < 0.02 * float(x.std())
    normal, laplace = found["normal"].double().flatten(), found["laplace"].double().flatten()
    probability = torch.special.ndtr(normal.sort().values)
    shares = (torch.arange(len(normal), dtype=torch.float64) + 0.5) / len(normal)
    assert torch.allclose(probability, shares, atol=1e-6)
    assert float(normal.std()) == pytest.approx(1, abs=1e-3)
    assert float(laplace.std()) == pytest.approx(math.sqrt(2), abs=1e-2)
    assert float(laplace.abs().mean()) == pytest.approx(1, abs=1e-3)
    # Neighbors do not know of each other: blocks are samples.
    for x in (normal, laplace):
        assert abs(float(torch.corrcoef(torch.stack([x[1:], x[:-1]]))[0, 1])) < 0.01


def test_weights_are_shipped_small_and_trained() -> None:
    assert weights.PATH.stat().st_size < 300_000
    x = weights.trained_weights()
    assert x.shape == (640, 160)
    assert x.isfinite().all()
    # The normal numbers they began as have a kurtosis of 3.
    kurtosis = float((x / x.std()).pow(4).mean())
    assert kurtosis > 3.3
    assert len(np.unique(x.numpy())) > 5000


def test_weights_can_be_trained_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """By a smaller model, in one step: half of its rows, moved from where they began."""
    monkeypatch.setattr(weights, "STEPS", 1)
    monkeypatch.setattr(weights, "SIZE", Size.TINY)
    monkeypatch.setattr(weights, "BLOCK", 1)
    made = weights.train_weights()
    assert made.shape == ((3 + 1 + 4) * 64 // 2, 64)
    parameters = dict(build_model(SHAPES[Size.TINY], 0).named_parameters())
    start = parameters["blocks.1.query_key_value.weight"][::2]
    assert not torch.equal(made[:96], start)
    assert torch.allclose(made[:96], start, atol=0.01)


# ---- one type


def test_errors_are_those_of_the_nearest_numbers(nf4_facts: Facts) -> None:
    """Computed without kernels: the nearest table entry of every element, in float64."""
    for key, x in data_sets().items():
        blocks = x.double().view(-1, 64)
        absmax = blocks.abs().amax(1, keepdim=True)
        table = torch.tensor(nf4.values, dtype=torch.float64)
        index = ((blocks / absmax)[..., None] - table).abs().argmin(-1)
        lost = table[index] * absmax - blocks
        error = nf4_facts.errors[key]
        assert error.mean == pytest.approx(float(lost.abs().mean() / blocks.abs().mean()), rel=1e-5)
        rms = float((lost.square().mean() / blocks.square().mean()).sqrt())
        assert error.rms == pytest.approx(rms, rel=1e-5)
        assert error.decibels == pytest.approx(-20 * math.log10(rms), abs=1e-3)


@pytest.mark.parametrize(
    ("name", "bits"),
    [("nf4", 4.5), ("dynamic8", 8.125), ("nvfp4", 4.5), ("mxfp4", 4.25), ("int8_affine", 8.5)],
)
def test_bits_per_element_count_scales(name: str, bits: float) -> None:
    assert facts_of(name).bits_per_element == pytest.approx(bits, abs=1e-5)


def test_a_scale_per_row_costs_next_to_nothing() -> None:
    assert facts_of("int8").bits_per_element == 8 + 32 / 4096


def test_a_block_size_of_ones_own() -> None:
    found = facts_of("nf4", 16)
    assert found.bits_per_element == 6
    assert found.errors["normal"].rms < facts_of("nf4").errors["normal"].rms
    with pytest.raises(OptionError, match="block size 17"):
        facts_of("nf4", 17)
    with pytest.raises(OptionError, match="int8 has a scale per row"):
        facts_of("int8", 64)


def test_the_table_of_levels(nf4_facts: Facts) -> None:
    assert [level.level for level in nf4_facts.levels] == list(nf4.values)
    assert nf4_facts.levels[0].above is None
    assert nf4_facts.levels[8].above == pytest.approx((nf4.values[7] or 0 + nf4.values[8]) / 2)  # type: ignore[operator]
    assert nf4_facts.written == 16
    assert nf4_facts.zero
    assert nf4_facts.smallest == nf4.values[8]


def test_levels_of_codes_that_are_not_written_or_no_numbers() -> None:
    levels = {level.code: level for level in levels_of(mxfp4.codebook(signed=True))}
    assert not levels[8].written
    assert levels[8].above is None
    assert levels[7].level == 1
    assert levels[7].value == 6
    assert levels[7].above == pytest.approx(5 / 6)
    ascending = levels_of(fp8_e4m3.codebook(signed=True))
    assert [level.level for level in ascending[-2:]] == [None, None]
    assert {level.code for level in ascending} == set(range(256))
    numbers = [level.level for level in ascending if level.level is not None]
    assert numbers == sorted(numbers)
    assert facts_of("fp8_e4m3").written == 253


@pytest.mark.parametrize("name", quant_types().names())
def test_every_type_has_facts_that_json_holds(name: str) -> None:
    found = json.loads(json.dumps(as_json(facts_of(name)), allow_nan=False))
    assert found["name"] == name
    assert found["source"]
    assert len(found["table"]) == 2 ** found["bits"]
    assert sum(row["written"] for row in found["table"]) == found["codes_written"]
    assert set(found["errors"]) == set(LABELS)
    for errors in found["errors"].values():
        assert 0 < errors["mean"] < 0.8
        assert 0 < errors["rms"] < 0.8
    thresholds = [row["written_above"] for row in found["table"] if row["written"]]
    assert thresholds[0] is None
    assert thresholds[1:] == sorted(thresholds[1:])
    assert found["bits"] < found["bits_per_element"] <= found["bits"] + 0.51


@pytest.mark.parametrize("family", ["dynamic", "linear", "nf"])
def test_every_bit_makes_errors_smaller(family: str) -> None:
    errors = [facts_of(f"{family}{bits}").errors["weights"].rms for bits in range(2, 8)]
    assert errors == sorted(errors, reverse=True)
    assert errors[0] > 4 * errors[-1]


def test_a_type_that_is_not_registered() -> None:
    found = facts_of(mine)
    assert found.package == ""
    assert found.written == 4
    assert found.smallest == 0.25


def test_zero_is_exact_or_is_not() -> None:
    assert facts_of("nf4").zero
    assert not facts_of("dynamic8_grid").zero
    assert not facts_of("int8_affine").zero
    encoding = make_encoding("state4", signed=False)
    assert encoding.codebook.values[encoding.codebook.zero_code] != 0


def test_an_unknown_type() -> None:
    with pytest.raises(UnknownNameError, match="did you mean 'nf4'"):
        facts_of("nf44")


# ---- words


@pytest.mark.parametrize(
    ("share", "expected"),
    [
        (0.09213, "9.21 %"),
        (0.5, "50.0 %"),
        (1.0, "100 %"),
        (0.00123, "0.123 %"),
        (0.0, "0 %"),
        (3.2e-5, "0.00320 %"),
    ],
)
def test_shares_have_three_digits(share: float, expected: str) -> None:
    assert percent(share) == expected


def test_bits_without_needless_zeros() -> None:
    assert [short(bits) for bits in (4.5, 8.0, 8.0078125)] == ["4.5", "8", "8.008"]


def test_long_tables_are_shown_in_part() -> None:
    assert [level and level.code for level in shown(levels_of(linear4.codebook(signed=True)))] == [
        *(code for code in range(16) if code != 8),
        8,
    ]
    levels = shown(levels_of(dynamic8.codebook(signed=True)))
    codes = [level and level.code for level in levels]
    assert codes == [0, 1, 2, None, *range(124, 131), None, 253, 254, 255]
    unsigned = [level and level.code for level in shown(levels_of(dynamic8.codebook(signed=False)))]
    assert unsigned == [0, 1, 2, 3, None, 253, 254, 255]
    assert len(shown(levels_of(int8.codebook(signed=True)))) == 15


# ---- the page


def test_the_page_is_what_the_specs_say() -> None:
    text = (ROOT / page.PATH).read_text()
    assert page.refreshed(text) == text, "write it anew: python -m bnbx.describe.page"
    assert len(page.PLACE.findall(text)) == len(page.WRITERS) == 3


def test_pictures_of_the_page_are_there() -> None:
    found = list(page.pictures((ROOT / page.PATH).read_text()))
    assert len(found) == 1
    for names, path in found:
        assert set(names) <= set(quant_types().names())
        picture = (ROOT / page.PATH.parent / path).read_bytes()
        assert picture.startswith(b"\x89PNG")
        assert 50_000 < len(picture) < 300_000


def test_writing_the_page(tmp_path: Path) -> None:
    stale = (
        "# x\n<!-- data -->\nold\n<!-- end -->\nkept\n<!-- plot: nf2 -->\n![alt text](img/a.png)\n"
    )
    (tmp_path / "page.md").write_text(stale)
    page.write(tmp_path / "page.md")
    text = (tmp_path / "page.md").read_text()
    assert "old" not in text
    assert "- **normal**: 131072 numbers" in text
    assert text.endswith(stale[stale.index("kept") :])
    assert (tmp_path / "img" / "a.png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(KeyError, match="nothing"):
        page.refreshed("<!-- nothing -->\n<!-- end -->")


def test_the_page_lists_every_built_in() -> None:
    text = (ROOT / page.PATH).read_text()
    types = quant_types()
    for name in types.names():
        if types.package(name) == page.BUILT_INS:
            assert text.count(f"| `{name}` |") == 1
            assert text.count(f"- `{name}`: ") == 1


def test_figures_in_the_prose_are_right() -> None:
    assert make_encoding("nf4", double=True).bytes((4096, 4096)) * 8 / 4096**2 == pytest.approx(
        4.127, abs=5e-4
    )
    means = {
        name: {key: error.mean for key, error in facts_of(name).errors.items()}
        for name in ("af4", "nf4")
    }
    nearer = [key for key in LABELS if means["af4"][key] < means["nf4"][key]]
    assert nearer == ["laplace"]
    assert means["af4"]["normal"] / means["nf4"]["normal"] == pytest.approx(1.03, abs=0.005)
    at_8_bits = [t.name for t in quant_types() if t.bits == 8 and t.scale.per == "block"]
    at_8_bits = [name for name in at_8_bits if facts_of(name).bits_per_element <= 8.25]
    assert min(at_8_bits, key=lambda n: facts_of(n).errors["weights"].rms) == "int8_block"
    assert np.allclose(facts_of("dynamic2").spec.values, [-0.55, 0, 0.55, 1])  # type: ignore[arg-type]
