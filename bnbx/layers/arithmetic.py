"""Which functions of torch mean the numbers of a parameter in codes, and which mean its memory.

The memory of such a parameter is codes, and libraries read, cut, copy and compare it by torch's own
functions: `view`, `cat`, `copy_`, `torch.equal`. Arithmetic on codes would give numbers that mean
nothing, without a word. So arithmetic, products, reductions and rows by index are done with the
dense numbers, and what would write such a result into codes is refused.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

from bnbx.errors import QuantizedDataError

_SCALING = "mul multiply div divide true_divide truediv"
_ELEMENTWISE = (
    "add sub subtract rsub floor_divide floordiv remainder fmod mod pow float_power addcmul "
    "addcdiv lerp maximum minimum fmax fmin lt le gt ge less less_equal greater greater_equal "
    "neg negative abs absolute positive pos reciprocal sqrt rsqrt square exp exp2 expm1 log "
    "log2 log10 log1p sin cos tan tanh sinh cosh asin acos atan atan2 erf erfc sign sgn signbit "
    "floor ceil round trunc frac clamp clip clamp_min clamp_max sigmoid logit relu softmax "
    "log_softmax hypot copysign where masked_fill nan_to_num isnan isinf isfinite bernoulli "
    "logaddexp heaviside"
)
_PRODUCTS = (
    "matmul mm bmm mv dot vdot inner outer ger einsum tensordot addmm addbmm baddbmm addmv addr "
    "chain_matmul kron cross cdist bilinear conv1d conv2d conv3d cosine_similarity"
)
_REDUCTIONS = (
    "sum nansum mean nanmean std var std_mean var_mean norm max min amax amin aminmax argmax "
    "argmin argsort sort topk kthvalue median nanmedian mode quantile nanquantile prod cumsum "
    "cumprod cummax cummin logsumexp logcumsumexp renorm dist trace det logdet inverse pinverse "
    "svd qr cholesky histc cov corrcoef count_nonzero all any"
)
_ROWS = (
    "index_select select take gather take_along_dim unbind iter unsqueeze expand expand_as "
    "repeat repeat_interleave tile broadcast_to broadcast_tensors index_add index_copy "
    "index_fill scatter scatter_add roll flip diagonal diag tril triu masked_select"
)
_FILLS = "fill zero normal uniform log_normal exponential cauchy geometric random"

MEMORY, NUMBERS, SCALES, ENTRY, WRITES, COPY, SETS_DATA = range(7)
_FUNCTIONAL = torch.nn.functional
_MODULES = (_FUNCTIONAL, torch.linalg, torch.special, torch.fft)


def _functions(names: str) -> Iterable[Any]:
    """Functions of these names, and the methods that Python's operators call."""
    return _called(names, "{}", "__{}__", "__r{}__")


def _in_place(names: str) -> Iterable[Any]:
    return _called(names, "{}_", "__i{}__")


def _called(names: str, *forms: str) -> Iterable[Any]:
    for owner in (torch, Tensor, _FUNCTIONAL):
        called = [
            getattr(owner, form.format(name), None) for name in names.split() for form in forms
        ]
        yield from filter(callable, called)


def _all_of(module: ModuleType) -> Iterable[Any]:
    return (each for name, each in vars(module).items() if callable(each) and name[0] != "_")


def _kinds() -> Mapping[Any, int]:
    """What each function means; later lines take precedence."""
    numeric = " ".join((_SCALING, _ELEMENTWISE, _PRODUCTS, _REDUCTIONS, _ROWS))
    found: dict[Any, int] = {}
    for module in _MODULES:
        found.update(dict.fromkeys(_all_of(module), NUMBERS))
    found.update(dict.fromkeys(_functions(numeric), NUMBERS))
    found.update(dict.fromkeys(_functions(_SCALING), SCALES))
    found.update(dict.fromkeys(_in_place(f"{numeric} {_FILLS}"), WRITES))
    found.update((each, WRITES) for each in _all_of(torch.nn.init) if each.__name__[-1] == "_")
    found[Tensor.__getitem__] = ENTRY
    found[Tensor.__setitem__] = WRITES
    found[Tensor.copy_] = COPY
    found[_FUNCTIONAL.pad] = MEMORY  # of a piece, so that pieces are of one size
    found[Tensor.data.__set__] = SETS_DATA  # type: ignore[attr-defined]
    return found


_KINDS = _kinds()


def kind_of(func: Any) -> int:
    """What a function of torch means of a parameter in codes."""
    return _KINDS.get(func, MEMORY)


# torch.compile takes the answer for the constant that it is, and need not trace the table.
kind_of._dynamo_marked_constant = True  # type: ignore[attr-defined]


class Coded:
    """Base of parameters whose memory may be codes."""

    scaled_by_hand = False
    """Whether users multiply codes with scales themselves, which then stays possible."""

    @property
    def in_codes(self) -> bool:
        """Whether the memory is codes, and what they stand for is known."""
        raise NotImplementedError

    def numbers(self, dtype: torch.dtype | None) -> Tensor:
        """The dense numbers, or a tensor that is decoded when they are needed.

        Args:
            dtype: for those that do not know which one they had.
        """
        raise NotImplementedError

    def entries(self, index: Any) -> Tensor:
        """What `[index]` gives of the dense numbers."""
        raise NotImplementedError

    def codes_again(self: Any, data: Tensor) -> Tensor | None:
        """The codes in `data`, if it is those of the parameter, converted to a float dtype."""
        codes = self.detach()
        if codes.is_floating_point() or not data.is_floating_point() or data.shape != codes.shape:
            return None
        if data.is_meta or codes.is_meta:
            return None
        found = codes.to(data.device)
        return found if torch.equal(found.to(data.dtype), data.detach()) else None


def in_numbers(
    func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any] | None
) -> Callable[[], Any] | None:
    """What to call in place of a function of torch that means numbers, where there are codes.

    Raises:
        QuantizedDataError: it would write numbers into codes.
    """
    kind = kind_of(func)
    if kind in (MEMORY, SETS_DATA):
        return None
    named = kwargs or {}
    target = next(iter((*args, *named.values()))) if kind == WRITES else named.get("out")
    if _coded(target):
        raise QuantizedDataError(_refusal(target, func))
    if kind == ENTRY:
        found, index = args
        return (lambda: found.entries(index)) if _coded(found) else None
    if kind == COPY and not _widens(*args[:2]):
        return None
    coded = [each for each in tree_leaves((args, named)) if _coded(each)]
    if not coded or (kind == SCALES and all(each.scaled_by_hand for each in coded)):
        return None
    dtype = _dtype_beside(args, named)

    def numbers(value: Any) -> Any:
        return value.numbers(dtype) if _coded(value) else value

    return lambda: func(*tree_map(numbers, args), **tree_map(numbers, dict(named)))


def _coded(value: Any) -> bool:
    return isinstance(value, Coded) and value.in_codes


def _widens(to: Any, source: Any = None, *others: Any) -> bool:
    """Whether codes in integers are copied to floats, which cannot mean the codes."""
    del others
    floats = not _coded(to) and to.is_floating_point()
    return bool(floats and _coded(source) and not source.is_floating_point())


def _dtype_beside(*values: Any) -> torch.dtype | None:
    """Dtype of the first dense floating tensor."""
    for each in tree_leaves(values):
        if isinstance(each, Tensor) and not _coded(each) and each.is_floating_point():
            return each.dtype
    return None


def _refusal(target: Any, func: Any) -> str:
    name = getattr(func, "__name__", str(func))
    return (
        f"{name}: the memory of this {type(target).__name__} is {target.dtype} codes, and cannot "
        "hold what numbers become. For a dense copy use layer.dequantized_weight(), which "
        "layer.load_state_dict takes back; for the codes themselves, weight.data"
    )
