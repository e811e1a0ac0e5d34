"""Executes unmodified CUDA kernel source on the CPU, so that kernels are tested without a GPU.

g++ compiles the kernel text against a few headers that provide what CUDA builds in, and every
CUDA thread runs as a fiber of one OS thread: barriers, warp collectives, shared memory and atomics
have CUDA's semantics. What CUDA leaves open is made visible: shared memory is poisoned before
every block, threads run in the order of a schedule, and rules that hardware rarely enforces
(divergent barriers, lanes outside a mask) are errors.

    module = compile_source(source, mode="check")
    module.kernel("scale")(grid=4, block=256, args=[x, x.numel(), 2.0], schedule=1)

Three modes, each a compilation of its own:

- plain: the fast one, some million elements a second.
- check: every memory access is checked, about ten times slower. Finds accesses outside of the
  arguments, the registered buffers and shared memory; races between threads and between blocks;
  reads of shared memory that nothing has written.
- ubsan: indices outside of arrays of known size, misaligned and null pointers, shifts by too much,
  division by zero, and conversions from float that do not fit.

A failure is a CudaOnCpuError that names what is wrong, the line, the block and the thread.

Not covered: timing, memory ordering weaker than the program order of each thread, the last bits of
approximate functions (`expf`, `rsqrtf`), and what NVIDIA's compiler makes of the text. Threads
switch at barriers and warp collectives only, so a kernel that spins on memory never ends.
"""

from cuda_on_cpu.arguments import Argument
from cuda_on_cpu.errors import CudaOnCpuError
from cuda_on_cpu.launch import SCHEDULES, Kernel, Module, compile_source

__all__ = ["SCHEDULES", "Argument", "CudaOnCpuError", "Kernel", "Module", "compile_source"]
