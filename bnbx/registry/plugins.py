"""Loads plugins into the catalogs: the built-ins first, then entry points one by one.

A third-party package declares

    [project.entry-points.bnbx]
    my_plugin = "my_package.my_module"

whose module has functions marked with `bnbx.registry.hookimpl`. Entry points load only when a
name is asked for that the built-ins lack, or a list is. A plugin that fails is remembered with its
reason and breaks nothing else. The environment variable BNBX_PLUGINS narrows the set to the entry
points it names (comma-separated); set but empty, it turns all of them off.
"""

from __future__ import annotations

import importlib
import os
import threading
from functools import lru_cache
from importlib.metadata import EntryPoint, entry_points
from typing import Any

import pluggy

from bnbx.errors import DuplicateNameError
from bnbx.registry import hookspecs
from bnbx.registry.catalog import Catalog
from bnbx.registry.optimizer import Optimizer
from bnbx.registry.quant_type import QuantType

GROUP = "bnbx"
BUILT_INS = ("bnbx.quant_types", "bnbx.optimizers.rules")


class Plugins:
    """The catalogs, and the plugins that fill them."""

    def __init__(self) -> None:
        self._manager = pluggy.PluginManager("bnbx")
        self._manager.add_hookspecs(hookspecs)
        self._lock = threading.RLock()
        self._waiting: list[EntryPoint] | None = None
        self.failures: dict[str, str] = {}
        """Reason by plugin name."""
        self.optimizers: Catalog[Optimizer] = Catalog("optimizer", self._more, self._failed)
        self.quant_types: Catalog[QuantType] = Catalog("quant type", self._more, self._failed)
        for module in BUILT_INS:
            self.load(module, importlib.import_module(module))

    def load(self, name: str, plugin: Any) -> None:
        """Register `plugin` (a module or object with hookimpls) and take in its specs.

        Raises whatever the plugin raises; then none of its specs stay.
        """
        if self._manager.has_plugin(name):
            raise DuplicateNameError(f"there is a plugin {name!r} already")
        try:
            self._manager.register(plugin, name)
            self._manager.check_pending()
            for hook, catalog in (
                ("register_optimizers", self.optimizers),
                ("register_quant_types", self.quant_types),
            ):
                others = [p for p in self._manager.get_plugins() if p is not plugin]
                caller = self._manager.subset_hook_caller(hook, remove_plugins=others)
                caller(register=_Register(catalog, name))
        except BaseException:
            self._forget(name)
            raise

    def _forget(self, name: str) -> None:
        for catalog in (self.optimizers, self.quant_types):
            catalog.discard(name)
        if self._manager.has_plugin(name):
            self._manager.unregister(name=name)

    def _more(self) -> bool:
        """Load the next waiting entry point; False if none waits."""
        with self._lock:
            if self._waiting is None:
                self._waiting = list(_selected(self.failures))
            if not self._waiting:
                return False
            entry = self._waiting.pop(0)
            try:
                self.load(entry.name, entry.load())
            except KeyboardInterrupt:
                raise
            except BaseException as error:  # noqa: BLE001 - a stranger's module may even exit
                self.failures[entry.name] = f"{type(error).__name__}: {error} (from {entry.value})"
            return True

    def _failed(self) -> dict[str, str]:
        return self.failures


class _Register:
    """What a hook implementation calls; checks the kind of what it is given."""

    def __init__(self, catalog: Catalog[Any], package: str) -> None:
        self.catalog = catalog
        self.package = package

    def __call__(self, spec: Any) -> None:
        expected = Optimizer if self.catalog.kind == "optimizer" else QuantType
        if not isinstance(spec, expected):
            raise TypeError(f"expected a bnbx.registry.{expected.__name__}, got {spec!r}")
        self.catalog.add(spec, self.package)


def _selected(failures: dict[str, str]) -> list[EntryPoint]:
    found = sorted(entry_points(group=GROUP), key=lambda entry: entry.name)
    chosen = os.environ.get("BNBX_PLUGINS")
    if chosen is None:
        return found
    wanted = [name.strip() for name in chosen.split(",") if name.strip()]
    for name in set(wanted) - {entry.name for entry in found}:
        failures[name] = "named in BNBX_PLUGINS, but no installed package has this entry point"
    return [entry for entry in found if entry.name in wanted]


@lru_cache(maxsize=1)
def plugins() -> Plugins:
    """The plugins of this process, loaded on first use."""
    return Plugins()
