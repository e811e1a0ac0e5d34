"""How CUDA source becomes something that runs on the CPU: read, compiled, and kept."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from cuda_on_cpu import CudaOnCpuError, compile_source
from cuda_on_cpu.samples import SAMPLES

# ---- source --------------------------------------------------------------------------------------


def test_kernels_are_found_in_any_form() -> None:
    source = """
    // __global__ void not_this(int) {}
    /* nor __global__ void
       this() */
    typedef long long int64_t; typedef unsigned char uint8_t;
    constexpr int bound(int threads) { return threads; }
    extern "C" __global__ void first(int64_t* out) { *out += 1; }
    extern "C" __global__ __launch_bounds__(bound(64), 2) void second(int64_t* out) { *out += 2; }
    extern "C" {
      __global__ void
      __launch_bounds__(32)
      third(int64_t* out) { *out += 4; }
    }"""
    module = compile_source(source)
    assert module.names == ("first", "second", "third")
    out = torch.zeros(1, dtype=torch.int64)
    for name in module.names:
        module.kernel(name)(1, 1, [out])
    assert out.item() == 7
    with pytest.raises(ValueError, match="allows 64"):
        module.kernel("second")(1, 65, [out])


@pytest.mark.parametrize(
    "declaration",
    [
        "extern __shared__ float4 x[];",
        "extern __shared__ __align__(16) float4 x[];",
        "extern __align__(16) __shared__ float4 x[ ] ;",
        "extern __shared__\n\n float4\n x[];",
    ],
)
def test_dynamic_shared_memory(declaration: str) -> None:
    source = (
        f'extern "C" __global__ void k(float* out) {{ {declaration}\n'
        "x[threadIdx.x] = make_float4(0.0f, 1.0f, 2.0f, threadIdx.x);\n"
        "__syncthreads();\n"
        "out[threadIdx.x] = x[31 - threadIdx.x].w; }"
    )
    out = torch.zeros(32)
    compile_source(source, "check").kernel("k")(1, 32, [out], shared_bytes=32 * 16)
    assert torch.equal(out, torch.arange(32.0).flip(0))


def test_dynamic_shared_memory_for_the_whole_file() -> None:
    source = """
    extern __shared__ int x[];
    __device__ void set(int i) { x[i] = i; }
    extern "C" __global__ void k(int* out) { set(threadIdx.x); out[threadIdx.x] = x[threadIdx.x]; }
    """
    out = torch.zeros(8, dtype=torch.int32)
    compile_source(source, "check").kernel("k")(1, 8, [out], shared_bytes=32)
    assert out.tolist() == list(range(8))


def test_lines_are_those_of_the_source() -> None:
    source = """extern "C" __global__ void k(float* out) {
      extern __shared__
        float
          x[];
      assert(out == nullptr);
    }"""
    with pytest.raises(CudaOnCpuError) as caught:
        compile_source(source).kernel("k")(1, 1, [torch.zeros(1)])
    assert str(caught.value) == (
        "k: assertion failed: out == nullptr\n"
        "  at kernel.cu:5: assert(out == nullptr);\n"
        "  in block (0, 0, 0), thread (0, 0, 0), schedule 0, plain mode"
    )


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("__device__ void f() {}", r"no kernel; expected `extern \"C\" __global__ void"),
        (
            'extern "C" __global__ void k() {\n  nonsense();\n}',
            r"(?s)kernel.cu:2:3: error: 'nonsense' was not declared.*\n2 \|   nonsense\(\);",
        ),
        (
            'extern "C" __global__ void k() { extern __shared__ float a[], b[]; }',
            r"cannot read `extern __shared__`; expected `extern __shared__ .* name\[\];`",
        ),
    ],
)
def test_source_that_does_not_compile(source: str, message: str) -> None:
    with pytest.raises(CudaOnCpuError, match=message):
        compile_source(source)


def test_unknown_kernel_is_answered_with_those_there_are() -> None:
    with pytest.raises(CudaOnCpuError, match="no kernel 'other'; the source has difference"):
        compile_source(SAMPLES["difference"].source).kernel("other")


# ---- the cache -----------------------------------------------------------------------------------


def test_second_compilation_comes_from_the_cache(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("BNBX_TEST_CACHE", str(tmp_path))
    source = SAMPLES["difference"].source
    first = compile_source(source)
    written = first.path.stat().st_mtime_ns
    assert first.path.is_relative_to(tmp_path)
    assert compile_source(source).path.stat().st_mtime_ns == written
    others = [compile_source(source, "ubsan"), compile_source(source, cuda_arch=900)]
    others.append(compile_source(source.replace("64", "32")))
    assert len({first.path, *(module.path for module in others)}) == 4
    left_over = [path.name for path in tmp_path.rglob("tmp*")]
    assert left_over == []


def test_processes_share_the_cache(tmp_path: Path) -> None:
    """Started together on an empty cache, all of them get a working kernel."""
    script = (
        "from cuda_on_cpu import compile_source\n"
        "from cuda_on_cpu.samples import SAMPLES\n"
        "sample = SAMPLES['difference']\n"
        "assert sample.run(compile_source(sample.source), 1)\n"
    )
    environment = {
        **os.environ,
        "BNBX_TEST_CACHE": str(tmp_path),
        "PYTHONPATH": str(Path(__file__).parent),
    }
    command = [sys.executable, "-c", script]
    processes = [subprocess.Popen(command, env=environment) for _ in range(2)]
    assert [process.wait(timeout=120) for process in processes] == [0, 0]
