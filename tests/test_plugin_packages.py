"""The packages under plugins/, installed as a user does: what they add is there, and right."""

from __future__ import annotations

from pathlib import Path

import pytest

from dropin import install, python

SIGNUM = """
import sys
import torch
import bnbx

assert "bnbx_signum" not in sys.modules  # until somebody asks for it
p = torch.randn(5000, requires_grad=True)
start = p.detach().clone()
optimizer = bnbx.optim.create("signum", [p], lr=0.125, beta=0.5, weight_decay=0.5)
momentum = torch.zeros_like(start)
for _ in range(3):
    p.grad = torch.randn(5000)
    optimizer.step()
    momentum = 0.5 * momentum + 0.5 * p.grad
    start = start * (1 - 0.125 * 0.5) - 0.125 * momentum.sign()
assert optimizer.state[p]["m"].dtype == torch.uint8
wrong = (p.detach() != start).float().mean()
assert wrong < 0.05, wrong  # where 8 bits have turned a sign
assert bnbx.optim.explain(optimizer).parameters[0].target == "cpu"
"""

APOT5 = """
import torch
import bnbx

x = torch.randn(10_000)
spec = bnbx.registry.quant_types().get("apot5")
levels = torch.tensor(sorted(set(spec.values)))
assert len(levels) == 31
blocks = torch.nn.functional.pad(x, (0, -len(x) % 64)).view(-1, 64)
scale = blocks.abs().amax(1, keepdim=True)
nearest = ((blocks / scale).unsqueeze(-1) - levels).abs().min(-1).values * scale
read = bnbx.quantize(x, "apot5").dequantize()
assert torch.allclose((read - x).abs(), nearest.view(-1)[: len(x)], atol=1e-6)
layer = torch.nn.Linear(64, 64)
print(bnbx.quantize_(layer, "apot5"))
assert layer(torch.randn(2, 64)).isfinite().all()
optimizer = bnbx.optim.AdamW8bit(layer.parameters(), state_types={"m": "apot5"}, min_8bit_size=0)
layer.bias.grad = torch.randn(64)
optimizer.step()
assert optimizer.state[layer.bias]["m"].dtype == torch.uint8
"""


@pytest.mark.parametrize(("package", "program"), [("signum", SIGNUM), ("apot5", APOT5)])
def test_what_a_package_adds(package: str, program: str, tmp_path: Path) -> None:
    folder = install(tmp_path / "installed", package)
    python("-W", "error", "-c", program, cwd=tmp_path, folders=(folder,))


def test_the_command_line_lists_them(tmp_path: Path) -> None:
    folders = tuple(install(tmp_path / name, name) for name in ("signum", "apot5"))
    main = "from bnbx.cli import main; main()"
    for command, name in (("rules", "signum"), ("types", "apot5")):
        assert name in python("-c", main, command, cwd=tmp_path, folders=folders)
        assert name not in python("-c", main, command, cwd=tmp_path)
