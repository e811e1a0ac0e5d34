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
import traceback
from functools import lru_cache
from importlib.metadata import EntryPoint, entry_points
from types import ModuleType
from typing import Any

import pluggy

from bnbx.errors import DuplicateNameError, PluginError
from bnbx.registry import hookspecs
from bnbx.registry.catalog import Catalog
from bnbx.registry.names import nearest
from bnbx.registry.optimizer import Optimizer
from bnbx.registry.quant_type import QuantType
from bnbx.registry.spec import Spec

GROUP = "bnbx"
CHOSEN = "BNBX_PLUGINS"
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
        self.left_out: tuple[str, ...] = ()
        """Entry points that are installed, but not among those that BNBX_PLUGINS names."""
        self._chosen: str | None = None
        self.optimizers: Catalog[Optimizer] = Catalog("optimizer", self._more, self.absent)
        self.quant_types: Catalog[QuantType] = Catalog("quant type", self._more, self.absent)
        self._catalogs: dict[str, Catalog[Any]] = {
            "register_optimizers": self.optimizers,
            "register_quant_types": self.quant_types,
        }
        for module in BUILT_INS:
            self.load(module, importlib.import_module(module))

    def load(self, name: str, plugin: Any) -> None:
        """Register `plugin` (a module or object with hookimpls) and take in its specs.

        Raises whatever the plugin raises; then none of its specs stay.

        Raises:
            PluginError: it has no function that is marked as a hook.
        """
        if self._manager.has_plugin(name):
            raise DuplicateNameError(f"there is a plugin {name!r} already")
        try:
            self._manager.register(plugin, name)
            self._check_hooks(plugin)
            self._manager.check_pending()
            for hook, catalog in self._catalogs.items():
                others = [p for p in self._manager.get_plugins() if p is not plugin]
                caller = self._manager.subset_hook_caller(hook, remove_plugins=others)
                caller(register=_Register(catalog, name))
        except BaseException:
            self._forget(name)
            raise

    def absent(self) -> list[str]:
        """The plugins that were passed over and why, and those left out, one a line."""
        lines = [f"plugin {name!r} was passed over: {why}" for name, why in self.failures.items()]
        if self.left_out:
            lines.append(
                f"installed, but left out by {CHOSEN}={self._chosen!r}: "
                f"{', '.join(self.left_out)}; add a name to load it, or unset {CHOSEN} to load all"
            )
        return lines

    def _check_hooks(self, plugin: Any) -> None:
        """Pluggy takes in anything, also what has no hooks or hooks that nobody calls."""
        callers = self._manager.get_hookcallers(plugin)
        if not callers:
            kind = type(plugin).__name__
            wrong = "" if isinstance(plugin, ModuleType) else f", not {_article(kind)} {kind}"
            raise PluginError(
                "it registers nothing: mark its functions with bnbx.registry.hookimpl; the entry "
                f"point has to name a module or an object with such functions{wrong}"
            )
        for caller in callers:
            needed = not all(found.optionalhook for found in caller.get_hookimpls())
            if needed and caller.name not in self._catalogs:
                raise PluginError(
                    f"unknown hook {caller.name!r}{nearest(caller.name, self._catalogs)}; "
                    f"there are {' and '.join(self._catalogs)}"
                )

    def _forget(self, name: str) -> None:
        for catalog in self._catalogs.values():
            catalog.discard(name)
        if self._manager.has_plugin(name):
            self._manager.unregister(name=name)

    def _more(self) -> bool:
        """Load the next waiting entry point; False if none waits."""
        with self._lock:
            if self._waiting is None:
                self._waiting = self._selected()
            if not self._waiting:
                return False
            entry = self._waiting.pop(0)
            try:
                self.load(entry.name, entry.load())
            except KeyboardInterrupt:
                raise
            except BaseException as error:  # noqa: BLE001 - a stranger's module may even exit
                place = ", ".join([entry.value, *_line_of(error, entry.value)])
                self.failures[entry.name] = f"{type(error).__name__}: {error} (from {place})"
            return True

    def _selected(self) -> list[EntryPoint]:
        """The entry points to load; notes those that are not there, and those left out."""
        found = sorted(entry_points(group=GROUP), key=lambda entry: entry.name)
        chosen = self._chosen = os.environ.get(CHOSEN)
        if chosen is None:
            return found
        wanted = [name.strip() for name in chosen.split(",") if name.strip()]
        for name in set(wanted) - {entry.name for entry in found}:
            self.failures[name] = (
                f"named in {CHOSEN}, but no installed package has this entry point"
            )
        self.left_out = tuple(entry.name for entry in found if entry.name not in wanted)
        return [entry for entry in found if entry.name in wanted]


class _Register:
    """What a hook implementation calls; checks the kind of what it is given."""

    def __init__(self, catalog: Catalog[Any], package: str) -> None:
        self.catalog = catalog
        self.package = package

    def __call__(self, spec: Any) -> None:
        expected = Optimizer if self.catalog.kind == "optimizer" else QuantType
        if not isinstance(spec, expected):
            named = isinstance(spec, Spec)  # and not all of its table
            got = f"{type(spec).__name__} {spec.name!r}" if named else repr(spec)
            raise TypeError(f"expected a bnbx.registry.{expected.__name__}, got {got}")
        self.catalog.add(spec, self.package)


def _article(noun: str) -> str:
    return "an" if noun[0].lower() in "aeiou" else "a"


def _line_of(error: BaseException, value: str) -> list[str]:
    """Where in a plugin's own package something went wrong: a file and a line, if that is known."""
    package = value.partition(":")[0].partition(".")[0]
    frames = traceback.walk_tb(error.__traceback__)
    own = [
        (frame.f_code.co_filename, line)
        for frame, line in frames
        if frame.f_globals.get("__name__", "").partition(".")[0] == package
    ]
    return [f"{file}:{line}" for file, line in own[-1:]]


@lru_cache(maxsize=1)
def plugins() -> Plugins:
    """The plugins of this process, loaded on first use."""
    return Plugins()
