// A copy by vectors of four, and element by element where less than a vector is left.
extern "C" __global__ void __launch_bounds__(128, 2) copy_vectors(
    const float* __restrict__ from, float* __restrict__ to, long long n) {
  const long long first = 4 * ((long long)blockIdx.x * blockDim.x + threadIdx.x);
  if (first + 4 <= n) {
    const float4 vector = *reinterpret_cast<const float4*>(from + first);
    *reinterpret_cast<float4*>(to + first) = vector;
  } else {
    for (long long i = first; i < n; ++i) to[i] = from[i];
  }
}
