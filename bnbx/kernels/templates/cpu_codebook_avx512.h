// Blocks of quantized states by AVX-512, 16 numbers at a time.

#ifdef BLOCKS_BY_AVX512
#include <immintrin.h>

// Byte permutes look up 64 codes in a 256-entry table at once, one table for each byte of a float.
static inline __m512i look_up_bytes(const u8* plane, __m512i index, __mmask64 upper) {
  const __m512i* part = (const __m512i*)plane;
  const __m512i low = _mm512_permutex2var_epi8(_mm512_loadu_si512(part), index, _mm512_loadu_si512(part + 1));
  const __m512i high = _mm512_permutex2var_epi8(_mm512_loadu_si512(part + 2), index, _mm512_loadu_si512(part + 3));
  return _mm512_mask_blend_epi8(upper, low, high);
}

// 16-byte lanes of the four planes interleave to floats in order if byte 4 j + w of lane l is
// code 16 j + 4 l + w.
alignas(64) static const u8 interleave[64] = {
    0, 1, 2, 3, 16, 17, 18, 19, 32, 33, 34, 35, 48, 49, 50, 51,
    4, 5, 6, 7, 20, 21, 22, 23, 36, 37, 38, 39, 52, 53, 54, 55,
    8, 9, 10, 11, 24, 25, 26, 27, 40, 41, 42, 43, 56, 57, 58, 59,
    12, 13, 14, 15, 28, 29, 30, 31, 44, 45, 46, 47, 60, 61, 62, 63};

// Tables of 16 values are one register: a permute decodes 16 codes.
template <class Type>
static inline void decode_narrow_block(const u8* codes, float absmax, const Tables* tables, float* x) {
  const __m512 levels = _mm512_loadu_ps(tables->levels), scale = _mm512_set1_ps(absmax);
  for (int i = 0; i < Type::BLOCK; i += 16) {
    const __m512i index = _mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i*)(codes + i)));
    _mm512_storeu_ps(x + i, _mm512_mul_ps(_mm512_permutexvar_ps(index, levels), scale));
  }
}

// And a search by halving has four steps, each a permute and a comparison.
template <class Type>
static inline void encode_narrow_block(const float* x, float inverse, const Tables* tables, u8* codes) {
  const __m512 thresholds = _mm512_loadu_ps(tables->thresholds), scale = _mm512_set1_ps(inverse);
  const __m512i order = _mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i*)tables->order));
  for (int i = 0; i < Type::BLOCK; i += 16) {
    const __m512 scaled = _mm512_mul_ps(_mm512_loadu_ps(x + i), scale);
    __m512i rank = _mm512_setzero_si512();
    for (int half = 8; half > 0; half /= 2) {
      const __m512i probe = _mm512_add_epi32(rank, _mm512_set1_epi32(half - 1));
      const __m512 threshold = _mm512_permutexvar_ps(probe, thresholds);
      rank = _mm512_mask_add_epi32(rank, _mm512_cmp_ps_mask(threshold, scaled, _CMP_LT_OQ), rank, _mm512_set1_epi32(half));
    }
    if (!Type::ORDERED) rank = _mm512_permutexvar_epi32(rank, order);
    _mm_storeu_si128((__m128i*)(codes + i), _mm512_cvtepi32_epi8(rank));
  }
}

// The bytes of the levels of 64 codes, plane by plane.
template <class Type>
static inline void look_up_planes(__m512i code, const Tables* tables, __m512i (&bytes)[4]) {
  if (!Type::MIRRORED) {
    const __mmask64 upper = _mm512_movepi8_mask(code);
    for (int b = 0; b < 4; ++b) bytes[b] = look_up_bytes(tables->planes[b], code, upper);
    return;
  }
  // Zero is code 127 (not ZERO_CODE: several codes may be zero's), and a magnitude of 1 to 128 is looked up among the
  // levels above it: half the permutes.
  const __m512i zero = _mm512_set1_epi8(127), magnitude = _mm512_abs_epi8(_mm512_sub_epi8(code, zero));
  const __mmask64 nonzero = _mm512_test_epi8_mask(magnitude, magnitude), negative = _mm512_cmplt_epu8_mask(code, zero);
  const __m512i place = _mm512_sub_epi8(magnitude, _mm512_set1_epi8(1));
  for (int b = 0; b < 4; ++b) {
    const __m512i* above = (const __m512i*)(tables->planes[b] + 128);
    bytes[b] = _mm512_maskz_permutex2var_epi8(nonzero, _mm512_loadu_si512(above), place, _mm512_loadu_si512(above + 1));
  }
  bytes[3] = _mm512_mask_add_epi8(bytes[3], negative, bytes[3], _mm512_set1_epi8(-128));  // the sign
}

template <class Type>
static inline void decode_block(const u8* codes, float absmax, const Tables* tables, float* x) {
  if (Type::BITS <= 4) return decode_narrow_block<Type>(codes, absmax, tables, x);
  if (Type::BLOCK < 64) return decode_block_plain<Type>(codes, absmax, tables, x);
  const __m512i lanes = _mm512_load_si512(interleave);
  const __m512 scale = _mm512_set1_ps(absmax);
  for (int i = 0; i < Type::BLOCK; i += 64) {
    __m512i bytes[4];
    look_up_planes<Type>(_mm512_permutexvar_epi8(lanes, _mm512_loadu_si512(codes + i)), tables, bytes);
    const __m512i low01 = _mm512_unpacklo_epi8(bytes[0], bytes[1]), high01 = _mm512_unpackhi_epi8(bytes[0], bytes[1]);
    const __m512i low23 = _mm512_unpacklo_epi8(bytes[2], bytes[3]), high23 = _mm512_unpackhi_epi8(bytes[2], bytes[3]);
    const __m512i value[4] = {_mm512_unpacklo_epi16(low01, low23), _mm512_unpackhi_epi16(low01, low23),
                              _mm512_unpacklo_epi16(high01, high23), _mm512_unpackhi_epi16(high01, high23)};
    for (int j = 0; j < 4; ++j)
      _mm512_storeu_ps(x + i + 16 * j, _mm512_mul_ps(_mm512_castsi512_ps(value[j]), scale));
  }
}

// find_rank for 16 values.
template <class Type>
static inline __m512i find_ranks(__m512 x, const Tables* tables) {
  const __m512i bits = _mm512_castps_si512(x), one = _mm512_set1_epi32(1);
  const __m512i mask = _mm512_set1_epi32((1 << Type::SHIFT) - 1);
  const __m512i floor = _mm512_set1_epi32((i32)Type::FLOOR);
  __m512i a = Type::SIGNED ? _mm512_and_si512(bits, _mm512_set1_epi32(0x7fffffff))
                           : _mm512_max_epi32(bits, _mm512_setzero_si512());
  a = _mm512_min_epu32(a, _mm512_set1_epi32((i32)Type::CEILING));
  const __mmask16 small = _mm512_cmplt_epu32_mask(a, floor);
  __m512i w = _mm512_add_epi32(_mm512_sub_epi32(a, floor), _mm512_set1_epi32(1 << Type::SHIFT));
  w = _mm512_mask_min_epu32(w, small, a, one);
  __m512i low = _mm512_and_si512(w, mask), entry = _mm512_srli_epi32(w, Type::SHIFT);
  if (Type::SIGNED) {
    const __mmask16 negative = _mm512_movepi32_mask(bits);
    low = _mm512_mask_xor_epi32(low, negative, low, mask);
    entry = _mm512_mask_add_epi32(entry, negative, entry, _mm512_set1_epi32(Type::HALF));
  }
  const __m512i found = _mm512_i32gather_epi32(entry, (const int*)tables->entries, 4);
  return _mm512_srli_epi32(_mm512_add_epi32(found, low), Type::SHIFT);
}

// The places of 16 values, whose ranks are the 8 bits above FRACTION. `sure` loses those next to a tie.
template <class Type>
static inline __m512i find_places(__m512 x, const Tables* tables, __mmask16* sure) {
  const __m512 smallest = _mm512_set1_ps(SMALLEST);
  const __m512 a = Type::SIGNED ? _mm512_range_ps(x, smallest, 0b1011)  // the larger magnitude of both
                                : _mm512_max_ps(x, smallest);
  const __m512i bits = _mm512_castps_si512(a);
  const __m512i pair = _mm512_srli_epi32(bits, 24);  // a permute reads 4 bits
  const __m512i turned = _mm512_add_epi32(bits, _mm512_permutexvar_epi32(pair, _mm512_loadu_si512(tables->turn)));
  const __m512i run = _mm512_srli_epi32(turned, 24);
  const __m512 slope = _mm512_permutexvar_ps(run, _mm512_loadu_ps(tables->slope));
  const __m512 offset = _mm512_permutexvar_ps(run, _mm512_loadu_ps(tables->offset));
  const __m512 high = _mm512_permutexvar_ps(run, _mm512_loadu_ps(tables->high));
  __m512 place = _mm512_min_ps(_mm512_fmadd_ps(a, slope, offset), high);
  if (Type::SIGNED) {  // so far counted from zero: put the sign of x on it, and count from the lowest code
    const __m512 sign = _mm512_and_ps(x, _mm512_set1_ps(-0.0f));
    place = _mm512_add_ps(_mm512_xor_ps(place, sign), _mm512_set1_ps(BIAS + Type::ZERO_CODE));
    place = _mm512_max_ps(place, _mm512_set1_ps(BIAS));
    *sure = _mm512_mask_test_epi32_mask(*sure, turned, _mm512_set1_epi32(CUT));  // there, ties go away from zero
  }
  *sure = _mm512_mask_test_epi32_mask(*sure, _mm512_castps_si512(place), _mm512_set1_epi32(NEAR_TIE));
  return _mm512_castps_si512(place);
}

// Where the code of value 16 j + 2 q + i is found, which the ranks of 64 places leave in byte 8 q + 2 j + i.
alignas(64) static const u8 in_order[64] = {
    0, 1, 8, 9, 16, 17, 24, 25, 32, 33, 40, 41, 48, 49, 56, 57,
    2, 3, 10, 11, 18, 19, 26, 27, 34, 35, 42, 43, 50, 51, 58, 59,
    4, 5, 12, 13, 20, 21, 28, 29, 36, 37, 44, 45, 52, 53, 60, 61,
    6, 7, 14, 15, 22, 23, 30, 31, 38, 39, 46, 47, 54, 55, 62, 63};

// count_thresholds for 16 values. Every sixteenth threshold fits into a register, where a permute finds it;
// of those between two of them four are gathered.
static inline __m512i count_thresholds16(__m512 x, const float* thresholds, __m512 sixteenths) {
  __m512i rank = _mm512_setzero_si512();
  for (int half = 8; half > 0; half /= 2) {
    const __m512 probe = _mm512_permutexvar_ps(_mm512_add_epi32(rank, _mm512_set1_epi32(half - 1)), sixteenths);
    rank = _mm512_mask_add_epi32(rank, _mm512_cmp_ps_mask(probe, x, _CMP_LT_OQ), rank, _mm512_set1_epi32(half));
  }
  rank = _mm512_slli_epi32(rank, 4);
  for (int half = 8; half > 0; half /= 2) {
    const __m512 probe = _mm512_i32gather_ps(rank, thresholds + half - 1, 4);
    rank = _mm512_mask_add_epi32(rank, _mm512_cmp_ps_mask(probe, x, _CMP_LT_OQ), rank, _mm512_set1_epi32(half));
  }
  return rank;
}

// Any table: `count` values, a multiple of 16; of the codes, 64 at a time are looked up by their ranks.
template <class Type>
static inline void encode_by_search(const float* x, float inverse, const Tables* tables, int count, u8* codes) {
  const __m512 scale = _mm512_set1_ps(inverse);
  const __m512i every = _mm512_setr_epi32(15, 31, 47, 63, 79, 95, 111, 127, 143, 159, 175, 191, 207, 223, 239, 255);
  const __m512 sixteenths = _mm512_i32gather_ps(every, tables->thresholds, 4);
  for (int i = 0; i < count; i += 16) {
    const __m512 scaled = _mm512_mul_ps(_mm512_loadu_ps(x + i), scale);
    const __m512i rank = Type::SHIFT ? find_ranks<Type>(scaled, tables) : count_thresholds16(scaled, tables->thresholds, sixteenths);
    _mm_storeu_si128((__m128i*)(codes + i), _mm512_cvtepi32_epi8(rank));
  }
  if (Type::ORDERED) return;
  for (int i = 0; i < count; i += 64) {
    const __mmask64 here = ~0ull >> (count - i < 64 ? 64 - (count - i) : 0);
    const __m512i ranks = _mm512_maskz_loadu_epi8(here, codes + i);
    _mm512_mask_storeu_epi8(codes + i, here, look_up_bytes(tables->order, ranks, _mm512_movepi8_mask(ranks)));
  }
}

template <class Type>
static __attribute__((noinline)) void encode_near_tie(const float* x, float inverse, const Tables* tables, int count, u8* codes) {
  encode_by_search<Type>(x, inverse, tables, count, codes);
}

template <class Type>
static inline void encode_in_segments(const float* x, float inverse, const Tables* tables, u8* codes) {
  const int GROUP = Type::BLOCK < 64 ? Type::BLOCK : 64;
  const __m512 scale = _mm512_set1_ps(inverse);
  const __m512i order = _mm512_load_si512(in_order);
  const __m512i shifts = _mm512_set1_epi16(FRACTION | (FRACTION + 32) << 8);  // of two places in 64 bits
  for (int i = 0; i < Type::BLOCK; i += GROUP) {
    __mmask16 sure = 0xffff;
    __m512i ranks = _mm512_setzero_si512();
    for (int j = 0; j < GROUP / 16; ++j) {
      const __m512i places = find_places<Type>(_mm512_mul_ps(_mm512_loadu_ps(x + i + 16 * j), scale), tables, &sure);
      ranks = _mm512_mask_multishift_epi64_epi8(ranks, 0x0303030303030303ull << (2 * j), shifts, places);
    }
    _mm512_mask_storeu_epi8(codes + i, ~0ull >> (64 - GROUP), _mm512_permutexvar_epi8(order, ranks));
    if (__builtin_expect(sure != 0xffff, 0)) encode_near_tie<Type>(x + i, inverse, tables, GROUP, codes + i);
  }
}

template <class Type>
static inline void encode_block(const float* x, float inverse, const Tables* tables, u8* codes) {
  if (Type::BITS <= 4) encode_narrow_block<Type>(x, inverse, tables, codes);
  else if (Type::SEGMENTS) encode_in_segments<Type>(x, inverse, tables, codes);
  else encode_by_search<Type>(x, inverse, tables, Type::BLOCK, codes);
}

#endif
