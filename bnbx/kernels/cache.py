"""Keeps compiled kernels between processes.

An entry is a binary, its source, and a JSON note with the binary's checksum; its key is the hash of
everything that reached the compiler. Files are written beside and renamed, so a reader never sees
half of one; a lock makes processes that start together compile once, and only saves work. An
entry that does not match its checksum is built anew. If the directory cannot be written, kernels
are built in a temporary one, with a warning.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import stat
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from functools import lru_cache
from pathlib import Path
from typing import TypeVar

import filelock
import platformdirs

from bnbx.errors import BnbxWarning, CompileError

T = TypeVar("T")
Build = Callable[[Path, Path], None]  # source file, binary to write
LOCK_SECONDS = 300.0
STALE_SECONDS = 3600.0


def key_of(*parts: str) -> str:
    """Hash of the parts, each kept apart from the next."""
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:32]


def cache_directory() -> Path:
    """BNBX_CACHE_DIR, or the user's cache directory of this platform."""
    chosen = os.environ.get("BNBX_CACHE_DIR")
    path = os.path.expanduser(chosen) if chosen else platformdirs.user_cache_dir("bnbx")  # noqa: PTH111 - it never raises
    return Path(path).absolute()


def load_or_build(key: str, source: str, suffix: str, build: Build, load: Callable[[Path], T]) -> T:
    """The kernel of this key: from the cache if it is there and whole, else built and kept.

    Args:
        key: from `key_of`; names the files.
        source: text that `build` compiles; kept beside the binary.
        suffix: of the source file (".cpp"); decides nothing.
        build: compiles a source file to a binary; raises on failure.
        load: opens a binary.
    """
    directory = cache_directory()
    found = _try_load(directory, key, load)
    if found is not None:
        return found
    try:
        _prepare(directory)
        with _lock(directory / f"{key}.lock"):
            found = _try_load(directory, key, load)
            return (
                found if found is not None else _build(directory, key, source, suffix, build, load)
            )
    except OSError as error:
        _warn_once(str(directory), str(error.strerror or error))
        try:
            with tempfile.TemporaryDirectory(prefix="bnbx-") as temporary:
                return _build(Path(temporary), key, source, suffix, build, load)
        except OSError as second:
            raise CompileError(
                f"kernels can be kept neither in {directory} ({error}) nor in a temporary "
                f"directory ({second})"
            ) from None


@lru_cache(maxsize=16)
def _warn_once(directory: str, reason: str) -> None:
    warnings.warn(
        f"kernels cannot be kept in {directory} ({reason}); they are compiled anew in every "
        "process. Set BNBX_CACHE_DIR to a directory that you can write.",
        BnbxWarning,
        stacklevel=3,
    )


def _try_load(directory: Path, key: str, load: Callable[[Path], T]) -> T | None:
    """The kernel if its files are whole; a bad artifact is as good as none."""
    binary = directory / f"{key}.so"
    try:
        note = json.loads((directory / f"{key}.json").read_text())
        if _checksum(binary) != note["sha256"] or not _trusted(directory):
            return None
        return load(binary)
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None


def _build(
    directory: Path, key: str, source: str, suffix: str, build: Build, load: Callable[[Path], T]
) -> T:
    with tempfile.TemporaryDirectory(prefix=".building-", dir=directory) as name:
        temporary = Path(name)
        text, binary, note = (temporary / f"{key}{end}" for end in (suffix, ".so", ".json"))
        text.write_text(source)
        build(text, binary)
        if not binary.exists():
            raise CompileError("the compiler succeeded, but wrote no kernel")
        note.write_text(json.dumps({"sha256": _checksum(binary), "source": text.name}))
        try:
            kernel = load(binary)  # what does not load is never kept
        except AttributeError as error:
            raise CompileError(f"the compiled library is not a kernel: {error}") from None
        for path in (text, binary, note):  # the note last: it vouches for the others
            path.replace(directory / path.name)
    return kernel


def _prepare(directory: Path) -> None:
    directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    if not _trusted(directory):
        raise PermissionError("other users can write there, and kernels in it are executed")
    for stale in directory.glob(".building-*"):
        with contextlib.suppress(OSError):
            if time.time() - stale.stat().st_mtime > STALE_SECONDS:
                shutil.rmtree(stale, ignore_errors=True)


def _trusted(directory: Path) -> bool:
    """Whether nobody whom this user has not let in can have put files there.

    That is this user, root, and the group of a directory that is open to it; always true without
    POSIX ids.
    """
    if not hasattr(os, "getuid"):
        return True
    status = directory.stat()
    return status.st_uid in (os.getuid(), 0) and not status.st_mode & stat.S_IWOTH


def _checksum(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


@contextlib.contextmanager
def _lock(path: Path) -> Iterator[None]:
    """Hold the lock file; go on without it where the file system has none or it is stuck."""
    lock = filelock.FileLock(str(path), timeout=LOCK_SECONDS)
    try:
        lock.acquire()
    except (filelock.Timeout, NotImplementedError):
        yield
        return
    try:
        yield
    finally:
        lock.release()
