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
p = torch.nn.Parameter(torch.randn(100_000).to(torch.{dtype}))
p.grad = torch.randn(100_000).to(torch.{dtype})
o = bnbx.optim.{name}([p], {arguments})
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
# The same of other storages: the arguments of a bfloat16 parameter's optimizer, and the change.
OTHERS = [
    ("bits=4", "s['m'] = s['m'][:-1].clone()"),
    ("bits=4", "s['m'] = s['m'].repeat(2)"),
    ("bits=4", "s['v_absmax'] = s['v_absmax'][::2].clone()"),
    ("bits=8, block_wise=False", "s['m_absmax'] = torch.zeros(0)"),
    ("bits=8, block_wise=False", "s['m_absmax'] = s['m_absmax'].repeat(3)"),
    ("master='residual'", "s['residual'] = s['residual'][:-1].clone()"),
    ("master='residual'", "s['residual'] = s['residual'].bfloat16()"),
    ("master='kahan'", "s['residual'].untyped_storage().resize_(0)"),
    ("master='kahan'", "s['residual'] = None"),
]


@pytest.fixture(autouse=True, scope="module")
def _cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with shared_cache(tmp_path_factory):
        yield


@pytest.mark.parametrize(("name", "tamper"), TAMPERING, ids=[t for _, t in TAMPERING])
def test_tampering_is_refused(name: str, tamper: str) -> None:
    assert_refused(SCRIPT.format(name=name, dtype="float32", arguments="", tamper=tamper))


@pytest.mark.parametrize(("arguments", "tamper"), OTHERS)
def test_tampering_with_other_storages_is_refused(arguments: str, tamper: str) -> None:
    script = SCRIPT.format(name="AdamW", dtype="bfloat16", arguments=arguments, tamper=tamper)
    assert_refused(script)


def assert_refused(script: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, f"status {done.returncode}\n{done.stderr}"
    assert done.stdout.startswith("refused: "), done.stdout
