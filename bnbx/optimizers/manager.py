"""`GlobalOptimManager`: overrides for single parameters, given from anywhere in a program.

Libraries that build the model, or receive the optimizer ready-made, have no other place to say
"keep this embedding's states in 32 bits". The manager only keeps what was said; what it means is
decided where all other values are, in `bnbx.registry.config.resolve`, as the last and strongest
layers. Overrides may be given before or after the optimizer exists, and before or after
`module.to(...)`. Nothing is kept alive by being registered, and nothing is found by its `id`.
"""

from __future__ import annotations

import sys
import threading
import warnings
from collections.abc import Iterable, Mapping, MutableMapping
from dataclasses import dataclass, field
from itertools import groupby
from types import FrameType
from typing import Any, ClassVar

from torch import Tensor
from torch.nn import Module
from torch.nn.utils.parametrize import is_parametrized
from torch.utils.weak import WeakIdKeyDictionary

from bnbx.errors import BnbxWarning, OptionError, SingletonError, UnknownNameError
from bnbx.registry import optimizers
from bnbx.registry.config import Layer
from bnbx.registry.names import nearest
from bnbx.registry.options import ALIASES, OPTIONS, unaliased

UNSET: Any = object()
"""Stands for a value that was not given; None is a value (`state_types=None`)."""


@dataclass(frozen=True)
class _Setting:
    """One overridden argument; `serial` tells which of two came later."""

    serial: int
    origin: str
    key: str
    value: Any


Settings = dict[str, _Setting]
Overrides = list[tuple[Tensor, tuple[Layer, ...]]]


@dataclass
class _ModuleOverride:
    """Settings for whatever tensor is an attribute of a module at the time of asking."""

    settings: Settings = field(default_factory=dict)
    found: bool = False
    warned: bool = False


class GlobalOptimManager:
    """The one place of this process for overrides of single parameters.

        manager = GlobalOptimManager.get_instance()
        manager.override_config(model.lm_head.weight, "bits", 32)
        manager.override_config([p, q], key_value_dict={"lr": 1e-4, "weight_decay": 0.0})
        manager.register_module_override(model.embed, "weight", {"bits": 32})

    Keys are a rule's arguments and the options of `bnbx.optim.create`, or bitsandbytes' names for
    them (`optim_bits`). Of two overrides of one key the later wins. An override outlives
    optimizers: a later optimizer over the same parameter gets it too.

    An override of a parameter follows the `torch.nn.Parameter` object, which `module.to(...)`
    keeps. Where it is replaced by another (`torch.__future__.set_overwrite_module_params_on_`
    `conversion`, XLA, FSDP), override the module's attribute instead, which is looked up anew.
    The same holds under `torch.__future__.set_swap_module_params_on_conversion`: torch swaps no
    tensor that is referred to weakly, as one with an override is ("Couldn't swap ...").

    Copies of an optimizer (deepcopy, pickle) give their parameters the overrides that the
    original's had.
    """

    _instance: ClassVar[GlobalOptimManager | None] = None
    _creation: ClassVar[threading.Lock] = threading.Lock()
    _lock: threading.RLock
    _version: int
    _tensors: MutableMapping[Tensor, Settings]
    _modules: MutableMapping[Module, dict[str, _ModuleOverride]]

    def __init__(self) -> None:
        raise SingletonError(
            "there is one GlobalOptimManager in a process; "
            "call GlobalOptimManager.get_instance() to get it"
        )

    @classmethod
    def get_instance(cls) -> GlobalOptimManager:
        """The manager of this process."""
        with GlobalOptimManager._creation:
            found = GlobalOptimManager._instance
            if found is None:
                found = object.__new__(GlobalOptimManager)
                found._lock = threading.RLock()
                found._version = 0
                found.initialize()
                GlobalOptimManager._instance = found
            return found

    def initialize(self) -> None:
        """Forget every override."""
        with self._lock:
            self._tensors = WeakIdKeyDictionary()
            self._modules = WeakIdKeyDictionary()
            self._version += 1

    # ---- what users say

    def register_parameters(self, params: Any) -> None:
        """Accept parameters, as bitsandbytes asks for before the model moves to its device.

        bnbx needs no registration, so nothing is kept; calls written for bitsandbytes work.

        Args:
            params: parameters, named parameters or groups of them, as for a torch optimizer.

        Raises:
            OptionError: these are no parameters.
        """
        tensors_in(params, "register_parameters")

    def override_config(
        self,
        parameters: Any,
        key: str | None = None,
        value: Any = UNSET,
        key_value_dict: Mapping[str, Any] | None = None,
    ) -> None:
        """Give arguments other values for some parameters; see the class.

        Args:
            parameters: a tensor, or tensors, named parameters or groups of them.
            key: the argument to override, with `value`; or else
            value: its value.
            key_value_dict: several arguments with their values.

        Raises:
            UnknownNameError: no registered rule has such an argument; with the nearest name.
            OptionError: these are no parameters, or the call gives no override or two.
        """
        call = "override_config"
        if key_value_dict is not None and (key is not None or value is not UNSET):
            raise OptionError(_label(call) + ": give key and value, or key_value_dict, not both")
        if key_value_dict is None:
            if key is None or value is UNSET:
                given = f"key={key!r} without a value" if key is not None else "no key"
                raise OptionError(
                    f"{_label(call)}: {given}; expected override_config(params, 'bits', 32) or "
                    "override_config(params, key_value_dict={'bits': 32})"
                )
            key_value_dict = {key: value}
        config = _checked(call, key_value_dict)
        tensors = tensors_in(parameters, call)
        with self._lock:
            self._version += 1
            for tensor in tensors:
                self._put(self._tensors.setdefault(tensor, {}), _label(call), config)

    def register_module_override(
        self, module: Module, param_name: str, config: Mapping[str, Any]
    ) -> None:
        """Give arguments other values for the parameter that is an attribute of a module.

        The attribute is looked up whenever an optimizer asks, so it may be set later (by a module
        that registers itself early in `__init__`) or be replaced.

        Args:
            module: holds the parameter itself, not in a child.
            param_name: the attribute, such as "weight".
            config: arguments with their values.

        Raises:
            UnknownNameError: the module, which is complete, has no such attribute, or no
                registered rule such an argument; with the nearest name.
            OptionError: a value of the wrong kind.
        """
        call = "register_module_override"
        if not isinstance(module, Module):
            raise OptionError(f"{_label(call)}: module is {module!r}; expected a torch.nn.Module")
        if not isinstance(param_name, str):
            raise OptionError(f"{_label(call)}: param_name={param_name!r}; expected a string")
        checked = _checked(call, config)
        label = f"{_label(call)}({type(module).__name__}, {param_name!r})"
        found = _attribute(module, param_name)
        if found is None and not _in_construction(module):
            raise UnknownNameError(f"{label}: {_no_attribute(module, param_name)}")
        with self._lock:
            self._version += 1
            overrides = self._modules.setdefault(module, {})
            override = overrides.setdefault(param_name, _ModuleOverride())
            override.found |= found is not None
            self._put(override.settings, label, checked)

    def _put(self, settings: Settings, origin: str, config: Mapping[str, Any]) -> None:
        for key, value in config.items():
            settings[key] = _Setting(self._version, origin, key, value)

    # ---- what optimizers ask

    @property
    def empty(self) -> bool:
        """Whether there is no override for any living parameter or module."""
        return not self._tensors and not self._modules

    @property
    def version(self) -> int:
        """Changes with every override. An optimizer asks anew then, and for new parameters.

        A module whose parameter is replaced changes nothing here: the new one is new to every
        optimizer that gets it.
        """
        return self._version

    def layers_for(self, p: Tensor) -> tuple[Layer, ...]:
        """The overrides of `p` as layers for `resolve`, from the oldest to the newest.

        Each is (origin, {argument: value}). Warns once about a module that registered an attribute
        and still does not have it.
        """
        with self._lock:
            settings = list(self._tensors.get(p, {}).values())
            for module, overrides in list(self._modules.items()):
                for name, override in overrides.items():
                    if _holds(module, name, override, p):
                        settings += override.settings.values()
        settings.sort(key=lambda setting: setting.serial)
        return tuple(
            (origin, {setting.key: setting.value for setting in together})
            for origin, together in groupby(settings, lambda setting: setting.origin)
        )

    def overrides_of(self, params: Iterable[Tensor]) -> Overrides:
        """The layers of those parameters that have any; see `adopt`."""
        if self.empty:
            return []
        return [(p, layers) for p in params if (layers := self.layers_for(p))]

    def adopt(self, overrides: Overrides) -> None:
        """Give copies of parameters what `overrides_of` found for the originals.

        What a parameter has already, since it is no copy or its module has spoken, stays as it is.
        """
        with self._lock:
            for p, layers in overrides:
                held, wanted = _merged(self.layers_for(p)), _merged(layers)
                new = {key for key in wanted if key not in held or held[key] != wanted[key]}
                if not new:
                    continue
                self._version += 1
                settings = self._tensors.setdefault(p, {})
                for origin, layer in layers:
                    self._put(settings, origin, {k: layer[k] for k in layer if k in new})


def _merged(layers: Iterable[Layer]) -> dict[str, Any]:
    return {key: value for _, layer in layers for key, value in layer.items()}


def _label(call: str) -> str:
    return f"GlobalOptimManager.{call}"


def _checked(call: str, config: Any) -> dict[str, Any]:
    """A copy of `config` under the names that bnbx uses."""
    if not isinstance(config, Mapping) or not config:
        raise OptionError(f"{_label(call)}: {config!r} is no override; expected {{'bits': 32}}")
    own = unaliased(config)
    for name in own:
        _check_key(call, name)
    return {k: dict(v) if isinstance(v, Mapping) else v for k, v in own.items()}


def _check_key(call: str, name: Any) -> None:
    """Raise UnknownNameError if no rule has this argument; plugins load only to look for it."""
    if name in OPTIONS or optimizers().find(lambda spec: name in spec.arguments):
        return
    arguments = dict.fromkeys(argument for spec in optimizers() for argument in spec.arguments)
    known = (*OPTIONS, *arguments, *ALIASES)
    raise UnknownNameError(
        f"{_label(call)}: no optimizer has an argument {name!r}{nearest(str(name), known)}; "
        f"there are: {', '.join(sorted({*OPTIONS, *arguments}))}"
    )


def tensors_in(params: Any, call: str) -> list[Tensor]:
    """The tensors of a tensor, of an iterable of tensors or (name, tensor), or of groups.

    Raises:
        OptionError: something in it is no tensor, or there is none.
    """
    if isinstance(params, Module):
        raise OptionError(
            f"{_label(call)}: params is a module; pass its parameters: module.parameters()"
        )
    found = list(_tensors(params, call))
    if not found:
        raise OptionError(
            f"{_label(call)}: there are no parameters in {params!r}; a generator such as "
            "model.parameters() is empty once it was used: call it again"
        )
    return found


def _tensors(params: Any, call: str) -> Iterable[Tensor]:
    if isinstance(params, Tensor):
        yield params
    elif isinstance(params, Mapping) and "params" in params:  # a group
        yield from _tensors(params["params"], call)
    elif isinstance(params, tuple) and len(params) == 2 and isinstance(params[0], str):
        yield from _tensors(params[1], call)
    elif isinstance(params, Iterable) and not isinstance(params, (str, bytes, Mapping, Module)):
        for item in params:
            yield from _tensors(item, call)
    else:
        raise OptionError(
            f"{_label(call)}: {params!r:.200} is no tensor; expected parameters, or groups "
            "{'params': parameters}"
        )


def _holds(module: Module, name: str, override: _ModuleOverride, p: Tensor) -> bool:
    """Whether `p` is what the override is about; warns once if it is about nothing."""
    found = _attribute(module, name)
    if found is not None:
        override.found = True
        return any(tensor is p for tensor in found)
    if not override.found and not override.warned and not _in_construction(module):
        override.warned = True
        warnings.warn(
            f"{_label('register_module_override')}({type(module).__name__}, {name!r}) has no "
            f"effect: {_no_attribute(module, name)}",
            BnbxWarning,
            stacklevel=2,
        )
    return False


def _attribute(module: Module, name: str) -> tuple[Tensor, ...] | None:
    """The tensors behind an attribute, none for `bias=None`; None if there is no such attribute."""
    parameters = module.__dict__.get("_parameters", {})
    if name in parameters:
        p = parameters[name]
        return () if p is None else (p,)
    if "_parameters" in module.__dict__ and is_parametrized(module, name):
        # The attribute is computed; what is trained are the originals.
        computed: Any = module.parametrizations
        return tuple(computed[name].parameters(recurse=False))
    value = getattr(module, name, UNSET)
    if value is None:
        return ()
    return (value,) if isinstance(value, Tensor) and value.is_leaf else None


def _no_attribute(module: Module, name: str) -> str:
    """What a complete module has instead, in words."""
    own = [other for other, _ in module.named_parameters(recurse=False)]
    hint = nearest(name, own)
    if name in dict(module.named_parameters()):
        hint = "; it belongs to a child: register it with that module"
    return f"the module has no parameter {name!r}{hint}; it has: {', '.join(own) or '(none)'}"


def _in_construction(module: Module) -> bool:
    """Whether an `__init__` of the module is running, which may set the attribute yet."""
    if "_parameters" not in module.__dict__:
        return True
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        code = frame.f_code
        if (
            code.co_name == "__init__"
            and code.co_argcount
            and frame.f_locals.get(code.co_varnames[0]) is module
        ):
            return True
        frame = frame.f_back
    return False
