"""The dtypes of the numbers that kernels read and write: one table for torch, files and sources."""

from __future__ import annotations

from collections.abc import Mapping

import torch

# By name; what the sources call them is in templates/numbers.h.
C_TYPES: Mapping[str, str] = {"float32": "float", "bfloat16": "bfloat16", "float16": "float16"}
BY_NAME: Mapping[str, torch.dtype] = {name: getattr(torch, name) for name in C_TYPES}
DTYPE_NAMES: Mapping[torch.dtype, str] = {dtype: name for name, dtype in BY_NAME.items()}
FLOATS = tuple(DTYPE_NAMES)
