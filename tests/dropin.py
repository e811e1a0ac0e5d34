"""The drop-in `bitsandbytes` for tests: installed into a folder, used by processes of their own.

The environment of the tests has the real one, so the folder goes before it on the path.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

PLUGINS = Path(__file__).parent.parent / "plugins"
RUNS = Path(__file__).parent / "dropin_runs.py"


def install(folder: Path, package: str = "bitsandbytes") -> Path:
    """Install one of our packages as a user does, but for its dependencies and where it goes."""
    options = ["--no-deps", "--no-build-isolation", "--no-index", "--disable-pip-version-check"]
    pip = [sys.executable, "-m", "pip", "install", "--quiet", *options]
    subprocess.run(
        [*pip, "--target", str(folder), str(PLUGINS / package)], check=True, capture_output=True
    )
    return folder


def environment(*folders: Path) -> dict[str, str]:
    """Variables of a process that looks into these folders first and asks no hub for anything."""
    path = os.pathsep.join([*map(str, folders), os.environ.get("PYTHONPATH", "")])
    quiet = {"TRANSFORMERS_VERBOSITY": "error", "TOKENIZERS_PARALLELISM": "false"}
    return {**os.environ, **quiet, "HF_HUB_OFFLINE": "1", "PYTHONPATH": path.rstrip(os.pathsep)}


def python(*arguments: str | Path, cwd: Path, folders: tuple[Path, ...] = ()) -> str:
    """What a Python process prints; its errors are the test's."""
    done = subprocess.run(
        [sys.executable, *map(str, arguments)],
        capture_output=True,
        text=True,
        cwd=cwd,
        env=environment(*folders),
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout
