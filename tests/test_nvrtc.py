"""The NVRTC driver: what compiles everywhere, what spills, and what does not compile."""

import pytest

import nvrtc
from cuda_on_cpu.samples import SAMPLES, read

reason = nvrtc.available()
pytestmark = pytest.mark.skipif(reason is not None, reason=str(reason))

# All loads come before all stores, so 96 values are alive at once; 1024 threads leave 64 registers.
SPILLING = """
extern "C" __global__ void __launch_bounds__(1024) spilling(float* x, int n) {
  float v[96];
#pragma unroll
  for (int i = 0; i < 96; ++i) v[i] = x[i * n];
#pragma unroll
  for (int i = 0; i < 96; ++i) x[i * n] = v[i] * v[(i * 37 + 5) % 96];
}
"""


@pytest.mark.parametrize("arch", nvrtc.ARCHITECTURES)
def test_kernel_compiles_without_spills(arch: int) -> None:
    cubin = nvrtc.compile_cubin(SAMPLES["block_absmax"].source, arch)
    assert cubin.arch == arch
    assert cubin.image.startswith(b"\x7fELF")
    assert list(cubin.kernels) == ["block_absmax"]
    assert 0 < cubin.registers <= 32
    assert cubin.shared_bytes == 256 * 4
    assert (cubin.spill_stores, cubin.spill_loads, cubin.stack_bytes) == (0, 0, 0)
    assert f"Compiling entry function 'block_absmax' for 'sm_{arch}'" in cubin.log


@pytest.mark.parametrize("name", [*SAMPLES, "atomics", "collectives", "floats", "integers"])
def test_what_the_cpu_harness_runs_is_cuda(name: str) -> None:
    """Its headers must not accept names or overloads that CUDA does not have."""
    for arch in (75, 120):
        assert nvrtc.compile_cubin(read(name), arch).spill_stores == 0


def test_spilling_kernel_is_seen() -> None:
    cubin = nvrtc.compile_cubin(SPILLING + SAMPLES["difference"].source, 80)
    assert cubin.spill_stores > 0
    assert cubin.spill_loads > 0
    assert cubin.stack_bytes > 0
    assert cubin.registers == cubin.kernels["spilling"].registers <= 64
    assert cubin.shared_bytes == cubin.kernels["difference"].shared_bytes == 64 * 4
    assert cubin.kernels["difference"].spill_stores == 0
    assert cubin.spill_stores == cubin.kernels["spilling"].spill_stores


def test_local_array_is_seen_as_stack() -> None:
    source = """extern "C" __global__ void k(float* x, int n) {
      float local[40];
      for (int i = 0; i < 40; ++i) local[(i * n) % 40] = x[i];
      x[n] = local[n];
    }"""
    cubin = nvrtc.compile_cubin(source, 90)
    assert (cubin.stack_bytes, cubin.spill_stores) == (160, 0)


def test_contraction_is_off_unless_asked_for() -> None:
    source = """extern "C" __global__ void k(float* x) { x[0] = x[1] * x[2] + x[3]; }"""
    separate = nvrtc.compile_cubin(source, 80).image
    assert separate == nvrtc.compile_cubin(source, 80, options=["--fmad=false"]).image
    assert separate != nvrtc.compile_cubin(source, 80, options=["--fmad=true"]).image


def test_error_has_the_log_and_the_numbered_source() -> None:
    source = 'extern "C" __global__ void k(float* x) {\n  x[0] = nonsense;\n}'
    with pytest.raises(nvrtc.NvrtcError) as caught:
        nvrtc.compile_cubin(source, 80)
    text = str(caught.value)
    assert text.startswith("NVRTC cannot compile for sm_80 (NVRTC_ERROR_COMPILATION):")
    assert 'kernel.cu(2): error: identifier "nonsense" is undefined' in text
    assert "2 |   x[0] = nonsense;" in text


def test_unknown_architecture_is_refused() -> None:
    with pytest.raises(nvrtc.NvrtcError, match="cannot compile for sm_12"):
        nvrtc.compile_cubin(SAMPLES["difference"].source, 12)


def test_source_without_a_kernel_is_refused() -> None:
    with pytest.raises(nvrtc.NvrtcError, match="defines no kernel"):
        nvrtc.compile_cubin("__device__ int f() { return 1; }", 80)


def test_missing_wheels_are_a_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nvrtc, "_LIBRARY_FOLDERS", ())
    nvrtc._library.cache_clear()
    try:
        assert nvrtc.available() == "NVRTC is not installed: pip install nvidia-cuda-nvrtc"
    finally:
        nvrtc._library.cache_clear()
