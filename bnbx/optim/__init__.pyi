"""Types of `bnbx.optim`, from the classes' signatures.

Made by `pytest tests/test_optim_stub.py --rewrite-golden`; not to be edited.
"""
# fmt: off

import os
from collections.abc import Mapping, Sequence
from typing import Any, TypedDict

from torch import Tensor
from torch.optim.optimizer import ParamsT
from typing_extensions import Unpack

from bnbx.optim.base import Optimizer8bit as Optimizer8bit
from bnbx.optim.base import OptimizerArgs as OptimizerArgs
from bnbx.optim.factory import OptimizerFactory as OptimizerFactory
from bnbx.optim.factory import create as create
from bnbx.optim.rule_optimizer import RuleOptimizer as RuleOptimizer
from bnbx.optimizers.explain import explain as explain
from bnbx.optimizers.explain import report as report
from bnbx.optimizers.manager import GlobalOptimManager as GlobalOptimManager

__all__: list[str]

class Options(TypedDict, total=False):
    bits: int
    state_types: str | Mapping[str, str] | None
    block_wise: bool
    percentile_clipping: int
    master: str
    maximize: bool
    paged: bool | str
    overrides: Mapping[str, Mapping[str, Any]] | None
    page_dir: str | os.PathLike[str] | None
    foreach: bool | None
    fused: bool | None
    capturable: bool
    differentiable: bool

class _Takes0(RuleOptimizer):
    def __init__(
        self, params: ParamsT, lr: float | Tensor = ..., betas: Sequence[float] | str = ...,
        alpha: float | Tensor = ..., t_alpha: float | None = ..., t_beta3: float | None = ...,
        eps: float | Tensor = ..., weight_decay: float | Tensor = ..., optim_bits: int = ...,
        min_8bit_size: int = ..., is_paged: bool | str = ..., *, skip_zeros: bool = ...,
        max_unorm: float = ..., args: object = ..., **options: Unpack[Options]
    ) -> None: ...

class _Takes1(RuleOptimizer):
    def __init__(
        self, params: ParamsT, lr: float | Tensor = ..., betas: Sequence[float] | str = ...,
        alpha: float | Tensor = ..., t_alpha: float | None = ..., t_beta3: float | None = ...,
        eps: float | Tensor = ..., weight_decay: float | Tensor = ..., min_8bit_size: int = ...,
        is_paged: bool | str = ..., *, skip_zeros: bool = ..., max_unorm: float = ...,
        args: object = ..., optim_bits: int = ..., **options: Unpack[Options]
    ) -> None: ...

class _Takes2(RuleOptimizer):
    def __init__(
        self, params: ParamsT, lr: float | Tensor = ..., lr_decay: float | Tensor = ...,
        weight_decay: float | Tensor = ..., initial_accumulator_value: float | Tensor = ...,
        eps: float | Tensor = ..., optim_bits: int = ..., args: object = ...,
        min_8bit_size: int = ..., *, skip_zeros: bool = ..., max_unorm: float = ...,
        is_paged: bool | str = ..., **options: Unpack[Options]
    ) -> None: ...

class _Takes3(RuleOptimizer):
    def __init__(
        self, params: ParamsT, lr: float | Tensor = ..., betas: Sequence[float] | str = ...,
        eps: float | Tensor = ..., weight_decay: float | Tensor = ..., amsgrad: bool = ...,
        optim_bits: int = ..., args: object = ..., min_8bit_size: int = ...,
        is_paged: bool | str = ..., *, skip_zeros: bool = ..., max_unorm: float = ...,
        decoupled_weight_decay: bool = ..., **options: Unpack[Options]
    ) -> None: ...

class _Takes4(RuleOptimizer):
    def __init__(
        self, params: ParamsT, lr: float | Tensor = ..., betas: Sequence[float] | str = ...,
        eps: float | Tensor = ..., weight_decay: float | Tensor = ..., amsgrad: bool = ...,
        optim_bits: int = ..., args: object = ..., min_8bit_size: int = ...,
        is_paged: bool | str = ..., *, skip_zeros: bool = ..., max_unorm: float = ...,
        **options: Unpack[Options]
    ) -> None: ...

class _Takes5(RuleOptimizer):
    def __init__(
        self, params: ParamsT, lr: float | Tensor = ..., bias_correction: bool = ...,
        betas: Sequence[float] | str = ..., eps: float | Tensor = ...,
        weight_decay: float | Tensor = ..., amsgrad: bool = ..., adam_w_mode: bool = ...,
        optim_bits: int = ..., args: object = ..., min_8bit_size: int = ...,
        max_unorm: float | Tensor = ..., *, skip_zeros: bool = ..., is_paged: bool | str = ...,
        **options: Unpack[Options]
    ) -> None: ...

class _Takes6(RuleOptimizer):
    def __init__(
        self, params: ParamsT, lr: float | Tensor = ..., bias_correction: bool = ...,
        betas: Sequence[float] | str = ..., eps: float | Tensor = ...,
        weight_decay: float | Tensor = ..., amsgrad: bool = ..., adam_w_mode: bool = ...,
        args: object = ..., min_8bit_size: int = ..., max_unorm: float | Tensor = ..., *,
        skip_zeros: bool = ..., optim_bits: int = ..., is_paged: bool | str = ...,
        **options: Unpack[Options]
    ) -> None: ...

class _Takes7(RuleOptimizer):
    def __init__(
        self, params: ParamsT, lr: float | Tensor = ..., momentum: float | Tensor = ...,
        dampening: float | Tensor = ..., weight_decay: float | Tensor = ..., nesterov: bool = ...,
        optim_bits: int = ..., args: object = ..., min_8bit_size: int = ...,
        max_unorm: float | Tensor = ..., *, skip_zeros: bool = ..., is_paged: bool | str = ...,
        **options: Unpack[Options]
    ) -> None: ...

class _Takes8(RuleOptimizer):
    def __init__(
        self, params: ParamsT, lr: float | Tensor = ..., momentum: float | Tensor = ...,
        dampening: float | Tensor = ..., weight_decay: float | Tensor = ..., nesterov: bool = ...,
        args: object = ..., min_8bit_size: int = ..., max_unorm: float | Tensor = ..., *,
        skip_zeros: bool = ..., optim_bits: int = ..., is_paged: bool | str = ...,
        **options: Unpack[Options]
    ) -> None: ...

class _Takes9(RuleOptimizer):
    def __init__(
        self, params: ParamsT, lr: float | Tensor = ..., betas: Sequence[float] | str = ...,
        weight_decay: float | Tensor = ..., optim_bits: int = ..., args: object = ...,
        min_8bit_size: int = ..., is_paged: bool | str = ..., *, skip_zeros: bool = ...,
        max_unorm: float = ..., **options: Unpack[Options]
    ) -> None: ...

class _Takes10(RuleOptimizer):
    def __init__(
        self, params: ParamsT, lr: float | Tensor = ..., betas: Sequence[float] | str = ...,
        weight_decay: float | Tensor = ..., args: object = ..., min_8bit_size: int = ...,
        is_paged: bool | str = ..., *, skip_zeros: bool = ..., max_unorm: float = ...,
        optim_bits: int = ..., **options: Unpack[Options]
    ) -> None: ...

class _Takes11(Optimizer8bit):
    def __init__(
        self, optimizer_name: str, params: ParamsT, lr: float | Tensor = ...,
        betas: Sequence[float] | str = ..., eps: float = ..., weight_decay: float = ...,
        optim_bits: int = ..., args: object = ..., min_8bit_size: int = ...,
        max_unorm: float = ..., skip_zeros: bool = ..., is_paged: bool | str = ...,
        **options: Unpack[Options]
    ) -> None: ...

class _Takes12(Optimizer8bit):
    def __init__(
        self, optimizer_name: str, params: ParamsT, lr: float | Tensor = ...,
        betas: Sequence[float] | str = ..., eps: float = ..., weight_decay: float = ...,
        optim_bits: int = ..., args: object = ..., min_8bit_size: int = ...,
        max_unorm: float = ..., skip_zeros: bool = ..., is_paged: bool | str = ...,
        alpha: float = ..., t_alpha: float | None = ..., t_beta3: float | None = ...,
        **options: Unpack[Options]
    ) -> None: ...

class _Takes13(RuleOptimizer):
    def __init__(
        self, params: ParamsT, lr: float | Tensor = ..., betas: Sequence[float] | str = ...,
        eps: float | Tensor = ..., weight_decay: float | Tensor = ..., amsgrad: bool = ...,
        optim_bits: int = ..., args: object = ..., min_8bit_size: int = ..., *,
        skip_zeros: bool = ..., max_unorm: float = ..., is_paged: bool | str = ...,
        **options: Unpack[Options]
    ) -> None: ...

class _Takes14(RuleOptimizer):
    def __init__(
        self, params: ParamsT, lr: float | Tensor = ..., betas: Sequence[float] | str = ...,
        weight_decay: float | Tensor = ..., optim_bits: int = ..., args: object = ...,
        min_8bit_size: int = ..., *, skip_zeros: bool = ..., max_unorm: float = ...,
        is_paged: bool | str = ..., **options: Unpack[Options]
    ) -> None: ...

class _Takes15(RuleOptimizer):
    def __init__(
        self, params: ParamsT, lr: float | Tensor = ..., betas: Sequence[float] | str = ...,
        weight_decay: float | Tensor = ..., args: object = ..., min_8bit_size: int = ..., *,
        skip_zeros: bool = ..., max_unorm: float = ..., optim_bits: int = ...,
        is_paged: bool | str = ..., **options: Unpack[Options]
    ) -> None: ...

class _Takes16(RuleOptimizer):
    def __init__(
        self, params: ParamsT, lr: float | Tensor = ..., alpha: float | Tensor = ...,
        eps: float | Tensor = ..., weight_decay: float | Tensor = ...,
        momentum: float | Tensor = ..., centered: bool = ..., optim_bits: int = ...,
        args: object = ..., min_8bit_size: int = ..., *, skip_zeros: bool = ...,
        max_unorm: float = ..., is_paged: bool | str = ..., **options: Unpack[Options]
    ) -> None: ...

class _Takes17(RuleOptimizer):
    def __init__(
        self, params: ParamsT, lr: float | Tensor = ..., alpha: float | Tensor = ...,
        eps: float | Tensor = ..., weight_decay: float | Tensor = ...,
        momentum: float | Tensor = ..., centered: bool = ..., args: object = ...,
        min_8bit_size: int = ..., *, skip_zeros: bool = ..., max_unorm: float = ...,
        optim_bits: int = ..., is_paged: bool | str = ..., **options: Unpack[Options]
    ) -> None: ...

class _Takes18(RuleOptimizer):
    def __init__(
        self, params: ParamsT, lr: float | Tensor = ..., momentum: float | Tensor = ...,
        dampening: float | Tensor = ..., weight_decay: float | Tensor = ..., nesterov: bool = ...,
        optim_bits: int = ..., args: object = ..., min_8bit_size: int = ..., *,
        skip_zeros: bool = ..., max_unorm: float = ..., is_paged: bool | str = ...,
        **options: Unpack[Options]
    ) -> None: ...

class _Takes19(RuleOptimizer):
    def __init__(
        self, params: ParamsT, lr: float | Tensor = ..., momentum: float | Tensor = ...,
        dampening: float | Tensor = ..., weight_decay: float | Tensor = ..., nesterov: bool = ...,
        args: object = ..., min_8bit_size: int = ..., *, skip_zeros: bool = ...,
        max_unorm: float = ..., optim_bits: int = ..., is_paged: bool | str = ...,
        **options: Unpack[Options]
    ) -> None: ...

class _Takes20(RuleOptimizer):
    def __init__(
        self, params: ParamsT, lr: float | Tensor = ..., momentum: float | Tensor = ...,
        dampening: float | Tensor = ..., weight_decay: float | Tensor = ..., nesterov: bool = ...,
        max_unorm: float | Tensor = ..., *, min_8bit_size: int = ..., skip_zeros: bool = ...,
        args: object = ..., optim_bits: int = ..., is_paged: bool | str = ...,
        **options: Unpack[Options]
    ) -> None: ...

class _Takes21(RuleOptimizer):
    def __init__(
        self, params: ParamsT, lr: float | Tensor = ..., betas: Sequence[float] | str = ...,
        alpha: float | Tensor = ..., t_alpha: float | None = ..., t_beta3: float | None = ...,
        eps: float | Tensor = ..., weight_decay: float | Tensor = ..., optim_bits: int = ...,
        min_8bit_size: int = ..., *, skip_zeros: bool = ..., max_unorm: float = ...,
        args: object = ..., is_paged: bool | str = ..., **options: Unpack[Options]
    ) -> None: ...

class _Takes22(RuleOptimizer):
    def __init__(
        self, params: ParamsT, lr: float | Tensor = ..., betas: Sequence[float] | str = ...,
        alpha: float | Tensor = ..., t_alpha: float | None = ..., t_beta3: float | None = ...,
        eps: float | Tensor = ..., weight_decay: float | Tensor = ..., min_8bit_size: int = ...,
        *, skip_zeros: bool = ..., max_unorm: float = ..., args: object = ...,
        optim_bits: int = ..., is_paged: bool | str = ..., **options: Unpack[Options]
    ) -> None: ...

class AdEMAMix(_Takes0): ...
class AdEMAMix32bit(_Takes1): ...
class Adagrad(_Takes2): ...
class Adagrad32bit(_Takes2): ...
class Adagrad8bit(_Takes2): ...
class Adam(_Takes3): ...
class Adam32bit(_Takes4): ...
class Adam8bit(_Takes4): ...
class AdamW(_Takes4): ...
class AdamW32bit(_Takes4): ...
class AdamW8bit(_Takes4): ...
class LAMB(_Takes5): ...
class LAMB32bit(_Takes6): ...
class LAMB8bit(_Takes6): ...
class LARS(_Takes7): ...
class LARS32bit(_Takes8): ...
class LARS8bit(_Takes8): ...
class Lion(_Takes9): ...
class Lion32bit(_Takes10): ...
class Lion8bit(_Takes10): ...
class Optimizer1State(_Takes11): ...
class Optimizer2State(_Takes12): ...
class PagedAdagrad(_Takes2): ...
class PagedAdagrad32bit(_Takes2): ...
class PagedAdagrad8bit(_Takes2): ...
class PagedAdam(_Takes4): ...
class PagedAdam32bit(_Takes4): ...
class PagedAdam8bit(_Takes4): ...
class PagedAdamW(_Takes13): ...
class PagedAdamW32bit(_Takes13): ...
class PagedAdamW8bit(_Takes13): ...
class PagedLAMB(_Takes5): ...
class PagedLAMB32bit(_Takes6): ...
class PagedLAMB8bit(_Takes6): ...
class PagedLARS(_Takes7): ...
class PagedLARS32bit(_Takes8): ...
class PagedLARS8bit(_Takes8): ...
class PagedLion(_Takes14): ...
class PagedLion32bit(_Takes15): ...
class PagedLion8bit(_Takes15): ...
class PagedRMSprop(_Takes16): ...
class PagedRMSprop32bit(_Takes17): ...
class PagedRMSprop8bit(_Takes17): ...
class PagedSGD(_Takes18): ...
class PagedSGD32bit(_Takes19): ...
class PagedSGD8bit(_Takes19): ...
class PytorchLARS(_Takes20): ...
class RMSprop(_Takes16): ...
class RMSprop32bit(_Takes17): ...
class RMSprop8bit(_Takes17): ...
class SGD(_Takes18): ...
class SGD32bit(_Takes19): ...
class SGD8bit(_Takes19): ...
class AdEMAMix8bit(_Takes1, AdEMAMix): ...
class PagedAdEMAMix(_Takes21, AdEMAMix): ...
class PagedAdEMAMix32bit(_Takes22, AdEMAMix32bit): ...
class PagedAdEMAMix8bit(_Takes22, AdEMAMix8bit): ...
