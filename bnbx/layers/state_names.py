"""Attributes by which FSDP looks the entries of a quantized parameter's state dict up.

It takes the key "weight.nested_absmax" for the attribute `nested_absmax` of `weight`. They are
properties, not `__getattr__`, which torch.compile does not trace in a tensor.
"""

from __future__ import annotations

from typing import Any


class StateNames:
    """Base of a parameter with a `quant_state`."""

    def _of_state(self, called: str, name: str, second: bool = False) -> Any:
        state: Any = getattr(self, "quant_state", None)
        if state is not None and second:
            state = state.state2
        if state is None:
            raise AttributeError(
                f"{type(self).__name__!r} object has no attribute {called!r}: "
                f"{'its scales are not' if second else 'it is not'} quantized"
            )
        return getattr(state, name)

    @property
    def absmax(self) -> Any:
        """Scales, or their codes."""
        return self._of_state("absmax", "absmax")

    @property
    def code(self) -> Any:
        """The table of numbers."""
        return self._of_state("code", "code")

    @property
    def quant_map(self) -> Any:
        """The table of numbers."""
        return self._of_state("quant_map", "code")

    @property
    def offset(self) -> Any:
        """Mean of the scales, if they are quantized."""
        return self._of_state("offset", "offset")

    @property
    def state2(self) -> Any:
        """Quantization state of the scales."""
        return self._of_state("state2", "state2")

    @property
    def nested_absmax(self) -> Any:
        """Scales of the scales."""
        return self._of_state("nested_absmax", "absmax", second=True)

    @property
    def nested_blocksize(self) -> Any:
        """Scales that share a scale."""
        return self._of_state("nested_blocksize", "blocksize", second=True)

    @property
    def nested_quant_map(self) -> Any:
        """The table of numbers of the scales."""
        return self._of_state("nested_quant_map", "code", second=True)

    @property
    def nested_dtype(self) -> Any:
        """What scales are dequantized to."""
        return self._of_state("nested_dtype", "dtype", second=True)

    @property
    def nested_offset(self) -> Any:
        """Mean of the scales, if they are quantized."""
        return self._of_state("nested_offset", "offset")
