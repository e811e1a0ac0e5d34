// Blocks of quantized states on a CPU: plain loops that any compiler vectorizes as it can.

template <class Type>
static inline void decode_block_plain(const u8* codes, float absmax, const Tables* tables, float* x) {
  for (int i = 0; i < Type::BLOCK; ++i) x[i] = tables->levels[codes[i]] * absmax;
}

template <class Type>
static inline void encode_block_plain(const float* x, float inverse, const Tables* tables, u8* codes) {
  u32 rank[Type::BLOCK], low[Type::BLOCK];
  if (Type::SHIFT == 0) {
    for (int i = 0; i < Type::BLOCK; ++i) rank[i] = count_thresholds(x[i] * inverse, tables->thresholds);
  } else {  // find_rank, with its look-ups in a loop of their own, so that the others are vectorized
    for (int i = 0; i < Type::BLOCK; ++i) {
      const Place place = find_place<Type>(x[i] * inverse);
      rank[i] = place.entry;
      low[i] = place.low;
    }
    for (int i = 0; i < Type::BLOCK; ++i) rank[i] = tables->entries[rank[i]];
    for (int i = 0; i < Type::BLOCK; ++i) rank[i] = (rank[i] + low[i]) >> Type::SHIFT;
  }
  for (int i = 0; i < Type::BLOCK; ++i) codes[i] = (u8)(Type::ORDERED ? rank[i] : tables->order[rank[i]]);
}

static inline i32 larger_magnitude(i32 largest, float x) {
  const i32 magnitude = (i32)(bits_of(x) & 0x7fffffffu);
  return magnitude > largest ? magnitude : largest;
}

// Ranks by a multiply-add inside the run of evenly spaced thresholds that x falls in; where one of the
// values is too close to a tie to be sure, all go to the exact search. The sum with BIAS leaves the rank
// in the mantissa above FRACTION bits of fraction, which are almost all zero near a tie. See `Segments`
// in bnbx/kernels/codebook.py, which makes the tables and proves them, and has the same constants.
// BIAS is 2**8 + 1/2, a float whose last mantissa bit is 2**-15, and two such bits more: ties then lie in
// the middle of what NEAR_TIE finds.
enum { FRACTION = 15, NEAR_TIE = (1 << FRACTION) - 4, CUT = 0xffffff };
static const float BIAS = 256.5f + 2.0f / (1 << FRACTION);
static const float SMALLEST = 0x1.000002p-31f;  // whose pair of binades is the first one

// Vectors of 16 or 8 numbers are in cpu_codebook_avx512.h and cpu_codebook_avx2.h.
#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512DQ__) && defined(__AVX512VBMI__)
#define BLOCKS_BY_AVX512
#elif defined(__AVX2__) && defined(__FMA__)
#define BLOCKS_BY_AVX2
#else

template <class Type>
static inline void decode_block(const u8* codes, float absmax, const Tables* tables, float* x) {
  decode_block_plain<Type>(codes, absmax, tables, x);
}

template <class Type>
static inline void encode_block(const float* x, float inverse, const Tables* tables, u8* codes) {
  encode_block_plain<Type>(x, inverse, tables, codes);
}

#endif
