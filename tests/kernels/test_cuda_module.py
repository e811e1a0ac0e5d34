"""The launcher of CUDA kernels, with a CuPy that only writes down what it is asked for."""

from __future__ import annotations

import sys
from contextlib import contextmanager, nullcontext
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from bnbx.errors import TargetError
from bnbx.kernels import coding_cuda, cuda, cuda_module, int8_cuda, linear_cuda
from bnbx.kernels.coding_source import CodingPlan
from bnbx.kernels.cuda_module import CudaModule, Launch
from bnbx.kernels.encoding import make_encoding
from bnbx.kernels.linear_source import plan_for
from bnbx.kernels.source import fill
from cuda_on_cpu.source import find_kernels
from plans import cases


class CompileError(Exception):
    """What CuPy raises for a source that NVRTC refuses."""


class Recorder:
    """A CuPy without a GPU: sources are searched for their kernels, launches are kept."""

    def __init__(self) -> None:
        self.launches: list[tuple[str, tuple[int, ...], tuple[int, ...], tuple[Any, ...], int]] = []
        self.stream = 0
        self.cuda = SimpleNamespace(
            Device=nullcontext,
            ExternalStream=self._stream,
            compiler=SimpleNamespace(CompileException=CompileError),
        )

    @contextmanager
    def _stream(self, number: int) -> Any:
        self.stream = number
        yield
        self.stream = 0

    def RawModule(self, code: str, options: tuple[str, ...]) -> Any:  # noqa: N802 - CuPy's name
        assert options == cuda_module.OPTIONS
        names = {kernel.name for kernel in find_kernels(code)}

        def get_function(name: str) -> Any:
            if name not in names:
                raise CompileError(name)
            return lambda *given: self.launches.append((name, *given, self.stream))

        return SimpleNamespace(get_function=get_function)


@pytest.fixture
def recorder(monkeypatch: pytest.MonkeyPatch) -> Recorder:
    found = Recorder()
    monkeypatch.setattr(cuda_module, "import_cupy", lambda: found)
    monkeypatch.setattr(torch.cuda, "device", nullcontext)
    processors = SimpleNamespace(multi_processor_count=2)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: processors)
    stream = SimpleNamespace(cuda_stream=77)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda _: stream)
    return found


def module(source: str, names: tuple[str, ...]) -> CudaModule:
    return CudaModule(source, names, torch.device("cuda", 0), "a test")


def test_launches_go_to_the_stream_of_torch_with_plain_arguments(recorder: Recorder) -> None:
    made = module('extern "C" __global__ void bnbx_run(float* x, const long long n) {}', ("run",))
    x = torch.zeros(3)
    none = Launch("run", 0, (x, np.int64(0)))  # of no blocks at all: CUDA would refuse it
    made.launch(
        [Launch("run", 5, (x, np.int64(3))), Launch("run", 1000, (None, np.int64(0))), none], 64
    )
    most = 2 * cuda_module.BLOCKS_PER_MULTIPROCESSOR
    assert recorder.launches == [
        ("bnbx_run", (5,), (64,), (np.uint64(x.data_ptr()), np.int64(3)), 77),
        ("bnbx_run", (most,), (64,), (np.uint64(0), np.int64(0)), 77),
        ("bnbx_run", (1,), (64,), (np.uint64(x.data_ptr()), np.int64(0)), 77),
    ]


def test_a_source_that_is_refused_is_named(recorder: Recorder) -> None:
    del recorder
    with pytest.raises(TargetError, match="kernel of a test: bnbx_gone"):
        module('extern "C" __global__ void bnbx_run() {}', ("gone",))


def test_without_cupy_the_error_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "cupy", None)
    with pytest.raises(TargetError, match="CuPy is not installed"):
        cuda_module.import_cupy()


@pytest.mark.parametrize("name", ["nf4", "nvfp4", "int8"])
def test_sources_have_the_kernels_that_are_asked_for(recorder: Recorder, name: str) -> None:
    del recorder
    encoding = make_encoding(name)
    module(coding_cuda.source(CodingPlan(encoding, "float32")), coding_cuda.NAMES)
    module(linear_cuda.source(plan_for(encoding, "float32")), linear_cuda.NAMES)
    module(fill(int8_cuda.TEMPLATE), int8_cuda.NAMES)


def test_the_kernel_of_an_optimizer_is_compiled_with_its_passes(
    recorder: Recorder, monkeypatch: pytest.MonkeyPatch
) -> None:
    del recorder
    monkeypatch.setattr(torch.Tensor, "to", lambda self, *_args, **_named: self)
    monkeypatch.setattr(torch, "zeros", lambda *_args, **_named: None)
    plans = {case.plan.measured: case.plan for case in cases()}
    assert set(plans) == {False, True}
    for measured, plan in plans.items():
        made = cuda.Kernel(plan, torch.device("cuda", 0))
        assert set(made.module.functions) == (
            {"measure", "reduce", "update"} if measured else {"update"}
        )
