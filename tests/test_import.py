"""What importing bnbx does not do, and that its public names are those that it lists."""

from __future__ import annotations

import importlib
import subprocess
import sys

import pytest

import bnbx

PUBLIC_MODULES = (
    "bnbx",
    "bnbx.errors",
    "bnbx.functional",
    "bnbx.nn",
    "bnbx.optim",
    "bnbx.registry",
)
PUBLIC_NAMES = (
    "MatmulLtState",
    "QuantTensor",
    "dequantize",
    "dequantize_",
    "matmul",
    "matmul_4bit",
    "quantize",
    "quantize_",
)
"""Those that the package itself has, besides its modules."""


def python(code: str) -> str:
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_import_bnbx_imports_nothing_heavy() -> None:
    code = """
import sys
import bnbx
heavy = {"torch", "numpy", "pydantic", "pluggy", "jinja2", "cupy"} & sys.modules.keys()
own = sorted(name for name in sys.modules if name.startswith("bnbx"))
print(sorted(heavy), own, bnbx.__version__)
"""
    assert python(code) == f"[] ['bnbx'] {bnbx.__version__}\n"


def test_modules_load_when_they_are_named() -> None:
    code = """
import sys
import bnbx
assert "bnbx.errors" not in sys.modules
print(bnbx.errors.BnbxError.__name__, bnbx.registry.optimizers().get("adamw").name)
print("torch" in sys.modules)
"""
    assert python(code) == "BnbxError adamw\nFalse\n"


def test_import_optim_compiles_nothing_and_touches_no_gpu() -> None:
    """Nor does it start a process, open a socket, write a file, or load a plugin from outside."""
    code = """
import importlib.metadata
import sys
import torch  # its own import may do as it likes

seen = []

def audit(event, arguments):
    if event in ("subprocess.Popen", "os.fork", "os.posix_spawn", "os.system", "socket.connect"):
        seen.append(event)
    if event in ("os.mkdir", "os.rename", "os.remove"):
        seen.append(event)
    if event == "open" and isinstance(arguments[1], str) and set(arguments[1]) & set("wax+"):
        seen.append(arguments)
    if event == "ctypes.dlopen" and "bnbx" in str(arguments[0]):
        seen.append(arguments)

sys.dont_write_bytecode = True
sys.addaudithook(audit)
real = importlib.metadata.EntryPoint.load
importlib.metadata.EntryPoint.load = lambda entry: seen.append(entry) or real(entry)
import bnbx.optim
from bnbx.optim import AdamW8bit
assert not torch.cuda.is_initialized()
assert "cupy" not in sys.modules
print(seen)
"""
    assert python(code) == "[]\n"


@pytest.mark.parametrize("name", PUBLIC_MODULES)
def test_public_names_exist_and_are_listed(name: str) -> None:
    module = importlib.import_module(name)
    listed = getattr(module, "__all__", None)
    if name == "bnbx.errors":  # every class in it is public
        listed = [key for key, value in vars(module).items() if isinstance(value, type)]
    assert listed
    assert len(set(listed)) == len(listed)
    for public in listed:
        assert getattr(module, public) is not None
        assert not public.startswith("_")
    assert set(listed) <= set(dir(module))


def test_names_of_the_package_are_its_public_modules() -> None:
    assert list(bnbx.__all__) == sorted(bnbx.__all__)
    modules = {f"bnbx.{name}" for name in set(bnbx.__all__) - set(PUBLIC_NAMES)}
    assert modules == set(PUBLIC_MODULES) - {"bnbx"}
    assert set(PUBLIC_NAMES) <= set(bnbx.__all__)
    assert dir(bnbx) == sorted([*bnbx.__all__, "__version__"])
    with pytest.raises(AttributeError, match="has no attribute 'optimm'"):
        bnbx.optimm  # noqa: B018 - the access is what is tested


@pytest.mark.parametrize("name", ["bnbx.functional", "bnbx.nn", "bnbx.optim", "bnbx.registry"])
def test_everything_public_is_listed(name: str) -> None:
    """What is made or offered in a module, without a leading underscore, is in its `__all__`."""
    module = importlib.import_module(name)
    made = {
        key
        for key, value in vars(module).items()
        if getattr(value, "__module__", "").startswith(name) and not key.startswith("_")
    }
    assert made <= set(module.__all__)


def test_every_error_is_caught_as_the_builtin_that_one_expects() -> None:
    from bnbx import errors

    classes = [value for value in vars(errors).values() if isinstance(value, type)]
    for each in classes:
        if each in (errors.BnbxError, errors.BnbxWarning):
            continue
        assert issubclass(each, errors.BnbxError)
        builtins = [base for base in each.__mro__ if base.__module__ == "builtins"]
        assert builtins[0] not in (Exception, BaseException, object), each
