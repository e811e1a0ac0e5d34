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

// Values by code in shared memory, for a pass that only decodes.
template <class Type>
struct Levels {
  float levels[1 << Type::BITS];

  DEVICE_MEMBER void fill(const Tables* tables) {
    for (int i = threadIdx.x; i < (1 << Type::BITS); i += LANES * WARPS) levels[i] = tables->levels[i];
  }
};

// A codebook in shared memory: values by code, and the table of the search.
template <class Type>
struct Shared {
  float levels[1 << Type::BITS];
  u32 search[Type::SHIFT ? Type::ENTRIES : 256];

  DEVICE_MEMBER void fill(const Tables* tables) {
    const u32* from = Type::SHIFT ? tables->entries : (const u32*)tables->thresholds;
    for (int i = threadIdx.x; i < (1 << Type::BITS); i += LANES * WARPS) levels[i] = tables->levels[i];
    for (int i = threadIdx.x; i < (int)(sizeof(search) / sizeof(u32)); i += LANES * WARPS) search[i] = from[i];
  }
};

// How the lanes and vectors of a piece fall into blocks, and how many pieces a block has.
template <class Type>
struct Layout {
  static constexpr int GROUP = Type::BLOCK < STRIDE ? Type::BLOCK / VECTOR : LANES;  // lanes of a block
  static constexpr bool WHOLE = Type::BLOCK >= PIECE;                               // both vectors in one block
  static constexpr int PIECES = Type::BLOCK > PIECE ? Type::BLOCK / PIECE : 1;
};

// The largest value among `COUNT` neighboring warps, the same in all of them. All warps of the launched
// block take part.
template <int COUNT>
DEVICE u32 largest_of_warps(u32 x, u32* largest) {
  const int warp = threadIdx.x / LANES;
  if (threadIdx.x % LANES == 0) largest[warp] = x;
  __syncthreads();
#pragma unroll
  for (int i = 0; i < COUNT; ++i) {
    const u32 other = largest[warp / COUNT * COUNT + i];
    x = other > x ? other : x;
  }
  __syncthreads();
  return x;
}

// Codes lie one after the other without gaps, the first in the highest bits. The four neighbors of a
// lane are the lower bits of a word: those of codes in even widths fill whole bytes, and those of odd
// widths do so together with the next lane's.
template <class Type>
struct Packed {
  static constexpr int WORD = VECTOR * Type::BITS;  // bits of a lane
  static constexpr bool ODD = WORD % 8 != 0;
};

// The bytes of `left` elements' codes.
template <class Type>
DEVICE i64 bytes_of(i64 left) {
  return (left * Type::BITS + 7) / 8;
}

// Codes of this lane, unpacked; those that do not exist are zero's.
template <class Type>
DEVICE void load_codes(const u8* from, i64 left, bool aligned, u8 (&codes)[PER_LANE]) {
  if (Type::BITS == 8) return load_piece(from, left, aligned, (u8)Type::ZERO_CODE, codes);
  const i64 bytes = bytes_of<Type>(left);
#pragma unroll
  for (int j = 0; j < VECTORS; ++j) {
    const int at = place_of(j * VECTOR), first = at * Type::BITS / 8;
    const int skipped = Packed<Type>::ODD ? at * Type::BITS % 8 : 0;
    u32 word = 0;
#pragma unroll
    for (int i = 0; i < (Packed<Type>::WORD + 7) / 8; ++i) word = word << 8 | (first + i < bytes ? from[first + i] : 0u);
    word >>= (Packed<Type>::ODD ? 4 - skipped : 0);
#pragma unroll
    for (int e = 0; e < VECTOR; ++e) {
      const u32 code = (word >> (Type::BITS * (VECTOR - 1 - e))) & ((1u << Type::BITS) - 1u);
      codes[j * VECTOR + e] = at + e < left ? (u8)code : (u8)Type::ZERO_CODE;
    }
  }
}

template <class Type>
DEVICE void store_codes(u8* to, i64 left, bool aligned, const u8 (&codes)[PER_LANE]) {
  if (Type::BITS == 8) return store_piece(to, left, aligned, codes);
  const i64 bytes = bytes_of<Type>(left);
#pragma unroll
  for (int j = 0; j < VECTORS; ++j) {
    const int at = place_of(j * VECTOR);
    u32 word = 0;
#pragma unroll
    for (int e = 0; e < VECTOR; ++e) word = word << Type::BITS | (at + e < left ? codes[j * VECTOR + e] : 0u);
    if (Packed<Type>::ODD) {  // of the bytes of two lanes, the first writes one more
      const u32 other = __shfl_xor_sync(0xffffffffu, word, 1);
      const bool second = threadIdx.x & 1;
      const unsigned long long pair = (unsigned long long)(second ? other : word) << Packed<Type>::WORD | (second ? word : other);
      const int first = (at - (second ? VECTOR : 0)) * Type::BITS / 8;
#pragma unroll
      for (int i = 0; i < Type::BITS; ++i)
        if ((i > Type::BITS / 2) == second && first + i < bytes) to[first + i] = (u8)(pair >> (8 * (Type::BITS - 1 - i)));
    } else {
#pragma unroll
      for (int i = 0; i < Packed<Type>::WORD / 8; ++i) {
        const int place = at * Type::BITS / 8 + i;
        if (place < bytes) to[place] = (u8)(word >> (Packed<Type>::WORD - 8 - 8 * i));
      }
    }
  }
}

template <class Type>
DEVICE void decode_piece(const u8 (&codes)[PER_LANE], const float* absmax, i64 left,
                         const float* levels, float (&x)[PER_LANE]) {
#pragma unroll
  for (int j = 0; j < VECTORS; ++j) {
    const int at = j * STRIDE + (threadIdx.x & 31) * VECTOR;
    const float scale = at < left ? absmax[Type::WHOLE ? 0 : at / Type::BLOCK] : 0.0f;
#pragma unroll
    for (int e = 0; e < VECTOR; ++e)
      x[j * VECTOR + e] = levels[codes[j * VECTOR + e]] * scale;
  }
}

// Where a block has several pieces, `largest_of_warp` has a place for each warp of the launched block,
// and `start` is the piece's place in its tensor.
template <class Type>
DEVICE void encode_piece(const float (&x)[PER_LANE], i64 left, const Shared<Type>& shared,
                         const Tables* tables, u8 (&codes)[PER_LANE], float* absmax,
                         u32* largest_of_warp = 0, i64 start = 0) {
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
    if (Layout<Type>::PIECES > 1 && !j) largest[0] = largest_of_warps<Layout<Type>::PIECES>(largest[0], largest_of_warp);
    const Scale scale = make_scale<Type>(largest[j]);
#pragma unroll
    for (int e = 0; e < VECTOR; ++e) {
      const float scaled = x[j * VECTOR + e] * scale.inverse;
      const u8 code = encode<Type>(scaled, shared.search, (const float*)shared.search, tables->order);
      codes[j * VECTOR + e] = scale.inverse > 0.0f ? code : (u8)Type::ZERO_CODE;
    }
    const bool first = at % Type::BLOCK == 0 && (Layout<Type>::PIECES == 1 || start % Type::BLOCK == 0);
    if (first && at < left) absmax[at / Type::BLOCK] = scale.absmax;
  }
}

// The same where the absmax is that of the whole tensor.
template <class Type>
DEVICE void encode_whole_piece(const float (&x)[PER_LANE], u32 largest, const Shared<Type>& shared,
                               const Tables* tables, u8 (&codes)[PER_LANE]) {
  const Scale scale = make_scale<Type>(largest);
#pragma unroll
  for (int i = 0; i < PER_LANE; ++i) {
    const u8 code = encode<Type>(x[i] * scale.inverse, shared.search, (const float*)shared.search, tables->order);
    codes[i] = scale.inverse > 0.0f ? code : (u8)Type::ZERO_CODE;
  }
}
