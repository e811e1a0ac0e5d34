// Everything that CUDA provides without an include: the prelude of every kernel compiled for the
// CPU. The kernel text follows inside namespace cuda_device, where these names come before those
// of the C library.
#pragma once

#if !defined(__CUDA_ARCH__)
#error "the Python side defines __CUDA_ARCH__"
#endif

#include "collectives.h"
#include "entry.h"
#include "floating.h"
#include "integer.h"
#include "memory.h"
#include "runtime.h"
#include "types.h"

#define __CUDACC__ 1
#define __CUDACC_RTC__ 1
#define __CUDACC_VER_MAJOR__ 13

// ---- keywords -----------------------------------------------------------------------------------

#define __global__ __attribute__((noinline))
#define __device__
#define __host__
// `used`: the compiler may drop no access because it cannot see who else touches the variable.
#define __shared__ static __attribute__((section("cuda_shared"), used))
#define __constant__ static __attribute__((section("cuda_constant")))
#define __grid_constant__
#define __launch_bounds__(...)
#define __forceinline__ inline __attribute__((always_inline))
#define __noinline__ __attribute__((noinline))
#define __align__(bytes) __attribute__((aligned(bytes)))

// ---- variables and statements -------------------------------------------------------------------

#define threadIdx (cuda_on_cpu::thread_index())
#define blockIdx (cuda_on_cpu::current_block())
#define blockDim (cuda_on_cpu::current_block_size())
#define gridDim (cuda_on_cpu::current_grid_size())
#define warpSize 32

#define __trap() cuda_on_cpu::fail_at_line(__LINE__, "__trap() was reached")
#undef assert
#define assert(condition) \
  ((condition) ? void() : cuda_on_cpu::fail_at_line(__LINE__, "assertion failed: %s", #condition))
