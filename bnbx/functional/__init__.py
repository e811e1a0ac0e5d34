"""Functions on quantized tensors: `quantize(tensor, "nf4")`, and bitsandbytes' functional.

Each works on plain tensors, keeps nothing, and is one operation (`torch.ops.bnbx.*`) that
torch.compile puts into a graph.
"""

from __future__ import annotations

from bnbx.functional.blockwise import dequantize_blockwise, quantize_blockwise
from bnbx.functional.generic import dequantize, fake_quantize, quantize
from bnbx.functional.halves import dequantize_4bit, gemv_4bit, quantize_4bit
from bnbx.functional.int8 import (
    int8_double_quant,
    int8_linear_matmul,
    int8_mm_dequant,
    int8_vectorwise_dequant,
    int8_vectorwise_quant,
)
from bnbx.functional.maps import (
    create_dynamic_map,
    create_fp8_map,
    create_linear_map,
    create_normal_map,
    create_quantile_map,
)
from bnbx.functional.memory import get_ptr, has_avx512bf16, is_on_gpu
from bnbx.functional.named import (
    dequantize_fp4,
    dequantize_nf4,
    get_4bit_type,
    quantize_fp4,
    quantize_nf4,
)
from bnbx.functional.statistics import (
    estimate_quantiles,
    histogram_scatter_add_2d,
    percentile_clipping,
)
from bnbx.functional.tensor import QuantTensor
from bnbx.functional.unscaled import dequantize_no_absmax, quantize_no_absmax
from bnbx.functional.updating import (
    optimizer_update_8bit,
    optimizer_update_8bit_blockwise,
    optimizer_update_32bit,
)
from bnbx.kernels.quant_state import QuantState
from bnbx.kernels.quantiles import fit_quantiles

__all__ = [
    "QuantState",
    "QuantTensor",
    "create_dynamic_map",
    "create_fp8_map",
    "create_linear_map",
    "create_normal_map",
    "create_quantile_map",
    "dequantize",
    "dequantize_4bit",
    "dequantize_blockwise",
    "dequantize_fp4",
    "dequantize_nf4",
    "dequantize_no_absmax",
    "double_quant",
    "estimate_quantiles",
    "fake_quantize",
    "fit_quantiles",
    "gemv_4bit",
    "get_4bit_type",
    "get_ptr",
    "has_avx512bf16",
    "histogram_scatter_add_2d",
    "int8_double_quant",
    "int8_linear_matmul",
    "int8_mm_dequant",
    "int8_vectorwise_dequant",
    "int8_vectorwise_quant",
    "is_on_gpu",
    "optimizer_update_8bit",
    "optimizer_update_8bit_blockwise",
    "optimizer_update_32bit",
    "percentile_clipping",
    "quantize",
    "quantize_4bit",
    "quantize_blockwise",
    "quantize_fp4",
    "quantize_nf4",
    "quantize_no_absmax",
]

double_quant = int8_double_quant  # its name before 0.45
