// Floating-point functions. Those that CUDA rounds correctly are exact here, NaNs aside: a NaN
// that arithmetic makes has other bits than on a GPU. The others (exp, log, pow, rsqrt and the
// fast forms) are rounded once from double precision, which a GPU misses by an ulp or more.
#pragma once
#include "integer.h"

namespace cuda_device {

// ---- rounding is part of the name ---------------------------------------------------------------

inline float __fadd_rn(float a, float b) { return a + b; }
inline float __fsub_rn(float a, float b) { return a - b; }
inline float __fmul_rn(float a, float b) { return a * b; }
inline float __fdiv_rn(float a, float b) { return a / b; }
inline float __fmaf_rn(float a, float b, float c) { return __builtin_fmaf(a, b, c); }
inline float __frcp_rn(float x) { return 1.0f / x; }
inline float __fsqrt_rn(float x) { return __builtin_sqrtf(x); }
inline double __dadd_rn(double a, double b) { return a + b; }
inline double __dsub_rn(double a, double b) { return a - b; }
inline double __dmul_rn(double a, double b) { return a * b; }
inline double __ddiv_rn(double a, double b) { return a / b; }
inline double __fma_rn(double a, double b, double c) { return __builtin_fma(a, b, c); }
inline double __dsqrt_rn(double x) { return __builtin_sqrt(x); }

// ---- minimum and maximum: a NaN loses against a number, and -0 is below +0 ----------------------

template <class T>
inline T smaller_number(T a, T b, T nan) {
  if (a != a) return b != b ? nan : b;
  if (b != b) return a;
  if (a == b) return __builtin_signbit(a) ? a : b;
  return a < b ? a : b;
}
template <class T>
inline T larger_number(T a, T b, T nan) {
  if (a != a) return b != b ? nan : b;
  if (b != b) return a;
  if (a == b) return __builtin_signbit(a) ? b : a;
  return a > b ? a : b;
}

// Of two NaNs the hardware makes this one.
inline float float_nan() { return __uint_as_float(0x7FFFFFFFu); }
inline double double_nan() { return __longlong_as_double(0x7FFFFFFFFFFFFFFFLL); }

inline float fminf(float a, float b) { return smaller_number(a, b, float_nan()); }
inline float fmaxf(float a, float b) { return larger_number(a, b, float_nan()); }
inline double fmin(double a, double b) { return smaller_number(a, b, double_nan()); }
inline double fmax(double a, double b) { return larger_number(a, b, double_nan()); }
inline float fmin(float a, float b) { return fminf(a, b); }
inline float fmax(float a, float b) { return fmaxf(a, b); }
inline float min(float a, float b) { return fminf(a, b); }
inline float max(float a, float b) { return fmaxf(a, b); }
inline double min(double a, double b) { return fmin(a, b); }
inline double max(double a, double b) { return fmax(a, b); }
inline double min(float a, double b) { return fmin(static_cast<double>(a), b); }
inline double min(double a, float b) { return fmin(a, static_cast<double>(b)); }
inline double max(float a, double b) { return fmax(static_cast<double>(a), b); }
inline double max(double a, float b) { return fmax(a, static_cast<double>(b)); }

inline float __saturatef(float x) { return x > 0.0f ? (x < 1.0f ? x : 1.0f) : 0.0f; }

// ---- exact functions, under their C names and as C++ overloads ----------------------------------

#define CUDA_ON_CPU_UNARY(name)                                    \
  inline float name##f(float x) { return __builtin_##name##f(x); } \
  inline float name(float x) { return __builtin_##name##f(x); }    \
  inline double name(double x) { return __builtin_##name(x); }
CUDA_ON_CPU_UNARY(sqrt)
CUDA_ON_CPU_UNARY(fabs)
CUDA_ON_CPU_UNARY(floor)
CUDA_ON_CPU_UNARY(ceil)
CUDA_ON_CPU_UNARY(trunc)
CUDA_ON_CPU_UNARY(rint)
CUDA_ON_CPU_UNARY(nearbyint)
CUDA_ON_CPU_UNARY(round)
#undef CUDA_ON_CPU_UNARY

inline float abs(float x) { return __builtin_fabsf(x); }
inline double abs(double x) { return __builtin_fabs(x); }
inline float copysignf(float x, float sign) { return __builtin_copysignf(x, sign); }
inline double copysign(double x, double sign) { return __builtin_copysign(x, sign); }
inline float fmodf(float a, float b) { return __builtin_fmodf(a, b); }
inline double fmod(double a, double b) { return __builtin_fmod(a, b); }
inline float ldexpf(float x, int exponent) { return __builtin_ldexpf(x, exponent); }
inline float scalbnf(float x, int exponent) { return __builtin_ldexpf(x, exponent); }
inline float frexpf(float x, int* exponent) { return __builtin_frexpf(x, exponent); }
inline float fmaf(float a, float b, float c) { return __builtin_fmaf(a, b, c); }
inline double fma(double a, double b, double c) { return __builtin_fma(a, b, c); }
inline bool isnan(float x) { return x != x; }
inline bool isnan(double x) { return x != x; }
inline bool isinf(float x) { return __builtin_isinf(x) != 0; }
inline bool isinf(double x) { return __builtin_isinf(x) != 0; }
inline bool isfinite(float x) { return __builtin_isfinite(x) != 0; }
inline bool isfinite(double x) { return __builtin_isfinite(x) != 0; }
inline bool signbit(float x) { return __builtin_signbit(x) != 0; }
inline bool signbit(double x) { return __builtin_signbit(x) != 0; }

// ---- functions that no two libraries round alike ------------------------------------------------

#define CUDA_ON_CPU_APPROXIMATE(name)                                               \
  inline double name(double x) { return __builtin_##name(x); }                      \
  inline float name##f(float x) { return static_cast<float>(__builtin_##name(x)); } \
  inline float name(float x) { return name##f(x); }
CUDA_ON_CPU_APPROXIMATE(exp)
CUDA_ON_CPU_APPROXIMATE(exp2)
CUDA_ON_CPU_APPROXIMATE(expm1)
CUDA_ON_CPU_APPROXIMATE(log)
CUDA_ON_CPU_APPROXIMATE(log2)
CUDA_ON_CPU_APPROXIMATE(log1p)
CUDA_ON_CPU_APPROXIMATE(tanh)
#undef CUDA_ON_CPU_APPROXIMATE

inline double pow(double a, double b) { return __builtin_pow(a, b); }
inline float powf(float a, float b) { return static_cast<float>(__builtin_pow(a, b)); }
inline float pow(float a, float b) { return powf(a, b); }
inline double rsqrt(double x) { return 1.0 / __builtin_sqrt(x); }
inline float rsqrtf(float x) { return static_cast<float>(rsqrt(static_cast<double>(x))); }
inline float __frsqrt_rn(float x) { return rsqrtf(x); }
inline float __fdividef(float a, float b) { return a / b; }
inline float __expf(float x) { return expf(x); }
inline float __logf(float x) { return logf(x); }
inline float __log2f(float x) { return log2f(x); }
inline float __powf(float a, float b) { return powf(a, b); }

// ---- conversions: out of range saturates, NaN gives 0 -------------------------------------------

inline int saturated_int(float x) {
  if (x != x) return 0;
  if (x >= 2147483648.0f) return 2147483647;
  return x <= -2147483648.0f ? -2147483647 - 1 : static_cast<int>(x);
}
inline unsigned saturated_uint(float x) {
  if (!(x > 0.0f)) return 0;
  return x >= 4294967296.0f ? 4294967295u : static_cast<unsigned>(x);
}

#define CUDA_ON_CPU_TO_INTEGER(mode, rounded)                                  \
  inline int __float2int_##mode(float x) { return saturated_int(rounded(x)); } \
  inline unsigned __float2uint_##mode(float x) { return saturated_uint(rounded(x)); }
CUDA_ON_CPU_TO_INTEGER(rn, rintf)
CUDA_ON_CPU_TO_INTEGER(rz, truncf)
CUDA_ON_CPU_TO_INTEGER(ru, ceilf)
CUDA_ON_CPU_TO_INTEGER(rd, floorf)
#undef CUDA_ON_CPU_TO_INTEGER

inline float __int2float_rn(int x) { return static_cast<float>(x); }
inline float __uint2float_rn(unsigned x) { return static_cast<float>(x); }
inline float __ll2float_rn(long long x) { return static_cast<float>(x); }
inline float __ull2float_rn(unsigned long long x) { return static_cast<float>(x); }
inline float __double2float_rn(double x) { return static_cast<float>(x); }

}  // namespace cuda_device
