// Blocks of quantized states on CUDA: a warp finds the largest magnitudes, and codes its piece.

// The largest value among `COUNT` neighboring lanes, the same in all of them.
template <int COUNT>
DEVICE u32 largest_of_lanes(u32 x) {
#if __CUDA_ARCH__ >= 800
  if (COUNT == LANES) return __reduce_max_sync(0xffffffffu, x);
#endif
#pragma unroll
  for (int distance = COUNT / 2; distance > 0; distance /= 2) {
    const u32 other = __shfl_xor_sync(0xffffffffu, x, distance);
    x = other > x ? other : x;
  }
  return x;
}

// A codebook in shared memory: values by code, and the table of the search.
template <class Type>
struct Shared {
  float levels[256];
  u32 search[Type::SHIFT ? Type::ENTRIES : 256];

  DEVICE_MEMBER void fill(const Tables* tables) {
    const u32* from = Type::SHIFT ? tables->entries : (const u32*)tables->thresholds;
    for (int i = threadIdx.x; i < 256; i += LANES * WARPS) levels[i] = tables->levels[i];
    for (int i = threadIdx.x; i < (int)(sizeof(search) / sizeof(u32)); i += LANES * WARPS) search[i] = from[i];
  }
};

// Blocks of at most PIECE elements: how the lanes and vectors of a piece fall into them.
template <class Type>
struct Layout {
  static constexpr int GROUP = Type::BLOCK < STRIDE ? Type::BLOCK / VECTOR : LANES;  // lanes of a block
  static constexpr bool WHOLE = Type::BLOCK == PIECE;                               // both vectors in one block
};

template <class Type>
DEVICE void decode_piece(const u8 (&codes)[PER_LANE], const float* absmax, i64 left,
                         const Shared<Type>& shared, float (&x)[PER_LANE]) {
#pragma unroll
  for (int j = 0; j < VECTORS; ++j) {
    const int at = j * STRIDE + (threadIdx.x & 31) * VECTOR;
    const float scale = at < left ? absmax[at / Type::BLOCK] : 0.0f;
#pragma unroll
    for (int e = 0; e < VECTOR; ++e)
      x[j * VECTOR + e] = shared.levels[codes[j * VECTOR + e]] * scale;
  }
}

template <class Type>
DEVICE void encode_piece(const float (&x)[PER_LANE], i64 left, const Shared<Type>& shared,
                         const Tables* tables, u8 (&codes)[PER_LANE], float* absmax) {
  u32 largest[VECTORS];
#pragma unroll
  for (int j = 0; j < VECTORS; ++j) {
    const int at = j * STRIDE + (threadIdx.x & 31) * VECTOR;
    largest[j] = 0;
#pragma unroll
    for (int e = 0; e < VECTOR; ++e) {
      const u32 magnitude = bits_of(x[j * VECTOR + e]) & 0x7fffffffu;
      if (at + e < left && magnitude > largest[j]) largest[j] = magnitude;
    }
  }
  __syncwarp();  // every lane has read the old absmax before one writes the new
  if (Layout<Type>::WHOLE) largest[0] = largest[1] = largest[0] > largest[1] ? largest[0] : largest[1];
#pragma unroll
  for (int j = 0; j < VECTORS; ++j) {
    const int at = j * STRIDE + (threadIdx.x & 31) * VECTOR;
    largest[j] = Layout<Type>::WHOLE && j ? largest[0] : largest_of_lanes<Layout<Type>::GROUP>(largest[j]);
    const Scale scale = make_scale(largest[j]);
#pragma unroll
    for (int e = 0; e < VECTOR; ++e) {
      const float scaled = x[j * VECTOR + e] * scale.inverse;
      const u8 code = encode<Type>(scaled, shared.search, (const float*)shared.search, tables->order);
      codes[j * VECTOR + e] = scale.inverse > 0.0f ? code : (u8)Type::ZERO_CODE;
    }
    if (at % Type::BLOCK == 0 && at < left) absmax[at / Type::BLOCK] = scale.absmax;
  }
}
