// Reverses every 32 elements: lanes of a warp exchange through shared memory.
extern "C" __global__ void warp_reverse(int* x) {
  __shared__ int slots[4][32];
  const int lane = threadIdx.x % warpSize, warp = threadIdx.x / warpSize;
  slots[warp][lane] = x[threadIdx.x];
  __syncwarp();
  x[threadIdx.x] = slots[warp][31 - lane];
}
