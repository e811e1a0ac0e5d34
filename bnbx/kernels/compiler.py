"""Finds a C++ compiler on the user's machine and runs it.

In order: $BNBX_CXX (if set, the only one; empty means none), $CXX, g++, clang++, c++, and the
`ziglang` wheel (`pip install bnbx[compiler]`). Rendered sources need no C++ standard library, so
a bare compiler is enough.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
import platform
import shlex
import shutil
import subprocess
import sys
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from bnbx.errors import CompileError

# No contraction (a rule's own is in the text, see lower.py) and no fast-math: a step has the same
# bits on every target. The other flags allow only what cannot change a result.
FLAGS = (
    "-std=c++17",
    "-O3",
    "-ffp-contract=off",
    "-fno-math-errno",
    "-fno-trapping-math",
    "-fPIC",
    "-w",  # GCC 12's own AVX-512 headers warn about themselves
)
CHOSEN = "BNBX_CXX"
HOW_TO = (
    "install g++ or clang++, or `pip install bnbx[compiler]`; "
    f"unset {CHOSEN} if it names a compiler that does not work"
)


@dataclass(frozen=True)
class Compiler:
    """A way to compile: the command before its flags, and what identifies its version."""

    command: tuple[str, ...]
    identity: str
    bundled: bool = False

    def key(self) -> tuple[str, ...]:
        """Everything besides the source that decides what comes out."""
        return (*self.command, self.identity, cpu_identity(), *FLAGS, *cpu_flags())

    def compile(self, source: Path, binary: Path) -> None:
        """Compile `source` to the shared library `binary`.

        Raises:
            CompileError: with the command, the compiler's words and the numbered source.
        """
        flags = [*FLAGS, *cpu_flags()]
        if not self.bundled:
            self._run([*self.command, *flags, "-shared", str(source), "-o", str(binary)], source)
            return
        # Zig would first build its C++ library (over a minute); these sources need none of it.
        made = source.with_suffix(".o")
        self._run(
            [*self.command, *flags, "-nostdinc++", "-c", str(source), "-o", str(made)], source
        )
        link = [*self.command[:-1], "cc", "-shared", "-nostdlib", str(made), "-o", str(binary)]
        self._run(link, source)

    def _run(self, command: list[str], source: Path) -> None:
        environment = {**os.environ, "LC_ALL": "C"}
        try:
            done = subprocess.run(
                command, capture_output=True, text=True, env=environment, check=False
            )
        except OSError as error:
            raise CompileError(f"{shlex.join(command)}: {error}") from None
        if done.returncode:
            numbered = "\n".join(
                f"{n:4} {line}" for n, line in enumerate(source.read_text().splitlines(), 1)
            )
            said = next((x for x in done.stderr.splitlines() if "error" in x), "")
            raise CompileError(
                f"{command[0]} failed with status {done.returncode} {said}\n"
                f"{shlex.join(command)}\n{done.stderr}\n{numbered}"
            )


def find_compiler() -> Compiler:
    """The compiler to use, by the environment as it is now.

    Raises:
        CompileError: saying what was tried.
    """
    return _find(os.environ.get(CHOSEN), os.environ.get("CXX"), os.environ.get("PATH"))


def how_to() -> str:
    """How to have a compiler, by the environment as it is now."""
    return f"unset {CHOSEN}" if _switched_off(os.environ.get(CHOSEN)) else HOW_TO


def _switched_off(chosen: str | None) -> bool:
    return chosen is not None and not chosen.strip()


@lru_cache(maxsize=16)
def _find(chosen: str | None, cxx: str | None, path: str | None) -> Compiler:
    if _switched_off(chosen):
        raise CompileError(f"the C++ compiler is switched off: {CHOSEN} is set, but empty")
    if chosen is not None:
        found = _on_path(chosen)
        if found is None:
            raise CompileError(f"{CHOSEN}={chosen!r} is not a command on PATH")
        return found
    for command in (cxx, "g++", "clang++", "c++"):
        found = _on_path(command) if command else None
        if found is not None:
            return found
    if importlib.util.find_spec("ziglang"):
        from importlib.metadata import version

        return Compiler((sys.executable, "-m", "ziglang", "c++"), version("ziglang"), bundled=True)
    tried = [f"CXX={cxx!r}"] if cxx else []
    raise CompileError(
        f"no C++ compiler: tried {', '.join([*tried, 'g++, clang++, c++, ziglang'])}"
    )


def _on_path(command: str) -> Compiler | None:
    try:
        words = shlex.split(command)
    except ValueError:  # a quote that is not closed
        return None
    where = shutil.which(words[0]) if words else None
    if where is None:
        return None
    file = Path(where).resolve()
    status = file.stat()
    return Compiler((where, *words[1:]), f"{file} {status.st_size} {status.st_mtime_ns}")


@lru_cache(maxsize=1)
def cpu_flags() -> tuple[str, ...]:
    """Flags for this very processor. Wide vectors are worth asking for where it has them."""
    machine = platform.machine().lower()
    if machine in ("x86_64", "amd64"):
        return ("-march=native", "-mprefer-vector-width=512")
    return ("-mcpu=native",) if machine in ("aarch64", "arm64") else ()


@lru_cache(maxsize=1)
def cpu_identity() -> str:
    """What -march=native depends on: machines that share a home directory may differ in it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        wanted = ("flags", "Features", "model name", "CPU part")
        text = "\n".join(dict.fromkeys(line for line in lines if line.startswith(wanted)))
    except OSError:
        text = platform.processor()
    return f"{platform.machine()} {hashlib.sha256(text.encode()).hexdigest()[:16]}"
