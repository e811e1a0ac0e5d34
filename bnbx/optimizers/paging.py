"""Keeps optimizer states in memory-mapped files, so that memory holds only what is being used.

The operating system writes pages of such a file back and drops them when memory is short, and reads
them again when a step touches them; ordinary memory can only go to swap, if there is any. A page
file has no name (or loses it at once), so nothing remains of it however the process ends, and its
space is reserved before it is used: a full disk is an error when a state is made, not a SIGBUS in
the middle of a step.

What a process should know of its states:

- One file holds many tensors: a mapping and a descriptor for each would meet the system's limits
  (65530 and 1024 on Linux) in a model of many experts.
- The mapping is shared with children made by fork, unlike ordinary memory: were a child to step, it
  would change the states of its parent. `Pages.check_process` refuses that; a child that only
  reads, or lets go of the optimizer (a worker of a DataLoader), does no harm.
- Copies, pickles and checkpoints of a paged tensor are ordinary tensors.
- A file system in memory (tmpfs, often /tmp) evicts nothing unless there is swap, and one that
  copies on write (btrfs, ZFS) cannot promise the reserved space.
"""

from __future__ import annotations

import contextlib
import errno
import math
import mmap
import os
import tempfile
import threading
import weakref
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import IO

import platformdirs
import torch
from torch import Tensor

from bnbx.errors import PagingError, TargetError
from bnbx.kernels.cuda_module import HOW_TO

DIRECTORY_VARIABLE = "BNBX_PAGE_DIR"
SMALLEST = 64 << 10  # bytes; tensors below stay in ordinary memory
FIRST_FILE = 64 << 20  # each file is as large as those before it together, and no larger than
LARGEST_FILE = 16 << 30  # this, unless one tensor is; what is not used takes no space on disk
# No way to reserve space but to write: musl on NFS, say. (glibc writes by itself.)
_NOT_OFFERED = frozenset({errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL})
_REMOVE: int | None = getattr(mmap, "MADV_REMOVE", None)  # Linux

_live: dict[int, int] = {}  # bytes of every paged storage of this process, by address


class Pages:
    """Makes tensors in page files of one directory.

    Threads may share it. A copy or an unpickled `Pages` has the directory and no tensors.

    Args:
        directory: for the files; it is made when it is needed. None for the environment variable
            BNBX_PAGE_DIR, else the folder "pages" in the user's cache folder of bnbx.
    """

    def __init__(self, directory: str | os.PathLike[str] | None = None) -> None:
        self.directory = page_directory(directory)
        self._file: _PageFile | None = None
        self._mapped = 0
        self._made_by: dict[int, tuple[int, int]] = {}  # bytes and process of tensors, by address
        self._process = self._taker = os.getpid()
        self._lock = threading.Lock()

    def __reduce__(self) -> tuple[Callable[[Path], Pages], tuple[Path]]:
        return Pages, (self.directory,)

    @property
    def nbytes(self) -> int:
        """Bytes of the tensors that exist in page files of this object."""
        return sum(nbytes for nbytes, _ in list(self._made_by.values()))

    def prepare(self) -> None:
        """Make the directory and try it, so that a mistake shows before the first step.

        Raises:
            PagingError: files cannot be made there.
        """
        _open(self.directory).close()

    def zeros(self, shape: Sequence[int], dtype: torch.dtype, fill: float = 0) -> Tensor:
        """A contiguous CPU tensor filled with `fill`, in a page file.

        A tensor of fewer than `SMALLEST` bytes is in ordinary memory.

        Raises:
            PagingError: the directory cannot be used, or has no space for it.
        """
        shape = tuple(shape)
        nbytes = math.prod(shape) * dtype.itemsize
        if nbytes < SMALLEST:
            return torch.full(shape, fill, dtype=dtype, device="cpu")
        strides = torch.empty(shape, dtype=dtype, device="meta").stride()
        tensor: Tensor = torch.empty(0, dtype=dtype, device="cpu")
        tensor.set_(self._take(nbytes), 0, shape, strides)
        if fill:
            tensor.fill_(fill)
        return tensor

    def copy_of(self, tensor: Tensor) -> Tensor:
        """A contiguous copy, from any device, in a page file; as `zeros`."""
        copy = self.zeros(tensor.shape, tensor.dtype)
        return copy.copy_(tensor.detach())

    def check_process(self) -> None:
        """Refuse to go on in a forked child: it would change the states of its parent.

        Raises:
            PagingError: tensors of this object were made before a fork, by another process.
        """
        process = os.getpid()
        if process == self._process:
            return
        others = {by for _, by in list(self._made_by.values())} - {process}
        if others:
            raise PagingError(
                f"process {process} was forked from process {min(others)}, and shares the pages of "
                "its paged optimizer states with it: a step here would change them there. Make "
                "the optimizer in the forked process (and load a state dict), use paged=False, or "
                "start processes with the method 'spawn'"
            )

    def _take(self, nbytes: int) -> torch.UntypedStorage:
        """Reserved zero bytes of a file, given back when the last tensor of them is gone.

        A storage of its own, of no more bytes: torch.save and deepcopy take whole storages.
        """
        process = os.getpid()
        if self._taker != process:
            # Forked. The parent goes on to take from its file, and one of its threads may have
            # held the lock.
            self._file, self._lock, self._taker = None, threading.Lock(), process
        with self._lock:
            if self._file is None or self._file.left < nbytes:
                size = max(nbytes, min(max(self._mapped, FIRST_FILE), LARGEST_FILE))
                self._file = _PageFile(_open(self.directory), self.directory, size)
                self._mapped += size
            file = self._file
            view, offset = file.take(nbytes)
        storage = torch.frombuffer(view, dtype=torch.uint8).untyped_storage()
        address = storage.data_ptr()
        self._made_by[address] = (nbytes, process)
        _live[address] = nbytes
        finalizer = weakref.finalize(
            view, _let_go, self._made_by, address, process, file.map, offset, nbytes
        )
        finalizer.atexit = False  # tensors may be read until the very end
        return storage


def page_directory(directory: str | os.PathLike[str] | None = None) -> Path:
    """The argument, else BNBX_PAGE_DIR, else a folder in the user's cache of bnbx; absolute."""
    chosen = directory if directory is not None else os.environ.get(DIRECTORY_VARIABLE)
    if not chosen:
        return platformdirs.user_cache_path("bnbx").absolute() / "pages"
    return Path(os.path.expanduser(chosen)).absolute()  # noqa: PTH111 - it never raises


def is_paged(tensor: Tensor) -> bool:
    """Whether the tensor, or what it is a view of, is in a page file of this process."""
    if tensor.device.type != "cpu" or tensor.layout is not torch.strided:
        return False
    return tensor.untyped_storage().data_ptr() in _live


def paged_nbytes() -> int:
    """Bytes of all tensors of this process that are in page files."""
    return sum(list(_live.values()))


def managed_zeros(
    shape: Sequence[int], dtype: torch.dtype, device: torch.device, fill: float = 0
) -> Tensor:
    """A CUDA tensor in managed memory, which the driver moves between host and device by pages.

    Slower than staging where states do not fit the device; the driver refuses nothing until host
    memory ends. It is filled on the current stream.

    Raises:
        TargetError: the device is not CUDA's, or CuPy is missing.
    """
    if device.type != "cuda":
        raise TargetError(
            f"paged='managed' needs a CUDA device, and a parameter is on {str(device)!r}; "
            "expected paged=True there"
        )
    try:
        import cupy
    except ImportError as error:
        raise TargetError(
            f"paged='managed' takes memory through CuPy, which is not installed ({error}). "
            f"{HOW_TO}; or use paged=True, which needs none"
        ) from None
    shape = tuple(shape)
    empty = torch.empty(shape, dtype=dtype, device="meta")
    nbytes = empty.numel() * dtype.itemsize
    if not nbytes:
        return torch.zeros(shape, dtype=dtype, device=device)
    with torch.cuda.device(device):
        index = torch.cuda.current_device()
        with cupy.cuda.Device(index):
            memory = cupy.ndarray((nbytes,), "uint8", cupy.cuda.malloc_managed(nbytes))
        # Not through DLPack, which names managed memory a device that torch does not know.
        flat = torch.as_tensor(memory, dtype=torch.uint8, device=torch.device("cuda", index))
        tensor: Tensor = torch.empty(0, dtype=dtype, device=flat.device)
        tensor.set_(flat.untyped_storage(), 0, shape, empty.stride())
        return tensor.fill_(fill)


class _PageFile:
    """A nameless file, mapped whole and taken from front to back."""

    def __init__(self, file: IO[bytes], directory: Path, nbytes: int) -> None:
        self.size = _whole_pages(nbytes)
        self.used = 0
        self._directory = directory
        self._file = file
        try:
            self._file.truncate(self.size)  # its size, not its space: that is reserved as taken
            self.map = mmap.mmap(self._file.fileno(), self.size)
        except (OSError, ValueError, OverflowError) as error:
            raise self._no_space(self.size, error) from error

    def __del__(self) -> None:
        self._file.close()  # the mapping stays while there are tensors in it

    @property
    def left(self) -> int:
        return self.size - self.used

    def take(self, nbytes: int) -> tuple[memoryview, int]:
        """The next bytes, with space on disk, and their offset."""
        offset, length = self.used, _whole_pages(nbytes)
        try:
            _reserve(self._file, offset, length)
        except OSError as error:
            _free(self.map, offset, length)  # what it got before the disk was full
            raise self._no_space(length, error) from error
        self.used += length
        return memoryview(self.map)[offset : offset + nbytes], offset

    def _no_space(self, nbytes: int, error: Exception) -> PagingError:
        return PagingError(
            f"paged optimizer states need {nbytes:,} bytes in {self._directory}, which cannot be "
            f"had: {_reason(error)}. Free space there, or choose a directory on a disk with more: "
            f"page_dir=..., or the environment variable {DIRECTORY_VARIABLE}"
        )


def _open(directory: Path) -> IO[bytes]:
    """A file without a name; where the system cannot do that, one that has lost it."""
    try:
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        return tempfile.TemporaryFile(dir=directory, prefix="bnbx-", buffering=0)
    except (OSError, ValueError) as error:
        raise PagingError(
            f"paged optimizer states cannot be kept in {directory}: {_reason(error)}. Choose "
            f"one where you can write: page_dir=..., or the environment variable "
            f"{DIRECTORY_VARIABLE}"
        ) from error


def _reserve(file: IO[bytes], offset: int, length: int) -> None:
    """Take space on disk for a range that reads as zeros; raises OSError."""
    if hasattr(os, "posix_fallocate"):
        try:
            os.posix_fallocate(file.fileno(), offset, length)
        except OSError as error:
            if error.errno not in _NOT_OFFERED:
                raise
        else:
            return
    file.seek(offset)
    zeros = bytes(1 << 20)
    while length > 0:
        length -= file.write(zeros[:length])


def _let_go(
    made_by: dict[int, tuple[int, int]],
    address: int,
    process: int,
    pages: mmap.mmap,
    offset: int,
    nbytes: int,
) -> None:
    """The last tensor of a range is gone; called at any moment, so it takes no lock."""
    made_by.pop(address, None)
    _live.pop(address, None)
    if os.getpid() == process:  # else a forked child lets go of what its parent still uses
        _free(pages, offset, _whole_pages(nbytes))


def _free(pages: mmap.mmap, offset: int, length: int) -> None:
    """Give memory and disk space of a range back, where the system can."""
    if _REMOVE is not None:
        with contextlib.suppress(OSError):
            pages.madvise(_REMOVE, offset, length)


def _whole_pages(nbytes: int) -> int:
    return -(-nbytes // mmap.PAGESIZE) * mmap.PAGESIZE


def _reason(error: Exception) -> str:
    return str(getattr(error, "strerror", None) or error)
