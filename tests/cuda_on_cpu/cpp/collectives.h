// Barriers, shuffles, votes and warp reductions, as kernel text calls them. The default arguments
// carry the line of the call, so that a failure can name it.
#pragma once
#include "runtime.h"

namespace cuda_device {

namespace collectives {

// Threads switch inside the runtime: the compiler must not keep memory in registers across it.
inline void forget_memory() { asm volatile("" ::: "memory"); }

inline unsigned meet(const cuda_on_cpu::Collective& collective, unsigned mask, uint64_t value,
                     int line) {
  forget_memory();
  const uint64_t result = cuda_on_cpu::meet_in_warp(collective, mask, value, 0, 32, line);
  forget_memory();
  return static_cast<unsigned>(result);
}

inline int meet_in_block(bool predicate, int line) {
  forget_memory();
  const int result = cuda_on_cpu::meet_in_block(predicate, line);
  forget_memory();
  return result;
}

template <class T>
inline uint64_t to_bits(T value) {
  static_assert(sizeof(T) <= 8, "warp collectives exchange at most 8 bytes");
  uint64_t bits = 0;
  __builtin_memcpy(&bits, &value, sizeof value);
  return bits;
}

// As with CUDA's overloads, types narrower than int arrive as int. Hardware reads 5 bits of the
// argument: a lane, a distance, or a lane mask.
template <class T, class Promoted = decltype(+T())>
inline Promoted exchange(const cuda_on_cpu::Collective& collective, unsigned mask, T value,
                         int argument, int width, int line) {
  const uint64_t bits = to_bits(static_cast<Promoted>(value));
  forget_memory();
  const uint64_t received =
      cuda_on_cpu::meet_in_warp(collective, mask, bits, argument & 31, width, line);
  forget_memory();
  Promoted result;
  __builtin_memcpy(&result, &received, sizeof result);
  return result;
}

}  // namespace collectives

// ---- the whole block ----------------------------------------------------------------------------

inline void __syncthreads(int line = __builtin_LINE()) { collectives::meet_in_block(false, line); }
inline int __syncthreads_count(int predicate, int line = __builtin_LINE()) {
  return collectives::meet_in_block(predicate != 0, line);
}
inline int __syncthreads_or(int predicate, int line = __builtin_LINE()) {
  return collectives::meet_in_block(predicate != 0, line) != 0;
}
inline int __syncthreads_and(int predicate, int line = __builtin_LINE()) {
  return collectives::meet_in_block(predicate == 0, line) == 0;
}

// ---- one warp -----------------------------------------------------------------------------------

inline void __syncwarp(unsigned mask = 0xffffffffu, int line = __builtin_LINE()) {
  collectives::meet(cuda_on_cpu::sync_warp, mask, 0, line);
}

template <class T>
inline auto __shfl_sync(unsigned mask, T value, int source, int width = 32,
                        int line = __builtin_LINE()) {
  return collectives::exchange(cuda_on_cpu::shuffle, mask, value, source, width, line);
}
template <class T>
inline auto __shfl_up_sync(unsigned mask, T value, unsigned delta, int width = 32,
                           int line = __builtin_LINE()) {
  return collectives::exchange(cuda_on_cpu::shuffle_up, mask, value, delta, width, line);
}
template <class T>
inline auto __shfl_down_sync(unsigned mask, T value, unsigned delta, int width = 32,
                             int line = __builtin_LINE()) {
  return collectives::exchange(cuda_on_cpu::shuffle_down, mask, value, delta, width, line);
}
template <class T>
inline auto __shfl_xor_sync(unsigned mask, T value, int lane_mask, int width = 32,
                            int line = __builtin_LINE()) {
  return collectives::exchange(cuda_on_cpu::shuffle_xor, mask, value, lane_mask, width, line);
}

inline unsigned __ballot_sync(unsigned mask, int predicate, int line = __builtin_LINE()) {
  return collectives::meet(cuda_on_cpu::ballot, mask, predicate != 0, line);
}
inline int __any_sync(unsigned mask, int predicate, int line = __builtin_LINE()) {
  return collectives::meet(cuda_on_cpu::ballot, mask, predicate != 0, line) != 0;
}
inline int __all_sync(unsigned mask, int predicate, int line = __builtin_LINE()) {
  return collectives::meet(cuda_on_cpu::ballot, mask, predicate == 0, line) == 0;
}

// What follows asks for compute capability 7.0 and 8.0 respectively.
template <class T>
inline unsigned __match_any_sync(unsigned mask, T value, int line = __builtin_LINE()) {
  return collectives::meet(cuda_on_cpu::match_any, mask, collectives::to_bits(value), line);
}

#if __CUDA_ARCH__ >= 800

#define CUDA_ON_CPU_REDUCTION(operation, type, collective)                                  \
  inline type __reduce_##operation##_sync(unsigned mask, type value,                        \
                                          int line = __builtin_LINE()) {                    \
    const unsigned bits = static_cast<unsigned>(value);                                     \
    return static_cast<type>(collectives::meet(cuda_on_cpu::collective, mask, bits, line)); \
  }
CUDA_ON_CPU_REDUCTION(add, int, reduce_add)
CUDA_ON_CPU_REDUCTION(add, unsigned, reduce_add)
CUDA_ON_CPU_REDUCTION(min, int, reduce_min_signed)
CUDA_ON_CPU_REDUCTION(min, unsigned, reduce_min_unsigned)
CUDA_ON_CPU_REDUCTION(max, int, reduce_max_signed)
CUDA_ON_CPU_REDUCTION(max, unsigned, reduce_max_unsigned)
CUDA_ON_CPU_REDUCTION(and, unsigned, reduce_and)
CUDA_ON_CPU_REDUCTION(or, unsigned, reduce_or)
CUDA_ON_CPU_REDUCTION(xor, unsigned, reduce_xor)
#undef CUDA_ON_CPU_REDUCTION

#endif

}  // namespace cuda_device
