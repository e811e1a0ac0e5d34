"""Strangers' specs: found when they are needed, and harmless when they are broken.

Each test lays a package with an entry point into a folder on sys.path, as pip would install it,
and asks a fresh set of plugins.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from types import ModuleType

import pytest

from bnbx import quant_types as types
from bnbx.errors import DuplicateNameError, PluginError, UnknownNameError
from bnbx.optimizers import rules
from bnbx.registry import Optimizer, QuantType, hookimpl, plugins
from bnbx.registry.plugins import BUILT_INS, Plugins


def files_of(package: ModuleType) -> tuple[str, ...]:
    """The files of specs in a package: every one but those that hold what others share."""
    (folder,) = package.__path__
    return tuple(sorted({file.stem for file in Path(folder).glob("[a-z]*.py")} - {"grids"}))


BUILT_IN_OPTIMIZERS = files_of(rules)
BUILT_IN_TYPES = files_of(types)

HEAD = "from bnbx.registry import Constraint, Optimizer, QuantType, State, hookimpl, rate\n"
OPTIMIZER = """
mine = Optimizer(
    name="{name}", summary="plain descent", hyper=dict(lr=rate(0.1)), element_code="p = p - lr * g"
)

@hookimpl
def register_optimizers(register):
    register(mine)
"""
QUANT_TYPE = """
wide = QuantType(name="{name}", summary="four", bits=2, values=(-1.0, 0.0, 0.5, 1.0))

@hookimpl
def register_quant_types(register):
    register(wide)
"""
Install = Callable[..., None]


def entry_points_of_tests(group: str) -> list[EntryPoint]:
    """What is installed, without the plugins that the machine happens to have."""
    return [entry for entry in entry_points(group=group) if entry.module.startswith("plugin_")]


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Install]:
    """Makes `install(entry_point_name, source)` put a package on sys.path."""
    monkeypatch.delenv("BNBX_PLUGINS", raising=False)
    monkeypatch.setattr(sys.modules[Plugins.__module__], "entry_points", entry_points_of_tests)
    monkeypatch.syspath_prepend(tmp_path)
    before = set(sys.modules)

    def put(name: str, source: str, *, package: str = "", value: str = "") -> None:
        package = package or f"plugin_{name}".replace(".", "_").replace("-", "_")
        (tmp_path / f"{package}.py").write_text(HEAD + source, encoding="utf-8")
        about = tmp_path / f"{package}-1.0.dist-info"
        about.mkdir()
        (about / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {package}\nVersion: 1.0\n")
        (about / "entry_points.txt").write_text(f"[bnbx]\n{name} = {value or package}\n")

    yield put
    for module in set(sys.modules) - before:
        if module.startswith("plugin_"):
            del sys.modules[module]


def loaded() -> list[str]:
    return sorted(name for name in sys.modules if name.startswith("plugin_"))


def miss(found: Plugins, name: str = "no_such_rule") -> str:
    with pytest.raises(UnknownNameError) as caught:
        found.optimizers.get(name)
    return str(caught.value)


def listed(*names: str) -> str:
    """How an error lists the optimizers that there are."""
    return "; available: " + ", ".join(sorted([*BUILT_IN_OPTIMIZERS, *names]))


def assert_only_built_ins(found: Plugins) -> None:
    assert found.optimizers.names() == BUILT_IN_OPTIMIZERS
    assert found.quant_types.names() == BUILT_IN_TYPES
    assert [found.optimizers.get(name).name for name in BUILT_IN_OPTIMIZERS]


# ---- good plugins


def test_a_plugin_is_found_on_a_miss(install: Install) -> None:
    install("good", OPTIMIZER.format(name="descent") + QUANT_TYPE.format(name="wide2"))
    found = Plugins()
    assert loaded() == []
    spec = found.optimizers.get("descent")
    assert isinstance(spec, Optimizer)
    assert spec is sys.modules["plugin_good"].mine
    assert found.optimizers.package("descent") == "good"
    assert isinstance(found.quant_types.get("wide2"), QuantType)
    assert found.failures == {}


def test_a_plugin_is_not_imported_while_the_built_ins_serve(install: Install) -> None:
    install("good", OPTIMIZER.format(name="descent"))
    found = Plugins()
    for name in BUILT_IN_OPTIMIZERS:
        assert found.optimizers.get(name).name == name
        assert found.optimizers.package(name) == "bnbx.optimizers.rules"
    for name in BUILT_IN_TYPES:
        assert found.quant_types.package(name) == "bnbx.quant_types"
    assert found.quant_types.find(lambda spec: spec.state_default) is not None
    assert BUILT_IN_OPTIMIZERS[0] in found.optimizers
    assert loaded() == []


def test_plugins_load_one_by_one_until_the_name_is_there(install: Install) -> None:
    install("b", OPTIMIZER.format(name="second"))
    install("a", OPTIMIZER.format(name="first"))
    install("c", OPTIMIZER.format(name="third"))
    found = Plugins()
    assert found.optimizers.get("second").name == "second"
    assert loaded() == ["plugin_a", "plugin_b"]
    assert found.optimizers.find(lambda spec: spec.name == "first") is not None
    assert loaded() == ["plugin_a", "plugin_b"]
    assert found.optimizers.find(lambda spec: spec.name == "none") is None
    assert loaded() == ["plugin_a", "plugin_b", "plugin_c"]


@pytest.mark.parametrize("look", ["names", "iter", "len", "in"])
def test_a_list_loads_them_all(install: Install, look: str) -> None:
    install("a", OPTIMIZER.format(name="first"))
    install("b", QUANT_TYPE.format(name="second"))
    catalog = Plugins().optimizers
    if look == "names":
        assert catalog.names() == tuple(sorted([*BUILT_IN_OPTIMIZERS, "first"]))
    elif look == "iter":
        assert [spec.name for spec in catalog] == sorted([*BUILT_IN_OPTIMIZERS, "first"])
    elif look == "len":
        assert len(catalog) == len(BUILT_IN_OPTIMIZERS) + 1
    else:
        assert "first" in catalog
        assert "second" not in catalog
        assert ["first"] not in catalog
    assert loaded() == ["plugin_a", "plugin_b"]


def test_an_entry_point_may_name_an_object(install: Install) -> None:
    source = """
class Mine:
    @hookimpl
    def register_optimizers(self, register):
        register(Optimizer(name="inner", summary="s", hyper={}, element_code="p = p - g"))

plugin = Mine()
"""
    install("object", source, value="plugin_object:plugin")
    assert Plugins().optimizers.get("inner").name == "inner"


def test_a_plugin_may_look_at_the_registry_while_it_loads(install: Install) -> None:
    source = "from bnbx.registry import optimizers\nbase = optimizers().get('adam')\n"
    install("looks", source + OPTIMIZER.format(name="descent"))
    assert Plugins().optimizers.get("descent").name == "descent"


def test_threads_that_miss_at_once_wait_for_the_plugin(install: Install) -> None:
    install("slow", "import time\ntime.sleep(0.2)\n" + OPTIMIZER.format(name="descent"))
    catalog = Plugins().optimizers
    with ThreadPoolExecutor(4) as threads:
        names = [spec.name for spec in threads.map(catalog.get, ["descent"] * 4)]
    assert names == ["descent"] * 4


def test_a_search_outlives_what_other_threads_load(install: Install) -> None:
    install("good", OPTIMIZER.format(name="descent"))
    catalog = Plugins().optimizers

    def wanted(spec: Optimizer) -> bool:
        return "descent" in catalog and spec.name == "descent"  # which loads it meanwhile

    found = catalog.find(wanted)
    assert found is not None
    assert found.name == "descent"


def test_a_miss_names_the_nearest_and_the_list(install: Install) -> None:
    install("good", OPTIMIZER.format(name="descent"))
    message = miss(Plugins(), "desent")
    assert message == "there is no optimizer 'desent'; did you mean 'descent'?" + listed("descent")


@pytest.mark.parametrize("name", [[], {}, 1, None, ("adam",), ""])
def test_a_name_that_is_none_is_a_miss_too(install: Install, name: object) -> None:
    install("good", OPTIMIZER.format(name="descent"))
    with pytest.raises(UnknownNameError, match="there is no optimizer "):
        Plugins().optimizers.get(name)  # type: ignore[arg-type]


# ---- broken plugins

BROKEN: dict[str, tuple[str, str]] = {
    "import": ("import no_such_module_of_mine\n", "ModuleNotFoundError: No module named"),
    "syntax": ("def (\n", "SyntaxError: "),
    "raises": ("raise KeyError('mine')\n", "KeyError: 'mine'"),
    "exits": ("raise SystemExit('mine')\n", "SystemExit: mine"),
    "bad_spec": (OPTIMIZER.format(name="Bad"), "SpecError: Optimizer spec 'Bad': name: "),
    "duplicate": (
        OPTIMIZER.format(name="adam"),
        "DuplicateNameError: optimizer 'adam' is registered by both bnbx.optimizers.rules and "
        "duplicate; one of them must rename it",
    ),
    "duplicate_type": (
        OPTIMIZER.format(name="descent") + QUANT_TYPE.format(name="dynamic8"),
        "DuplicateNameError: quant type 'dynamic8' is registered by both bnbx.quant_types and "
        "duplicate_type; one of them must rename it",
    ),
    "twice": (
        OPTIMIZER.format(name="descent") + "    register(mine)\n",
        "DuplicateNameError: optimizer 'descent' is registered by both twice and twice",
    ),
    "wrong_kind": (
        QUANT_TYPE.format(name="wide2").replace("quant_types", "optimizers"),
        "TypeError: expected a bnbx.registry.Optimizer, got QuantType 'wide2' (from ",
    ),
    "wrong_object": (
        OPTIMIZER.format(name="descent") + "    register('descent')\n",
        "TypeError: expected a bnbx.registry.Optimizer, got 'descent'",
    ),
    "class_of_spec": (
        OPTIMIZER.format(name="descent") + "    register(Optimizer)\n",
        "TypeError: expected a bnbx.registry.Optimizer, got <class",
    ),
    "unknown_hook": (
        OPTIMIZER.format(name="descent") + "@hookimpl\ndef register_layers(register): pass\n",
        "PluginError: unknown hook 'register_layers'",
    ),
    "hook_in_the_singular": (
        OPTIMIZER.format(name="descent").replace("optimizers(register)", "optimizer(register)"),
        "PluginError: unknown hook 'register_optimizer'; did you mean 'register_optimizers'?; "
        "there are register_optimizers and register_quant_types",
    ),
    "forgotten_mark": (
        OPTIMIZER.format(name="descent").replace("@hookimpl", ""),
        "PluginError: it registers nothing: mark its functions with bnbx.registry.hookimpl; the "
        "entry point has to name a module or an object with such functions (from ",
    ),
    "wrong_argument": (
        OPTIMIZER.format(name="descent").replace("(register):", "(registry):"),
        "PluginValidationError: Plugin 'wrong_argument' for hook 'register_optimizers'",
    ),
    "hook_raises": (
        OPTIMIZER.format(name="descent") + "    raise RuntimeError('half-way')\n",
        "RuntimeError: half-way",
    ),
    "second_hook_raises": (
        OPTIMIZER.format(name="descent") + QUANT_TYPE.format(name="wide2") + "    wide.missing\n",
        "AttributeError: ",
    ),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_plugin_is_reported_and_breaks_nothing_else(install: Install, name: str) -> None:
    source, reason = BROKEN[name]
    install(name, source)
    install("zz_good", OPTIMIZER.format(name="later"))
    found = Plugins()
    assert found.optimizers.get("later").name == "later"
    message = miss(found)
    first, *rest = message.split("\n", 1)
    assert first == "there is no optimizer 'no_such_rule'" + listed("later")
    assert rest[0].startswith(f"plugin {name!r} was passed over: {reason}")
    assert re.search(rf"\(from plugin_{name}(, \S+plugin_{name}\.py:\d+)?\)$", rest[0])
    assert found.quant_types.names() == BUILT_IN_TYPES
    assert found.optimizers.package("adam") == "bnbx.optimizers.rules"
    assert set(found.failures) == {name}
    assert miss(found) == message


@pytest.mark.parametrize("value", ["[]", "None", "1", "Optimizer", "missing"])
def test_an_entry_point_of_a_strange_object(install: Install, value: str) -> None:
    install("odd", f"value = {value}\n" if value != "missing" else "", value="plugin_odd:value")
    install("zz_good", OPTIMIZER.format(name="later"))
    found = Plugins()
    assert found.optimizers.get("later").name == "later"
    assert set(found.failures) == {"odd"}
    assert found.optimizers.names() == tuple(sorted([*BUILT_IN_OPTIMIZERS, "later"]))


@pytest.mark.parametrize(
    ("value", "words"), [("mine", "an Optimizer"), ("register_optimizers", "a function")]
)
def test_an_entry_point_that_names_no_plugin(install: Install, value: str, words: str) -> None:
    install("odd", OPTIMIZER.format(name="descent"), value=f"plugin_odd:{value}")
    assert miss(Plugins()).splitlines()[1] == (
        "plugin 'odd' was passed over: PluginError: it registers nothing: mark its functions with "
        "bnbx.registry.hookimpl; the entry point has to name a module or an object with such "
        f"functions, not {words} (from plugin_odd:{value})"
    )


def test_hooks_of_another_version_may_be_optional(install: Install) -> None:
    later = "@hookimpl(optionalhook=True)\ndef register_layers(register): pass\n"
    install("later", OPTIMIZER.format(name="descent") + later)
    found = Plugins()
    assert found.optimizers.get("descent").name == "descent"
    assert found.failures == {}


def test_what_a_plugin_raises_comes_with_its_line(install: Install) -> None:
    """The last line of its own: not that of the module it calls."""
    install("calls", "import json\n\n\njson.loads('{')\n")
    message = miss(Plugins())
    assert re.search(r"\(from plugin_calls, \S+plugin_calls\.py:5\)$", message)


def test_every_broken_plugin_is_reported(install: Install) -> None:
    for name, (source, _) in BROKEN.items():
        install(name, source)
    found = Plugins()
    message = miss(found)
    assert set(found.failures) == set(BROKEN)
    for name, (_, reason) in BROKEN.items():
        assert f"\nplugin {name!r} was passed over: {reason}" in message
    assert_only_built_ins(found)


def test_the_name_of_a_built_in_plugin_breaks_no_built_in(install: Install) -> None:
    for built_in in BUILT_INS:
        install(built_in, OPTIMIZER.format(name="descent"))
    found = Plugins()
    message = miss(found)
    assert_only_built_ins(found)
    for built_in in BUILT_INS:
        assert f"plugin {built_in!r} was passed over" in message


def test_two_packages_with_one_entry_point_name(install: Install) -> None:
    """The second one is reported; the first one stays, whole."""
    install("same", OPTIMIZER.format(name="first"), package="plugin_one")
    install("same", OPTIMIZER.format(name="second"), package="plugin_two")
    found = Plugins()
    message = miss(found)
    left = set(found.optimizers.names()) - set(BUILT_IN_OPTIMIZERS)
    assert left in ({"first"}, {"second"})
    assert "plugin 'same' was passed over" in message


def test_two_plugins_of_the_same_spec_name(install: Install) -> None:
    install("a", OPTIMIZER.format(name="descent"))
    install("b", OPTIMIZER.format(name="descent"))
    found = Plugins()
    assert found.optimizers.package("descent") == "a"
    assert "registered by both a and b" in miss(found)


def test_loading_by_hand_raises_what_is_wrong(install: Install) -> None:
    install("good", OPTIMIZER.format(name="adam"))
    found = Plugins()
    import plugin_good  # type: ignore[import-not-found]

    with pytest.raises(DuplicateNameError, match="'adam'"):
        found.load("good", plugin_good)
    assert_only_built_ins(found)
    with pytest.raises(PluginError, match=r"it registers nothing: .*, not an object$"):
        found.load("good", object())
    plugin_good.register_optimizers = hookimpl(lambda register: None)
    found.load("good", plugin_good)  # the name is free again


# ---- BNBX_PLUGINS


def install_two(install: Install) -> None:
    install("one", OPTIMIZER.format(name="first"))
    install("two", OPTIMIZER.format(name="second"))


@pytest.mark.parametrize("value", ["", " ", ",", " , "])
def test_plugins_can_be_turned_off(
    install: Install, monkeypatch: pytest.MonkeyPatch, value: str
) -> None:
    install_two(install)
    monkeypatch.setenv("BNBX_PLUGINS", value)
    found = Plugins()
    assert_only_built_ins(found)
    assert loaded() == []
    assert found.failures == {}


@pytest.mark.parametrize("value", ["two", " two ", "two,", "two,two"])
def test_plugins_can_be_chosen(
    install: Install, monkeypatch: pytest.MonkeyPatch, value: str
) -> None:
    install_two(install)
    monkeypatch.setenv("BNBX_PLUGINS", value)
    found = Plugins()
    assert found.optimizers.names() == tuple(sorted([*BUILT_IN_OPTIMIZERS, "second"]))
    assert loaded() == ["plugin_two"]
    assert found.failures == {}


def test_a_chosen_plugin_that_is_missing_is_named(
    install: Install, monkeypatch: pytest.MonkeyPatch
) -> None:
    install_two(install)
    monkeypatch.setenv("BNBX_PLUGINS", "one,three")
    message = miss(Plugins(), "second")
    assert message == (
        f"there is no optimizer 'second'{listed('first')}\n"
        "plugin 'three' was passed over: named in BNBX_PLUGINS, but no installed package has "
        "this entry point\n"
        "installed, but left out by BNBX_PLUGINS='one,three': two; add a name to load it, or "
        "unset BNBX_PLUGINS to load all"
    )


def test_a_miss_names_the_plugins_that_were_turned_off(
    install: Install, monkeypatch: pytest.MonkeyPatch
) -> None:
    install_two(install)
    monkeypatch.setenv("BNBX_PLUGINS", "")
    assert "\ninstalled, but left out by BNBX_PLUGINS='': one, two; " in miss(Plugins(), "second")


# ---- what an import costs


def test_the_plugins_of_a_process_are_made_once() -> None:
    assert plugins() is plugins()


@pytest.mark.parametrize("module", ["bnbx", "bnbx.registry", "bnbx.registry.config"])
def test_importing_the_registry_is_cheap(install: Install, tmp_path: Path, module: str) -> None:
    """No torch, no numpy, no built-in spec, and nothing of the plugins that are installed."""
    install("good", OPTIMIZER.format(name="descent"))
    script = f"import sys, {module}; print(*sorted(sys.modules))"
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    command = [sys.executable, "-c", script]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    imported = set(done.stdout.split())
    assert module in imported
    assert not imported & {"torch", "numpy", "cupy", "jinja2", "plugin_good", *BUILT_INS}


def test_specs_load_without_torch_and_numpy() -> None:
    script = (
        "import sys\nfrom bnbx.registry import optimizers, quant_types\n"
        "optimizers().names(), quant_types().names()\nprint(*sorted(sys.modules))"
    )
    environment = {**os.environ, "BNBX_PLUGINS": ""}
    command = [sys.executable, "-c", script]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    imported = set(done.stdout.split())
    assert set(BUILT_INS) <= imported
    assert not imported & {"torch", "numpy", "cupy", "jinja2"}
