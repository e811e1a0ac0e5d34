// What numbers.h asks of a target: C++ on a CPU.

#define DEVICE static inline
DEVICE unsigned int bits_of(float x) { unsigned int bits; __builtin_memcpy(&bits, &x, 4); return bits; }
DEVICE float float_of(unsigned int bits) { float x; __builtin_memcpy(&x, &bits, 4); return x; }
DEVICE float root(float x) { return __builtin_sqrtf(x); }
DEVICE double root64(double x) { return __builtin_sqrt(x); }
