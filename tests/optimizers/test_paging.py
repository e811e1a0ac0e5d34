"""Tensors in page files: what they are, where they are kept, and what a full disk does."""

from __future__ import annotations

import copy
import errno
import gc
import io
import json
import mmap
import os
import pickle
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from bnbx.errors import BnbxError, PagingError, TargetError
from bnbx.optimizers.paging import (
    SMALLEST,
    Pages,
    is_paged,
    managed_zeros,
    page_directory,
    paged_nbytes,
)

linux = pytest.mark.skipif(sys.platform != "linux", reason="asks Linux about the process")


@pytest.fixture
def pages(tmp_path: Path) -> Pages:
    return Pages(tmp_path / "pages")


# ---- tensors


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.uint8, torch.int64])
@pytest.mark.parametrize("fill", [0, 3])
def test_a_tensor_is_what_torch_full_makes(pages: Pages, dtype: torch.dtype, fill: int) -> None:
    tensor = pages.zeros((300, 1, 257), dtype, fill)
    expected = torch.full((300, 1, 257), fill, dtype=dtype)
    assert is_paged(tensor)
    assert torch.equal(tensor, expected)
    assert tensor.stride() == expected.stride()
    assert tensor.dtype is dtype
    assert not tensor.requires_grad
    assert not tensor._is_view()
    assert tensor.untyped_storage().nbytes() == expected.untyped_storage().nbytes()
    tensor.add_(1)
    assert torch.equal(tensor, expected + 1)


@pytest.mark.parametrize("shape", [(), (0,), (5, 0), (SMALLEST - 1,)])
def test_small_and_empty_tensors_are_ordinary(pages: Pages, shape: tuple[int, ...]) -> None:
    tensor = pages.zeros(shape, torch.uint8, 7)
    assert torch.equal(tensor, torch.full(shape, 7, dtype=torch.uint8))
    assert not is_paged(tensor)
    assert not pages.directory.exists(), "nothing was asked of the disk"
    assert is_paged(pages.zeros((SMALLEST,), torch.uint8))


def test_tensors_share_nothing(pages: Pages) -> None:
    """Sizes that do not end with a page, over several files."""
    sizes = [SMALLEST + 1, 5_000_001, 70_000_000, SMALLEST, 3_000_000] * 3
    tensors = [pages.zeros((size,), torch.uint8, k + 1) for k, size in enumerate(sizes)]
    for k, (tensor, size) in enumerate(zip(tensors, sizes, strict=True)):
        assert tensor.shape == (size,)
        assert tensor.data_ptr() % mmap.PAGESIZE == 0
        assert bool((tensor == k + 1).all())


def test_copy_of_takes_any_tensor(pages: Pages) -> None:
    source = torch.randn(300, 200, requires_grad=True).t()
    held = pages.copy_of(source)
    assert is_paged(held)
    assert held.is_contiguous()
    assert not held.requires_grad
    assert torch.equal(held, source.detach())
    assert not is_paged(pages.copy_of(torch.ones(3)))


def test_views_are_paged_and_others_are_not(pages: Pages) -> None:
    tensor = pages.zeros((100_000,), torch.float32)
    assert is_paged(tensor[5:10].view(torch.uint8))
    assert not is_paged(torch.zeros(100_000))
    assert not is_paged(torch.zeros(0))
    assert not is_paged(torch.empty(100_000, device="meta"))
    assert not is_paged(torch.eye(3).to_sparse())


def test_bytes_are_counted_while_their_tensors_live(pages: Pages) -> None:
    before = paged_nbytes()
    first = pages.zeros((100_000,), torch.float32)
    second = Pages(pages.directory).zeros((100_001,), torch.uint8)
    view = first[::2]
    assert (pages.nbytes, paged_nbytes() - before) == (400_000, 500_001)
    del first, second
    assert (pages.nbytes, paged_nbytes() - before) == (400_000, 400_000)
    del view
    assert (pages.nbytes, paged_nbytes() - before) == (0, 0)


def test_tensors_outlive_their_pages(pages: Pages) -> None:
    tensors = [pages.zeros((50_000_000,), torch.uint8, k) for k in range(3)]
    del pages
    gc.collect()
    assert [int(t[-1]) for t in tensors] == [0, 1, 2]


# ---- copies are ordinary tensors


def saved(tensor: Tensor) -> Tensor:
    file = io.BytesIO()
    torch.save({"state": tensor}, file)
    assert len(file.getvalue()) < tensor.nbytes + 10_000, "more than the tensor was written"
    file.seek(0)
    loaded = torch.load(file, weights_only=True)["state"]
    assert isinstance(loaded, Tensor)
    return loaded


@pytest.mark.parametrize(
    "how", [copy.deepcopy, saved, lambda t: pickle.loads(pickle.dumps(t)), torch.clone]
)
def test_copies_are_ordinary(pages: Pages, how: Callable[[Tensor], Tensor]) -> None:
    pages.zeros((100_000,), torch.float32, 9)  # beside it in the file
    tensor = pages.zeros((10, 10_000), torch.float32, 0.5)
    other = how(tensor)
    assert torch.equal(other, tensor)
    assert not is_paged(other)
    other.add_(1)
    assert bool((tensor == 0.5).all())


def test_sharing_with_processes_makes_it_ordinary(pages: Pages) -> None:
    """Torch moves what it sends to another process into memory of its own."""
    tensor = pages.zeros((100_000,), torch.float32, 0.5)
    share: Any = tensor.share_memory_
    share()
    assert bool((tensor == 0.5).all())
    assert not is_paged(tensor)
    assert pages.nbytes == 0


@pytest.mark.parametrize("how", [copy.deepcopy, lambda pages: pickle.loads(pickle.dumps(pages))])
def test_a_copy_of_pages_has_the_directory_only(
    pages: Pages, how: Callable[[Pages], Pages]
) -> None:
    tensor = pages.zeros((100_000,), torch.float32)
    other = how(pages)
    assert other.directory == pages.directory
    assert other.nbytes == 0
    assert bool((other.zeros((100_000,), torch.float32, 1) == 1).all())
    assert bool((tensor == 0).all())


# ---- the directory


def test_the_argument_wins_then_the_variable_then_the_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.delenv("BNBX_PAGE_DIR", raising=False)
    if sys.platform == "linux":
        assert page_directory() == tmp_path / "cache" / "bnbx" / "pages"
    default = page_directory()
    monkeypatch.setenv("BNBX_PAGE_DIR", "")
    assert page_directory() == default
    monkeypatch.setenv("BNBX_PAGE_DIR", "~/pages")
    assert page_directory() == tmp_path / "home" / "pages"
    assert page_directory("/argument") == Path("/argument")
    monkeypatch.chdir(tmp_path)
    assert page_directory("here") == tmp_path / "here"
    before = Pages("here").directory
    monkeypatch.chdir("/")
    assert before == tmp_path / "here"


def test_a_missing_directory_is_made_for_its_user_only(tmp_path: Path) -> None:
    pages = Pages(tmp_path / "a" / "b")
    pages.prepare()
    assert pages.directory.is_dir()
    assert pages.directory.stat().st_mode & 0o077 == 0
    assert not list(pages.directory.iterdir())


@pytest.mark.parametrize("kind", ["a file", "in a file", "nowhere", "null", "long"])
def test_a_directory_that_cannot_be_used_is_an_error(tmp_path: Path, kind: str) -> None:
    file = tmp_path / "file"
    file.write_text("")
    directory = {
        "a file": file,
        "in a file": file / "pages",
        "nowhere": Path("/proc/nowhere/pages"),
        "null": Path("a\0b"),
        "long": tmp_path / ("x" * 5000),
    }[kind]
    pages = Pages(directory)
    for attempt in (pages.prepare, lambda: pages.zeros((SMALLEST,), torch.uint8)):
        with pytest.raises(PagingError, match=r"cannot be kept in.*BNBX_PAGE_DIR") as caught:
            attempt()
        assert str(directory.absolute()) in str(caught.value)
        assert isinstance(caught.value, OSError)
        assert isinstance(caught.value, BnbxError)


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may write all")
def test_a_read_only_directory_is_an_error(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    with pytest.raises(PagingError, match=r"Permission denied.*BNBX_PAGE_DIR"):
        Pages(tmp_path).prepare()


# ---- disk space


@linux
def test_space_is_reserved_and_given_back(pages: Pages) -> None:
    def on_disk() -> int:
        assert pages._file is not None
        return os.fstat(pages._file._file.fileno()).st_blocks * 512

    first = pages.zeros((8_000_000,), torch.uint8)
    second = pages.zeros((4_000_000,), torch.uint8, 1)
    assert 12_000_000 <= on_disk() < 12_200_000
    del first
    assert 4_000_000 <= on_disk() < 4_100_000
    assert bool((second == 1).all())
    del second
    assert on_disk() < 100_000


FILL_DISK = """
import sys, torch
from bnbx.optimizers import paging
if sys.argv[2] == "unreserved":
    paging._reserve = lambda file, offset, length: None
pages = paging.Pages(sys.argv[1])
held = []
try:
    for size in (3_000_000, 1_000_000, 8_000_000, 2_000_000):
        held.append(pages.zeros((size,), torch.uint8, 1))
except paging.PagingError as error:
    print(error)
held.append(pages.zeros((1_500_000,), torch.uint8, 1))
print([int((t == 1).sum()) for t in held])
"""


@pytest.mark.parametrize("how", ["reserved", "unreserved"])
def test_a_full_disk_is_an_error_and_no_crash(tmp_path: Path, how: str) -> None:
    """On a real file system of 6 MB. Without the reservation, the process indeed dies of it."""
    script = tmp_path / "script.py"
    script.write_text(FILL_DISK)
    (tmp_path / "disk").mkdir()
    begin = f"mount -t tmpfs -o size=6m disk {tmp_path}/disk && exec {sys.executable}"
    own_mounts = ["unshare", "--user", "--map-root-user", "--mount", "sh", "-c"]
    possible = [*own_mounts, f"{begin} -c pass"]
    if not shutil.which("unshare") or subprocess.run(possible, check=False).returncode:
        pytest.skip("file systems cannot be mounted here")
    command = f"{begin} {script} {tmp_path}/disk {how}"
    ended = subprocess.run(
        [*own_mounts, command], capture_output=True, text=True, timeout=120, check=False
    )
    if how == "unreserved":
        assert ended.returncode == -7, ended  # SIGBUS
        return
    assert ended.returncode == 0, ended.stderr
    error, counts = ended.stdout.splitlines()
    assert f"need 8,003,584 bytes in {tmp_path}/disk" in error or mmap.PAGESIZE != 4096
    assert "No space left on device" in error
    assert json.loads(counts) == [3_000_000, 1_000_000, 1_500_000]


@linux
def test_what_a_full_disk_gave_is_given_back(pages: Pages, monkeypatch: pytest.MonkeyPatch) -> None:
    """Some file systems reserve what they can before they say that it is too little."""
    held = pages.zeros((1_000_000,), torch.uint8, 1)
    assert pages._file is not None
    file, real = pages._file._file.fileno(), os.posix_fallocate
    before = os.fstat(file).st_blocks

    def half(descriptor: int, offset: int, length: int) -> None:
        real(descriptor, offset, length // 2)
        assert os.fstat(descriptor).st_blocks > before
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", half)
    with pytest.raises(PagingError, match="No space left on device"):
        pages.zeros((4_000_000,), torch.uint8)
    assert os.fstat(file).st_blocks == before
    monkeypatch.setattr(os, "posix_fallocate", real)
    assert not bool(pages.zeros((4_000_000,), torch.uint8).any())
    assert bool((held == 1).all())


def test_a_tensor_larger_than_any_file_is_an_error(pages: Pages) -> None:
    for size in (1 << 60, 1 << 62):
        with pytest.raises(PagingError, match="cannot be had"):
            pages.zeros((size,), torch.uint8)
    assert bool((pages.zeros((SMALLEST,), torch.uint8, 1) == 1).all())


@pytest.mark.parametrize("offered", ["missing", "refused"])
def test_space_is_reserved_where_the_system_has_no_call_for_it(
    pages: Pages, monkeypatch: pytest.MonkeyPatch, offered: str
) -> None:
    def refuse(*arguments: int) -> None:
        raise OSError(errno.EOPNOTSUPP, "not supported")

    if offered == "missing":
        monkeypatch.delattr(os, "posix_fallocate", raising=False)
    else:
        monkeypatch.setattr(os, "posix_fallocate", refuse, raising=False)
    first = pages.zeros((5_000_000,), torch.uint8, 1)
    second = pages.zeros((3_000_001,), torch.uint8)
    assert bool((first == 1).all())
    assert not bool(second.any())
    if sys.platform == "linux":
        assert pages._file is not None
        assert os.fstat(pages._file._file.fileno()).st_blocks * 512 >= 8_000_001


@linux
def test_thousands_of_tensors_need_few_descriptors_and_mappings(pages: Pages) -> None:
    def counted() -> tuple[int, int]:
        maps = Path("/proc/self/maps").read_text().count("\n")
        return len([*Path("/proc/self/fd").iterdir()]), maps

    before = counted()
    tensors = [pages.zeros((SMALLEST,), torch.uint8) for _ in range(3000)]
    assert all(map(is_paged, tensors))
    descriptors, maps = (n - b for n, b in zip(counted(), before, strict=True))
    assert descriptors <= 6
    assert maps <= 30
    del tensors
    assert pages.nbytes == 0


# ---- managed memory


def test_managed_memory_says_what_it_needs(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(TargetError, match=r"'managed' needs a CUDA device.*'cpu'.*paged=True"):
        managed_zeros((4,), torch.float32, torch.device("cpu"))
    monkeypatch.setitem(sys.modules, "cupy", None)
    with pytest.raises(TargetError, match=r"CuPy.*not installed.*pip install.*paged=True"):
        managed_zeros((4,), torch.float32, torch.device("cuda"))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.uint8])
@pytest.mark.parametrize("shape", [(), (0,), (300, 257)])
def test_managed_memory_is_a_tensor_of_the_device(
    dtype: torch.dtype, shape: tuple[int, ...]
) -> None:
    device = torch.device("cuda", torch.cuda.current_device())
    tensor = managed_zeros(shape, dtype, device, 3)
    assert torch.equal(tensor, torch.full(shape, 3, dtype=dtype, device=device))
    assert tensor.device == device
    tensor.add_(1)
    assert torch.equal(tensor.cpu(), torch.full(shape, 4, dtype=dtype))
    assert torch.equal(copy.deepcopy(tensor), tensor)
    assert not is_paged(tensor)
