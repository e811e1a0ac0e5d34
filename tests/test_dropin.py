"""The drop-in distribution `bitsandbytes`: it is bnbx, and the libraries that look for it work.

Everything is run in processes of its own: the environment of the tests has the real bitsandbytes.
"""

from __future__ import annotations

import ast
import json
from importlib.util import find_spec
from pathlib import Path

import pytest

import bnbx
from dropin import RUNS, python

# What the real one has and the drop-in has not, which transformers, peft and accelerate do not ask
# for: whole modules, with what they are about or what does it here, ...
ABSENT_MODULES = {
    "bitsandbytes.__main__": "diagnostics; `bnbx` is the command",
    "bitsandbytes._ops": "torch.ops.bitsandbytes",
    "bitsandbytes.backends": "torch.ops.bitsandbytes, by device",
    "bitsandbytes.cextension": "the compiled library",
    "bitsandbytes.consts": "the compiled library",
    "bitsandbytes.cuda_specs": "the compiled library",
    "bitsandbytes.diagnostics": "of the compiled library",
    "bitsandbytes.nn.parametrize": "bnbx.nn.replace_parameter",
}
# ... and names in modules that are there.
ABSENT_NAMES = {
    "bitsandbytes": "adam cpu_ops default_ops modules",  # modules that it imports by the way
    "bitsandbytes.autograd._functions": (
        "GlobalOutlierPooler MatMul4Bit MatMul8bitFp MatMul8bitLt"  # behind matmul and matmul_4bit
    ),
    "bitsandbytes.functional": (
        "CUBLAS_Context GlobalPageManager batched_igemm check_matmul elementwise_func fill "
        "get_paged igemm prefetch_tensor"
    ),
    "bitsandbytes.nn.modules": "fix_4bit_weight_quant_state_from_module maybe_rearrange_weight",
    "bitsandbytes.optim.optimizer": "MockArgs",
    "bitsandbytes.utils": (
        "execute_and_return outlier_hook pack_dict_to_tensor replace_linear sync_gpu "
        "unpack_tensor_to_dict"
    ),
}

MISSING_NAMES = """
import importlib, json, sys

missing = {}
for module, names in json.loads(sys.argv[1]).items():
    try:
        loaded = importlib.import_module(module)
    except ImportError:
        missing[module] = None
    else:
        missing[module] = sorted(name for name in names if not hasattr(loaded, name))
print(json.dumps(missing))
"""

ONE_OF_EACH = """
import importlib.metadata
import sys
import torch
import bitsandbytes as bnb
import bnbx
import bitsandbytes.nn.modules as modules
import bitsandbytes.optim.adamw
from bitsandbytes.autograd._functions import MatmulLtState
from bitsandbytes.nn.linear import Linear4bit
from bitsandbytes.optim import AdamW8bit, optimizer
from bitsandbytes.utils import OutlierTracer

assert not torch.cuda.is_initialized()
assert bnb.__version__ == importlib.metadata.version("bitsandbytes")
assert bnb.nn is modules is bnbx.nn and bnb.optim is optimizer is bitsandbytes.optim.adamw
assert bnb.functional is bnbx.functional
assert bnb.optim.adamw.AdamW8bit is AdamW8bit and AdamW8bit.__base__ is bnbx.optim.AdamW8bit
assert bnb.optim.GlobalOptimManager is bnbx.optim.GlobalOptimManager
assert Linear4bit is bnbx.nn.Linear4bit and OutlierTracer is bnbx.nn.OutlierTracer
assert MatmulLtState is bnb.MatmulLtState is bnbx.MatmulLtState
assert all(getattr(bnb, n) is getattr(bnbx, n) for n in bnbx.__all__ if n != "optim")
assert bnb.optim.__all__ == bnbx.optim.__all__
copies = {
    module.__name__
    for name, module in sys.modules.items()
    if name.startswith("bitsandbytes.") and not module.__name__.startswith("bnbx.")
}
assert bnbx.optim.Optimizer8bit.__module__ == "bnbx.optim.base"
print(AdamW8bit)  # the Trainer of transformers looks for the library's name here
print(bnb.__file__, importlib.metadata.requires("bitsandbytes"), copies)
"""


def test_every_name_is_the_object_of_bnbx(dropin: Path, tmp_path: Path) -> None:
    shown = python("-W", "error", "-c", ONE_OF_EACH, cwd=tmp_path, folders=(dropin,))
    file = dropin / "bitsandbytes" / "__init__.py"
    about = f"{file} ['bnbx==0.1.0'] {{'bitsandbytes.optim'}}"
    assert shown.splitlines() == ["<class 'bitsandbytes.optim.AdamW8bit'>", about]
    assert bnbx.optim.AdamW8bit.__module__ == "bnbx.optim"  # in a process that did not ask for it


ADAM = """
import pickle
import torch
import bitsandbytes as bnb
import bnbx

for name in ("Adam", "Adam8bit", "Adam32bit", "PagedAdam", "PagedAdam8bit", "PagedAdam32bit"):
    ends = []
    theirs, ours = getattr(bnb.optim, name), getattr(bnbx.optim, name.replace("Adam", "AdamW"))
    for made, decay in (
        (theirs, {"weight_decay": 0.1}),
        (ours, {"weight_decay": 0.1}),
        (theirs, {}),
        (ours, {"weight_decay": 0.0}),
    ):
        torch.manual_seed(0)
        p = torch.randn(5000, requires_grad=True)
        optimizer = made([p], lr=0.01, **decay)
        p.grad = torch.randn(5000)
        optimizer.step()
        ends.append(p.detach())
    assert torch.equal(ends[0], ends[1]) and torch.equal(ends[2], ends[3])
    assert not torch.equal(ends[0], ends[2])
    assert type(pickle.loads(pickle.dumps(theirs([p])))) is theirs
"""


def test_adam_decays_as_in_bitsandbytes(dropin: Path, tmp_path: Path) -> None:
    python("-W", "error", "-c", ADAM, cwd=tmp_path, folders=(dropin,))


def test_the_metadata_keep_it_off_indexes(dropin: Path) -> None:
    (folder,) = dropin.glob("*.dist-info")
    assert folder.name == "bitsandbytes-0.50.2.dist-info"
    assert "Classifier: Private :: Do Not Upload" in (folder / "METADATA").read_text()


def names_of_the_real_one() -> dict[str, list[str]]:
    """The functions and classes of each module, and what packages import, read from its files."""
    spec = find_spec("bitsandbytes")
    if spec is None or not spec.submodule_search_locations:
        pytest.skip("the extra `peers` has the real one")
    root = Path(spec.submodule_search_locations[0])
    found = {}
    for file in sorted(root.rglob("*.py")):
        parts = ["bitsandbytes", *file.relative_to(root).with_suffix("").parts]
        names = []
        for node in ast.parse(file.read_text()).body:
            if isinstance(node, ast.FunctionDef | ast.ClassDef):
                names.append(node.name)
            elif isinstance(node, ast.ImportFrom) and file.name == "__init__.py":
                names += [alias.asname or alias.name for alias in node.names]
        public = [name for name in names if not name.startswith("_")]
        found[".".join(parts).removesuffix(".__init__")] = public
    return found


def test_names_of_the_real_one_are_there(dropin: Path, tmp_path: Path) -> None:
    real = names_of_the_real_one()
    assert "Linear4bit" in real["bitsandbytes.nn"]
    names = json.dumps(real)
    missing = json.loads(python("-c", MISSING_NAMES, names, cwd=tmp_path, folders=(dropin,)))
    assert missing.keys() == real.keys()
    for module, absent in missing.items():
        if absent is None:
            assert any(f"{module}.".startswith(f"{name}.") for name in ABSENT_MODULES), module
        else:
            assert absent == ABSENT_NAMES.get(module, "").split(), module


@pytest.mark.parametrize("runs", [("bits", "adapters"), ("trainer", "accelerator")])
def test_libraries_run(
    runs: tuple[str, ...], dropin: Path, saved_model: Path, tmp_path: Path
) -> None:
    (tmp_path / "model").symlink_to(saved_model)
    python(RUNS, *runs, cwd=tmp_path, folders=(dropin,))
