"""What every test shares: how hypothesis searches, and what is skipped without a GPU."""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

from dropin import RUNS, install, python

# A busy machine is slow without anything being wrong: no deadlines. On CI the same examples run
# every time, so that a red build is about the change; elsewhere each run searches anew.
settings.register_profile(
    "default",
    deadline=None,
    derandomize="CI" in os.environ,
    suppress_health_check=[HealthCheck.too_slow],
)
settings.load_profile("default")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip the tests marked `gpu` where they cannot run, with what is missing as the reason."""
    marked = [item for item in items if item.get_closest_marker("gpu")]
    missing = _missing_for_gpu() if marked else None
    for item in marked if missing else []:
        item.add_marker(pytest.mark.skip(reason=f"needs a GPU: {missing}"))


def _missing_for_gpu() -> str | None:
    import torch

    if not torch.cuda.is_available():
        return "torch sees no CUDA device"
    if importlib.util.find_spec("cupy") is None:
        return "CuPy is not installed"
    return None


@pytest.fixture(scope="session")
def dropin(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder for the path that has bnbx as `bitsandbytes` in it."""
    return install(tmp_path_factory.mktemp("dropin"))


@pytest.fixture(scope="session")
def saved_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a small language model, as transformers saves one."""
    folder = tmp_path_factory.mktemp("hub")
    python(RUNS, "save", cwd=folder)
    return folder / "model"


def pytest_addoption(parser: pytest.Parser) -> None:
    """`--rewrite-golden` writes tests/golden anew; see tests/kernels/test_golden.py."""
    parser.addoption("--rewrite-golden", action="store_true", help="write tests/golden anew")
