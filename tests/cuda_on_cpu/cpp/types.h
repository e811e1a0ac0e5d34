// The vector types that CUDA builds in, with CUDA's alignments, and dim3.
#pragma once

namespace cuda_device {

#define CUDA_ON_CPU_VECTORS(element, name, align2, align4)                             \
  struct name##1 {                                                                     \
    element x;                                                                         \
  };                                                                                   \
  struct alignas(align2) name##2 {                                                     \
    element x, y;                                                                      \
  };                                                                                   \
  struct name##3 {                                                                     \
    element x, y, z;                                                                   \
  };                                                                                   \
  struct alignas(align4) name##4 {                                                     \
    element x, y, z, w;                                                                \
  };                                                                                   \
  inline name##1 make_##name##1(element x) { return {x}; }                             \
  inline name##2 make_##name##2(element x, element y) { return {x, y}; }               \
  inline name##3 make_##name##3(element x, element y, element z) { return {x, y, z}; } \
  inline name##4 make_##name##4(element x, element y, element z, element w) { return {x, y, z, w}; }

CUDA_ON_CPU_VECTORS(signed char, char, 2, 4)
CUDA_ON_CPU_VECTORS(unsigned char, uchar, 2, 4)
CUDA_ON_CPU_VECTORS(short, short, 4, 8)
CUDA_ON_CPU_VECTORS(unsigned short, ushort, 4, 8)
CUDA_ON_CPU_VECTORS(int, int, 8, 16)
CUDA_ON_CPU_VECTORS(unsigned int, uint, 8, 16)
CUDA_ON_CPU_VECTORS(long long, longlong, 16, 16)
CUDA_ON_CPU_VECTORS(unsigned long long, ulonglong, 16, 16)
CUDA_ON_CPU_VECTORS(float, float, 8, 16)
CUDA_ON_CPU_VECTORS(double, double, 16, 16)

#undef CUDA_ON_CPU_VECTORS

struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
};

}  // namespace cuda_device
