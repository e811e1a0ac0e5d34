"""What goes wrong while a kernel is compiled for the CPU or runs there."""


class CudaOnCpuError(RuntimeError):
    """The kernel does not compile for the CPU, or broke a rule of CUDA while it ran."""
