// The largest magnitude of every row: shuffles within warps, dynamic shared memory between them.
#define ALL_LANES 0xffffffffu

typedef long long int64_t;

__device__ __forceinline__ float warp_max(float value) {
#if __CUDA_ARCH__ >= 800
  // Magnitudes order like their bits.
  return __uint_as_float(__reduce_max_sync(ALL_LANES, __float_as_uint(value)));
#else
  for (int offset = 16; offset > 0; offset >>= 1)
    value = fmaxf(value, __shfl_xor_sync(ALL_LANES, value, offset));
  return value;
#endif
}

extern "C" __global__ void row_max(const float* __restrict__ x, float* __restrict__ out,
                                   const int64_t columns) {
  extern __shared__ float of_warps[];  // one per warp
  const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
  float value = 0.0f;
  for (int64_t column = threadIdx.x; column < columns; column += blockDim.x)
    value = fmaxf(value, fabsf(__ldg(x + blockIdx.x * columns + column)));
  value = warp_max(value);
  if (lane == 0) of_warps[warp] = value;
  __syncthreads();
  if (warp == 0) {
    value = lane < blockDim.x / 32 ? of_warps[lane] : 0.0f;
    value = warp_max(value);
    if (lane == 0) out[blockIdx.x] = value;
  }
}
