// Helpers of CUDA kernels: a warp, one of WARPS in a block, works on PIECE elements, four neighbors of each
// of its LANES at a time. The template defines these three before this, as cuda_module.py has them.

enum { VECTOR = 4, STRIDE = LANES * VECTOR, VECTORS = PIECE / STRIDE, PER_LANE = VECTORS * VECTOR };

template <class T>
struct alignas(VECTOR * sizeof(T)) Four {
  T item[VECTOR];
};

// This lane's elements of a piece of which `left` elements exist; `missing` stands for the others.
template <class T>
DEVICE void load_piece(const T* from, i64 left, bool aligned, T missing, T (&to)[PER_LANE]) {
#pragma unroll
  for (int j = 0; j < VECTORS; ++j) {
    const int at = j * STRIDE + (threadIdx.x & 31) * VECTOR;
    if (aligned && at + VECTOR <= left) {
      *(Four<T>*)(to + j * VECTOR) = *(const Four<T>*)(from + at);
    } else {
#pragma unroll
      for (int e = 0; e < VECTOR; ++e) to[j * VECTOR + e] = at + e < left ? from[at + e] : missing;
    }
  }
}

template <class T>
DEVICE void store_piece(T* to, i64 left, bool aligned, const T (&from)[PER_LANE]) {
#pragma unroll
  for (int j = 0; j < VECTORS; ++j) {
    const int at = j * STRIDE + (threadIdx.x & 31) * VECTOR;
    if (aligned && at + VECTOR <= left) {
      *(Four<T>*)(to + at) = *(const Four<T>*)(from + j * VECTOR);
    } else {
#pragma unroll
      for (int e = 0; e < VECTOR; ++e)
        if (at + e < left) to[at + e] = from[j * VECTOR + e];
    }
  }
}

// The place in its piece of this lane's element i.
DEVICE int place_of(int i) { return i / VECTOR * STRIDE + (threadIdx.x & 31) * VECTOR + i % VECTOR; }

// The sum over all lanes of a warp, the same in each.
DEVICE double sum_of_lanes(double x) {
#pragma unroll
  for (int distance = LANES / 2; distance > 0; distance /= 2) x += __shfl_xor_sync(0xffffffffu, x, distance);
  return x;
}

DEVICE bool is_aligned(const void* pointer) { return ((unsigned long long)pointer & 15u) == 0; }
