"""Any parameter of any module in codes: `replace_parameter`.

Mixtures of experts keep all their weights in one n-D parameter, which no linear layer holds.
`torch.nn.utils.parametrize` lets the module go on reading it by its name, as dense numbers (see
`bnbx.layers.stacked`); what is kept, moved and saved are the codes. State dicts have the entries
that layers have: `name`, `name.absmax`, `name.quant_state.bitsandbytes__nf4`, and so on.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from typing_extensions import Self

from bnbx.errors import BnbxError, OptionError, UnknownNameError
from bnbx.kernels.fit import check_method
from bnbx.kernels.quant_state import QuantState
from bnbx.layers import ops
from bnbx.layers.module import follow_dtype, is_beside, load_weight, save_state
from bnbx.layers.moving import MovingModule
from bnbx.layers.parameter import QuantParameter
from bnbx.layers.reclass import change_class, class_of
from bnbx.layers.stacked import Stacked
from bnbx.registry import QuantType
from bnbx.registry.names import nearest

ORIGINAL = "original"
# Of what a module keeps, that which registering a parametrization changes.
_REGISTRIES = ("_parameters", "_modules", "_state_dict_hooks", "_load_state_dict_pre_hooks")


class Dequantized(nn.Module):
    """The parametrization: from codes to what the module reads.

    Attributes:
        quant_state: of the codes.
    """

    def __init__(self, quant_state: QuantState | None) -> None:
        super().__init__()
        self.quant_state = quant_state

    def forward(self, codes: Tensor) -> Tensor:
        """The numbers; in codes still, until something needs them."""
        state = getattr(codes, "quant_state", None) or self.quant_state
        if state is None:
            return codes  # not quantized yet
        memory = codes.detach()
        if memory.is_meta or torch.compiler.is_compiling():
            found: Tensor = ops.dequantize(
                state.parts(memory), state.label, state.shape or (), state.dtype or torch.float32
            )
            return found
        self.quant_state = state
        return Stacked.of(memory, state)

    def extra_repr(self) -> str:
        """How the parameter is kept."""
        state = self.quant_state
        return "not quantized yet" if state is None else state.encoding.describe()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """As in torch; a change of dtype reaches what the codes are dequantized to."""
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        follow_dtype(self.quant_state, fn)
        return self


class _Holder(MovingModule, parametrize.ParametrizationList):
    """What torch holds a parametrized parameter in; the parameter keeps its class where it goes.

    Attributes:
        fit: how scales are chosen where dense numbers come, see `bnbx.kernels.fit`.
        quant_state: the parameter's, which is told of it as layers are.
    """

    fit: str | None = None
    quant_state: QuantState | None = None

    def right_inverse(self, value: Any) -> None:
        """Take dense numbers over: what torch calls where a tensor is assigned.

        Raises:
            QuantizedDataError: their shape is another, or they are no plain floats.
        """
        param: QuantParameter = getattr(self, ORIGINAL)
        if not load_weight(self, ORIGINAL, _shape(param), value, {}, assign=False):
            with torch.no_grad():
                param.copy_(value)

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, *others: Any, **named: Any
    ) -> None:
        """Nothing where `_load` has done it, which knows entries by the parameter's own name."""
        if f"{prefix}{ORIGINAL}" in state_dict:
            super()._load_from_state_dict(state_dict, prefix, *others, **named)


def replace_parameter(
    module: nn.Module,
    name: str,
    quant_type: str | QuantType = "nf4",
    block_size: int | None = None,
    double: bool = False,
    *,
    fit: str | None = None,
    kind: type[QuantParameter] = QuantParameter,
) -> QuantParameter:
    """Quantize a parameter, of any shape, that is an attribute of a module.

    Args:
        module: holds the parameter itself, not in a child.
        name: the attribute.
        quant_type: name of a registered type, or a spec.
        block_size: elements that share a scale; the type's own by default.
        double: whether scales are quantized too.
        fit: how scales are chosen, see `bnbx.kernels.fit`; None for absmax.
        kind: the class of the parameter that holds the codes.

    Returns:
        That parameter, `module.parametrizations[name].original`.

    Raises:
        UnknownNameError: the module has no such parameter, or there is no such quant type.
        OptionError: it is parametrized already, or there is no such `fit`.
        UnsupportedTensorError: it is not float32, bfloat16 or float16.
    """
    check_method(fit)
    param = parameter_of(module, name)
    new = kind(param, quant_type=quant_type, blocksize=block_size, compress_statistics=double)
    if not param.is_meta:
        new.quantize(fit=fit)
    keep_in_codes(module, name, new, fit)
    return new


def keep_in_codes(
    module: nn.Module, name: str, param: QuantParameter, fit: str | None = None
) -> None:
    """Let a parameter in codes, or to be in codes, stand for a module's parameter."""
    change_class(module, class_of(module))
    module._parameters[name] = param
    parametrize.register_parametrization(module, name, Dequantized(param.quant_state), unsafe=True)
    holder: Any = module.parametrizations[name]  # type: ignore[index]
    holder.__class__ = _Holder
    holder.fit = fit
    if param.module is None or isinstance(param.module, _Holder):
        param.module = holder
    type.__setattr__(type(module), "__reduce_ex__", _reduce)
    type.__setattr__(type(module), "register_parameter", _register)
    if any(_is_ours(hook, name) for hook in module._state_dict_hooks.values()):
        return
    hooked: Any = module
    hooked._register_state_dict_hook(partial(_save, name=name))
    hooked.register_load_state_dict_pre_hook(partial(_load, name=name))


def restore_parameter(
    module: nn.Module,
    name: str,
    dtype: torch.dtype | None = None,
    *,
    dense: nn.Parameter | None = None,
) -> nn.Parameter:
    """Undo `replace_parameter`: the parameter is dense and frozen.

    Args:
        module: holds the parameter.
        name: the attribute.
        dtype: of the dense numbers; by default the one that they had.
        dense: the parameter to be instead.

    Raises:
        UnknownNameError: no such parameter is in codes.
    """
    param = coded_parameter(module, name)
    if param is None:
        raise UnknownNameError(f"{type(module).__name__} has no parameter {name!r} in codes")
    if dense is None:
        dense = nn.Parameter(param.dequantize(dtype), requires_grad=False)
    change_class(module, class_of(module))
    holder: Any = module.parametrizations[name]  # type: ignore[index]
    parametrize.remove_parametrizations(module, name, leave_parametrized=False)
    holder._parameters.clear()  # it and the codes know one another: no cycle may keep them
    setattr(module, name, dense)
    return dense


def _register(module: Any, name: str, param: nn.Parameter | None) -> None:
    """As `register_parameter`, to which assigning a parameter leads; one in codes stays."""
    if coded_parameter(module, name) is not None:
        kind = class_of(module).__name__
        raise OptionError(
            f"{kind}.{name} is kept in codes, and cannot be another parameter: assign a tensor, "
            "which is quantized (.detach() of a parameter is one), or make it dense first, with "
            f"bnbx.nn.restore_parameter(module, {name!r}) or bnbx.dequantize_"
        )
    super(type(module), module).register_parameter(name, param)  # of the class below torch's


def _reduce(module: Any, protocol: Any) -> tuple[Any, ...]:
    """What pickle keeps of a module with parameters in codes: its own class, and what is in it.

    torch refuses parametrized modules, since what computes a parameter may be anything; here it is
    known.
    """
    del protocol
    kind: Any = class_of(module)
    if len(coded_parameters(module)) < len(module.parametrizations):
        module.__getstate__()  # another's is among them: torch's error
    own = getattr(kind, "__getstate__", None)  # of any class since Python 3.11
    return _blank, (kind,), own(module) if own else module.__dict__


def _blank(kind: Any) -> nn.Module:
    """A module that waits for what `_reduce` told of it."""
    waiting: Any = type(kind.__name__, (kind,), {"__setstate__": _fill})
    module: nn.Module = waiting.__new__(waiting)
    return module


def _fill(module: Any, state: dict[str, Any]) -> None:
    module.__class__ = type(module).__base__
    # `state` is a live module's where a module is copied by `copy.copy`
    module.__setstate__({k: copy.copy(v) if k in _REGISTRIES else v for k, v in state.items()})
    for hooks in (module._state_dict_hooks, module._load_state_dict_pre_hooks):
        for key in [key for key, hook in hooks.items() if _is_ours(hook)]:
            del hooks[key]
    for name, holder in module._modules.pop("parametrizations").items():
        keep_in_codes(module, name, getattr(holder, ORIGINAL), holder.fit)


def coded_parameter(module: nn.Module, name: str) -> QuantParameter | None:
    """The parameter that holds the codes of a replaced one; None if it is not replaced."""
    if not parametrize.is_parametrized(module, name):
        return None
    found: Any = module.parametrizations[name]  # type: ignore[index]
    if not any(isinstance(each, Dequantized) for each in found):
        return None
    original = getattr(found, ORIGINAL)
    return original if isinstance(original, QuantParameter) else None


def coded_parameters(module: nn.Module) -> dict[str, QuantParameter]:
    """All of them, by name."""
    if not parametrize.is_parametrized(module):
        return {}
    names = list(module.parametrizations)  # type: ignore[arg-type]
    found = {name: coded_parameter(module, name) for name in names}
    return {name: param for name, param in found.items() if param is not None}


def parameter_of(module: nn.Module, name: str) -> nn.Parameter:
    """The parameter that is an attribute of a module.

    Raises:
        UnknownNameError: there is none.
        OptionError: it is parametrized.
    """
    if parametrize.is_parametrized(module, name):
        raise OptionError(f"{type(module).__name__}.{name} is parametrized already")
    found = module._parameters.get(name)
    if found is None:
        known = [key for key, value in module._parameters.items() if value is not None]
        raise UnknownNameError(
            f"{type(module).__name__} has no parameter {name!r}{nearest(name, known)}; it has: "
            f"{', '.join(known) or '(none)'}"
        )
    return found


def _shape(param: QuantParameter) -> tuple[int, ...]:
    """Of the dense numbers."""
    return tuple(param.shape if param.quant_state is None else param.quant_state.shape or ())


# ---- state dicts


def _is_ours(hook: Any, name: str | None = None) -> bool:
    """Whether a hook is `_save` or `_load`; of this parameter, if there is a name."""
    hook = getattr(hook, "hook", hook)
    ours = isinstance(hook, partial) and hook.func in (_save, _load)
    return ours and name in (None, hook.keywords["name"])


def _save(
    module: nn.Module, state_dict: dict[str, Any], prefix: str, metadata: Any, *, name: str
) -> None:
    """Entries under the parameter's own name."""
    del metadata
    inner = f"{prefix}parametrizations.{name}.{ORIGINAL}"
    param = coded_parameter(module, name)
    if param is None or inner not in state_dict:
        return
    codes = state_dict.pop(inner)
    state_dict[f"{prefix}{name}"] = codes
    keep_vars = isinstance(codes, QuantParameter)
    save_state(param.quant_state, state_dict, f"{prefix}{name}.", keep_vars)


def _load(
    module: nn.Module,
    state_dict: dict[str, Any],
    prefix: str,
    local_metadata: Mapping[str, Any],
    strict: bool,
    missing_keys: list[str],
    unexpected_keys: list[str],
    error_msgs: list[str],
    *,
    name: str,
) -> None:
    """Entries under the parameter's own name; codes, or dense numbers."""
    key = f"{prefix}{name}"
    above = f"{prefix}parametrizations.{name}."
    param = coded_parameter(module, name)
    if param is None or (key not in state_dict and above + ORIGINAL in state_dict):
        return
    beside = {k: state_dict.pop(k) for k in list(state_dict) if is_beside(k, key)}
    if key not in state_dict:
        own: dict[str, Any] = {}
        save_state(param.quant_state, own, f"{key}.", keep_vars=False)
        missing_keys += [key, *(entry for entry in own if entry not in beside)]
        return
    given = state_dict.pop(key)
    holder: Any = module.parametrizations[name]  # type: ignore[index]
    assign = bool(local_metadata.get("assign_to_params_buffers", False))
    try:
        if not load_weight(holder, ORIGINAL, _shape(param), given, beside, assign):
            said: list[str] = []
            entry = {above + ORIGINAL: given}
            holder._load_from_state_dict(
                entry, above, local_metadata, strict, missing_keys, unexpected_keys, said
            )
            error_msgs += [each.replace(above + ORIGINAL, key) for each in said]
    except BnbxError as error:
        error_msgs.append(f"{key}: {error}")
    found = getattr(holder, ORIGINAL)
    for each in holder:
        if isinstance(each, Dequantized):
            each.quant_state = getattr(found, "quant_state", None)
