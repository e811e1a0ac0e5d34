"""Layers that know which of their input's dimensions have outliers: `OutlierAwareLinear`.

A few hidden dimensions of large transformers carry values far beyond all others
(arXiv:2208.07339, section 3). In most layers they can be found without running the model: the
columns of a layer's weight that belong to them vary far more than the rest. For the first layer,
the input itself is looked at.
"""

from __future__ import annotations

from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from bnbx.errors import OptionError, SingletonError
from bnbx.kernels.int8 import dequantize_rows, quantize_rows

SIGMAS = 4.0
INPUT_SIGMAS = 3.0
LARGE = 6.0


def find_outlier_dims(
    weight: Tensor, reduction_dim: int = 0, zscore: float = SIGMAS, topk: int | None = None
) -> Tensor:
    """Dimensions whose standard deviation stands out, as int64 indices.

    Args:
        weight: (rows, columns), floats.
        reduction_dim: over which dimension deviations are taken: 0 finds columns.
        zscore: how many deviations above the mean of all of them counts.
        topk: this many of the largest instead.
    """
    spread = weight.detach().float().std(reduction_dim)
    if topk is not None:
        return torch.topk(spread, k=topk).indices
    return torch.nonzero((spread - spread.mean()) / spread.std() > zscore).flatten()


class OutlierTracer:
    """Finds the outlier dimensions of each linear layer of a model as it runs for the first time.

    There is one: `OutlierTracer.get_instance()`. The first layer that runs is judged by its input
    (and by values of 6 and more), every other by the weight of its own columns.
    """

    _instance: OutlierTracer | None = None

    def __init__(self) -> None:
        raise SingletonError("OutlierTracer is one for all: call OutlierTracer.get_instance()")

    @classmethod
    def get_instance(cls) -> OutlierTracer:
        """The tracer."""
        if cls._instance is None:
            cls._instance = cls.__new__(cls)
            cls._instance._clear()
        return cls._instance

    def _clear(self) -> None:
        self._found: WeakKeyDictionary[nn.Module, Tensor] = WeakKeyDictionary()
        self._hooks: dict[int, Any] = {}
        self._traces = False

    def initialize(self, model: nn.Module) -> None:
        """Watch all linear layers of a model, and forget those of another."""
        for hook in self._hooks.values():
            hook.remove()
        self._clear()
        self._traces = True
        for module in model.modules():
            if isinstance(module, nn.Linear):
                self._hooks[id(module)] = module.register_forward_pre_hook(self._look)

    def is_initialized(self) -> bool:
        """Whether a model is watched."""
        return self._traces

    def get_outliers(self, weight: Tensor) -> Tensor | None:
        """The outlier dimensions of the layer with this weight; None if it has not run yet."""
        for module, found in self._found.items():
            if getattr(module, "weight", None) is weight:
                return found
        return None

    def _look(self, module: nn.Module, inputs: tuple[Any, ...]) -> None:
        weight: Any = module.weight
        if not len(self._found):
            x = inputs[0].detach().reshape(-1, inputs[0].shape[-1])
            spread = find_outlier_dims(x, 0, INPUT_SIGMAS)
            large = torch.nonzero((x.abs() > LARGE).any(0)).flatten()
            self._found[module] = torch.unique(torch.cat([spread, large]))
        else:
            self._found[module] = find_outlier_dims(weight)
        hook = self._hooks.pop(id(module), None)
        if hook is not None:
            hook.remove()


class OutlierAwareLinear(nn.Linear):
    """A linear layer that quantizes its weight on first use, sparing the columns with outliers.

    `OutlierTracer.get_instance().initialize(model)` comes before the first forward pass. What is
    done with the columns may be overridden: `quantize_weight` and `forward_with_outliers`.

    Attributes:
        outlier_dim: indices of the columns; None until the first forward pass.
        is_quantized: whether the weight is.
    """

    def __init__(
        self,
        input_features: int,
        output_features: int,
        bias: bool = True,
        device: torch.device | str | int | None = None,
    ) -> None:
        """Make a layer; arguments are those of `torch.nn.Linear`."""
        super().__init__(input_features, output_features, bias, device)
        self.outlier_dim: Tensor | None = None
        self.is_quantized = False

    def quantize_weight(self, w: Tensor, outlier_idx: Tensor) -> Tensor:
        """The weight as it is used from then on.

        Here each row is rounded to int8 and back, but for the columns with outliers, which neither
        change nor count for the scale.
        """
        rest = w.detach().clone()
        rest[:, outlier_idx] = 0
        codes, absmax, _ = quantize_rows(rest)
        found = dequantize_rows(codes, absmax, w.dtype)
        found[:, outlier_idx] = w.detach()[:, outlier_idx]
        return found

    def forward_with_outliers(self, x: Tensor, outlier_idx: Tensor) -> Tensor:
        """The product; here one with the weight that `quantize_weight` gave."""
        del outlier_idx  # the weight already tells them apart
        return nn.functional.linear(x, self.weight, self.bias)

    def forward(self, x: Tensor) -> Tensor:
        """The product.

        Raises:
            OptionError: no outliers are known: `OutlierTracer` does not watch this layer.
        """
        if self.outlier_dim is None:
            self.outlier_dim = OutlierTracer.get_instance().get_outliers(self.weight)
        if self.outlier_dim is None:
            raise OptionError(
                "the outliers of this OutlierAwareLinear are not known; call "
                "OutlierTracer.get_instance().initialize(model) before the first forward pass, or "
                "set layer.outlier_dim"
            )
        if not self.is_quantized:
            with torch.no_grad():
                self.weight.copy_(self.quantize_weight(self.weight, self.outlier_dim))
            self.is_quantized = True
        return self.forward_with_outliers(x, self.outlier_dim)
