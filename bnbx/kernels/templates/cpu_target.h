// What numbers.h asks of a target: C++ on a CPU.

#define DEVICE static inline
DEVICE unsigned int bits_of(float x) { unsigned int bits; __builtin_memcpy(&bits, &x, 4); return bits; }
DEVICE float float_of(unsigned int bits) { float x; __builtin_memcpy(&x, &bits, 4); return x; }
DEVICE float root(float x) { return __builtin_sqrtf(x); }
DEVICE double root64(double x) { return __builtin_sqrt(x); }

// a * b + c, rounded once.
#if defined(__FMA__) || defined(__FP_FAST_FMAF) || defined(__aarch64__)
DEVICE float fused(float a, float b, float c) { return __builtin_fmaf(a, b, c); }
#else
// Where there is no instruction for it: the product is exact in double precision, and of a sum that is not, the last bit
// is set, so that rounding to float can take it neither for a number halfway nor for one on the other side of it.
DEVICE float fused(float a, float b, float c) {
  const double product = (double)a * b, sum = product + c;
  const double added = sum - product, lost = (product - (sum - added)) + (c - added);
  long long bits;
  __builtin_memcpy(&bits, &sum, 8);
  const long long next = bits + ((lost > 0.0) == (sum > 0.0) ? 1 : -1);
  bits = (lost < 0.0 || lost > 0.0) && !(bits & 1) ? next : bits;
  double odd;
  __builtin_memcpy(&odd, &bits, 8);
  return (float)odd;
}
#endif
