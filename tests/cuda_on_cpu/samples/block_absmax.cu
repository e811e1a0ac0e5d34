// The largest magnitude of every block of 256 elements: a tree in shared memory.
#define THREADS 256

extern "C" __global__ void __launch_bounds__(THREADS)
block_absmax(const float* __restrict__ x, float* __restrict__ absmax, long long n) {
  __shared__ float partial[THREADS];
  const int tid = threadIdx.x;
  const long long i = (long long)blockIdx.x * THREADS + tid;
  partial[tid] = i < n ? fabsf(x[i]) : 0.0f;
  __syncthreads();
  for (int half = THREADS / 2; half > 0; half >>= 1) {
    if (tid < half) partial[tid] = fmaxf(partial[tid], partial[tid + half]);
    __syncthreads();
  }
  if (tid == 0) absmax[blockIdx.x] = partial[0];
}
