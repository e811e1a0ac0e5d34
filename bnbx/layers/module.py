"""What quantized layers have in common: a frozen `weight` in codes, and its state dict.

The entries are those of bitsandbytes, for any type:

    weight                                    codes
    weight.absmax, weight.quant_map           scales and table
    weight.nested_absmax, ...nested_quant_map the same of the scales, if they are quantized
    weight.center, weight.tensor_scale        in types that have them
    weight.quant_state.bitsandbytes__nf4      JSON: type, block size, shape, dtype

A layer takes over what it loads: codes of any type, or dense numbers, which it quantizes if it is
quantized itself.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from typing_extensions import Self

from bnbx.errors import BnbxError, QuantizedDataError
from bnbx.kernels.coding import FLOATS
from bnbx.kernels.quant_state import QuantState
from bnbx.kernels.state_dict import PACKED, TENSORS, plain_tensor
from bnbx.layers.moving import MovingModule
from bnbx.layers.parameter import QuantParameter
from bnbx.layers.products import dense

WEIGHT = "weight"


class QuantizedModule(MovingModule):
    """Base of layers with a quantized weight.

    Attributes:
        quant_state: the weight's, for when a library takes it from there; None until quantized.
        fit: how scales are chosen, see `bnbx.kernels.fit`; None for absmax.
    """

    weight: Any
    quant_state: QuantState | None
    fit: str | None

    @property
    def weight_shape(self) -> tuple[int, ...]:
        """Of the dense weight."""
        raise NotImplementedError

    def __setattr__(self, name: str, value: Any) -> None:
        """As in torch; a weight that is shared brings its quantization state along."""
        super().__setattr__(name, value)
        if name == WEIGHT:
            self._note_state()

    def _note_state(self) -> None:
        state = getattr(self.weight, "quant_state", None)
        if isinstance(state, QuantState):
            self.quant_state = state

    def state_of_weight(self) -> QuantState:
        """The quantization state of the weight, wherever libraries have left it.

        Raises:
            QuantizedDataError: it is not quantized yet.
        """
        state = getattr(self.weight, "quant_state", None)
        if state is None:
            state = self.quant_state
        if state is None:
            raise QuantizedDataError(
                f"the weight of this {type(self).__name__} is not quantized yet: move the layer to "
                'a device, such as .to("cpu") or .cuda(), after its weights are loaded'
            )
        found: QuantState = state
        codes = self.weight.device
        # accelerate brings codes to another device for a call, and what belongs to them only where
        # a parameter's class is called Params4bit.
        stays = codes == found.absmax.device or "meta" in (codes.type, found.absmax.device.type)
        return found if stays else found.on(codes)

    def dequantized_weight(self, dtype: torch.dtype | None = None) -> Tensor:
        """The dense weight, in the dtype that it had or in another."""
        weight: Any = self.weight
        if isinstance(weight, QuantParameter) and not weight.bnb_quantized:
            return weight.dequantize(dtype)
        state, codes = self.state_of_weight(), weight.detach()
        state.check(codes)
        return dense(codes, state, dtype)

    def how(self) -> str:
        """How the weight is kept, in words."""
        weight = self.weight
        if not isinstance(weight, QuantParameter):
            return "weight is kept elsewhere"
        quantized = "" if weight.bnb_quantized else ", not quantized yet"
        return weight.encoding.describe() + quantized

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """As in torch; a change of dtype reaches what the weight is dequantized to."""
        before = self.weight.device
        super()._apply(fn, recurse)
        self._note_state()
        state, device = self.quant_state, self.weight.device
        if state is not None and state.absmax.device != device:
            # A weight that lost its class has left it behind. Of codes that an offloading library
            # has put on the meta device, and will bring back, it stays where it is.
            if "meta" not in (device.type, state.absmax.device.type):
                state.to(device)
            elif device != before:
                self.quant_state = state.on(device)
        follow_dtype(self.quant_state, fn)
        return self

    # ---- state dicts

    def _save_to_state_dict(
        self, destination: dict[str, Any], prefix: str, keep_vars: bool
    ) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        state = getattr(self.weight, "quant_state", None) or self.quant_state
        save_state(state, destination, f"{prefix}{WEIGHT}.", keep_vars)

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        key = prefix + WEIGHT
        beside = {name: value for name, value in state_dict.items() if is_beside(name, key)}
        given = state_dict.get(key)
        taken = False
        if isinstance(given, Tensor):
            assign = bool(local_metadata.get("assign_to_params_buffers", False))
            try:
                taken = load_weight(self, WEIGHT, self.weight_shape, given, beside, assign)
            except BnbxError as error:
                error_msgs.append(f"{key}: {error}")
                taken = True
        rest = {
            name: value
            for name, value in state_dict.items()
            if name not in beside and not (taken and name == key)
        }
        lacking: list[str] = []
        super()._load_from_state_dict(
            rest, prefix, local_metadata, strict, lacking, unexpected_keys, error_msgs
        )
        if given is None:
            # A file may hold a shared weight once, and what lies beside it too.
            own: dict[str, Any] = {}
            save_state(getattr(self.weight, "quant_state", None), own, f"{key}.", keep_vars=False)
            lacking += [name for name in own if name not in beside]
        missing_keys += [name for name in lacking if not (taken and name == key)]


def is_beside(name: str, key: str) -> bool:
    """Whether an entry of a state dict belongs to the quantized parameter with this key."""
    if not name.startswith(f"{key}."):
        return False
    rest = name[len(key) + 1 :]
    return rest in TENSORS or rest.startswith(PACKED)


def follow_dtype(state: QuantState | None, fn: Callable[[Tensor], Tensor]) -> None:
    """Let a conversion of a module reach what its codes are dequantized to."""
    if state is not None and state.dtype is not None:
        dtype = fn(torch.empty(0, dtype=state.dtype, device=state.absmax.device)).dtype
        state.dtype = dtype if dtype in FLOATS else state.dtype


def save_state(
    state: QuantState | None, destination: dict[str, Any], prefix: str, keep_vars: bool
) -> None:
    """Add the entries of a quantization state to a state dict."""
    if state is None:
        return
    for key, value in state.as_dict(packed=True).items():
        destination[prefix + key] = value if keep_vars else value.detach()


def load_weight(
    module: torch.nn.Module,
    name: str,
    shape: Sequence[int],
    given: Any,
    beside: Mapping[str, Any],
    assign: bool,
) -> bool:
    """Load a quantized parameter from the entries of a state dict; False if torch may do it.

    Args:
        module: holds the parameter.
        name: its attribute.
        shape: of the dense numbers.
        given: the entry of the parameter itself.
        beside: the entries that belong to it; keys begin with its key.
        assign: keep the memory that is given, as in `load_state_dict(assign=True)`.

    Raises:
        BnbxError: the entries do not fit one another, or not the parameter.
    """
    param: Any = getattr(module, name)
    if any(PACKED in key for key in beside):
        codes = plain_tensor("the weight", given)
        _load_codes(module, name, param, shape, codes, beside, assign)
        return True
    if beside:
        raise QuantizedDataError(
            f"{', '.join(sorted(beside))} without an entry that ends in {PACKED!r} and the name of "
            "the quant type"
        )
    if not isinstance(param, QuantParameter):
        return False
    given = plain_tensor("the weight", given, meta=not param.bnb_quantized, repeats=True)
    if not given.is_floating_point() or (param.bnb_quantized and given.shape == param.shape):
        raise QuantizedDataError(
            f"{given.dtype} of shape {tuple(given.shape)} without a quantization state beside it, "
            f"an entry that ends in {PACKED!r} and the name of the quant type"
        )
    if not param.bnb_quantized and not assign:
        return False  # torch copies them, and says what does not fit
    if given.shape != torch.Size(shape):
        raise QuantizedDataError(
            f"dense numbers of shape {tuple(given.shape)}; expected {tuple(shape)}"
        )
    _load_dense(module, name, param, given, assign)
    return True


def _load_codes(
    module: torch.nn.Module,
    name: str,
    param: Tensor,
    shape: Sequence[int],
    given: Tensor,
    beside: Mapping[str, Any],
    assign: bool,
) -> None:
    if param.is_meta and not assign:
        raise QuantizedDataError(
            "the layer is on the meta device, where nothing can be copied to; pass assign=True to "
            "load_state_dict, or call to_empty(device=...) first"
        )
    kind = type(param) if isinstance(param, QuantParameter) else QuantParameter
    state = QuantState.from_dict(beside, given.device if assign else param.device)
    if state.shape != torch.Size(shape):
        found = None if state.shape is None else tuple(state.shape)
        raise QuantizedDataError(f"a weight of shape {found}; expected {tuple(shape)}")
    if not assign:
        state, given = copy.deepcopy(state), given.detach().to(param.device, copy=True)
    new = kind.from_prequantized(given, state, module=module)
    if isinstance(param, QuantParameter) and not assign and not param.is_meta:
        param.adopt(new.detach(), state)
    else:
        setattr(module, name, new)
    module.quant_state = state  # type: ignore[assignment]


def _load_dense(
    module: torch.nn.Module, name: str, param: QuantParameter, given: Tensor, assign: bool
) -> None:
    """Dense numbers, quantized if the parameter is."""
    settings = {**param._settings(), "quant_state": None, "bnb_quantized": False}
    state = param.quant_state
    if not param.bnb_quantized or state is None:
        setattr(module, name, type(param)(given, **settings))
        return
    dense = given if assign or state.dtype is None else given.to(state.dtype)
    new = type(param)(dense, **settings)
    new.quantize(given.device if assign else param.device, getattr(module, "fit", None))
    assert new.quant_state is not None
    if assign:
        setattr(module, name, new)
    else:
        param.adopt(new.detach(), new.quant_state)
