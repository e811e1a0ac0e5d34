"""What the figures hold for: processor, system, library versions and compiler."""

from __future__ import annotations

import os
import platform
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from bnbx.errors import CompileError
from bnbx.kernels.compiler import find_compiler

PACKAGES = ("bnbx", "torch", "bitsandbytes", "torchao", "numpy")


def describe() -> dict[str, object]:
    """The machine as plain data; versions are None for packages that are not installed."""
    return {
        "processor": _processor(),
        "cores": os.cpu_count(),
        "system": platform.platform(),
        "python": platform.python_version(),
        "compiler": _compiler(),
        "packages": {name: _version(name) for name in PACKAGES},
    }


def _processor() -> str:
    """The model name that the kernel gives; some systems only know the architecture."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    for line in lines:
        name, _, value = line.partition(":")
        if name.strip() == "model name":
            return value.strip()
    return platform.processor() or platform.machine()


def _compiler() -> str:
    """The first line of its `--version`."""
    try:
        compiler = find_compiler()
    except CompileError as error:
        return str(error)
    done = subprocess.run(
        [*compiler.command, "--version"], capture_output=True, text=True, check=False
    )
    return (done.stdout or compiler.identity).splitlines()[0]


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None
