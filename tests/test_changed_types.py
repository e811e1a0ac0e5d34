"""A package changes the table of its quant type: what was kept by the old one is not read wrongly.

Each process here finds the type by an entry point, as that of an installed package.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

PLUGIN = """
import os
from bnbx.registry import QuantType, hookimpl

BASE = float(os.environ["LOG3_BASE"])
log3 = QuantType(
    name="log3", summary="powers of " + os.environ.get("LOG3_SAYS", "a number"), bits=3,
    values=(-1.0, -BASE, -BASE**2, 0.0, BASE**3, BASE**2, BASE, 1.0), block_size=64,
)


@hookimpl
def register_quant_types(register):
    register(log3)
"""
MODEL = """
import sys, torch, bnbx, bnbx.nn
torch.manual_seed(0)
x = torch.ones(2, 64)
"""
SAVE = {
    "pickle": "m = torch.nn.Sequential(torch.nn.Linear(64, 8)); bnbx.quantize_(m, 'log3')\n"
    "torch.save(m, 'kept'); y = m(x)",
    "export": "m = torch.nn.Sequential(torch.nn.Linear(64, 8)); bnbx.quantize_(m, 'log3')\n"
    "torch.export.save(torch.export.export(m.eval(), (x,)), 'kept'); y = m(x)",
    "double": "m = bnbx.nn.QuantLinear(64, 8, quant_type='log3', double=True).to('cpu')\n"
    "torch.save(m, 'kept'); y = m(x)",
    "optimizer": "p = torch.nn.Parameter(torch.randn(5000)); p.grad = torch.randn(5000)\n"
    "o = bnbx.optim.create('lion', [p], lr=0.1, state_types='log3'); o.step()\n"
    "torch.save((o, p.grad), 'kept'); o.step(); y = p.detach()",
}
SAVE["memory"] = SAVE["pickle"].replace("m(x)", "m[0].weight.dequantize()")
LOAD = {
    "memory": "y = torch.load('kept', weights_only=False)[0].weight.dequantize()",
    "pickle": "y = torch.load('kept', weights_only=False)(x)",
    "export": "y = torch.export.load('kept').module()(x)",
    "double": "y = torch.load('kept', weights_only=False)(x)",
    "optimizer": "o, grad = torch.load('kept', weights_only=False)\n"
    "p = o.param_groups[0]['params'][0]; p.grad = grad; o.step(); y = p.detach()",
}


@pytest.fixture
def installed(tmp_path: Path) -> Path:
    """A folder with a package that has an entry point."""
    (tmp_path / "log3_plugin.py").write_text(PLUGIN, encoding="utf-8")
    about = tmp_path / "log3_plugin-1.0.dist-info"
    about.mkdir()
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: log3_plugin\nVersion: 1.0\n")
    (about / "entry_points.txt").write_text("[bnbx]\nlog3 = log3_plugin\n")
    return tmp_path


def run(folder: Path, code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    path = os.pathsep.join([str(folder), *filter(None, sys.path)])
    return subprocess.run(
        [sys.executable, "-c", MODEL + code],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": path, **environment},
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.parametrize("kind", SAVE)
def test_what_another_table_wrote_is_refused(kind: str, installed: Path) -> None:
    written = run(installed, SAVE[kind] + "\ntorch.save(y, 'y')", LOG3_BASE="0.5")
    assert written.returncode == 0, written.stderr
    compare = "\nassert torch.equal(y, torch.load('y')), 'other numbers'"
    same = run(installed, LOAD[kind] + compare, LOG3_BASE="0.5", LOG3_SAYS="two, in other words")
    assert same.returncode == 0, same.stderr
    other = run(installed, LOAD[kind], LOG3_BASE="0.25")
    assert other.returncode != 0
    assert "quant type 'log3' that means other numbers than the registered one" in other.stderr
    assert "from log3" in other.stderr


def test_a_file_of_a_layer_needs_no_plugin(installed: Path) -> None:
    """It holds the spec, and so decodes as it was written where the type is another, or unknown."""
    layer = "m = bnbx.nn.QuantLinear(64, 8, quant_type={!r}).to('cpu')\n"
    save = layer.format("log3") + "torch.save((m.state_dict(), m(x)), 'kept')"
    load = layer.format("nf4") + (
        "saved, y = torch.load('kept', weights_only=True)\n"
        "m.load_state_dict(saved, assign=True)\n"
        "assert torch.equal(m(x), y)\n"
        "again = bnbx.nn.QuantLinear(64, 8).to('cpu')\n"
        "again.load_state_dict(m.state_dict(), assign=True)\n"
        "assert torch.equal(again(x), y)"
    )
    written = run(installed, save, LOG3_BASE="0.5")
    assert written.returncode == 0, written.stderr
    for settings in ({"LOG3_BASE": "0.5"}, {"LOG3_BASE": "0.25"}, {"BNBX_PLUGINS": ""}):
        read = run(installed, load, **settings)
        assert read.returncode == 0, read.stderr


def test_a_type_that_only_says_it_otherwise_is_the_same(installed: Path) -> None:
    """A file's spec with another summary: what comes of it is the registered type again."""
    layer = "m = bnbx.nn.QuantLinear(64, 8, quant_type='log3').to('cpu')\n"
    save = layer + "torch.save((m.state_dict(), m(x)), 'kept')"
    take = layer + (
        "saved, y = torch.load('kept', weights_only=True)\nm.load_state_dict(saved)\n"
        "assert m.weight.quant_type == 'log3'\ntorch.save((m, y), 'again')"
    )
    load = "m, y = torch.load('again', weights_only=False)\nassert torch.equal(m(x), y)"
    for code, says in ((save, "two"), (take, "another number"), (load, "another number")):
        done = run(installed, code, LOG3_BASE="0.5", LOG3_SAYS=says)
        assert done.returncode == 0, done.stderr
