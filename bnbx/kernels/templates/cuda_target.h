// What numbers.h asks of a target: CUDA.

#define DEVICE __device__ __forceinline__ static
#define DEVICE_MEMBER __device__ __forceinline__
DEVICE unsigned int bits_of(float x) { return __float_as_uint(x); }
DEVICE float float_of(unsigned int bits) { return __uint_as_float(bits); }
DEVICE float root(float x) { return sqrtf(x); }
DEVICE double root64(double x) { return sqrt(x); }
DEVICE float fused(float a, float b, float c) { return fmaf(a, b, c); }
