// Memory as kernel text touches it: cached loads and stores, copies, atomics and fences.
#pragma once
#include "runtime.h"

#define CUDA_ON_CPU_INLINED inline __attribute__((always_inline))

#if defined(__SANITIZE_THREAD__)
extern "C" void __tsan_read_range(void* address, size_t bytes);
extern "C" void __tsan_write_range(void* address, size_t bytes);
#endif

namespace cuda_device {

// ---- loads and stores with a cache policy: always inlined, so that the checker sees the caller --

#define CUDA_ON_CPU_LOAD(name)                   \
  template <class T>                             \
  CUDA_ON_CPU_INLINED T name(const T* address) { \
    return *address;                             \
  }
CUDA_ON_CPU_LOAD(__ldg)
CUDA_ON_CPU_LOAD(__ldca)
CUDA_ON_CPU_LOAD(__ldcg)
CUDA_ON_CPU_LOAD(__ldcs)
CUDA_ON_CPU_LOAD(__ldcv)
CUDA_ON_CPU_LOAD(__ldlu)
#undef CUDA_ON_CPU_LOAD

// A parameter of this type takes part in no deduction: atomicAdd(&an_unsigned, 1) is fine.
template <class T>
struct Same {
  typedef T type;
};

#define CUDA_ON_CPU_STORE(name)                                             \
  template <class T>                                                        \
  CUDA_ON_CPU_INLINED void name(T* address, typename Same<T>::type value) { \
    *address = value;                                                       \
  }
CUDA_ON_CPU_STORE(__stcg)
CUDA_ON_CPU_STORE(__stcs)
CUDA_ON_CPU_STORE(__stwb)
CUDA_ON_CPU_STORE(__stwt)
#undef CUDA_ON_CPU_STORE

// Calls into libc are not instrumented, so these tell the checker themselves.
CUDA_ON_CPU_INLINED void* memcpy(void* to, const void* from, size_t bytes) {
#if defined(__SANITIZE_THREAD__)
  __tsan_read_range(const_cast<void*>(from), bytes);
  __tsan_write_range(to, bytes);
#endif
  return __builtin_memcpy(to, from, bytes);
}
CUDA_ON_CPU_INLINED void* memset(void* to, int value, size_t bytes) {
#if defined(__SANITIZE_THREAD__)
  __tsan_write_range(to, bytes);
#endif
  return __builtin_memset(to, value, bytes);
}

// ---- atomics: one OS thread runs everything, so plain operations are atomic ---------------------

// Not inlined when instrumented: the checker hears of the access as a whole, from its caller.
template <class T, class Update>
CUDA_ON_CPU_UNCHECKED T read_modify_write(T* address, const void* caller, Update update) {
  if (cuda_on_cpu::observer) {
    cuda_on_cpu::observer->atomic_access(address, sizeof(T), cuda_on_cpu::site_of(caller));
  }
  const T old = *address;
  *address = update(old);
  return old;
}

#define CUDA_ON_CPU_ATOMIC(name, result)                                                       \
  template <class T>                                                                           \
  __attribute__((noinline, no_sanitize("thread"))) T name(T* address,                          \
                                                          typename Same<T>::type value) {      \
    auto update = [value](T old) __attribute__((no_sanitize("thread"))) { return T(result); }; \
    return read_modify_write(address, __builtin_return_address(0), update);                    \
  }
CUDA_ON_CPU_ATOMIC(atomicAdd, old + value)
CUDA_ON_CPU_ATOMIC(atomicSub, old - value)
CUDA_ON_CPU_ATOMIC(atomicExch, value)
CUDA_ON_CPU_ATOMIC(atomicMin, old < value ? old : value)
CUDA_ON_CPU_ATOMIC(atomicMax, old > value ? old : value)
CUDA_ON_CPU_ATOMIC(atomicInc, old >= value ? 0 : old + 1)
CUDA_ON_CPU_ATOMIC(atomicDec, old == 0 || old > value ? value : old - 1)
CUDA_ON_CPU_ATOMIC(atomicAnd, old & value)
CUDA_ON_CPU_ATOMIC(atomicOr, old | value)
CUDA_ON_CPU_ATOMIC(atomicXor, old ^ value)
#undef CUDA_ON_CPU_ATOMIC

template <class T>
__attribute__((noinline, no_sanitize("thread"))) T atomicCAS(T* address,
                                                             typename Same<T>::type expected,
                                                             typename Same<T>::type value) {
  auto update = [=](T old) __attribute__((no_sanitize("thread"))) {
    return old == expected ? value : old;
  };
  return read_modify_write(address, __builtin_return_address(0), update);
}

// ---- fences: memory is always in order here, but the checker wants to know ----------------------

CUDA_ON_CPU_UNCHECKED void __threadfence() {
  if (cuda_on_cpu::observer) cuda_on_cpu::observer->thread_fence();
}
inline void __threadfence_block() {}

}  // namespace cuda_device
