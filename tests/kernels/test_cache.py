"""Compiled kernels are kept, found again, rebuilt if damaged; no fault of a disk stops a run."""

from __future__ import annotations

import ctypes
import errno
import json
import os
import shutil
import signal
import stat
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from bnbx.errors import BnbxWarning, CompileError
from bnbx.kernels import cache
from bnbx.kernels.cache import key_of, load_or_build
from bnbx.kernels.compiler import find_compiler

SOURCE = 'extern "C" int answer() { return 42; }\n'


class Builder:
    """A build that writes what it is given, and counts."""

    def __init__(self, binary: bytes = b"a kernel") -> None:
        self.binary = binary
        self.builds = 0

    def __call__(self, source: Path, binary: Path) -> None:
        assert source.read_text() == SOURCE
        self.builds += 1
        binary.write_bytes(self.binary)


def fetch(build: cache.Build, key: str = "key") -> bytes:
    return load_or_build(key, SOURCE, ".cpp", build, Path.read_bytes)


@pytest.fixture
def directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The cache directory, which does not exist yet."""
    monkeypatch.setenv("BNBX_CACHE_DIR", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def counting_compiler(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """BNBX_CXX is a script that adds a line to this file, then compiles."""
    log = tmp_path / "compiled"
    log.touch()
    real = find_compiler().command
    script = tmp_path / "c++ that counts"
    script.write_text(f'#!/bin/sh\necho run >> "{log}"\nexec {" ".join(real)} "$@"\n')
    script.chmod(0o755)
    monkeypatch.setenv("BNBX_CXX", f"'{script}'")
    return log


def runs(log: Path) -> int:
    return len(log.read_text().splitlines())


# ---- the key


def test_key_depends_on_every_part_and_on_where_it_ends() -> None:
    keys = {
        key_of("ab", "c"),
        key_of("a", "bc"),
        key_of("abc"),
        key_of("ab", "c", ""),
        key_of("ab"),
    }
    assert len(keys) == 5
    assert key_of("ab", "c") == key_of("ab", "c")


# ---- kept and found


def test_a_kernel_is_built_once(directory: Path) -> None:
    build = Builder()
    assert [fetch(build) for _ in range(3)] == [b"a kernel"] * 3
    assert build.builds == 1
    assert fetch(build, "other key") == b"a kernel"
    assert build.builds == 2


def test_source_lies_beside_the_binary(directory: Path) -> None:
    fetch(Builder())
    assert (directory / "key.cpp").read_text() == SOURCE
    assert (directory / "key.so").read_bytes() == b"a kernel"
    assert json.loads((directory / "key.json").read_text())["source"] == "key.cpp"
    assert not list(directory.glob(".building-*"))


def test_others_may_not_write_into_a_new_directory(directory: Path) -> None:
    fetch(Builder())
    assert stat.S_IMODE(directory.stat().st_mode) == 0o700


DAMAGES: dict[str, Callable[[Path], object]] = {
    "changed binary": lambda at: (at / "key.so").write_bytes(b"a kernfl"),
    "truncated binary": lambda at: (at / "key.so").write_bytes(b"a ker"),
    "empty binary": lambda at: (at / "key.so").write_bytes(b""),
    "missing binary": lambda at: (at / "key.so").unlink(),
    "missing note": lambda at: (at / "key.json").unlink(),
    "empty note": lambda at: (at / "key.json").write_text(""),
    "note of garbage": lambda at: (at / "key.json").write_bytes(b"\xff\xfe{"),
    "note of another kind": lambda at: (at / "key.json").write_text("[1, 2]"),
    "note of null": lambda at: (at / "key.json").write_text("null"),
    "note without checksum": lambda at: (at / "key.json").write_text("{}"),
    "note of another binary": lambda at: (at / "key.json").write_text('{"sha256": "0"}'),
}


@pytest.mark.parametrize("what", DAMAGES)
def test_damaged_entries_are_built_anew(what: str, directory: Path) -> None:
    build = Builder()
    fetch(build)
    DAMAGES[what](directory)
    assert fetch(build) == b"a kernel"
    assert build.builds == 2
    assert fetch(build) == b"a kernel"
    assert build.builds == 2


def test_a_binary_that_does_not_open_is_built_anew(directory: Path) -> None:
    """Whole, but of another machine, say."""
    load_or_build("key", SOURCE, ".cpp", Builder(b"not a library"), Path.read_bytes)
    library = load_or_build("key", SOURCE, ".cpp", find_compiler().compile, open_library)
    assert library.answer() == 42


def open_library(path: Path) -> ctypes.CDLL:
    return ctypes.CDLL(str(path))


def test_nothing_is_kept_of_a_build_that_fails(directory: Path) -> None:
    def failing(source: Path, binary: Path) -> None:
        binary.write_bytes(b"half")
        raise CompileError("no")

    def unloadable(path: Path) -> bytes:
        raise OSError("not a library")

    with pytest.raises(CompileError):
        fetch(failing)
    assert not [path for path in directory.iterdir() if path.suffix != ".lock"]
    with pytest.warns(BnbxWarning), pytest.raises(CompileError, match="not a library"):
        load_or_build("key", SOURCE, ".cpp", Builder(), unloadable)
    assert not [path for path in directory.iterdir() if path.suffix != ".lock"]
    assert fetch(Builder()) == b"a kernel"


# ---- many processes

TEN_LINES = """
import ctypes, sys
from pathlib import Path
from bnbx.kernels.cache import key_of, load_or_build
from bnbx.kernels.compiler import find_compiler

source = 'extern "C" int answer() { return 42; }\\n'
compiler = find_compiler()
sys.stdin.read()  # until all have started
key = key_of(source, *compiler.key())
library = load_or_build(key, source, ".cpp", compiler.compile, lambda p: ctypes.CDLL(str(p)))
print(library.answer())
"""


def start(script: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-W", "error", "-c", script],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def finish(process: subprocess.Popen[str]) -> str:
    output, errors = process.communicate(timeout=60)
    assert process.returncode == 0, errors
    return output


def test_eight_processes_compile_once(directory: Path, counting_compiler: Path) -> None:
    processes = [start(TEN_LINES) for _ in range(8)]
    assert [finish(process) for process in processes] == ["42\n"] * 8
    assert runs(counting_compiler) == 1


def test_a_later_start_runs_no_compiler(directory: Path, counting_compiler: Path) -> None:
    step = """
import torch
from bnbx.optim import create

p = torch.ones(5000, requires_grad=True)
p.grad = torch.ones(5000)
create("lion", [p]).step()
print(p[0].item())
"""
    first = finish(start(step))
    assert runs(counting_compiler) == 1
    assert finish(start(step)) == first
    assert runs(counting_compiler) == 1


def test_a_killed_compilation_leaves_a_cache_that_works(
    directory: Path, counting_compiler: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hanging = tmp_path / "hanging c++"
    hanging.write_text('#!/bin/sh\necho > "$(dirname "$0")/half"\nexec sleep 60\n')
    hanging.chmod(0o755)
    usable = os.environ["BNBX_CXX"]
    # The same key: the compiler's command is not what differs here.
    script = TEN_LINES.replace("key_of(source, *compiler.key())", "'key'")
    monkeypatch.setenv("BNBX_CXX", f"'{hanging}'")
    with start(script) as process:
        assert process.stdin is not None
        process.stdin.close()
        until((tmp_path / "half").exists)
        left = list(directory.glob(".building-*"))
        assert left
        children = children_of(process.pid)
        process.kill()
        process.wait()
        for child in children:
            os.kill(child, signal.SIGKILL)
    monkeypatch.setenv("BNBX_CXX", usable)
    began = time.monotonic()
    assert finish(start(script)) == "42\n"
    assert time.monotonic() - began < 30, "it waited for the lock of a dead process"
    assert runs(counting_compiler) == 1
    # What the dead process left is cleared away once nobody can still be at work on it.
    assert left[0].exists()
    os.utime(left[0], (0, 0))
    fetch(Builder(), "another")
    assert not left[0].exists()


def until(condition: Callable[[], bool]) -> None:
    for _ in range(600):
        if condition():
            return
        time.sleep(0.05)
    raise AssertionError("it did not happen")


def children_of(pid: int) -> list[int]:
    return [int(word) for word in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def test_a_stuck_lock_is_passed_over(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import filelock

    monkeypatch.setattr(cache, "LOCK_SECONDS", 0.1)
    directory.mkdir(mode=0o700)
    with filelock.FileLock(str(directory / "key.lock")):
        assert fetch(Builder()) == b"a kernel"
    assert (directory / "key.so").exists()


# ---- directories that cannot be used


@pytest.fixture
def unusable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A file stands where the directory should be; so nobody can write there, root included."""
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("BNBX_CACHE_DIR", str(tmp_path / "file" / "cache"))
    yield str(tmp_path / "file" / "cache")
    assert (tmp_path / "file").read_text() == "in the way"


def test_without_a_directory_kernels_are_built_for_this_process(unusable: str) -> None:
    build = Builder()
    with pytest.warns(BnbxWarning) as caught:
        assert fetch(build) == b"a kernel"
    assert build.builds == 1
    message = str(caught[0].message)
    assert len(caught) == 1
    assert unusable in message
    assert "Set BNBX_CACHE_DIR to a directory that you can write" in message


def test_one_warning_for_all_kernels_of_a_process(unusable: str) -> None:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for key in ("one", "two", "three"):
            fetch(Builder(), key)
    assert len([w for w in caught if w.category is BnbxWarning]) == 1


def test_a_step_works_without_a_directory(unusable: str) -> None:
    step = """
import warnings
import torch
from bnbx.errors import BnbxWarning
from bnbx.optim import create

params = [torch.ones(5000, requires_grad=True), torch.ones(9, requires_grad=True)]
for p in params:
    p.grad = torch.ones_like(p)
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    create("lion", params, lr=0.5).step()
print([w.category.__name__ for w in caught], [p[0].item() for p in params])
"""
    assert finish(start(step)) == "['BnbxWarning'] [0.5, 0.5]\n"


@pytest.mark.parametrize("where", ["write_text", "replace", "mkdir"])
def test_a_full_disk_is_a_warning(
    where: str, directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = getattr(Path, where)

    def full(path: Path, *args: object, **kwargs: object) -> object:
        if path == directory or directory in path.parents:
            raise OSError(errno.ENOSPC, "No space left on device", str(path))
        return real(path, *args, **kwargs)

    monkeypatch.setattr(Path, where, full)
    with pytest.warns(BnbxWarning, match="No space left on device"):
        assert fetch(Builder()) == b"a kernel"
    monkeypatch.undo()
    monkeypatch.setenv("BNBX_CACHE_DIR", str(directory))
    assert fetch(Builder()) == b"a kernel"


def test_a_full_disk_under_the_compiler_is_a_warning(directory: Path) -> None:
    """The compiler's own words, not an error of Python's; another place may have room."""
    places = []

    def full(source: Path, binary: Path) -> None:
        places.append(source.parent)
        if directory in source.parents:
            raise OSError(errno.ENOSPC, "No space left on device")
        binary.write_bytes(b"a kernel")

    with pytest.warns(BnbxWarning, match="No space left"):
        assert fetch(full) == b"a kernel"
    assert len(places) == 2


@pytest.mark.parametrize("mode", [0o777, 0o707, 0o1777])
def test_a_directory_that_others_can_write_is_refused(directory: Path, mode: int) -> None:
    """Kernels are executed: a stranger's file may not be one."""
    directory.mkdir()
    planted = Builder(b"planted")
    fetch(planted)
    directory.chmod(mode)
    with pytest.warns(BnbxWarning, match="other users can write there"):
        assert fetch(Builder()) == b"a kernel"
    assert (directory / "key.so").read_bytes() == b"planted"


def test_a_directory_of_another_user_is_refused(
    directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fetch(Builder(b"planted"))
    if os.getuid() == 0:
        os.chown(directory, 12345, -1)
    else:
        monkeypatch.setattr(os, "getuid", lambda: 12345)
    with pytest.warns(BnbxWarning, match="other users can write there"):
        assert fetch(Builder()) == b"a kernel"


def test_the_default_directory_is_the_users(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.delenv("BNBX_CACHE_DIR", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache.cache_directory().name == "bnbx"
    monkeypatch.setenv("BNBX_CACHE_DIR", "~/kernels")
    assert cache.cache_directory() == Path.home() / "kernels"


def test_the_wrapper_compiles(directory: Path, counting_compiler: Path) -> None:
    """Guards the fixture: a path with spaces, and flags that pass through."""
    assert shutil.which(find_compiler().command[0])
    library = load_or_build("key", SOURCE, ".cpp", find_compiler().compile, open_library)
    assert library.answer() == 42
    assert runs(counting_compiler) == 1
