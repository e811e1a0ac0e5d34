// Every atomic, by all threads on one word each.
extern "C" __global__ void atomics(const unsigned* values, unsigned* words, float* sum) {
  const unsigned x = values[blockIdx.x * blockDim.x + threadIdx.x];
  atomicAdd(words + 0, x);
  atomicSub(words + 1, x);
  atomicMin(words + 2, x);
  atomicMax(words + 3, x);
  atomicAnd(words + 4, x);
  atomicOr(words + 5, x);
  atomicXor(words + 6, x);
  atomicInc(words + 7, 6);
  atomicDec(words + 8, 6);
  atomicExch(words + 9, 77);
  unsigned seen = 0;
  for (unsigned expected = seen;; expected = seen) {
    seen = atomicCAS(words + 10, expected, expected + 2);
    if (seen == expected) break;
  }
  atomicAdd(sum, 0.25f);
}
