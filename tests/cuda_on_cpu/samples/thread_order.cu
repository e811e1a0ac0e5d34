// Who came when: blocks and threads take numbers, before and after a barrier and a shuffle.
extern "C" __global__ void thread_order(int* order, int* counter) {
  const int thread = blockIdx.x * blockDim.x + threadIdx.x, count = gridDim.x * blockDim.x;
  order[thread] = atomicAdd(counter, 1);
  __syncthreads();
  order[count + thread] = atomicAdd(counter, 1);
  __syncwarp();
  order[2 * count + thread] = atomicAdd(counter, 1);
}
