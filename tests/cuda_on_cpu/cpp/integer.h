// Integer intrinsics, and the reinterpretation of bits.
#pragma once
#include <stdint.h>

namespace cuda_device {

// ---- counting and permuting bits ----------------------------------------------------------------

inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline int __popcll(unsigned long long x) { return __builtin_popcountll(x); }
inline int __clz(int x) { return x ? __builtin_clz(static_cast<unsigned>(x)) : 32; }
inline int __clzll(long long x) {
  return x ? __builtin_clzll(static_cast<unsigned long long>(x)) : 64;
}
inline int __ffs(int x) { return __builtin_ffs(x); }
inline int __ffsll(long long x) { return __builtin_ffsll(x); }

inline unsigned __brev(unsigned x) {
  unsigned result = 0;
  for (int i = 0; i < 32; ++i) result |= (x >> i & 1u) << (31 - i);
  return result;
}

// Selects four of the eight bytes of b:a; of each selector digit, three bits count.
inline unsigned __byte_perm(unsigned a, unsigned b, unsigned selector) {
  const uint64_t bytes = static_cast<uint64_t>(b) << 32 | a;
  unsigned result = 0;
  for (int i = 0; i < 4; ++i) {
    const unsigned index = selector >> (4 * i) & 7u;
    result |= static_cast<unsigned>(bytes >> (8 * index) & 0xFFu) << (8 * i);
  }
  return result;
}

// The upper or lower half of high:low shifted; the plain forms wrap the distance, the `c` forms
// clamp it.
inline unsigned __funnelshift_l(unsigned low, unsigned high, unsigned shift) {
  return static_cast<unsigned>((static_cast<uint64_t>(high) << 32 | low) << (shift & 31) >> 32);
}
inline unsigned __funnelshift_r(unsigned low, unsigned high, unsigned shift) {
  return static_cast<unsigned>((static_cast<uint64_t>(high) << 32 | low) >> (shift & 31));
}
inline unsigned __funnelshift_lc(unsigned low, unsigned high, unsigned shift) {
  return shift >= 32 ? low : __funnelshift_l(low, high, shift);
}
inline unsigned __funnelshift_rc(unsigned low, unsigned high, unsigned shift) {
  return shift >= 32 ? high : __funnelshift_r(low, high, shift);
}

// ---- products -----------------------------------------------------------------------------------

inline int __mulhi(int a, int b) {
  return static_cast<int>(static_cast<int64_t>(a) * b >> 32);
}
inline unsigned __umulhi(unsigned a, unsigned b) {
  return static_cast<unsigned>(static_cast<uint64_t>(a) * b >> 32);
}
__extension__ inline long long __mul64hi(long long a, long long b) {
  return static_cast<long long>(static_cast<__int128>(a) * b >> 64);
}
__extension__ inline unsigned long long __umul64hi(unsigned long long a, unsigned long long b) {
  return static_cast<unsigned long long>(static_cast<unsigned __int128>(a) * b >> 64);
}

inline int __dp4a(int a, int b, int c) {
  for (int i = 0; i < 4; ++i) {
    c += static_cast<signed char>(a >> 8 * i) * static_cast<signed char>(b >> 8 * i);
  }
  return c;
}
inline unsigned __dp4a(unsigned a, unsigned b, unsigned c) {
  for (int i = 0; i < 4; ++i) c += (a >> 8 * i & 0xFFu) * (b >> 8 * i & 0xFFu);
  return c;
}

// ---- min, max, abs: CUDA's overloads, so that what is ambiguous there is ambiguous here ---------

#define CUDA_ON_CPU_MIN_MAX(result, left, right)                                     \
  inline result min(left a, right b) {                                               \
    return static_cast<result>(a) < static_cast<result>(b) ? static_cast<result>(a)  \
                                                           : static_cast<result>(b); \
  }                                                                                  \
  inline result max(left a, right b) {                                               \
    return static_cast<result>(a) > static_cast<result>(b) ? static_cast<result>(a)  \
                                                           : static_cast<result>(b); \
  }
#define CUDA_ON_CPU_MIN_MAX_FAMILY(type)                           \
  CUDA_ON_CPU_MIN_MAX(type, type, type)                            \
  CUDA_ON_CPU_MIN_MAX(unsigned type, unsigned type, unsigned type) \
  CUDA_ON_CPU_MIN_MAX(unsigned type, unsigned type, type)          \
  CUDA_ON_CPU_MIN_MAX(unsigned type, type, unsigned type)
CUDA_ON_CPU_MIN_MAX_FAMILY(int)
CUDA_ON_CPU_MIN_MAX_FAMILY(long)
CUDA_ON_CPU_MIN_MAX_FAMILY(long long)
#undef CUDA_ON_CPU_MIN_MAX_FAMILY
#undef CUDA_ON_CPU_MIN_MAX

inline int abs(int x) { return x < 0 ? -x : x; }
inline long abs(long x) { return x < 0 ? -x : x; }
inline long long abs(long long x) { return x < 0 ? -x : x; }
inline long long llabs(long long x) { return abs(x); }

// ---- the same bits as another type --------------------------------------------------------------

template <class To, class From>
inline To same_bits(From from) {
  static_assert(sizeof(To) == sizeof(From), "reinterpretation keeps the size");
  To to;
  __builtin_memcpy(&to, &from, sizeof to);
  return to;
}

inline int __float_as_int(float x) { return same_bits<int>(x); }
inline unsigned __float_as_uint(float x) { return same_bits<unsigned>(x); }
inline float __int_as_float(int x) { return same_bits<float>(x); }
inline float __uint_as_float(unsigned x) { return same_bits<float>(x); }
inline long long __double_as_longlong(double x) { return same_bits<long long>(x); }
inline double __longlong_as_double(long long x) { return same_bits<double>(x); }

}  // namespace cuda_device
