"""The documentation's Python runs, its links lead somewhere, and what it lists is there."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from dropin import environment

DOCS = Path(__file__).parent.parent / "docs"
PAGES = sorted(DOCS.glob("*.md"))
BLOCK = re.compile(r"^```python\n(.*?)^```", re.DOTALL | re.MULTILINE)
LINK = re.compile(r"\]\(([^)#]+\.md)\)")
FILE = re.compile(r"`((?:bnbx|tests)/[\w./-]+\.(?:py|j2|h|cpp))`")
BLOCKS = [(page, code) for page in PAGES for code in BLOCK.findall(page.read_text())]


@pytest.mark.parametrize(
    ("page", "code"), BLOCKS, ids=[f"{page.stem}-{n}" for n, (page, _) in enumerate(BLOCKS)]
)
def test_python_blocks_run(
    page: Path, code: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    folders = []
    if page.stem == "transformers":  # it says what is there: a model, and bnbx as bitsandbytes
        folders.append(request.getfixturevalue("dropin"))
        (tmp_path / "model").symlink_to(request.getfixturevalue("saved_model"))
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env=environment(*folders),
        check=False,
    )
    assert done.returncode == 0, f"{page.name}:\n{code}\n{done.stderr}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_links_and_files_exist(page: Path) -> None:
    text = page.read_text()
    for link in LINK.findall(text):
        assert (page.parent / link).exists(), f"{page.name} links to {link}"
    for name in FILE.findall(text):
        assert (DOCS.parent / name).exists(), f"{page.name} names {name}"


def test_every_page_is_in_the_index() -> None:
    listed = set(LINK.findall((DOCS / "README.md").read_text()))
    assert listed == {page.name for page in PAGES} - {"README.md"}
