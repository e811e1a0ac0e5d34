// Every warp and block collective on the same inputs, one row of results each.
extern "C" __global__ void collectives(const unsigned* values, unsigned* out) {
  const unsigned all = 0xffffffffu, lane = threadIdx.x % 32, n = blockDim.x;
  const unsigned x = values[threadIdx.x];
  out += threadIdx.x;
  out[0 * n] = __shfl_sync(all, x, 5);
  out[1 * n] = __shfl_sync(all, x, lane + 3, 8);
  out[2 * n] = __shfl_up_sync(all, x, 3);
  out[3 * n] = __shfl_up_sync(all, x, 3, 8);
  out[4 * n] = __shfl_down_sync(all, x, 3);
  out[5 * n] = __shfl_down_sync(all, x, 3, 16);
  out[6 * n] = __shfl_xor_sync(all, x, 32 + 17);  // five bits count
  out[7 * n] = __shfl_xor_sync(all, x, 9, 8);
  out[8 * n] = __ballot_sync(all, x & 1);
  out[9 * n] = __any_sync(all, x == values[0]);
  out[10 * n] = __all_sync(all, x < 900);
  out[11 * n] = __match_any_sync(all, x % 4);
  out[12 * n] = __syncthreads_count(x & 1);
  out[13 * n] = __syncthreads_or(x == 1000);
  out[14 * n] = __syncthreads_and(x < 1000);
  // Halves of a warp meet on their own.
  const unsigned half = lane < 16 ? 0x0000ffffu : 0xffff0000u;
  out[15 * n] = lane < 16 ? __shfl_sync(half, x, 3) : __shfl_sync(half, x, 19);
  const unsigned long long wide = (unsigned long long)x << 40;
  out[16 * n] = (unsigned)(__shfl_xor_sync(all, wide, 1) >> 40);
  out[17 * n] = (unsigned)__shfl_down_sync(all, (float)x, 1);
  out[18 * n] = __match_any_sync(half, x % 4);
#if __CUDA_ARCH__ >= 800
  const int centered = (int)x - 500;
  out[19 * n] = __reduce_add_sync(half, x);
  out[20 * n] = __reduce_min_sync(all, centered);
  out[21 * n] = __reduce_max_sync(all, centered);
  out[22 * n] = __reduce_max_sync(all, (unsigned)centered);
  out[23 * n] = __reduce_and_sync(all, x | 3u);
  out[24 * n] = __reduce_or_sync(all, x);
  out[25 * n] = __reduce_xor_sync(all, x);
#endif
}
