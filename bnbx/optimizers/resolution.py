"""Each parameter's values: its group's, under the overrides that concern it.

Resolving is a pure function (`bnbx.registry.config.resolve`); here is what makes it cheap: results
are kept by the values they came from, and overrides are looked up only when they may have changed.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Mapping
from operator import is_
from typing import Any

from torch import Tensor

from bnbx.errors import UnknownNameError
from bnbx.optimizers.manager import GlobalOptimManager
from bnbx.optimizers.overrides import NamePatterns, names_of
from bnbx.registry import Optimizer as OptimizerSpec
from bnbx.registry import quant_types
from bnbx.registry.config import Layer, Resolved, resolve
from bnbx.registry.names import closest
from bnbx.registry.options import options_of

# What torch's schedulers write into groups, which may be used again for a new optimizer, and the
# norm that training loops clip the gradients of a group to.
TAGS = frozenset(
    "initial_lr base_lr max_lr min_lr swa_lr base_momentum max_momentum max_norm".split()
)
ARGUMENT, GROUP = "argument", "param group"
MAX_KEPT = 1024  # a schedule makes a new learning rate every step


class Resolution:
    """Resolves groups and parameters of one optimizer.

    Args:
        spec: the rule.
        given: the arguments that its constructor was given.
        patterns: overrides by name.
    """

    def __init__(
        self, spec: OptimizerSpec, given: Mapping[str, Any], patterns: NamePatterns
    ) -> None:
        self.spec = spec
        self.names = (*spec.arguments, *options_of(spec))
        given = {name: value for name, value in given.items() if name in self.names}
        self.given = {name: _fixed(value) for name, value in given.items()}
        self.defaults = {
            **options_of(spec),
            **{a: spec.default(a) for a in spec.arguments},
            **given,
        }
        self.patterns = patterns
        self.parameter_names: dict[Tensor, str] = {}
        self._hashed = {name: hashable(value) for name, value in self.defaults.items()}
        self._kept: dict[Any, Resolved] = {}
        self._latest: dict[int, tuple[tuple[Any, ...], Resolved]] = {}  # by id of the group
        self._layers: dict[Tensor, tuple[Layer, ...]] = {}
        self._version = -1

    def add_names(self, group: Mapping[str, Any]) -> None:
        """Learn the names of a group's parameters."""
        self.parameter_names.update(zip(group["params"], names_of(group) or (), strict=False))
        self._layers.clear()

    def forget(self, group: Mapping[str, Any]) -> None:
        """Forget a group that was refused."""
        for p in group["params"]:
            self.parameter_names.pop(p, None)
        self._layers.clear()

    def check_keys(self, keys: Iterable[str]) -> None:
        """Groups may carry tags of their own (schedulers add some), but no slips of the hand."""
        for key in keys:
            near = closest(key, self.names)
            if near and key not in self.names and key not in TAGS:
                raise UnknownNameError(
                    f"parameter group: {self.spec.name} has no argument {key!r}; "
                    f"did you mean {near!r}? It has: {', '.join(self.names)}"
                )

    def values_in(self, group: Mapping[str, Any]) -> Callable[[Tensor], Resolved]:
        """What gives the values of a group's parameters.

        The group's own are checked again whenever one has changed.

        Raises:
            OptionError: a value out of range; the callable raises it too.
            UnknownNameError: a quant type or state that is not there; so does the callable.
        """
        of_group = self._of_group(group)
        manager = GlobalOptimManager.get_instance()
        if not self.patterns and manager.empty:
            return lambda p: of_group
        if manager.version != self._version:
            self._layers.clear()
            self._version = manager.version

        def values_of(p: Tensor) -> Resolved:
            layers = self._layers.get(p)
            if layers is None:
                name = self.parameter_names.get(p)
                by_name = self.patterns.layers_for(name) if name is not None else ()
                layers = self._layers[p] = (*by_name, *manager.layers_for(p))
            return self._resolved(group, layers) if layers else of_group

        return values_of

    def _of_group(self, group: Mapping[str, Any]) -> Resolved:
        given = tuple(map(group.__getitem__, self.names))
        latest = self._latest.get(id(group))
        # Between most steps nothing changes. The objects are compared: hashing them takes longer.
        if latest is not None and all(map(is_, given, latest[0])):
            return latest[1]
        found = self._resolved(group, ())
        self._latest.pop(id(group), None)
        if all(map(_lasts, given)):
            self._latest[id(group)] = given, found
        return found

    def _resolved(self, group: Mapping[str, Any], layers: tuple[Layer, ...]) -> Resolved:
        values = tuple(hashable(group[name]) for name in self.names)
        key = (values, layers and tuple((origin, hashable(layer)) for origin, layer in layers))
        found = self._kept.get(key)
        if found is None:
            changed = {
                name: group[name]
                for name, value in zip(self.names, values, strict=True)
                if value != self._hashed[name]
            }
            every = [(ARGUMENT, self.given), (GROUP, changed), *layers]
            if len(self._kept) >= MAX_KEPT:
                self._kept.clear()
            found = self._kept[key] = resolve(self.spec, quant_types(), every)
        return found

    def clear(self) -> None:
        """Forget which parameters and groups there are."""
        self._layers.clear()
        self._latest.clear()


def _lasts(value: Any) -> bool:
    """Whether nothing can change `value` in place."""
    if type(value) is tuple:
        return all(map(_lasts, value))
    return value is None or type(value) in (bool, int, float, str)


def _fixed(value: Any) -> Any:
    """The number in a tensor, which stays while the tensor may change in place."""
    if isinstance(value, (list, tuple)):
        return tuple(map(_fixed, value))
    return float(value) if isinstance(value, Tensor) else value


def hashable(value: Any) -> Any:
    """A value that stands for `value` in the key of a dict."""
    if isinstance(value, Mapping):
        return tuple(sorted((key, hashable(item)) for key, item in value.items()))
    if isinstance(value, (list, tuple)):
        return tuple(map(hashable, value))
    if isinstance(value, Tensor):
        value = float(value)
    # 1.0 and True are equal, and not the same to a check.
    return (type(value), value) if isinstance(value, Hashable) else repr(value)
