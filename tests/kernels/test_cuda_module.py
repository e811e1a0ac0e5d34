"""The launcher of CUDA kernels, with a CuPy that only writes down what it is asked for."""

from __future__ import annotations

import ctypes
import sys
from contextlib import nullcontext
from pathlib import Path
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
from cuda_on_cpu.source import find_kernels
from plans import cases


class CompileError(Exception):
    """What CuPy raises for a source that NVRTC refuses."""


class Loaded:
    """A module whose machine code is its source: `names` are those of all functions so far."""

    def __init__(self, names: list[str]) -> None:
        self.names = names
        self.code = ""

    def load(self, code: bytes) -> None:
        self.code = code.decode()

    def get_function(self, name: str) -> Any:
        assert name in {kernel.name for kernel in find_kernels(self.code)}, name
        self.names.append(name)
        return SimpleNamespace(ptr=len(self.names))


class Recorder:
    """A CuPy without a GPU: sources are searched for their kernels, launches are kept.

    Kernels have the numbers 1, 2, ... for addresses. Of a launch is kept: the kernel, blocks,
    threads, the stream, the device, and the places of its arguments' 8 bytes, which are read before
    the call returns, as the driver does.
    """

    __version__ = "0"

    def __init__(self) -> None:
        self.names: list[str] = []
        self.compiled = 0
        self.launches: list[tuple[str, int, int, tuple[int, ...], int, int]] = []
        self.device = 0
        self.arguments = 2
        self.cuda = SimpleNamespace(
            compiler=SimpleNamespace(
                CompileException=CompileError, compile_using_nvrtc=self._compile
            ),
            function=SimpleNamespace(Module=lambda: Loaded(self.names)),
            nvrtc=SimpleNamespace(getVersion=lambda: (13, 0)),
            driver=SimpleNamespace(launchKernel=self._launch),
            runtime=SimpleNamespace(getDevice=lambda: self.device, setDevice=self._set),
        )

    def _set(self, index: int) -> None:
        self.device = index

    def _launch(self, address: int, *given: int) -> None:
        grid, threads, shared, stream, places, extra = given[:3], given[3:6], *given[6:]
        assert (grid[1:], threads[1:], shared, extra) == ((1, 1), (1, 1), 0, 0)
        pointers = (ctypes.c_uint64 * self.arguments).from_address(places)
        values = tuple(ctypes.c_uint64.from_address(place).value for place in pointers)
        name = self.names[address - 1]
        self.launches.append((name, grid[0], threads[0], values, stream, self.device))

    def _compile(self, source: str, options: tuple[str, ...]) -> tuple[bytes, None]:
        assert options == cuda_module.OPTIONS
        self.compiled += 1
        if "refused" in source:
            raise CompileError("refused")
        return source.encode(), None


@pytest.fixture
def recorder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Recorder:
    monkeypatch.setenv("BNBX_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (9, 0))
    found = Recorder()
    monkeypatch.setattr(cuda_module, "import_cupy", lambda: found)
    monkeypatch.setattr(torch.cuda, "device", nullcontext)
    processors = SimpleNamespace(multi_processor_count=2)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: processors)
    stream = SimpleNamespace(cuda_stream=77)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda _: stream)
    monkeypatch.setattr(cuda_module, "_raw_stream", None)
    return found


def module(source: str, names: tuple[str, ...], index: int = 0) -> CudaModule:
    return CudaModule(source, names, torch.device("cuda", index), "a test")


SOURCE = 'extern "C" __global__ void bnbx_run(float* x, const long long n) {}'


def test_launches_go_to_the_stream_of_torch_with_plain_arguments(recorder: Recorder) -> None:
    made = module(SOURCE, ("run",))
    x = torch.zeros(3)
    none = Launch("run", 0, (x, np.int64(0)))  # of no blocks at all: CUDA would refuse it
    made.launch(
        [Launch("run", 5, (x, np.int64(3))), Launch("run", 1000, (None, np.int64(0))), none], 64
    )
    most = 2 * cuda_module.BLOCKS_PER_MULTIPROCESSOR
    assert recorder.launches == [
        ("bnbx_run", 5, 64, (x.data_ptr(), 3), 77, 0),
        ("bnbx_run", most, 64, (0, 0), 77, 0),
        ("bnbx_run", 1, 64, (x.data_ptr(), 0), 77, 0),
    ]


def test_arguments_are_their_bytes(recorder: Recorder) -> None:
    """As many of 8 as a kernel takes of them, the lowest first."""
    recorder.arguments = 3
    given = (np.int64(-5), np.float32(1.5), np.int32(-1))
    module(SOURCE, ("run",)).launch([Launch("run", 1, given)])
    found = [value.to_bytes(8, "little") for value in recorder.launches[0][3]]
    assert np.frombuffer(found[0], np.int64)[0] == -5
    assert np.frombuffer(found[1], np.float32)[0] == 1.5
    assert np.frombuffer(found[2], np.int32)[0] == -1


def test_a_launch_is_on_the_device_of_its_module_and_leaves_the_current_one(
    recorder: Recorder,
) -> None:
    module(SOURCE, ("run",), 1).launch([Launch("run", 1, (None, np.int64(0)))])
    assert [launch[-1] for launch in recorder.launches] == [1]
    assert recorder.device == 0


def test_the_stream_is_asked_for_by_number_where_torch_can_say_it(
    recorder: Recorder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cuda_module, "_raw_stream", lambda index: 100 + index)
    module(SOURCE, ("run",), 3).launch([Launch("run", 1, (None, np.int64(0)))])
    assert [launch[-2] for launch in recorder.launches] == [103]


def test_a_source_that_is_refused_is_named(recorder: Recorder) -> None:
    del recorder
    with pytest.raises(TargetError, match="kernel of a test: refused"):
        module('extern "C" __global__ void bnbx_run() { refused }', ("run",))


def test_a_source_is_compiled_once_for_a_kind_of_device(
    recorder: Recorder, monkeypatch: pytest.MonkeyPatch
) -> None:
    for _ in range(2):
        module(SOURCE, ("run",))
    assert recorder.compiled == 1
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (8, 0))
    module(SOURCE, ("run",))
    assert recorder.compiled == 2


def test_nothing_is_flushed_to_zero_or_contracted() -> None:
    """CuPy's own way of compiling asks for the former: its H100 gave other bits than a CPU."""
    assert {"--ftz=false", "--fmad=false", "--prec-div=true", "--prec-sqrt=true"} <= set(
        cuda_module.OPTIONS
    )


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
    module(int8_cuda.source(), int8_cuda.NAMES)


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
