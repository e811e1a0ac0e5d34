"""What the optimizers' tests share: a kernel cache and page files of their own, a seed, threads."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from bnbx.optimizers.paging import DIRECTORY_VARIABLE
from compiled import shared_cache


@pytest.fixture(scope="session", autouse=True)
def kernels(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with shared_cache(tmp_path_factory):
        yield


@pytest.fixture(scope="session", autouse=True)
def page_files(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Paged states of tests go to a temporary directory, never into the user's cache."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(DIRECTORY_VARIABLE, str(tmp_path_factory.mktemp("pages")))
        yield


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Small tensors on many threads mostly wait, the more so where tests run side by side."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def two_threads(one_thread: None) -> None:
    torch.set_num_threads(2)
