"""Fitted scales, where users of layers look for them; `bnbx.kernels.fit` says how they are found.

The search lives with the kernels because functions and layers both quantize with it, and neither
imports the other.
"""

from __future__ import annotations

from bnbx.kernels.fit import METHODS, STEPS, check_method, fit_scales

__all__ = ["METHODS", "STEPS", "check_method", "fit_scales"]
