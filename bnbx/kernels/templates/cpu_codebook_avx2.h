// Blocks of quantized states by AVX2, 8 numbers at a time.

#ifdef BLOCKS_BY_AVX2
#include <immintrin.h>

// Eight levels by their codes, load after load: 2 / 3 of the time of what compilers make of a loop, and of a
// gather's.
static inline __m256 look_up_levels(const float* levels, const u8* codes) {
  unsigned long long eight;
  __builtin_memcpy(&eight, codes, 8);
  const auto level = [&](int i) { return levels[eight >> 8 * i & 0xff]; };
  return _mm256_setr_ps(level(0), level(1), level(2), level(3), level(4), level(5), level(6), level(7));
}

// Floats of their four bytes, which are 32 in a vector: of bytes 4 v .. 4 v + 3 of either half, those of value v.
struct Floats32 {
  __m256 value[4];
};

static inline Floats32 interleave_bytes(__m256i b0, __m256i b1, __m256i b2, __m256i b3) {
  const __m256i low01 = _mm256_unpacklo_epi8(b0, b1), high01 = _mm256_unpackhi_epi8(b0, b1);
  const __m256i low23 = _mm256_unpacklo_epi8(b2, b3), high23 = _mm256_unpackhi_epi8(b2, b3);
  return {_mm256_castsi256_ps(_mm256_unpacklo_epi16(low01, low23)), _mm256_castsi256_ps(_mm256_unpackhi_epi16(low01, low23)),
          _mm256_castsi256_ps(_mm256_unpacklo_epi16(high01, high23)), _mm256_castsi256_ps(_mm256_unpackhi_epi16(high01, high23))};
}

// A table of 16 bytes in both halves of a register, as byte shuffles want it.
static inline __m256i load_twice(const u8* table) {
  return _mm256_broadcastsi128_si256(_mm_loadu_si128((const __m128i*)table));
}

// Codes of a group: 32 of them, or 16 where a block is not made of more.
static inline __m256i load_codes(const u8* codes, int group) {
  if (group == 32) return _mm256_loadu_si256((const __m256i*)codes);
  return _mm256_castsi128_si256(_mm_loadu_si128((const __m128i*)codes));
}

static inline void put_codes(__m256i codes, int group, u8* to) {
  if (group == 32) _mm256_storeu_si256((__m256i*)to, codes);
  else _mm_storeu_si128((__m128i*)to, _mm256_castsi256_si128(codes));
}

// Four of 32 codes at a time to one half and to the other: then what is found of them interleaves in order.
static inline __m256i halves_in_turn(__m256i codes) {
  return _mm256_permutevar8x32_epi32(codes, _mm256_setr_epi32(0, 2, 4, 6, 1, 3, 5, 7));
}

// Tables of 16 values: byte shuffles look up 32 codes at once, one table for each byte of a float.
template <class Type>
static inline void decode_narrow_block(const u8* codes, float absmax, const Tables* tables, float* x) {
  const __m256 scale = _mm256_set1_ps(absmax);
  const int group = Type::BLOCK % 32 ? 16 : 32;
  const __m256i plane[4] = {load_twice(tables->planes[0]), load_twice(tables->planes[1]), load_twice(tables->planes[2]), load_twice(tables->planes[3])};
  for (int i = 0; i < Type::BLOCK; i += group) {
    const __m256i index = halves_in_turn(load_codes(codes + i, group));
    const Floats32 levels = interleave_bytes(_mm256_shuffle_epi8(plane[0], index), _mm256_shuffle_epi8(plane[1], index),
                                             _mm256_shuffle_epi8(plane[2], index), _mm256_shuffle_epi8(plane[3], index));
    for (int j = 0; j < group / 8; ++j) _mm256_storeu_ps(x + i + 8 * j, _mm256_mul_ps(levels.value[j], scale));
  }
}

template <class Type>
static inline void decode_block(const u8* codes, float absmax, const Tables* tables, float* x) {
  if (Type::BITS <= 4) return decode_narrow_block<Type>(codes, absmax, tables, x);
  const __m256 scale = _mm256_set1_ps(absmax);
  for (int i = 0; i < Type::BLOCK; i += 8)
    _mm256_storeu_ps(x + i, _mm256_mul_ps(look_up_levels(tables->levels, codes + i), scale));
}

// The last bytes of 32 integers, in order.
static inline __m256i last_bytes(const __m256i (&x)[4]) {
  const __m256i byte = _mm256_set1_epi16(0xff);
  const __m256i low = _mm256_and_si256(_mm256_packus_epi32(x[0], x[1]), byte);
  const __m256i high = _mm256_and_si256(_mm256_packus_epi32(x[2], x[3]), byte);
  return _mm256_permutevar8x32_epi32(_mm256_packus_epi16(low, high), _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7));
}

// A value in a table of 8 for each lane; the last three bits of an index count.
static inline __m256 look_up(__m256 table, __m256i index) { return _mm256_permutevar8x32_ps(table, index); }
static inline __m256 look_up(const float* table, __m256i index) { return look_up(_mm256_loadu_ps(table), index); }

static inline __m256i below(__m256 a, __m256 b) { return _mm256_castps_si256(_mm256_cmp_ps(a, b, _CMP_LT_OQ)); }

// The 15 thresholds of a table of 16, as a search by halving asks for them.
struct Halves {
  __m256 half, quarters[2], eighths, sixteenths;
};

static inline Halves load_halves(const float* t) {
  return {_mm256_set1_ps(t[7]), {_mm256_set1_ps(t[3]), _mm256_set1_ps(t[11])},
          _mm256_setr_ps(t[1], t[5], t[9], t[13], t[1], t[5], t[9], t[13]),
          _mm256_setr_ps(t[0], t[2], t[4], t[6], t[8], t[10], t[12], t[14])};
}

// Each step finds one more bit of the ranks, from the first one on. What compares true is -1.
static inline __m256i count_thresholds8(__m256 x, const Halves& thresholds) {
  const __m256i first = below(thresholds.half, x);
  const __m256 quarter = _mm256_blendv_ps(thresholds.quarters[0], thresholds.quarters[1], _mm256_castsi256_ps(first));
  __m256i rank = _mm256_sub_epi32(_mm256_slli_epi32(_mm256_srli_epi32(first, 31), 1), below(quarter, x));
  rank = _mm256_sub_epi32(_mm256_add_epi32(rank, rank), below(_mm256_permutevar_ps(thresholds.eighths, rank), x));
  return _mm256_sub_epi32(_mm256_add_epi32(rank, rank), below(look_up(thresholds.sixteenths, rank), x));
}

template <class Type>
static inline void encode_narrow_block(const float* x, float inverse, const Tables* tables, u8* codes) {
  const int group = Type::BLOCK % 32 ? 16 : 32;
  const Halves thresholds = load_halves(tables->thresholds);
  const __m256i order = load_twice(tables->order);
  const __m256 scale = _mm256_set1_ps(inverse);
  for (int i = 0; i < Type::BLOCK; i += group) {
    __m256i ranks[4] = {};
    for (int j = 0; j < group / 8; ++j)
      ranks[j] = count_thresholds8(_mm256_mul_ps(_mm256_loadu_ps(x + i + 8 * j), scale), thresholds);
    const __m256i bytes = last_bytes(ranks);
    put_codes(Type::ORDERED ? bytes : _mm256_shuffle_epi8(order, bytes), group, codes + i);
  }
}

// As `find_places` in cpu_codebook_avx512.h, but the run is found by a comparison: of tables of 8 values
// alone one permute is enough. A lane of `sure` becomes zero where one of its places is not.
template <class Type>
static inline __m256i find_places(__m256 x, const Tables* tables, __m256i* sure) {
  const __m256 sign = _mm256_and_ps(x, _mm256_set1_ps(-0.0f));
  const __m256 a = _mm256_max_ps(Type::SIGNED ? _mm256_xor_ps(x, sign) : x, _mm256_set1_ps(SMALLEST));
  const __m256i bits = _mm256_castps_si256(a);
  const __m256i lower = _mm256_shuffle_epi8(load_twice(tables->lower), _mm256_srli_epi32(bits, 24));
  const __m256i cut = _mm256_castps_si256(look_up((const float*)tables->cuts, lower));
  const __m256i run = _mm256_sub_epi32(lower, _mm256_cmpgt_epi32(bits, cut));
  __m256 place = _mm256_fmadd_ps(a, look_up(tables->slope, run), look_up(tables->offset, run));
  place = _mm256_min_ps(place, look_up(tables->high, run));
  if (Type::SIGNED) {
    place = _mm256_add_ps(_mm256_xor_ps(place, sign), _mm256_set1_ps(BIAS + Type::ZERO_CODE));
    place = _mm256_max_ps(place, _mm256_set1_ps(BIAS));
    *sure = _mm256_min_epu32(*sure, _mm256_xor_si256(bits, cut));
  }
  *sure = _mm256_min_epu32(*sure, _mm256_and_si256(_mm256_castps_si256(place), _mm256_set1_epi32(NEAR_TIE)));
  return _mm256_castps_si256(place);
}

template <class Type>
static __attribute__((noinline)) void encode_near_tie(const float* x, float inverse, const Tables* tables, int count, u8* codes) {
  for (int i = 0; i < count; ++i) codes[i] = (u8)find_rank<Type>(x[i] * inverse, tables->entries, tables->thresholds);
}

template <class Type>
static inline void encode_in_segments(const float* x, float inverse, const Tables* tables, u8* codes) {
  const int group = Type::BLOCK % 32 ? 16 : 32;
  const __m256 scale = _mm256_set1_ps(inverse);
  for (int i = 0; i < Type::BLOCK; i += group) {
    __m256i sure = _mm256_set1_epi32(-1), ranks[4] = {};
    for (int j = 0; j < group / 8; ++j) {
      const __m256 scaled = _mm256_mul_ps(_mm256_loadu_ps(x + i + 8 * j), scale);
      ranks[j] = _mm256_srli_epi32(find_places<Type>(scaled, tables, &sure), FRACTION);
    }
    put_codes(last_bytes(ranks), group, codes + i);
    const __m256i unsure = _mm256_cmpeq_epi32(sure, _mm256_setzero_si256());
    if (__builtin_expect(!_mm256_testz_si256(unsure, unsure), 0))
      encode_near_tie<Type>(x + i, inverse, tables, group, codes + i);
  }
}

template <class Type>
static inline void encode_block(const float* x, float inverse, const Tables* tables, u8* codes) {
  if (Type::BITS <= 4) encode_narrow_block<Type>(x, inverse, tables, codes);
  else if (Type::SEGMENTS) encode_in_segments<Type>(x, inverse, tables, codes);
  else encode_block_plain<Type>(x, inverse, tables, codes);
}

#endif
