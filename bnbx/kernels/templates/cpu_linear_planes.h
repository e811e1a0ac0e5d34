// Codes of up to 6 bits as products read them with AVX2, whose shuffles of bytes look up 32 codes in a table
// of 16 bytes at once. The four bytes of a level are in tables of their own; what is found there is
// interleaved: 12 shuffles decode 32 codes of 4 bits. One row of x and a 4096 x 4096 weight take 1.45 ms on
// a thread of a Zen 3, and 2.7 with permutes of whole floats, of which one takes as long as three shuffles.

#ifdef PLANES_OF_16

enum { PARTS_OF_PLANE = CODE_BITS <= 4 ? 1 : 1 << (CODE_BITS - 4) };

// By byte of a level and 16 of the codes; both halves of a register are alike.
struct Levels {
  __m256i part[4][PARTS_OF_PLANE];
};

static inline Levels load_levels(const Tables* tables) {
  Levels levels;
  for (int b = 0; b < 4; ++b)
    for (int p = 0; p < PARTS_OF_PLANE; ++p)
      levels.part[b][p] = load_twice(tables->planes[b] + 16 * p);
  return levels;
}

// A byte of the levels of 32 codes. A shuffle gives 0 where the highest bit of its index is set: so it is
// where a code is in another part of the table.
static inline __m256i look_up_byte(const __m256i (&part)[PARTS_OF_PLANE], __m256i codes) {
  if (PARTS_OF_PLANE == 1) return _mm256_shuffle_epi8(part[0], codes);
  __m256i found = _mm256_setzero_si256();
#pragma GCC unroll 4
  for (int p = 0; p < PARTS_OF_PLANE; ++p) {
    const __m256i here = _mm256_xor_si256(codes, _mm256_set1_epi8(16 * p));
    found = _mm256_or_si256(found, _mm256_shuffle_epi8(part[p], _mm256_add_epi8(here, _mm256_set1_epi8(0x70))));
  }
  return found;
}

// The levels of 32 codes, in the order of `interleave_bytes`.
static inline void look_up_codes(__m256i codes, const Levels& levels, Floats& w0, Floats& w1, Floats& w2, Floats& w3) {
  const Floats32 found = interleave_bytes(look_up_byte(levels.part[0], codes), look_up_byte(levels.part[1], codes),
                                          look_up_byte(levels.part[2], codes), look_up_byte(levels.part[3], codes));
  w0 = (Floats)found.value[0], w1 = (Floats)found.value[1], w2 = (Floats)found.value[2], w3 = (Floats)found.value[3];
}

template <int K>
static inline void decode32(const u8* from, const Levels& levels, float* to) {
  Floats w[4];
  look_up_codes(halves_in_turn(unpack32<CODE_BITS, GROUP, K>(from)), levels, w[0], w[1], w[2], w[3]);
  for (int v = 0; v < 4; ++v) store(w[v], to + v * LANES);
}

static inline void decode_in_order(const u8* from, const Levels& levels, float* to) {
  decode32<0>(from, levels, to);
  if (GROUP > 32) decode32<GROUP / 32 * 2 - 2>(from, levels, to + GROUP - 32);
}

#if CODE_BITS <= 4

// The 8 codes of each lane, two in a byte, the first one above the other: bytes 4 v .. 4 v + 3 of either half are
// the pairs number v of its 4 lanes. Above them there may be anything.
static inline __m256i load_pairs(const u8* from) {
#if CODE_BITS == 4
  const __m128i order = _mm_setr_epi8(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
  return _mm256_shuffle_epi8(_mm256_loadu_si256((const __m256i*)from), _mm256_broadcastsi128_si256(order));
#elif CODE_BITS == 2
  const __m256i order = _mm256_setr_epi8(0, 2, 4, 6, 0, 2, 4, 6, 1, 3, 5, 7, 1, 3, 5, 7,
                                         8, 10, 12, 14, 8, 10, 12, 14, 9, 11, 13, 15, 9, 11, 13, 15);
  const __m256i bytes = _mm256_shuffle_epi8(_mm256_broadcastsi128_si256(_mm_loadu_si128((const __m128i*)from)), order);
  return _mm256_srlv_epi32(bytes, _mm256_setr_epi32(4, 0, 4, 0, 4, 0, 4, 0));
#else
  const __m128i low = _mm_loadu_si128((const __m128i*)from), high = _mm_loadu_si128((const __m128i*)(from + 8));
  const __m256i words_at = _mm256_setr_epi8(2, 1, 0, -1, 5, 4, 3, -1, 8, 7, 6, -1, 11, 10, 9, -1,
                                            6, 5, 4, -1, 9, 8, 7, -1, 12, 11, 10, -1, 15, 14, 13, -1);
  const Ints words = (Ints)_mm256_shuffle_epi8(_mm256_set_m128i(high, low), words_at);
  const Ints fours = (words & 0xfff) | (words & 0xfff000) << 4;
  const Ints pairs = (fours & 0x3f003f) | (fours & 0xfc00fc0) << 2;
  const __m128i order = _mm_setr_epi8(3, 7, 11, 15, 2, 6, 10, 14, 1, 5, 9, 13, 0, 4, 8, 12);
  return _mm256_shuffle_epi8((__m256i)pairs, _mm256_broadcastsi128_si256(order));
#endif
}

static inline void decode_group(const u8* from, const Levels& levels, Floats (&w)[VECTORS]) {
  const __m256i pairs = load_pairs(from), one = _mm256_set1_epi8((1 << CODE_BITS) - 1);
  const __m256i first = _mm256_and_si256(_mm256_srli_epi16(pairs, CODE_BITS), one), second = _mm256_and_si256(pairs, one);
  look_up_codes(first, levels, w[0], w[2], w[4], w[6]);
  look_up_codes(second, levels, w[1], w[3], w[5], w[7]);
}

#else

static inline void decode_group(const u8* from, const Levels& levels, Floats (&w)[VECTORS]) {
  look_up_codes(unpack32<CODE_BITS, GROUP, 0>(from), levels, w[0], w[1], w[2], w[3]);
}

#endif
#endif
