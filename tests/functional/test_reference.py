"""Every function that bitsandbytes documents is here, with every argument that it documents."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import torch

import bnbx.functional
from bnbx import functional

# By version of the documentation: each function, its arguments in their order.
DOCUMENTED: dict[str, dict[str, str]] = {
    "0.0.24": {
        "create_dynamic_map": "signed n",
        "create_linear_map": "signed",
        "dequantize": "A quant_state absmax code out",
        "dequantize_blockwise": "A quant_state absmax code out blocksize",
        "dequantize_no_absmax": "A code out",
        "estimate_quantiles": "A out offset",
        "get_ptr": "A",
        "histogram_scatter_add_2d": "histogram index1 index2 source",
        "optimizer_update_32bit": "optimizer_name g p state1 beta1 eps step lr state2 beta2 "
        "weight_decay gnorm_scale unorm_vec max_unorm",
        "optimizer_update_8bit": "optimizer_name g p state1 state2 beta1 beta2 eps step lr qmap1 "
        "qmap2 max1 max2 new_max1 new_max2 weight_decay gnorm_scale unorm_vec max_unorm",
        "optimizer_update_8bit_blockwise": "optimizer_name g p state1 state2 beta1 beta2 eps step "
        "lr qmap1 qmap2 absmax1 absmax2 weight_decay gnorm_scale",
        "percentile_clipping": "grad gnorm_vec step percentile",
        "quantize": "A code out",
        "quantize_blockwise": "A code absmax rand out",
        "quantize_no_absmax": "A code out",
    },
    "0.49.1": {
        "int8_linear_matmul": "A B out dtype",
        "int8_mm_dequant": "A row_stats col_stats out bias",
        "int8_vectorwise_dequant": "A stats",
        "int8_vectorwise_quant": "A threshold",
        "int8_double_quant": "A col_stats row_stats out_col out_row threshold",
        "dequantize_4bit": "A quant_state absmax out blocksize quant_type",
        "dequantize_fp4": "A quant_state absmax out blocksize",
        "dequantize_nf4": "A quant_state absmax out blocksize",
        "gemv_4bit": "A B out transposed_A transposed_B state",
        "quantize_4bit": "A absmax out blocksize compress_statistics quant_type quant_storage",
        "quantize_fp4": "A absmax out blocksize compress_statistics quant_storage",
        "quantize_nf4": "A absmax out blocksize compress_statistics quant_storage",
        "QuantState": "absmax shape code blocksize quant_type dtype offset state2",
        "dequantize_blockwise": "A quant_state absmax code out blocksize nested",
        "quantize_blockwise": "A code absmax out blocksize nested",
        "get_ptr": "A",
        "is_on_gpu": "tensors",
    },
    "0.50.2": {
        "create_dynamic_map": "signed max_exponent_bits total_bits",
        "create_fp8_map": "signed exponent_bits precision_bits total_bits",
        "create_linear_map": "signed total_bits add_zero",
        "create_normal_map": "offset use_extra_value",
        "has_avx512bf16": "",
        "optimizer_update_32bit": "optimizer_name g p state1 beta1 eps step lr state2 beta2 beta3 "
        "alpha weight_decay gnorm_scale unorm_vec max_unorm skip_zeros",
        "optimizer_update_8bit_blockwise": "optimizer_name g p state1 state2 beta1 beta2 beta3 "
        "alpha eps step lr qmap1 qmap2 absmax1 absmax2 weight_decay gnorm_scale skip_zeros",
        "create_quantile_map": "A total_bits",
        "get_4bit_type": "typename device blocksize",
    },
}
METHODS = {"as_dict": "packed", "from_dict": "qs_dict device", "to": "device"}
# Defaults that the documentation gives.
DEFAULTS: dict[str, dict[str, Any]] = {
    "create_dynamic_map": dict(signed=True, max_exponent_bits=7, total_bits=8),
    "create_linear_map": dict(signed=True, total_bits=8, add_zero=True),
    "estimate_quantiles": dict(out=None, offset=0.001953125),
    "percentile_clipping": dict(percentile=5),
    "int8_linear_matmul": dict(out=None, dtype=torch.int32),
    "int8_vectorwise_quant": dict(threshold=0.0),
    "quantize_4bit": dict(
        absmax=None, compress_statistics=False, quant_type="fp4", quant_storage=torch.uint8
    ),
    "dequantize_4bit": dict(quant_state=None, absmax=None, out=None, quant_type="fp4"),
    "quantize_blockwise": dict(code=None, absmax=None, out=None, blocksize=4096, nested=False),
    "dequantize_blockwise": dict(quant_state=None, absmax=None, blocksize=4096, nested=False),
    "optimizer_update_32bit": dict(
        state2=None,
        beta2=0.0,
        beta3=0.0,
        alpha=0.0,
        weight_decay=0.0,
        gnorm_scale=1.0,
        unorm_vec=None,
        max_unorm=0.0,
        skip_zeros=False,
    ),
    "optimizer_update_8bit_blockwise": dict(weight_decay=0.0, gnorm_scale=1.0, skip_zeros=False),
    "optimizer_update_8bit": dict(weight_decay=0.0, gnorm_scale=1.0, unorm_vec=None, max_unorm=0.0),
}
CASES = [(version, name) for version, names in DOCUMENTED.items() for name in names]


@pytest.mark.parametrize(("version", "name"), CASES)
def test_documented_arguments(version: str, name: str) -> None:
    """By name all of them, and in their order, but where a later version changed it.

    Those orders are told apart when a function is called; test_updates.py and
    test_bytes_of_blocks.py call them.
    """
    documented = DOCUMENTED[version][name].split()
    parameters = inspect.signature(getattr(functional, name)).parameters
    assert set(documented) <= set(parameters)
    changed = version == "0.0.24" and name in (
        "create_dynamic_map",
        "optimizer_update_32bit",
        "optimizer_update_8bit_blockwise",
        "quantize_blockwise",
    )
    if not changed:
        assert list(parameters)[: len(documented)] == documented
    text = inspect.getdoc(getattr(functional, name)) or ""
    for argument in documented:
        assert f"{argument}:" in text or "`" in text.splitlines()[0], argument


@pytest.mark.parametrize("name", DEFAULTS)
def test_documented_defaults(name: str) -> None:
    parameters = inspect.signature(getattr(functional, name)).parameters
    found = {argument: parameters[argument].default for argument in DEFAULTS[name]}
    assert found == DEFAULTS[name]


def test_methods_of_states() -> None:
    for name, arguments in METHODS.items():
        parameters = inspect.signature(getattr(functional.QuantState, name)).parameters
        found = [parameter for parameter in parameters if parameter != "self"]
        assert found == arguments.split()


def test_block_sizes_of_4bit_functions_default_to_64() -> None:
    for name in ("quantize_4bit", "quantize_nf4", "quantize_fp4"):
        _, state = getattr(functional, name)(torch.randn(130))
        assert state.blocksize == 64


def test_everything_is_listed() -> None:
    documented = {name for names in DOCUMENTED.values() for name in names}
    own = {"QuantTensor", "fake_quantize", "fit_quantiles", "double_quant"}
    assert set(bnbx.functional.__all__) == documented | own
    for name in bnbx.functional.__all__:
        assert inspect.getdoc(getattr(functional, name))
