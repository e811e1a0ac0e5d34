"""States and storages changed behind the optimizer's back: an error, never a wild write."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator

import pytest

from compiled import shared_cache

SCRIPT = """
import torch
import bnbx.optim
p = torch.nn.Parameter(torch.randn(100_000))
p.grad = torch.randn(100_000)
o = bnbx.optim.{name}([p])
o.step()
s = o.state[p]
{tamper}
try:
    o.step()
except (ValueError, TypeError) as error:
    print("refused:", type(error).__name__, error)
"""

# What was changed, and whether of an 8-bit or a 32-bit optimizer.
TAMPERING = [
    ("AdamW8bit", "s['m_absmax'] = torch.zeros(1)"),
    ("AdamW8bit", "s['m_absmax'] = s['m_absmax'].half()"),
    ("AdamW8bit", "s['m'] = s['m'].to('meta')"),
    ("AdamW8bit", "s['m'] = torch.zeros(1, dtype=torch.uint8).expand(100_000)"),
    ("AdamW8bit", "s['m'] = s['m'].repeat_interleave(2)[::2]"),
    ("AdamW8bit", "s['m'].data = torch.zeros(10, dtype=torch.uint8)"),
    ("AdamW8bit", "s['m'].untyped_storage().resize_(0)"),
    ("AdamW8bit", "s['m'] = None"),
    ("AdamW8bit", "del s['m_absmax']"),
    ("AdamW32bit", "s['m'] = s['m'].bfloat16()"),
    ("AdamW32bit", "s['m'] = torch.zeros(1000, dtype=torch.uint8)"),
    ("AdamW8bit", "p.untyped_storage().resize_(0)"),
    ("AdamW8bit", "p.grad.untyped_storage().resize_(0)"),
    ("AdamW8bit", "p.data = p.data.double()"),
]


@pytest.fixture(autouse=True, scope="module")
def _cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with shared_cache(tmp_path_factory):
        yield


@pytest.mark.parametrize(("name", "tamper"), TAMPERING, ids=[t for _, t in TAMPERING])
def test_tampering_is_refused(name: str, tamper: str) -> None:
    script = SCRIPT.format(name=name, tamper=tamper)
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, f"status {done.returncode}\n{done.stderr}"
    assert done.stdout.startswith("refused: "), done.stdout
