"""The layers' door: quantized layers under their familiar names, and whole models in one call.

`quantize_(model, "nf4")` quantizes a model in place, `dequantize_(model)` undoes it. A class is
one of the generic layers (`QuantLinear`, `QuantEmbedding`, `Linear8bitLt`) with arguments; it is
quantized when it moves to a device.
"""

from __future__ import annotations

from bnbx.kernels.quant_state import QuantState
from bnbx.layers.embedding import QuantEmbedding
from bnbx.layers.int8 import Linear8bitLt
from bnbx.layers.int8_params import Int8Params
from bnbx.layers.linear import QuantLinear
from bnbx.layers.merge import Merged, MergeReport, merge_lora
from bnbx.layers.parameter import QuantParameter
from bnbx.layers.parametrize import replace_parameter, restore_parameter
from bnbx.nn.convert import dequantize_, quantize_
from bnbx.nn.embedding import (
    Embedding,
    Embedding4bit,
    EmbeddingFP4,
    EmbeddingNF4,
    StableEmbedding,
)
from bnbx.nn.embedding8 import Embedding8bit
from bnbx.nn.linear import FP4Params, Linear4bit, LinearFP4, LinearNF4, Params4bit
from bnbx.nn.outliers import OutlierAwareLinear, OutlierTracer, find_outlier_dims
from bnbx.nn.report import Entry, QuantizationReport

__all__ = [
    "Embedding",
    "Embedding4bit",
    "Embedding8bit",
    "EmbeddingFP4",
    "EmbeddingNF4",
    "Entry",
    "FP4Params",
    "Int8Params",
    "Linear4bit",
    "Linear8bitLt",
    "LinearFP4",
    "LinearNF4",
    "MergeReport",
    "Merged",
    "OutlierAwareLinear",
    "OutlierTracer",
    "Params4bit",
    "QuantEmbedding",
    "QuantLinear",
    "QuantParameter",
    "QuantState",
    "QuantizationReport",
    "StableEmbedding",
    "dequantize_",
    "find_outlier_dims",
    "merge_lora",
    "quantize_",
    "replace_parameter",
    "restore_parameter",
]
