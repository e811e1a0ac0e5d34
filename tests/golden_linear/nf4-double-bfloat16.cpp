// products with a quantized weight: 4-bit codes, blocks of 64, quantized scales, bfloat16 numbers
// Rendered by bnbx; change the templates, not this file.

// What numbers.h asks of a target: C++ on a CPU.

#define DEVICE static inline
DEVICE unsigned int bits_of(float x) { unsigned int bits; __builtin_memcpy(&bits, &x, 4); return bits; }
DEVICE float float_of(unsigned int bits) { float x; __builtin_memcpy(&x, &bits, 4); return x; }
DEVICE float root(float x) { return __builtin_sqrtf(x); }
DEVICE double root64(double x) { return __builtin_sqrt(x); }

// a * b + c, rounded once.
#if defined(__FMA__) || defined(__FP_FAST_FMAF) || defined(__aarch64__)
DEVICE float fused(float a, float b, float c) { return __builtin_fmaf(a, b, c); }
#else
// Where there is no instruction for it: the product is exact in double precision, and of a sum that is not, the last bit
// is set, so that rounding to float can take it neither for a number halfway nor for one on the other side of it.
DEVICE float fused(float a, float b, float c) {
  const double product = (double)a * b, sum = product + c;
  const double added = sum - product, lost = (product - (sum - added)) + (c - added);
  long long bits;
  __builtin_memcpy(&bits, &sum, 8);
  const long long next = bits + ((lost > 0.0) == (sum > 0.0) ? 1 : -1);
  bits = (lost < 0.0 || lost > 0.0) && !(bits & 1) ? next : bits;
  double odd;
  __builtin_memcpy(&odd, &bits, 8);
  return (float)odd;
}
#endif

// Numbers, as C++ and CUDA kernels share them. The target defines before this: DEVICE (how a function
// is declared), bits_of and float_of (a float's bits), root and root64 (correctly rounded square
// roots), and fused (a * b + c, rounded once).

typedef unsigned char u8;
typedef signed char i8;
typedef unsigned short u16;
typedef int i32;
typedef unsigned int u32;
typedef long long i64;

// ---- storage types of parameters and gradients: rounded to nearest even, NaN kept

struct bfloat16 { u16 bits; };
struct float16 { u16 bits; };

DEVICE float to_float(float x) { return x; }

DEVICE float to_float(bfloat16 x) { return float_of((u32)x.bits << 16); }

DEVICE float to_float(float16 x) {
  const u32 magnitude = (u32)(x.bits & 0x7fffu) << 13;
  // 2**112 moves the exponent from bias 15 to bias 127, subnormals included.
  const float finite = float_of(magnitude) * float_of(0x77800000u);
  const bool special = (x.bits & 0x7c00u) == 0x7c00u;
  const u32 bits = special ? (magnitude | 0x7f800000u) : bits_of(finite);
  return float_of(bits | ((u32)(x.bits & 0x8000u) << 16));
}

DEVICE void from_float(float x, float& to) { to = x; }

DEVICE void from_float(float x, bfloat16& to) {
  const u32 bits = bits_of(x);
  const u32 rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  to.bits = (u16)((bits & 0x7fffffffu) > 0x7f800000u ? 0x7fc0u : rounded);
}

DEVICE void from_float(float x, float16& to) {
  const u32 bits = bits_of(x);
  const u32 magnitude = bits & 0x7fffffffu;
  // Below 2**-14, adding 0.5 makes the addition itself round to multiples of 2**-24.
  const u32 subnormal = bits_of(float_of(magnitude) + 0.5f) - 0x3f000000u;
  const u32 normal = (magnitude + 0xc8000fffu + ((magnitude >> 13) & 1u)) >> 13;
  u32 half = magnitude < 0x38800000u ? subnormal : normal;
  half = magnitude >= 0x477ff000u ? 0x7c00u : half;
  half = magnitude > 0x7f800000u ? 0x7e00u : half;
  to.bits = (u16)(half | ((bits >> 16) & 0x8000u));
}

// ---- what a rule's statements work on: a Number, which is a float, or several where a target has them

template <class Stored>
DEVICE void rule_read(const Stored* from, float& x) { x = to_float(*from); }

template <class Stored>
DEVICE void rule_write(float x, Stored* to) { from_float(x, *to); }

// ---- functions of the rule language

DEVICE float rule_fma(float a, float b, float c) { return fused(a, b, c); }    // a * b + c
DEVICE float rule_fms(float a, float b, float c) { return fused(a, b, -c); }   // a * b - c
DEVICE float rule_fnma(float a, float b, float c) { return fused(-a, b, c); }  // c - a * b
DEVICE float rule_where(bool condition, float yes, float no) { return condition ? yes : no; }
DEVICE float rule_sqrt(float x) { return root(x); }
DEVICE float rule_abs(float x) { return float_of(bits_of(x) & 0x7fffffffu); }
// The sign bit on a one: vectorized, one comparison and not three.
DEVICE float rule_sign(float x) { return x < 0.0f || x > 0.0f ? float_of((bits_of(x) & 0x80000000u) | 0x3f800000u) : x; }
DEVICE float rule_min(float a, float b) { return a < b ? a : b; }
DEVICE float rule_max(float a, float b) { return a > b ? a : b; }

DEVICE double rule_where(bool condition, double yes, double no) { return condition ? yes : no; }
DEVICE double rule_sqrt(double x) { return root64(x); }
DEVICE double rule_abs(double x) { return x < 0.0 ? -x : x + 0.0; }  // the sum makes -0 a 0
DEVICE double rule_sign(double x) { return x > 0.0 ? 1.0 : (x < 0.0 ? -1.0 : x); }
DEVICE double rule_min(double a, double b) { return a < b ? a : b; }
DEVICE double rule_max(double a, double b) { return a > b ? a : b; }

// Quantized states, as C++ and CUDA kernels share them.

// The tables of one codebook; see bnbx/kernels/codebook.py, which packs them.
struct Tables {
  float levels[256];      // value by code, over the unit
  u8 planes[4][256];      // the same, byte by byte
  u8 order[256];          // code by rank
  float thresholds[256];  // ascending, padded with infinity
  u32 turn[16];           // these six: see Segments in codebook.py
  float slope[16], offset[16], high[16];
  u8 lower[16];
  u32 cuts[8];
  u32 entries[1];  // as many as the codebook needs
};

// What a block's largest magnitude (as float bits) makes of the block. NaN or infinity: the block
// reads as NaN from now on. Below the smallest normal number, or without a finite inverse: the block
// is zero. Otherwise the codes are those of x * inverse, in which absmax becomes the table's unit.
struct Scale {
  float absmax, inverse;
};

template <class Type>
DEVICE Scale make_scale(u32 largest) {
  Scale scale = {largest >= 0x7f800000u ? float_of(0x7fc00000u) : 0.0f, 0.0f};
  if (largest < 0x00800000u || largest >= 0x7f800000u) return scale;
  const float inverse = Type::UNIT / float_of(largest);
  if (bits_of(inverse) < 0x7f800000u) scale.absmax = float_of(largest), scale.inverse = inverse;
  return scale;
}

// Where the search for x looks, and what it adds to the entry found there: an exact search, since
// each entry carries over just past the one threshold in its bucket. See `Buckets` in codebook.py.
struct Place {
  u32 entry, low;
};

template <class Type>
DEVICE Place find_place(float x) {
  const u32 mask = (1u << Type::SHIFT) - 1u;
  const u32 bits = bits_of(x);
  // A codebook without negative thresholds has one answer for all negative x, that of 0.
  u32 a = Type::SIGNED ? bits & 0x7fffffffu : (i32)bits > 0 ? bits : 0u;
  a = a < Type::CEILING ? a : Type::CEILING;
  const u32 small = a < 1u ? a : 1u;
  const u32 w = a < Type::FLOOR ? small : a - Type::FLOOR + (1u << Type::SHIFT);
  const u32 negative = Type::SIGNED ? bits >> 31 : 0u;
  const Place place = {(w >> Type::SHIFT) + negative * Type::HALF, (w & mask) ^ (negative ? mask : 0u)};
  return place;
}

// The number of thresholds below x, by halving, for codebooks without such entries.
DEVICE u32 count_thresholds(float x, const float* thresholds) {
  u32 rank = 0;
  for (u32 step = 128; step > 0; step >>= 1) rank += thresholds[rank + step - 1] < x ? step : 0;
  return rank;
}

template <class Type>
DEVICE u32 find_rank(float x, const u32* entries, const float* thresholds) {
  if (Type::SHIFT == 0) return count_thresholds(x, thresholds);
  const Place place = find_place<Type>(x);
  return (entries[place.entry] + place.low) >> Type::SHIFT;
}

template <class Type>
DEVICE u8 encode(float x, const u32* entries, const float* thresholds, const u8* order) {
  const u32 rank = find_rank<Type>(x, entries, thresholds);
  return (u8)(Type::ORDERED ? rank : order[rank]);
}

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

// Codes in bytes of their own to codes packed without gaps, the first in the highest bits, and back.

// As many at a time as fill whole bytes.
template <int BITS>
struct Group {
  static constexpr int CODES = 8 % BITS ? 8 : 8 / BITS, BYTES = CODES * BITS / 8;
};

template <int BITS>
static inline void unpack_group(const u8* packed, u8* codes) {
  unsigned long long word = 0;
  for (int i = 0; i < Group<BITS>::BYTES; ++i) word = word << 8 | packed[i];
  for (int i = 0; i < Group<BITS>::CODES; ++i)
    codes[i] = (u8)((word >> (BITS * (Group<BITS>::CODES - 1 - i))) & ((1 << BITS) - 1));
}

template <int BITS>
static inline void pack_group(const u8* codes, u8* packed) {
  unsigned long long word = 0;
  for (int i = 0; i < Group<BITS>::CODES; ++i) word = word << BITS | codes[i];
  for (int i = 0; i < Group<BITS>::BYTES; ++i) packed[i] = (u8)(word >> (8 * (Group<BITS>::BYTES - 1 - i)));
}

#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512VBMI__)
#include <immintrin.h>

// 64 codes. Eight of them are BITS bytes: a permute brings these into a word of 64 bits, the first one on
// top, from which a multishift takes 8 bits at 8 places.
template <int BITS>
static inline __m512i unpack64(const u8* packed) {
  const __m512i bytes = _mm512_maskz_loadu_epi8(~0ull >> (64 - 8 * BITS), packed);
  if (BITS == 8) return bytes;
  alignas(64) u8 source[64], shift[64];
  for (int i = 0; i < 64; ++i) {
    source[i] = (u8)(i / 8 * BITS + (i % 8 < BITS ? BITS - 1 - i % 8 : 0));
    shift[i] = (u8)(BITS * (7 - i % 8));
  }
  const __m512i words = _mm512_permutexvar_epi8(_mm512_load_si512(source), bytes);
  const __m512i shifted = _mm512_multishift_epi64_epi8(_mm512_load_si512(shift), words);
  return _mm512_and_si512(shifted, _mm512_set1_epi8((1 << BITS) - 1));
}

// Neighbors are joined, to 2, 4 and then 8 codes; what stands above the latter's BITS bytes is left out.
template <int BITS>
static inline void pack64(__m512i codes, u8* packed) {
  alignas(64) u8 source[64];
  for (int i = 0; i < 64; ++i) source[i] = (u8)(i / BITS * 8 + BITS - 1 - i % BITS);
  const __m512i two = _mm512_maddubs_epi16(_mm512_set1_epi16(1 << 8 | 1 << BITS), codes);
  const __m512i four = _mm512_madd_epi16(two, _mm512_set1_epi32(1 << 16 | 1 << 2 * BITS));
  const __m512i eight = _mm512_or_si512(_mm512_slli_epi64(four, 4 * BITS), _mm512_srli_epi64(four, 32));
  const __m512i bytes = _mm512_permutexvar_epi8(_mm512_load_si512(source), eight);
  _mm512_mask_storeu_epi8(packed, ~0ull >> (64 - 8 * BITS), bytes);
}

#define PERMUTE_PACKED 1
#else
#define PERMUTE_PACKED 0
#endif

#if defined(__AVX2__) && !(defined(__AVX512F__) && defined(__AVX512BW__))
#include <immintrin.h>
#define SHUFFLE_PACKED 1

// Where 16 bytes are loaded that hold 16 codes, those from 16 k on of COUNT: not beyond the last one's byte.
template <int BITS, int COUNT>
static constexpr int piece_at(int k) {
  return 2 * BITS * k < COUNT / 8 * BITS - 16 ? 2 * BITS * k : COUNT / 8 * BITS - 16;
}

// Of the 16 codes of either half, the first 8 or the others, in words of 16 bits. A shuffle brings the two bytes
// that a code may touch into its word, a multiplication shifts the code to the top.
template <int BITS, int COUNT, int K>
static inline __m256i unpack_words(__m256i packed, int others) {
  alignas(32) u8 source[32];
  alignas(32) u16 factor[16];
  for (int w = 0; w < 16; ++w) {
    const int k = K + w / 8, bit = (8 * others + w % 8) * BITS, byte = 2 * BITS * k - piece_at<BITS, COUNT>(k) + bit / 8;
    source[2 * w + 1] = (u8)byte;
    source[2 * w] = (u8)(bit % 8 + BITS > 8 ? byte + 1 : 0xff);
    factor[w] = (u16)(1 << bit % 8);
  }
  const __m256i words = _mm256_shuffle_epi8(packed, _mm256_load_si256((const __m256i*)source));
  return _mm256_srli_epi16(_mm256_mullo_epi16(words, _mm256_load_si256((const __m256i*)factor)), 16 - BITS);
}

// Codes 16 K .. 16 K + 31 of COUNT, which are 16 bytes or more.
template <int BITS, int COUNT, int K>
static inline __m256i unpack32(const u8* packed) {
  const __m128i low = _mm_loadu_si128((const __m128i*)(packed + piece_at<BITS, COUNT>(K)));
  const __m128i high = _mm_loadu_si128((const __m128i*)(packed + piece_at<BITS, COUNT>(K + 1)));
  const __m256i both = _mm256_set_m128i(high, low);
  return _mm256_packus_epi16(unpack_words<BITS, COUNT, K>(both, 0), unpack_words<BITS, COUNT, K>(both, 1));
}

template <int BITS>
static inline void unpack64(const u8* packed, u8* codes) {
  _mm256_storeu_si256((__m256i*)codes, unpack32<BITS, 64, 0>(packed));
  _mm256_storeu_si256((__m256i*)(codes + 32), unpack32<BITS, 64, 2>(packed));
}
#else
#define SHUFFLE_PACKED 0
#endif

// As many codes as come in whole groups. Where no code crosses a byte, shifts alone are faster: a
// compiler vectorizes them.
template <int BITS>
static inline int unpack_whole(const u8* packed, int count, u8* codes) {
#if PERMUTE_PACKED
  if (8 % BITS) {
    for (int i = 0; i + 64 <= count; i += 64) _mm512_storeu_si512(codes + i, unpack64<BITS>(packed + i * BITS / 8));
    return count / 64 * 64;
  }
#elif SHUFFLE_PACKED
  if (8 % BITS) {
    for (int i = 0; i + 64 <= count; i += 64) unpack64<BITS>(packed + i * BITS / 8, codes + i);
    return count / 64 * 64;
  }
#endif
  const int groups = count / Group<BITS>::CODES;
  for (int i = 0; i < groups; ++i) unpack_group<BITS>(packed + i * Group<BITS>::BYTES, codes + i * Group<BITS>::CODES);
  return groups * Group<BITS>::CODES;
}

template <int BITS>
static inline int pack_whole(const u8* codes, int count, u8* packed) {
#if PERMUTE_PACKED
  if (8 % BITS) {
    for (int i = 0; i + 64 <= count; i += 64) pack64<BITS>(_mm512_loadu_si512(codes + i), packed + i * BITS / 8);
    return count / 64 * 64;
  }
#endif
  const int groups = count / Group<BITS>::CODES;
  for (int i = 0; i < groups; ++i) pack_group<BITS>(codes + i * Group<BITS>::CODES, packed + i * Group<BITS>::BYTES);
  return groups * Group<BITS>::CODES;
}

// The bytes of a last group may be fewer than a whole one's.
template <int BITS>
static inline void unpack_codes(const u8* packed, int count, u8* codes) {
  if (BITS == 8) {
    __builtin_memcpy(codes, packed, count);
    return;
  }
  for (int i = unpack_whole<BITS>(packed, count, codes); i < count; i += Group<BITS>::CODES) {
    u8 bytes[Group<BITS>::BYTES] = {}, group[Group<BITS>::CODES];
    const int left = count - i < Group<BITS>::CODES ? count - i : Group<BITS>::CODES;
    __builtin_memcpy(bytes, packed + i * BITS / 8, (left * BITS + 7) / 8);
    unpack_group<BITS>(bytes, group);
    __builtin_memcpy(codes + i, group, left);
  }
}

template <int BITS>
static inline void pack_codes(const u8* codes, int count, u8* packed) {
  if (BITS == 8) {
    __builtin_memcpy(packed, codes, count);
    return;
  }
  for (int i = pack_whole<BITS>(codes, count, packed); i < count; i += Group<BITS>::CODES) {
    u8 bytes[Group<BITS>::BYTES], group[Group<BITS>::CODES] = {};
    const int left = count - i < Group<BITS>::CODES ? count - i : Group<BITS>::CODES;
    __builtin_memcpy(group, codes + i, left);
    pack_group<BITS>(group, bytes);
    __builtin_memcpy(packed + i * BITS / 8, bytes, (left * BITS + 7) / 8);
  }
}

// The parts of a tensor; see bnbx/kernels/encoding.py. Those that an encoding lacks are null.
struct Parts {
  u8* codes;
  void* scale;
  float* center;
  float* tensor_scale;
  float* second_scale;
  float* mean;
  const Tables* tables;         // of the codes
  const Tables* second_tables;  // of quantized scales
};

// Scales of blocks, as C++ and CUDA kernels share them: how they are found, kept and read.
// bnbx/kernels/coding_reference.py says the same with torch operations; the bits are equal.
// `Code` is the encoding's traits: those of its codebook, and of its scales (scale_traits.j2). `Parts` is
// made from PARTS of coding_source.py (parts.j2).

enum ScaleKind { FLOAT32, BFLOAT16, E4M3, E8M0, SECOND };

// ---- e4m3 without its sign: 4 bits of exponent (bias 7), 3 of fraction, 0x7f is NaN

DEVICE float from_e4m3(u8 code) {
  const float finite = float_of((u32)(code & 0x7fu) << 20) * float_of(0x7b800000u);  // times 2**120
  return (code & 0x7fu) == 0x7fu ? float_of(0x7fc00000u) : finite;
}

// Nearest, ties to even, of 0 <= x <= 448, or NaN.
DEVICE u8 to_e4m3(float x) {
  const u32 bits = bits_of(x);
  const u32 small = bits_of(x + 16384.0f) - bits_of(16384.0f);  // the sum rounds to multiples of 2**-9
  const u32 normal = ((bits + 0x7ffffu + ((bits >> 20) & 1u)) >> 20) - (120u << 3);
  return bits > 0x7f800000u ? (u8)0x7fu : (u8)(bits < 0x3c800000u ? small : normal);
}

// ---- reading

// What the levels of a block are multiplied by; `second_levels` are those of quantized scales.
template <class Code>
DEVICE float factor_at(const Parts& parts, i64 block, const float* second_levels) {
  if (Code::SCALE == BFLOAT16) return to_float(((const bfloat16*)parts.scale)[block]);
  if (Code::SCALE == SECOND)
    return second_levels[((const u8*)parts.scale)[block]] * parts.second_scale[block / Code::SECOND_BLOCK] + *parts.mean;
  if (Code::SCALE == E8M0) {
    const u32 byte = ((const u8*)parts.scale)[block];
    return float_of(byte == 255u ? 0x7fc00000u : byte ? byte << 23 : 1u << 22);
  }
  if (Code::SCALE == E4M3) {
    const float step = from_e4m3(((const u8*)parts.scale)[block]);
    return Code::TENSOR_SCALE ? step * *parts.tensor_scale : step;
  }
  return ((const float*)parts.scale)[block];
}

template <class Code>
DEVICE float factor_at(const Parts& parts, i64 block) {
  return factor_at<Code>(parts, block, Code::SCALE == SECOND ? parts.second_tables->levels : 0);
}

template <class Code>
DEVICE float center_at(const Parts& parts, i64 block) {
  return Code::CENTERED ? parts.center[block] : 0.0f;
}

// ---- finding

// What is to be known of a block's numbers: the largest magnitude, as float bits, so that NaN is the
// largest of all; and the ends of its range, where the encoding subtracts its mid-point.
struct Range {
  u32 largest;
  float high, low;
};

DEVICE Range empty_range() {
  const Range range = {0u, float_of(0xff800000u), float_of(0x7f800000u)};
  return range;
}

DEVICE void add_to_range(float x, Range& range) {
  const u32 magnitude = bits_of(x) & 0x7fffffffu;
  range.largest = magnitude > range.largest ? magnitude : range.largest;
  range.high = x > range.high ? x : range.high;
  range.low = x < range.low ? x : range.low;
}

// What turns x into the number whose nearest table entry is its code: (x - center) * inverse.
// inverse is 0 where a block has no numbers to keep: the codes are then that of zero.
struct Scaling {
  float center, inverse;
};

// Below this absmax a block is scaled as if it had this: the inverse stays finite. Not so on a grid.
DEVICE float smallest_absmax() { return 1e-38f; }

DEVICE float finite_or_most(float x) {
  const float most = float_of(0x7f7fffffu);
  return x < most ? x : most;
}

template <class Code>
DEVICE float inverse_of(float absmax) {
  if (Code::GRID) return 1.0f / absmax;
  return absmax >= smallest_absmax() ? finite_or_most(Code::UNIT * (1.0f / absmax)) : 1e38f;
}

// The absmax that a block keeps: where a unit above 1 would make the inverse overflow, a larger one.
template <class Code>
DEVICE float kept_absmax(float absmax) {
  const float least = Code::UNIT * smallest_absmax();
  return Code::UNIT > 1.0f && absmax > 0.0f && absmax < least ? least : absmax;
}

// Where x falls in the table. On a grid, a block without an inverse keeps signs alone.
template <class Code>
DEVICE float scaled(float x, const Scaling& scaling) {
  if (Code::GRID && scaling.inverse > float_of(0x7f7fffffu)) return x > 0.0f ? 2.0f : -2.0f;
  return (Code::CENTERED ? x - scaling.center : x) * scaling.inverse;
}

// The scale of a whole tensor, by its largest finite magnitude: that block's e4m3 scale becomes 448.
template <class Code>
DEVICE float tensor_scale_of(u32 largest) {
  const float scale = float_of(largest) / (448.0f * Code::UNIT);
  return scale > 0.0f ? scale : 1.0f;
}

// Finds a block's scale, and keeps it if `keep`: where several threads find the same, one writes it.
template <class Code>
DEVICE Scaling keep_scale(const Parts& parts, i64 block, const Range& range, float tensor_scale, bool keep) {
  Scaling scaling = {0.0f, 0.0f};
  u32 largest = range.largest;
  if (Code::CENTERED) {
    scaling.center = 0.5f * range.high + 0.5f * range.low;
    const u32 above = bits_of(range.high - scaling.center) & 0x7fffffffu;
    const u32 below = bits_of(range.low - scaling.center) & 0x7fffffffu;
    if (largest >= 0x7f800000u) scaling.center = float_of(0x7fc00000u);
    else largest = above > below ? above : below;
    if (keep) parts.center[block] = scaling.center;
  }
  const bool finite = largest < 0x7f800000u;
  const float absmax = float_of(finite ? largest : 0x7fc00000u);
  if (Code::SCALE == E8M0) {
    const i32 exponent = (i32)(largest >> 23) - (i32)(bits_of(Code::UNIT) >> 23) + 127;
    const u32 byte = finite ? (u32)(exponent < 0 ? 0 : exponent > 254 ? 254 : exponent) : 255u;
    if (keep) ((u8*)parts.scale)[block] = (u8)byte;
    if (finite) scaling.inverse = float_of(byte < 254u ? (254u - byte) << 23 : 1u << 22);
  } else if (Code::SCALE == E4M3) {
    const float step = Code::TENSOR_SCALE ? absmax / Code::UNIT / tensor_scale : absmax / Code::UNIT;
    const u8 kept = to_e4m3(step > 448.0f ? 448.0f : step);
    if (keep) ((u8*)parts.scale)[block] = kept;
    const float factor = Code::TENSOR_SCALE ? from_e4m3(kept) * tensor_scale : from_e4m3(kept);
    if (finite && factor > 0.0f) scaling.inverse = finite_or_most(1.0f / factor);
  } else if (Code::SCALE == BFLOAT16) {
    bfloat16 kept;
    const float most = float_of(0x7f7f0000u);
    from_float(absmax > most ? most : kept_absmax<Code>(absmax), kept);
    if (keep) ((bfloat16*)parts.scale)[block] = kept;
    const float factor = to_float(kept);
    if ((bits_of(factor) & 0x7fffffffu) < 0x7f800000u) scaling.inverse = inverse_of<Code>(factor);
  } else {
    const float kept = kept_absmax<Code>(absmax);
    if (keep) ((float*)parts.scale)[block] = kept;
    if (finite) scaling.inverse = inverse_of<Code>(kept);
  }
  return scaling;
}

// ---- stochastic rounding: to one of the two neighbors of x, in proportion to nearness

// `numbers` are the table's, ascending, `written` of them; `uniform` lies in [0, 1).
template <class Code>
DEVICE u8 encode_stochastically(float x, float uniform, const u32* entries, const float* thresholds, const u8* order, const float* numbers, int written) {
  const int rank = (int)find_rank<Code>(x, entries, thresholds);
  int low = rank - (numbers[rank] > x ? 1 : 0);
  low = low < 0 ? 0 : low > written - 2 ? written - 2 : low;
  const float span = numbers[low + 1] - numbers[low];
  const float part = (x - numbers[low]) / (span > 0.0f ? span : 1.0f);
  return order[low + (uniform < part ? 1 : 0)];
}

// Numbers of any dtype on a CPU, to floats and back. float16 goes by the processor's own instructions
// where it has them: compilers do not vectorize its conversions by themselves.

#if defined(__AVX512F__) || defined(__F16C__)
#include <immintrin.h>
#endif

// Where they are floats: `from` itself, or in `room`.
static inline const float* load_numbers(const float* from, int, float*) { return from; }

static inline const float* load_numbers(const bfloat16* from, int count, float* room) {
  for (int i = 0; i < count; ++i) room[i] = to_float(from[i]);
  return room;
}

static inline const float* load_numbers(const float16* from, int count, float* room) {
  int i = 0;
#if defined(__AVX512F__)
  for (; i + 16 <= count; i += 16)
    _mm512_storeu_ps(room + i, _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)(from + i))));
#elif defined(__F16C__)
  for (; i + 8 <= count; i += 8)
    _mm256_storeu_ps(room + i, _mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)(from + i))));
#endif
  for (; i < count; ++i) room[i] = to_float(from[i]);
  return room;
}

static inline void store_numbers(const float* from, int count, float* to) { __builtin_memcpy(to, from, count * sizeof(float)); }

static inline void store_numbers(const float* from, int count, bfloat16* to) {
  for (int i = 0; i < count; ++i) from_float(from[i], to[i]);
}

static inline void store_numbers(const float* from, int count, float16* to) {
  int i = 0;
#if defined(__AVX512F__)
  for (; i + 16 <= count; i += 16)
    _mm256_storeu_si256((__m256i*)(to + i), _mm512_cvtps_ph(_mm512_loadu_ps(from + i), _MM_FROUND_TO_NEAREST_INT));
#elif defined(__F16C__)
  for (; i + 8 <= count; i += 8)
    _mm_storeu_si128((__m128i*)(to + i), _mm256_cvtps_ph(_mm256_loadu_ps(from + i), _MM_FROUND_TO_NEAREST_INT));
#endif
  for (; i < count; ++i) from_float(from[i], to[i]);
}

// Work on the threads of the host process: each takes the next slice of it until there are none.

// The host's GOMP_parallel, so that kernels and torch share one pool of threads.
typedef void (*Parallel)(void (*)(void*), void*, unsigned, unsigned);

enum { SLICES_PER_THREAD = 4 };  // a thread that is interrupted holds up the others less

// A slice, one of `count`, and which of the threads that take part has it.
struct Slice {
  i64 number, count, worker;
  i64 first_of(i64 items) const { return items * number / count; }
  i64 last_of(i64 items) const { return items * (number + 1) / count; }  // one past it
};

template <class Work>
struct Pool {
  const Work* work;
  i64 slices, next, workers;
};

template <class Work>
static void take_slices(void* data) {
  Pool<Work>* pool = (Pool<Work>*)data;
  const i64 worker = __atomic_fetch_add(&pool->workers, 1, __ATOMIC_RELAXED);
  for (;;) {
    const i64 number = __atomic_fetch_add(&pool->next, 1, __ATOMIC_RELAXED);
    if (number >= pool->slices) return;
    pool->work->take({number, pool->slices, worker});
  }
}

// Work is a struct that says what to do with a slice: `void take(Slice slice) const`.
template <class Work>
static void run_in_slices(const Work& work, i64 slices, i64 threads, Parallel parallel) {
  Pool<Work> pool = {&work, threads > 1 && parallel ? slices : 1, 0, 0};
  if (pool.slices > 1) parallel(take_slices<Work>, &pool, (unsigned)threads, 0);
  else take_slices<Work>(&pool);
}

// The processor's own prefetchers end with a page of memory, and have to find out anew in the next one that it is read in
// order: so its first lines are asked for early. That takes 2 to 4 % off an optimizer's step, 10 % off the product of a row
// with a 4-bit weight from memory, on a Granite Rapids. More lines cost a step time again, where several arrays are read.

enum { LINE = 64, PAGE = 4096 };

// Of the page that begins in the `bytes` before `at`, if one does. Does no harm where there is nothing.
template <bool WRITTEN>
static inline void begin_page(const void* at, int bytes, int lines) {
  const int in_page = (int)((unsigned long long)at % PAGE);
  if (in_page >= bytes) return;
  for (int i = 0; i < lines; ++i) __builtin_prefetch((const char*)at - in_page + i * LINE, WRITTEN);
}

#define CODE_BITS 4
struct Codebook {
  static constexpr int BITS = CODE_BITS, BLOCK = 64;
};
struct Code : Codebook {
  static constexpr ScaleKind SCALE = SECOND;
  static constexpr bool CENTERED = false, TENSOR_SCALE = false, GRID = false;
  static constexpr int SECOND_BLOCK = 256;
};

typedef bfloat16 Number;  // what x and y are made of
enum { BLOCK, ROW, TENSOR };
enum { PER = BLOCK };  // what shares a scale

struct Job {
  Parts parts;
  i64 rows;  // of the weight
  i64 columns;
  i64 inputs;          // rows of x
  const Number* x;     // inputs * columns
  const Number* bias;  // rows of them, or null
  Number* y;           // inputs * rows; or the columns that are decoded
  i64 first;           // of these
  i64 last;            // one past them
  float* room;         // for rows of x as they are multiplied: see bnbx_room_for
};

// Vectors of LANES floats. Arithmetic on these types is the compiler's own, for any processor; what
// needs an instruction of its own is here, once for each instruction set that has it.

#if defined(__AVX512F__) && defined(__AVX512BW__)
#include <immintrin.h>
enum { LANES = 16 };
#elif defined(__AVX2__) && defined(__FMA__)
#include <immintrin.h>
#define EIGHT_LANES
enum { LANES = 8 };
#else
enum { LANES = 4 };
#endif

// Processors that multiply pairs of bfloat16 at half of the speed of pairs of integers (0.81 and 0.39 ns for a vector on an
// Emerald Rapids): those of Intel, known by instructions that AMD's lack.
#if defined(__AVX512FP16__) || defined(BNBX_SLOW_PAIRS)
#define SLOW_PAIRS
#endif

typedef float Floats __attribute__((vector_size(4 * LANES)));
typedef i32 Ints __attribute__((vector_size(4 * LANES)));

static inline Floats load(const float* from) {
  Floats x;
  __builtin_memcpy(&x, from, sizeof x);
  return x;
}

static inline void store(Floats x, float* to) { __builtin_memcpy(to, &x, sizeof x); }

static inline Floats fill(float x) {
  Floats all;
  for (int l = 0; l < LANES; ++l) all[l] = x;
  return all;
}

#if defined(__AVX512F__) && defined(__AVX512BW__)

static inline Floats multiply_add(Floats a, Floats b, Floats c) {
  return (Floats)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
}

// x[index] for each lane; the last four bits of an index count.
static inline Floats permute(Floats x, Ints index) {
  return (Floats)_mm512_permutexvar_ps((__m512i)index, (__m512)x);
}

static inline Floats broadcast(const float* x) { return (Floats)_mm512_set1_ps(*x); }

// To the nearest integers.
static inline Floats round_all(Floats x) { return (Floats)_mm512_roundscale_ps((__m512)x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }

// The sum of all lanes; here and below, always in the same order.
static inline float sum_of(Floats x) { return _mm512_reduce_add_ps((__m512)x); }

// 16 floats in registers.
struct Table16 { Floats values; };
static inline Table16 load_table(const float* from) { return {load(from)}; }
static inline Floats look_up(const Table16& table, Ints index) { return permute(table.values, index); }

#elif defined(__AVX2__) && defined(__FMA__)

static inline Floats multiply_add(Floats a, Floats b, Floats c) {
  return (Floats)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
}

// x[index] for each lane; the last three bits of an index count.
static inline Floats permute(Floats x, Ints index) {
  return (Floats)_mm256_permutevar8x32_ps((__m256)x, (__m256i)index);
}

static inline Floats broadcast(const float* x) { return (Floats)_mm256_broadcast_ss(x); }

static inline Floats round_all(Floats x) { return (Floats)_mm256_round_ps((__m256)x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }

static inline float sum_of(Floats x) {
  const __m128 four = _mm_add_ps(_mm256_castps256_ps128((__m256)x), _mm256_extractf128_ps((__m256)x, 1));
  const __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)));
}

#else

static inline Floats multiply_add(Floats a, Floats b, Floats c) { return a * b + c; }

static inline float sum_of(Floats x) { return (x[0] + x[2]) + (x[1] + x[3]); }

static inline Floats permute(Floats x, Ints index) {
  Floats found;
  for (int l = 0; l < LANES; ++l) found[l] = x[index[l] % LANES];
  return found;
}

#endif

// Codes as products read them: a group of them at a time, from bytes to levels in registers.
//
// Where the table of levels fits into registers, those of a group come out in the order that takes
// the fewest instructions: vector v holds in its lane l the element first_element(l) + v * STEP. The
// numbers that they are multiplied with are laid out in that order beforehand.

#if CODE_BITS <= 4 && defined(__AVX512F__) && defined(__AVX512BW__)
#define TABLE_IN_REGISTERS  // a lane holds 8 codes, and shifts bring them down one by one
enum { GROUP = 8 * LANES, STEP = 1 };
static inline int first_element(int lane) { return 8 * lane; }
#elif CODE_BITS > 4 && defined(__AVX512BW__) && defined(__AVX512VBMI__)
#define BYTE_PLANES  // see look_up_bytes in cpu_codebook_avx512.h
enum { GROUP = 64, STEP = 4 };
static inline int first_element(int lane) { return lane / 4 * 16 + lane % 4; }
#elif CODE_BITS <= 4 && defined(EIGHT_LANES)
#define PLANES_OF_16  // see cpu_linear_planes.h; a lane has 8 codes in a row
enum { GROUP = 64, STEP = 1 };
static inline int first_element(int lane) { return 8 * lane; }
#elif CODE_BITS <= 6 && defined(EIGHT_LANES)
#define PLANES_OF_16
enum { GROUP = 32, STEP = 4 };
static inline int first_element(int lane) { return lane / 4 * 16 + lane % 4; }
#else
enum { GROUP = 64, STEP = LANES };
static inline int first_element(int lane) { return lane; }
#endif

enum { VECTORS = GROUP / LANES, GROUP_BYTES = GROUP / 8 * CODE_BITS };

static inline int element_at(int place) { return first_element(place % LANES) + place / LANES * STEP; }

#ifdef TABLE_IN_REGISTERS

// The levels, as often as they fit into 16: then whatever stands above a code in its index is harmless.
typedef Table16 Levels;

static inline Levels load_levels(const Tables* tables) {
  float repeated[16];
  for (int i = 0; i < 16; ++i) repeated[i] = tables->levels[i % (1 << CODE_BITS)];
  return load_table(repeated);
}

// How far down code v of a lane is to be shifted.
static constexpr int shift_of(int v) {
  return CODE_BITS == 4 ? v / 2 * 8 + 4 - v % 2 * 4 : CODE_BITS == 2 ? v / 4 * 8 + 6 - v % 4 * 2 : 3 * (7 - v);
}

// 8 codes for each lane, as they lie in memory, or where codes cross bytes, the first one on top.
static inline Ints load_words(const u8* from) {
#if CODE_BITS == 4
  return (Ints)_mm512_loadu_si512(from);
#elif CODE_BITS == 2
  return (Ints)_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)from));
#else
  const __m512i packed = _mm512_maskz_loadu_epi32(0x0fff, from);
  const __m512i pieces = _mm512_permutexvar_epi32(_mm512_setr_epi32(0, 1, 2, 2, 3, 4, 5, 5, 6, 7, 8, 8, 9, 10, 11, 11), packed);
  const __m128i order = _mm_setr_epi8(2, 1, 0, -1, 5, 4, 3, -1, 8, 7, 6, -1, 11, 10, 9, -1);
  return (Ints)_mm512_shuffle_epi8(pieces, _mm512_broadcast_i32x4(order));
#endif
}

static inline Ints load_bytes(const u8* from) {
  return (Ints)_mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i*)from));
}

static inline void decode_group(const u8* from, const Levels& levels, Floats (&w)[VECTORS]) {
  const Ints words = load_words(from);
#pragma GCC unroll 8
  for (int v = 0; v < VECTORS; ++v) w[v] = look_up(levels, words >> shift_of(v));
}

static inline void decode_in_order(const u8* from, const Levels& levels, float* to) {
  alignas(64) u8 codes[GROUP];
  unpack_codes<CODE_BITS>(from, GROUP, codes);
  for (int i = 0; i < GROUP; i += LANES) store(look_up(levels, load_bytes(codes + i)), to + i);
}

#elif defined(BYTE_PLANES)

typedef const Tables* Levels;

static inline Levels load_levels(const Tables* tables) { return tables; }

static inline __m512i look_up_plane(const u8* plane, __m512i index, __mmask64 upper) {
#if CODE_BITS == 8
  return look_up_bytes(plane, index, upper);
#elif CODE_BITS == 7
  return _mm512_permutex2var_epi8(_mm512_loadu_si512(plane), index, _mm512_loadu_si512(plane + 64));
#else
  return _mm512_permutexvar_epi8(index, _mm512_loadu_si512(plane));
#endif
}

// Floats from the four bytes of each, which stand in 16-byte pieces of their own.
static inline void look_up_codes(__m512i index, Levels levels, Floats (&w)[4]) {
  const __mmask64 upper = _mm512_movepi8_mask(index);
  const __m512i b0 = look_up_plane(levels->planes[0], index, upper), b1 = look_up_plane(levels->planes[1], index, upper);
  const __m512i b2 = look_up_plane(levels->planes[2], index, upper), b3 = look_up_plane(levels->planes[3], index, upper);
  const __m512i low01 = _mm512_unpacklo_epi8(b0, b1), high01 = _mm512_unpackhi_epi8(b0, b1);
  const __m512i low23 = _mm512_unpacklo_epi8(b2, b3), high23 = _mm512_unpackhi_epi8(b2, b3);
  w[0] = (Floats)_mm512_unpacklo_epi16(low01, low23);
  w[1] = (Floats)_mm512_unpackhi_epi16(low01, low23);
  w[2] = (Floats)_mm512_unpacklo_epi16(high01, high23);
  w[3] = (Floats)_mm512_unpackhi_epi16(high01, high23);
}

static inline void decode_group(const u8* from, const Levels& levels, Floats (&w)[VECTORS]) {
  look_up_codes(unpack64<CODE_BITS>(from), levels, w);
}

static inline void decode_in_order(const u8* from, const Levels& levels, float* to) {
  Floats w[VECTORS];
  look_up_codes(_mm512_permutexvar_epi8(_mm512_load_si512(interleave), unpack64<CODE_BITS>(from)), levels, w);
  for (int v = 0; v < VECTORS; ++v) store(w[v], to + v * LANES);
}

#elif !defined(PLANES_OF_16)

typedef const Tables* Levels;

static inline Levels load_levels(const Tables* tables) { return tables; }

#ifdef EIGHT_LANES

static inline void decode_group(const u8* from, const Levels& levels, Floats (&w)[VECTORS]) {
  u8 codes[GROUP];
  unpack_codes<CODE_BITS>(from, GROUP, codes);
#pragma GCC unroll 8
  for (int v = 0; v < VECTORS; ++v) w[v] = (Floats)look_up_levels(levels->levels, codes + v * LANES);
}

static inline void decode_in_order(const u8* from, const Levels& levels, float* to) {
  Floats w[VECTORS];
  decode_group(from, levels, w);
  for (int v = 0; v < VECTORS; ++v) store(w[v], to + v * LANES);
}

#else

static inline void decode_in_order(const u8* from, const Levels& levels, float* to) {
  u8 codes[GROUP];
  unpack_codes<CODE_BITS>(from, GROUP, codes);
  for (int i = 0; i < GROUP; ++i) to[i] = levels->levels[codes[i]];
}

static inline void decode_group(const u8* from, const Levels& levels, Floats (&w)[VECTORS]) {
  float x[GROUP];
  decode_in_order(from, levels, x);
  for (int v = 0; v < VECTORS; ++v) w[v] = load(x + v * LANES);
}

#endif
#endif

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

// Products of a few rows of x with a quantized weight on a CPU. Each row of the weight is decoded
// group by group, in registers, and multiplied with up to MOST_INPUTS rows of x on the way.
//
// Groups are counted from a multiple of ALIGNMENT in the flattened weight, at or before the row's first
// element: so a group begins in a byte, and blocks in it at multiples of ALIGNMENT. How far before,
// the phase, may differ between rows; x is laid out once for each phase that there is.

enum { MOST_INPUTS = 4, ALIGNMENT = 16, TILE = 8192, ROWS_AT_ONCE = 32 };
// Elements that have one factor; blocks are multiples of it.
enum { SPAN = PER == BLOCK && (int)Code::BLOCK < (int)GROUP ? (int)Code::BLOCK : (int)GROUP, SPANS = GROUP / SPAN };
enum { MOST_FACTORS = TILE / SPAN + SPANS + LANES };
// Where a weight comes from memory, it is asked for so early: bytes of codes, and rows of scales. A fifth
// of the time of one row of x, measured between products that leave nothing of it in the caches.
#ifdef SLOW_PAIRS
enum { CODES_AHEAD = 4096 };  // 4 to 10 % less than with 2048 on an Emerald Rapids
#else
enum { CODES_AHEAD = 2048 };
#endif
enum { ROWS_AHEAD = 2, PAGE_AHEAD = 1024, PAGE_LINES = 6 };
enum { SCALE_BYTES = Code::SCALE == FLOAT32 ? 4 : Code::SCALE == BFLOAT16 ? 2 : 1 };

// A row of the weight from its aligned beginning on; its elements are [phase, end).
struct Row {
  const u8* codes;
  i64 start;   // where the aligned beginning lies in the flattened weight
  i64 factor;  // which factor is that of the whole row, where scales are not per block
  int phase;
  i64 end;
};

static inline Row find_row(const Job* job, i64 number) {
  const i64 columns = job->columns;
  if (PER == ROW) {
    const i64 bytes = (columns * CODE_BITS + 7) / 8;
    return {job->parts.codes + number * bytes, 0, number, 0, columns};
  }
  const i64 first = number * columns, phase = first % ALIGNMENT, start = first - phase;
  return {job->parts.codes + start / 8 * CODE_BITS, start, 0, (int)phase, phase + columns};
}

// Every phase is a multiple of this.
static inline i64 phase_step(i64 columns) {
  const i64 power = columns & -columns;
  return PER == ROW || power > ALIGNMENT ? (i64)ALIGNMENT : power;
}

static inline i64 stride_of(i64 columns) { return (columns + ALIGNMENT + GROUP - 1) / GROUP * GROUP; }

static inline float* laid_out(const Job* job, i64 phase) {
  return job->room + (phase >> __builtin_ctzll(phase_step(job->columns))) * MOST_INPUTS * stride_of(job->columns);
}

// M rows of x as those of a phase read them: group by group, and in it vector by vector, of each row in
// turn. Zero outside of the row, and for rows that there are not.
template <int M>
static void lay_out(const Job* job, i64 input, i64 phase, float* to) {
  const i64 columns = job->columns;
  for (i64 group = 0; group < stride_of(columns); group += GROUP, to += GROUP * M)
    for (int m = 0; m < M; ++m) {
      const Number* x = job->x + (input + m) * columns;
      for (int i = 0; i < GROUP; ++i) {
        const i64 column = group + element_at(i) - phase;
        const bool there = column >= 0 && column < columns && input + m < job->inputs;
        to[(i / LANES * M + m) * LANES + i % LANES] = there ? to_float(x[column]) : 0.0f;
      }
    }
}

// For the codes of each group.
static inline void ask_ahead(const u8* codes) {
  __builtin_prefetch(codes + CODES_AHEAD);
  begin_page<false>(codes + CODES_AHEAD + PAGE_AHEAD, GROUP_BYTES, PAGE_LINES);
}

// What the levels of a row's elements [from, to) are multiplied by, and what is added then.
struct Factors {
  float factor[MOST_FACTORS], center[Code::CENTERED ? MOST_FACTORS : 1];
};

static inline void find_factors(const Parts& parts, const Row& row, i64 from, i64 to, Factors& factors) {
  if (PER != BLOCK) return;
  const i64 per_block = Code::BLOCK / SPAN;
  const i64 first = (row.start + from) / SPAN, count = (row.start + to - 1) / SPAN + 1 - first;
  const u8* ahead = (const u8*)parts.scale + (first + ROWS_AHEAD * count) / per_block * SCALE_BYTES;
  for (i64 byte = 0; byte < count / per_block * SCALE_BYTES; byte += 64) __builtin_prefetch(ahead + byte);
  for (i64 i = 0; i < count; ++i) factors.factor[i] = factor_at<Code>(parts, (first + i) / per_block);
  if (Code::CENTERED)
    for (i64 i = 0; i < count; ++i) factors.center[i] = center_at<Code>(parts, (first + i) / per_block);
}

// What all groups of a row have in common.
struct Lanes {
  Ints first, span;  // the element of each lane in vector 0, and its span
  int offset;        // where the row's aligned beginning lies in its span
};

static inline Lanes find_lanes(const Row& row) {
  Lanes lanes;
  lanes.offset = (int)(row.start % SPAN);
  for (int l = 0; l < LANES; ++l) lanes.first[l] = first_element(l);
  lanes.span = (lanes.first + lanes.offset) / (int)SPAN;
  return lanes;
}

// Numbers of a group's spans for the lanes of its vector v. Where elements are in order, a vector lies in
// one span; else lane l is in the same one in every vector.
static inline Floats for_lanes(const float* of_spans, const Lanes& lanes, int v) {
#ifdef EIGHT_LANES
  if (SPANS == 1 && lanes.offset == 0) return (Floats)_mm256_broadcast_ss(of_spans);  // a permute takes as long as three shuffles
#endif
  return STEP == LANES ? fill(of_spans[(lanes.offset + v * LANES) / SPAN]) : permute(load(of_spans), lanes.span);
}

// Zero where the elements of vector v are outside of [low, high).
static inline Floats cut(Floats w, const Lanes& lanes, int v, int low, int high) {
  const Ints element = lanes.first + v * (int)STEP;
  return (Floats)((Ints)w & (element >= low & element < high));
}

// The codes of a group that may end beyond the row: nothing is read from there.
struct Part {
  u8 codes[GROUP_BYTES];
};

static inline Part load_part(const u8* codes, i64 count) {
  Part part = {};
  __builtin_memcpy(part.codes, codes, (count * CODE_BITS + 7) / 8);
  return part;
}

// What is added to while a row is gone through, group by group.
template <int M>
struct Totals {
  enum { CHAINS = M < 4 ? 4 : 2 };  // of additions that need not wait for each other
  Floats factor, center;            // of all blocks, where scales are not per block
  Floats sum[M][CHAINS];
};

// Where a group lies: its codes, the rows of x, the factors and centers of its spans.
struct Cursor {
  const u8* codes;
  const float *x, *factors, *centers;
};

template <int M>
static inline void step(Cursor& at) {
  at.codes += GROUP_BYTES;
  at.x += GROUP * M;
  at.factors += SPANS;
  at.centers += Code::CENTERED ? SPANS : 0;
}

// Adds the products of a group with M rows of x. Of a group that is not WHOLE, only elements [low, high) are the
// row's, and their codes have been copied to `codes`.
template <int M, bool WHOLE>
static inline __attribute__((always_inline)) void add_group(const u8* codes, const Cursor& at, const Lanes& lanes, const Levels& levels,
                                                            int low, int high, Totals<M>& totals) {
  Floats w[VECTORS], factor = totals.factor, center = totals.center;
  decode_group(codes, levels, w);
  if (M == 1 && WHOLE && STEP != LANES && !Code::CENTERED) {  // a lane has one factor: it is for the sum
    Floats part[2] = {w[0] * load(at.x), w[1] * load(at.x + LANES)};
#pragma GCC unroll 8
    for (int v = 2; v < VECTORS; ++v) part[v % 2] = multiply_add(w[v], load(at.x + v * LANES), part[v % 2]);
    if (PER == BLOCK) factor = for_lanes(at.factors, lanes, 0);
    totals.sum[0][0] = multiply_add(part[0] + part[1], factor, totals.sum[0][0]);
    return;
  }
#pragma GCC unroll 16
  for (int v = 0; v < VECTORS; ++v) {
    if (PER == BLOCK) factor = for_lanes(at.factors, lanes, v);
    if (PER == BLOCK && Code::CENTERED) center = for_lanes(at.centers, lanes, v);
    w[v] = Code::CENTERED ? multiply_add(w[v], factor, center) : w[v] * factor;
    if (!WHOLE) w[v] = cut(w[v], lanes, v, low, high);
#pragma GCC unroll 4
    for (int m = 0; m < M; ++m) {
      Floats& sum = totals.sum[m][v % Totals<M>::CHAINS];
      sum = multiply_add(w[v], load(at.x + (v * M + m) * LANES), sum);
    }
  }
}

// The same for a group at either end of a row.
template <int M>
static inline void add_end(const Cursor& at, const Lanes& lanes, const Levels& levels, i64 low, i64 high, Totals<M>& totals) {
  const int begin = low > 0 ? (int)low : 0, end = high < GROUP ? (int)high : (int)GROUP;
  const Part part = load_part(at.codes, end);
  add_group<M, false>(part.codes, at, lanes, levels, begin, end, totals);
}

// Adds the products of M rows of x with a row's elements [from, to) to sums. `from` is a multiple of GROUP, and so
// is `to`, or it is the end; x is laid out for the row's phase, and begins there.
template <int M>
static inline void add_products(const Parts& parts, const Row& row, i64 from, i64 to, const float* x, const Levels& levels, float* sums) {
  Factors factors;
  find_factors(parts, row, from, to, factors);
  const Lanes lanes = find_lanes(row);
  Totals<M> totals = {};
  if (PER != BLOCK) {
    totals.factor = fill(factor_at<Code>(parts, row.factor));
    totals.center = fill(center_at<Code>(parts, row.factor));
  }
  Cursor at = {row.codes + from / 8 * CODE_BITS, x, factors.factor, factors.center};
  if (from < row.phase) {
    add_end<M>(at, lanes, levels, row.phase - from, row.end - from, totals);
    step<M>(at);
    from += GROUP;
  }
  for (i64 whole = (to - from) / GROUP; whole > 0; --whole, step<M>(at)) {
    ask_ahead(at.codes);
    add_group<M, true>(at.codes, at, lanes, levels, 0, GROUP, totals);
  }
  if (from < to && (to - from) % GROUP) add_end<M>(at, lanes, levels, 0, (to - from) % GROUP, totals);
#pragma GCC unroll 4
  for (int m = 0; m < M; ++m) {
    Floats sum = totals.sum[m][0];
#pragma GCC unroll 4
    for (int c = 1; c < Totals<M>::CHAINS; ++c) sum += totals.sum[m][c];
    sums[m] += sum_of(sum);
  }
}

// Rows [first, last) of the weight times M rows of x, those from `input` on.
template <int M>
static void multiply(const Job* job, i64 input, i64 first, i64 last) {
  const Levels levels = load_levels(job->parts.tables);
  const i64 stride = stride_of(job->columns);
  for (; first < last; first += ROWS_AT_ONCE) {
    const int count = (int)(last - first < ROWS_AT_ONCE ? last - first : ROWS_AT_ONCE);
    float sums[ROWS_AT_ONCE][M] = {};
    for (i64 tile = 0; tile < stride; tile += TILE / M)  // what is used of x by all rows stays in the cache
      for (int r = 0; r < count; ++r) {
        const Row row = find_row(job, first + r);
        const i64 end = tile + TILE / M < row.end ? tile + TILE / M : row.end;
        if (tile < end) add_products<M>(job->parts, row, tile, end, laid_out(job, row.phase) + tile * M, levels, sums[r]);
      }
    for (int r = 0; r < count; ++r)
      for (int m = 0; m < M && input + m < job->inputs; ++m) {
        const i64 number = first + r;
        const float sum = job->bias ? sums[r][m] + to_float(job->bias[number]) : sums[r][m];
        from_float(sum, job->y[(input + m) * job->rows + number]);
      }
  }
}

// Some columns of the weight as numbers: what many rows of a gradient are multiplied with.

// The numbers of a row's elements [from, to), with the bits that dequantizing gives.
static void decode_elements(const Parts& parts, const Row& row, const Levels& levels, i64 from, i64 to, Number* numbers) {
  for (i64 tile = from / GROUP * GROUP; tile < to; tile += TILE) {
    const i64 end = tile + TILE < to ? tile + TILE : to;
    Factors factors;
    find_factors(parts, row, tile, end, factors);
    const i64 offset = (row.start + tile) % SPAN;
    for (i64 group = tile; group < end; group += GROUP) {
      alignas(64) float x[GROUP];
      const u8* codes = row.codes + group / 8 * CODE_BITS;
      if (group + GROUP <= row.end) decode_in_order(codes, levels, x);
      else decode_in_order(load_part(codes, row.end - group).codes, levels, x);
      for (int i = 0; i < GROUP; i += ALIGNMENT) {
        const i64 span = (offset + group - tile + i) / SPAN;
        const float factor = PER == BLOCK ? factors.factor[span] : factor_at<Code>(parts, row.factor);
        for (int j = i; j < i + ALIGNMENT; ++j) x[j] *= factor;
        if (!Code::CENTERED) continue;
        const float center = PER == BLOCK ? factors.center[span] : center_at<Code>(parts, row.factor);
        for (int j = i; j < i + ALIGNMENT; ++j) x[j] += center;
      }
      const i64 low = from > group ? from - group : 0, high = end - group < GROUP ? end - group : GROUP;
      store_numbers(x + low, (int)(high - low), numbers + (group + low - from));
    }
  }
}

// Of rows [first, last), the columns that the job asks for.
static void decode_columns(const Job* job, i64, i64 first, i64 last) {
  const Levels levels = load_levels(job->parts.tables);
  for (i64 number = first; number < last; ++number) {
    const Row row = find_row(job, number);
    Number* to = job->y + number * (job->last - job->first);
    decode_elements(job->parts, row, levels, row.phase + job->first, row.phase + job->last, to);
  }
}

// The matrix unit of Intel's processors from Sapphire Rapids on (AMX): eight tiles of 16 rows of 64
// bytes, and one instruction that adds 16 x 16 sums of 64 products of bytes in 16 cycles, eight times
// what vectors of 64 bytes do; or of 32 products of bfloat16, whose subnormal numbers count as zero. Its
// operations are here, and with -DBNBX_EMULATE_TILES the same in plain C++, so that what is built on
// them can be tested on any processor.
//
// The system keeps no room for tiles until a process asks for it: without its leave the first
// instruction would end the process (tiles_granted). A thread's tiles are set up when a piece of work
// begins and given up when it ends: other libraries (oneDNN) set up their own in the same threads, and
// a thread that holds none has 8 KiB less to save when it is interrupted.

// C holds sums, A rows as they lie in memory, B for each 4 bytes of a row of A the 4 bytes that they meet,
// for 16 columns beside one another.
enum { TILE_ROWS = 16, TILE_BYTES = 64, TILE_COUNT = 8 };

#if defined(BNBX_EMULATE_TILES)
#define TILES 1
#define INT8_TILES 1
#define BFLOAT16_TILES 1
static bool emulated_leave;
static thread_local struct { int rows[TILE_COUNT]; i8 bytes[TILE_COUNT][TILE_ROWS * TILE_BYTES]; } emulated;

static inline i64 ask_for_tiles() { return emulated_leave = true, 0; }
// What a processor does that is told of no tile, or has no leave: it stops.
static inline int emulated_rows(int tile) {
  if (!emulated_leave || !emulated.rows[tile]) __builtin_trap();
  return emulated.rows[tile];
}
static inline void set_up_tiles(const u8* rows) {
  if (!emulated_leave) __builtin_trap();
  for (int t = 0; t < TILE_COUNT; ++t) emulated.rows[t] = rows[t];
}
static inline void give_up_tiles() { emulated = {}; }
template <int T>
static inline void tile_zero() { __builtin_memset(emulated.bytes[T], 0, emulated_rows(T) * TILE_BYTES); }
template <int T>
static inline void tile_load(const void* from, i64 stride) {
  for (int r = 0; r < emulated_rows(T); ++r) __builtin_memcpy(emulated.bytes[T] + r * TILE_BYTES, (const i8*)from + r * stride, TILE_BYTES);
}
template <int T>
static inline void tile_store(void* to, i64 stride) {
  for (int r = 0; r < emulated_rows(T); ++r) __builtin_memcpy((i8*)to + r * stride, emulated.bytes[T] + r * TILE_BYTES, TILE_BYTES);
}
template <int C, int A, int B>
static inline void tile_add() {
  const i8 *a = emulated.bytes[A], *b = emulated.bytes[B];
  i32 sums[TILE_ROWS * TILE_ROWS];
  __builtin_memcpy(sums, emulated.bytes[C], sizeof sums);
  if (emulated_rows(C) != emulated_rows(A) || emulated_rows(B) != TILE_ROWS) __builtin_trap();
  for (int m = 0; m < emulated_rows(A); ++m)
    for (int n = 0; n < TILE_ROWS; ++n)
      for (int k = 0; k < TILE_BYTES; ++k) sums[m * TILE_ROWS + n] += a[m * TILE_BYTES + k] * b[k / 4 * TILE_BYTES + 4 * n + k % 4];
  __builtin_memcpy(emulated.bytes[C], sums, sizeof sums);
}
static inline float emulated_number(const i8* from) {
  bfloat16 x;
  __builtin_memcpy(&x, from, sizeof x);
  return (x.bits & 0x7f80u) ? to_float(x) : 0.0f;
}
template <int C, int A, int B>
static inline void tile_add_pairs() {
  const i8 *a = emulated.bytes[A], *b = emulated.bytes[B];
  float sums[TILE_ROWS * TILE_ROWS];
  __builtin_memcpy(sums, emulated.bytes[C], sizeof sums);
  if (emulated_rows(C) != emulated_rows(A) || emulated_rows(B) != TILE_ROWS) __builtin_trap();
  for (int m = 0; m < emulated_rows(A); ++m)
    for (int n = 0; n < TILE_ROWS; ++n)
      for (int k = 0; k < TILE_BYTES; k += 2)
        sums[m * TILE_ROWS + n] += emulated_number(a + m * TILE_BYTES + k) * emulated_number(b + k / 4 * TILE_BYTES + 4 * n + k % 4);
  __builtin_memcpy(emulated.bytes[C], sums, sizeof sums);
}

#elif defined(__AMX_TILE__) && defined(__AVX512F__) && defined(__x86_64__) && defined(__linux__)
#define TILES 1
#if defined(__AMX_INT8__) && defined(__AVX512VNNI__)
#define INT8_TILES 1
#endif
#if defined(__AMX_BF16__) && defined(__AVX512BF16__)
#define BFLOAT16_TILES 1
#endif
// arch_prctl(ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA), for all threads of the process and its children.
static inline i64 ask_for_tiles() {
  i64 result = 158;
  asm volatile("syscall" : "+a"(result) : "D"(0x1023L), "S"(18L) : "rcx", "r11", "memory");
  return result;
}
static inline void set_up_tiles(const u8* rows) {
  alignas(64) struct { u8 palette, start, none[14]; unsigned short bytes[16]; u8 rows[16]; } all = {1};
  for (int t = 0; t < TILE_COUNT; ++t) all.bytes[t] = TILE_BYTES, all.rows[t] = rows[t];
  asm volatile("ldtilecfg %0" : : "m"(all));
}
static inline void give_up_tiles() { asm volatile("tilerelease"); }
template <int T>
static inline void tile_zero() { asm volatile("tilezero %%tmm%c0" : : "i"(T)); }
template <int T>
static inline void tile_load(const void* from, i64 stride) {
  asm volatile("tileloadd (%0,%1,1), %%tmm%c2" : : "r"(from), "r"(stride), "i"(T) : "memory");
}
template <int T>
static inline void tile_store(void* to, i64 stride) {
  asm volatile("tilestored %%tmm%c2, (%0,%1,1)" : : "r"(to), "r"(stride), "i"(T) : "memory");
}
template <int C, int A, int B>
static inline void tile_add() { asm volatile("tdpbssd %%tmm%c2, %%tmm%c1, %%tmm%c0" : : "i"(C), "i"(A), "i"(B)); }
template <int C, int A, int B>
static inline void tile_add_pairs() { asm volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" : : "i"(C), "i"(A), "i"(B)); }
#endif

#if TILES
// Whether tiles may be used: the system is asked once. -DBNBX_REFUSE_TILES is a system that says no.
static bool tiles_granted() {
#if defined(BNBX_REFUSE_TILES)
  return false;
#else
  enum { UNKNOWN, YES, NO };
  static int answer = UNKNOWN;
  int known = __atomic_load_n(&answer, __ATOMIC_ACQUIRE);
  if (known == UNKNOWN) __atomic_store_n(&answer, known = ask_for_tiles() == 0 ? YES : NO, __ATOMIC_RELEASE);
  return known == YES;
#endif
}

// Turns 16 rows of 16 groups of 4 bytes, `stride` bytes apart, to columns; `to` may be `from`.
static inline void turn(const void* from, i64 stride, void* to, i64 to_stride) {
#if defined(__AVX512F__)
  __m512i a[16], b[16];
#define EACH _Pragma("GCC unroll 16") for (int i = 0; i < 16; ++i)
  EACH a[i] = _mm512_loadu_si512((const char*)from + i * stride);
  EACH b[i] = i % 2 ? _mm512_unpackhi_epi32(a[i - 1], a[i]) : _mm512_unpacklo_epi32(a[i], a[i + 1]);
  EACH a[i] = i % 2 ? _mm512_unpackhi_epi64(b[i / 4 * 4 + i % 4 / 2], b[i / 4 * 4 + i % 4 / 2 + 2])
                    : _mm512_unpacklo_epi64(b[i / 4 * 4 + i % 4 / 2], b[i / 4 * 4 + i % 4 / 2 + 2]);
  // Now a[4 g + c] holds columns c, 4 + c, 8 + c, 12 + c of rows 4 g to 4 g + 3.
  EACH b[i] = i % 2 ? _mm512_shuffle_i32x4(a[i / 8 * 8 + i % 8 / 2], a[i / 8 * 8 + i % 8 / 2 + 4], 0xdd)
                    : _mm512_shuffle_i32x4(a[i / 8 * 8 + i % 8 / 2], a[i / 8 * 8 + i % 8 / 2 + 4], 0x88);
  // b[8 h + 2 c + odd]: columns c and 8 + c, 4 more where odd, of rows 8 h to 8 h + 7.
  EACH a[i] = i / 8 ? _mm512_shuffle_i32x4(b[i % 4 * 2 + i / 4 % 2], b[8 + i % 4 * 2 + i / 4 % 2], 0xdd)
                    : _mm512_shuffle_i32x4(b[i % 4 * 2 + i / 4 % 2], b[8 + i % 4 * 2 + i / 4 % 2], 0x88);
  EACH _mm512_storeu_si512((char*)to + i * to_stride, a[i]);
#undef EACH
#else
  i32 turned[16][16];
  for (int r = 0; r < 16; ++r)
    for (int c = 0; c < 16; ++c) __builtin_memcpy(&turned[c][r], (const char*)from + r * stride + 4 * c, 4);
  for (int r = 0; r < 16; ++r) __builtin_memcpy((char*)to + r * to_stride, turned[r], 64);
#endif
}
#endif

// A panel's outputs: what they are a multiple of, also where they are columns of the weight, and the most.
enum { TILE_SIDE = 32, SIDE_ACROSS = 128, MOST_OUTPUTS = 384 };

// The weight as tiles that rows of bfloat16 meet (cpu_linear_tiles.h): whole groups of codes are decoded in registers and
// turned 16 x 16 pairs at a time, 0.14 ns for a number of nf4; what is left of a row, number by number.

#if BFLOAT16_TILES
enum { TILE_NUMBERS = TILE_SIDE * TILE_ROWS, DEPTH = 256 };

#if (defined(TABLE_IN_REGISTERS) || defined(BYTE_PLANES)) && defined(__AVX512BF16__)
enum { WHOLE_GROUPS = 1 };

// Two floats of each lane as bfloat16. Subnormal ones come out as zeros, which a tile takes them for anyway.
static inline __m512i join(Floats low, Floats high) { return (__m512i)_mm512_cvtne2ps_pbh((__m512)high, (__m512)low); }

#ifdef TABLE_IN_REGISTERS
// Lane l of joined vector p has columns 8 l + 2 p and the one after it: row 4 (l % 4) + p of tile l / 4.
enum { JOINED = 4, ROWS_BETWEEN = 4 };
static inline void decode_pairs(const u8* codes, const float* factors, const float* centers, const Totals<1>& all, const Lanes& lanes,
                                const Levels& levels, __m512i (&pairs)[JOINED]) {
  static const struct Order {
    alignas(64) u16 of[32];
    constexpr Order() : of() { for (int i = 0; i < 32; ++i) of[i] = (u16)(i / 2 + i % 2 * 16); }
  } order;
  Floats w[VECTORS];
  decode_group(codes, levels, w);
#pragma GCC unroll 8
  for (int v = 0; v < VECTORS; ++v) {
    w[v] *= PER == BLOCK ? for_lanes(factors, lanes, v) : all.factor;
    if (Code::CENTERED) w[v] += PER == BLOCK ? for_lanes(centers, lanes, v) : all.center;
  }
#pragma GCC unroll 4
  for (int p = 0; p < JOINED; ++p) pairs[p] = _mm512_permutexvar_epi16(_mm512_load_si512(order.of), join(w[2 * p], w[2 * p + 1]));
}
#else
// Joined vector p has columns 32 p to 32 p + 31, as tile p.
enum { JOINED = 2, ROWS_BETWEEN = 1 };
static inline void decode_pairs(const u8* codes, const float* factors, const float* centers, const Totals<1>& all, const Lanes& lanes,
                                const Levels& levels, __m512i (&pairs)[JOINED]) {
  alignas(64) float x[GROUP];
  Floats w[VECTORS];
  decode_in_order(codes, levels, x);
#pragma GCC unroll 4
  for (int v = 0; v < VECTORS; ++v) {
    const int span = (lanes.offset + v * LANES) / SPAN;
    w[v] = load(x + v * LANES) * (PER == BLOCK ? broadcast(factors + span) : all.factor);
    if (Code::CENTERED) w[v] += PER == BLOCK ? broadcast(centers + span) : all.center;
  }
#pragma GCC unroll 2
  for (int p = 0; p < JOINED; ++p) pairs[p] = join(w[2 * p], w[2 * p + 1]);
}
#endif

// Whole groups of 16 outputs to tiles; `outs` of them are there. Their rows begin with a group.
static void decode_groups(const Job* job, const Levels& levels, i64 at, i64 outs, i64 from, i64 groups, bfloat16* to) {
  alignas(64) __m512i staged[DEPTH / GROUP][JOINED][TILE_ROWS];
  for (i64 o = 0; o < TILE_ROWS; ++o) {
    const Row row = find_row(job, at + (o < outs ? o : 0));
    const Lanes lanes = find_lanes(row);
    Factors factors;
    find_factors(job->parts, row, from, from + groups * GROUP, factors);
    Totals<1> all = {};
    if (PER != BLOCK) all.factor = fill(factor_at<Code>(job->parts, row.factor)), all.center = fill(center_at<Code>(job->parts, row.factor));
    const u8 *codes = row.codes + from / 8 * CODE_BITS, *ahead = codes + TILE_ROWS * (job->columns * CODE_BITS / 8);
    for (i64 byte = 0; byte < groups * GROUP_BYTES; byte += 64) __builtin_prefetch(ahead + byte);
    for (i64 g = 0; g < groups; ++g, codes += GROUP_BYTES) {
      __m512i pairs[JOINED];
      decode_pairs(codes, factors.factor + g * SPANS, factors.center + (Code::CENTERED ? g * SPANS : 0), all, lanes, levels, pairs);
#pragma GCC unroll 4
      for (int p = 0; p < JOINED; ++p) staged[g][p][o] = pairs[p];
    }
  }
  enum { TILE_OF = ROWS_BETWEEN == 1 ? TILE_NUMBERS : TILE_SIDE };
  for (i64 g = 0; g < groups; ++g, to += GROUP * TILE_ROWS)
    for (int p = 0; p < JOINED; ++p) turn(staged[g][p], TILE_BYTES, to + p * TILE_OF, ROWS_BETWEEN * TILE_BYTES);
}

// Whole groups of a row of the weight in order, from a multiple of GROUP on. The row begins with a group.
static void decode_line(const Job* job, const Levels& levels, i64 number, i64 from, i64 groups, bfloat16* to) {
  const Row row = find_row(job, number);
  const i64 offset = row.start % SPAN;
  Factors factors;
  find_factors(job->parts, row, from, from + groups * GROUP, factors);
  const float all = PER == BLOCK ? 0.0f : factor_at<Code>(job->parts, row.factor), center = center_at<Code>(job->parts, row.factor);
  const u8* codes = row.codes + from / 8 * CODE_BITS;
  for (i64 g = 0; g < groups; ++g, codes += GROUP_BYTES, to += GROUP) {
    alignas(64) float x[GROUP];
    decode_in_order(codes, levels, x);
#pragma GCC unroll 4
    for (int i = 0; i < GROUP; i += 2 * LANES) {
      const i64 span0 = (offset + i) / SPAN + g * SPANS, span1 = (offset + i + LANES) / SPAN + g * SPANS;
      Floats low = load(x + i) * broadcast(PER == BLOCK ? factors.factor + span0 : &all);
      Floats high = load(x + i + LANES) * broadcast(PER == BLOCK ? factors.factor + span1 : &all);
      if (Code::CENTERED) low += broadcast(PER == BLOCK ? factors.center + span0 : &center);
      if (Code::CENTERED) high += broadcast(PER == BLOCK ? factors.center + span1 : &center);
      _mm512_storeu_si512(to + i, join(low, high));
    }
  }
}
#else
enum { WHOLE_GROUPS = 0 };
static void decode_groups(const Job*, const Levels&, i64, i64, i64, i64, bfloat16*) {}
static void decode_line(const Job*, const Levels&, i64, i64, i64, bfloat16*) {}
#endif

// Columns [from, to) of up to 16 outputs, fewer than DEPTH, to tiles that zeros fill up.
static void decode_rest(const Job* job, const Levels& levels, i64 at, i64 outs, i64 from, i64 to, bfloat16* tiles) {
  alignas(64) bfloat16 numbers[TILE_ROWS][DEPTH] = {};
  for (i64 o = 0; o < outs; ++o) {
    const Row row = find_row(job, at + o);
    decode_elements(job->parts, row, levels, row.phase + from, row.phase + to, numbers[o]);
  }
  for (i64 k = 0; k < to - from; k += TILE_SIDE) turn(numbers[0] + k, sizeof numbers[0], tiles + k * TILE_ROWS, TILE_BYTES);
}

// Columns [from, to) of outputs [at, at + outs) to tiles. Places of outputs that there are not may hold anything.
static void decode_tiles(const Job* job, const Levels& levels, i64 at, i64 outs, i64 from, i64 to, bfloat16* tiles) {
  const bool in_groups = WHOLE_GROUPS && (PER == ROW || job->columns % ALIGNMENT == 0);
  const i64 groups = in_groups ? (to - from) / GROUP : 0, rest = from + groups * GROUP;
  for (i64 o = 0; o < outs; o += TILE_ROWS, tiles += DEPTH * TILE_ROWS) {
    const i64 some = outs - o < TILE_ROWS ? outs - o : TILE_ROWS;
    if (groups) decode_groups(job, levels, at + o, some, from, groups, tiles);
    if (rest < to) decode_rest(job, levels, at + o, some, rest, to, tiles + (rest - from) * TILE_ROWS);
  }
}

// Columns [at, at + outs) of rows [from, to) of the weight to tiles: pairs are of two rows, one above the other.
static void decode_across(const Job* job, const Levels& levels, i64 at, i64 outs, i64 from, i64 to, bfloat16* tiles) {
  const bool in_groups = WHOLE_GROUPS && (PER == ROW || job->columns % ALIGNMENT == 0) && at % GROUP == 0;
  const i64 groups = in_groups ? outs / GROUP : 0, rest = groups * GROUP;
  alignas(64) bfloat16 numbers[2][MOST_OUTPUTS + TILE_ROWS] = {};
  for (i64 k = from; (k - from) % TILE_SIDE || k < to; k += 2) {
    for (int i = 0; i < 2; ++i) {
      if (k + i >= to) {
        __builtin_memset(numbers[i], 0, sizeof numbers[i]);
        continue;
      }
      if (groups) decode_line(job, levels, k + i, at, groups, numbers[i]);
      const Row row = find_row(job, k + i);
      if (rest < outs) decode_elements(job->parts, row, levels, row.phase + at + rest, row.phase + at + outs, numbers[i] + rest);
    }
    bfloat16* pairs = tiles + (k - from) / TILE_SIDE * TILE_NUMBERS + (k - from) % TILE_SIDE / 2 * TILE_SIDE;
    for (i64 o = 0; o < outs; o += TILE_ROWS, pairs += DEPTH * TILE_ROWS) {
      u32 joined[TILE_ROWS];
      for (int c = 0; c < TILE_ROWS; ++c) joined[c] = numbers[0][o + c].bits | (u32)numbers[1][o + c].bits << 16;
      __builtin_memcpy(pairs, joined, TILE_BYTES);
    }
  }
}
#endif

// Many rows of bfloat16 times a weight where the processor has a matrix unit (cpu_tiles.h). torch multiplies
// panels by it too, but packs x and each panel on every call: with nf4, 512 rows by 4096 x 4096 take 36 ms so on a
// thread of an Emerald Rapids, and 22 here, as much as with a dense weight. Of these, 3.4 are for decoding, 5 for copying x.
//
// Rows of x are copied, 32 at a time, but stay as they are (tile A). The weight is decoded to what they meet (tile B), some
// outputs and DEPTH of its columns at a time, so that it stays in the caches; so do the sums of these outputs with all rows
// of x, or many of them, which are added to once for each DEPTH.

#if BFLOAT16_TILES
// What a call is about, and what each of its workers has in the job's room.
struct TileWork {
  const Job* job;
  i64 stride;  // from a row of x to the next one
  i64 rows;    // of x at a time
  i64 panel;   // outputs at a time, a multiple of `side`
  bool across; // whether outputs are columns of the weight: of a gradient

  void take(Slice slice) const;
};

struct TileRoom {
  float* sums;        // of each 16 rows and 16 outputs in turn, together
  bfloat16* weights;  // of each 16 outputs and 32 columns in turn, together
};

// How many numbers a row of x has, and one of y.
static inline i64 depth_of(const TileWork& work) { return work.across ? work.job->rows : work.job->columns; }
static inline i64 outputs_of(const TileWork& work) { return work.across ? work.job->columns : work.job->rows; }

static inline i64 tiles_of(i64 rows) { return (rows + TILE_ROWS - 1) / TILE_ROWS; }

// In floats.
static i64 tile_room(i64 rows, i64 panel) { return (tiles_of(rows) * TILE_ROWS + DEPTH / 2) * panel + TILE_ROWS; }

static TileRoom find_tile_room(const TileWork& work, i64 worker) {
  float* room = work.job->room + worker * tile_room(work.rows, work.panel);
  room += (64 - (unsigned long long)room % 64) / 4 % 16;
  return {room, (bfloat16*)(room + tiles_of(work.rows) * TILE_ROWS * work.panel)};
}

// ---- products

// Sums are in tiles 0 to 3, x in 4 and 5, the weight in 6 and 7.
static void set_up_products() {
  u8 rows[TILE_COUNT];
  for (u8& each : rows) each = TILE_ROWS;
  set_up_tiles(rows);
}

// Columns [from, to) of up to 16 rows of x to tiles that zeros fill up. In x itself, rows of 4096 numbers have all of their
// lines in one place of the first cache.
static void copy_rows(const TileWork& work, i64 first, i64 from, i64 to, bfloat16* tiles) {
  for (i64 r = 0; r < TILE_ROWS; ++r) {
    const bool there = first + r < work.job->inputs;
    const bfloat16* x = work.job->x + (first + r) * work.stride;
    for (i64 k = from; k < to; k += TILE_SIDE) {
      bfloat16* piece = tiles + (k - from) * TILE_ROWS + r * TILE_SIDE;
      if (there && k + TILE_SIDE <= to) {
        __builtin_memcpy(piece, x + k, TILE_BYTES);
        continue;
      }
      __builtin_memset(piece, 0, TILE_BYTES);
      if (there) __builtin_memcpy(piece, x + k, (to - k) * sizeof *x);
    }
  }
}

// Adds to the sums of 32 outputs with 16 ROWS of x. Those of the second 16 are `next` floats further on.
template <int ROWS>
static void add_products(bool begin, const bfloat16* x, const bfloat16* w, i64 count, float* sums, i64 next) {
  if (begin) {
    tile_zero<0>(), tile_zero<1>();
    if (ROWS == 2) tile_zero<2>(), tile_zero<3>();
  } else {
    tile_load<0>(sums, TILE_BYTES), tile_load<1>(sums + 256, TILE_BYTES);
    if (ROWS == 2) tile_load<2>(sums + next, TILE_BYTES), tile_load<3>(sums + next + 256, TILE_BYTES);
  }
  for (; count > 0; --count, x += TILE_NUMBERS, w += TILE_NUMBERS) {
    tile_load<4>(x, TILE_BYTES);
    tile_load<6>(w, TILE_BYTES);
    tile_add_pairs<0, 4, 6>();
    tile_load<7>(w + DEPTH * TILE_ROWS, TILE_BYTES);
    tile_add_pairs<1, 4, 7>();
    if (ROWS == 1) continue;
    tile_load<5>(x + DEPTH * TILE_ROWS, TILE_BYTES);
    tile_add_pairs<2, 5, 6>();
    tile_add_pairs<3, 5, 7>();
  }
  tile_store<0>(sums, TILE_BYTES), tile_store<1>(sums + 256, TILE_BYTES);
  if (ROWS == 2) tile_store<2>(sums + next, TILE_BYTES), tile_store<3>(sums + next + 256, TILE_BYTES);
}

// Sums of `rows` rows of x and outputs [at, at + outs), plus bias, to y: row by row, so that lines are written whole.
static void finish_tiles(const TileWork& work, i64 first, i64 rows, i64 at, i64 outs, const TileRoom& room) {
  const Job* job = work.job;
  float* bias = (float*)room.weights;  // which are not needed any more
  for (i64 o = 0; o < outs; ++o) bias[o] = job->bias ? to_float(job->bias[at + o]) : 0.0f;
  for (i64 row = 0; row < rows; ++row) {
    const float* sums = room.sums + row / TILE_ROWS * work.panel * TILE_ROWS + row % TILE_ROWS * TILE_ROWS;
    bfloat16* y = job->y + (first + row) * outputs_of(work) + at;
    for (i64 o = 0; o < outs; o += TILE_ROWS) {
      bfloat16 results[TILE_ROWS];
      for (int i = 0; i < TILE_ROWS; ++i) from_float(sums[o * TILE_ROWS + i] + bias[o + i], results[i]);
      __builtin_memcpy(y + o, results, (outs - o < TILE_ROWS ? outs - o : TILE_ROWS) * sizeof *y);
    }
  }
}

// Asks for a part of the next 32 rows of x while others are multiplied: part `o` of `outs` outputs.
static inline void ask_for_rows(const TileWork& work, i64 first, i64 from, i64 to, i64 o, i64 outs) {
  const i64 pieces = (outs + TILE_SIDE - 1) / TILE_SIDE, part = o / TILE_SIDE, inputs = work.job->inputs;
  const i64 begin = first + 2 * TILE_ROWS * part / pieces, end = first + 2 * TILE_ROWS * (part + 1) / pieces;
  for (i64 r = begin; r < end && r < inputs; ++r)
    for (i64 k = from; k < to; k += TILE_SIDE) __builtin_prefetch(work.job->x + r * work.stride + k);
}

// Outputs [at, at + outs), a panel at most, of `rows` rows of x, those from `first` on.
static void multiply_panel(const TileWork& work, const Levels& levels, i64 first, i64 rows, i64 at, i64 outs, const TileRoom& room) {
  const i64 depth = depth_of(work), next = work.panel * TILE_ROWS;
  alignas(64) bfloat16 x[2 * TILE_ROWS * DEPTH];
  for (i64 from = 0; from < depth; from += DEPTH) {
    const i64 to = from + DEPTH < depth ? from + DEPTH : depth, count = (to - from + TILE_SIDE - 1) / TILE_SIDE;
    (work.across ? decode_across : decode_tiles)(work.job, levels, at, outs, from, to, room.weights);
    for (i64 row = 0; row < rows; row += 2 * TILE_ROWS) {
      const bool both = row + TILE_ROWS < rows;
      copy_rows(work, first + row, from, to, x);
      if (both) copy_rows(work, first + row + TILE_ROWS, from, to, x + TILE_ROWS * DEPTH);
      for (i64 o = 0; o < outs; o += TILE_SIDE) {
        ask_for_rows(work, first + row + 2 * TILE_ROWS, from, to, o, outs);
        float* sums = room.sums + row * work.panel + o * TILE_ROWS;
        if (both) add_products<2>(from == 0, x, room.weights + o * DEPTH, count, sums, next);
        else add_products<1>(from == 0, x, room.weights + o * DEPTH, count, sums, next);
      }
    }
  }
  finish_tiles(work, first, rows, at, outs, room);
}

static void multiply_slice(const TileWork& work, const TileRoom& room, i64 begin, i64 end) {
  const Levels levels = load_levels(work.job->parts.tables);
  const i64 inputs = work.job->inputs;
  set_up_products();
  for (i64 first = 0; first < inputs; first += work.rows)
    for (i64 at = begin; at < end; at += work.panel)
      multiply_panel(work, levels, first, inputs - first < work.rows ? inputs - first : work.rows, at, end - at < work.panel ? end - at : work.panel, room);
  give_up_tiles();
}

inline void TileWork::take(Slice slice) const {
  const i64 outputs = outputs_of(*this), side = across ? (i64)SIDE_ACROSS : (i64)TILE_SIDE, pieces = (outputs + side - 1) / side;
  const i64 begin = slice.first_of(pieces) * side, end = slice.last_of(pieces) * side;
  if (begin < end) multiply_slice(*this, find_tile_room(*this, slice.worker), begin, end < outputs ? end : outputs);
}
#endif

// The product of one row of bfloat16 numbers with 4-bit codes, by instructions that multiply pairs of
// them: half as many permutes and shifts as with floats. A level is the sum of two bfloat16, which has 16
// bits of it or more: less is lost than 1 / 200 of a rounding of the result. Instructions for pairs take
// subnormal numbers for zero, and zero times infinity would be NaN where an infinite number meets a level
// that one bfloat16 is enough for: rows with such numbers are multiplied as floats.

#if CODE_BITS == 4 && defined(TABLE_IN_REGISTERS) && defined(__AVX512BF16__)
#define PAIRS

// The levels, twice: of a word's last five bits, that is what an index counts, one is of the next code.
struct PairLevels {
  __m512i high, low;
};

static inline PairLevels load_pair_levels(const Tables* tables) {
  alignas(64) bfloat16 high[32], low[32];
  for (int i = 0; i < 32; ++i) {
    from_float(tables->levels[i % 16], high[i]);
    from_float(tables->levels[i % 16] - to_float(high[i]), low[i]);
  }
  return {_mm512_load_si512(high), _mm512_load_si512(low)};
}

// The row of x in the order of the codes: word w of a group's 64 bytes, shifted down by 4 v bits, is the
// code of its element v ^ 1.
static void lay_out_pairs(const Job* job, i64 input, bfloat16* to) {
  const bfloat16* x = job->x + input * job->columns;
  for (i64 group = 0; group < job->columns; group += GROUP)
    for (int v = 0; v < 4; ++v)
      for (int word = 0; word < 32; ++word) to[group + v * 32 + word] = x[group + word * 4 + (v ^ 1)];
}

static inline Floats multiply_pairs(Floats sum, __m512i levels, __m512i x) {
  return (Floats)_mm512_dpbf16_ps((__m512)sum, (__m512bh)levels, (__m512bh)x);
}

static inline __attribute__((always_inline)) Floats pair_products(const u8* codes, const bfloat16* x, const PairLevels& levels) {
  const __m512i words = _mm512_loadu_si512(codes);
  Floats high = {}, low = {};
#pragma GCC unroll 4
  for (int v = 0; v < 4; ++v) {
    const __m512i index = _mm512_srli_epi16(words, 4 * v), numbers = _mm512_loadu_si512(x + v * 32);
    high = multiply_pairs(high, _mm512_permutexvar_epi16(index, levels.high), numbers);
    low = multiply_pairs(low, _mm512_permutexvar_epi16(index, levels.low), numbers);
  }
  return high + low;
}

// Rows [first, last) of the weight times a row of x.
static void multiply_in_pairs(const Job* job, i64 input, i64 first, i64 last) {
  const PairLevels levels = load_pair_levels(job->parts.tables);
  const i64 columns = job->columns;
  const Lanes lanes = find_lanes(find_row(job, first));  // groups begin with a span: all rows have the same
  for (; first < last; ++first) {
    const Row row = find_row(job, first);
    Floats factor = PER == BLOCK ? Floats{} : fill(factor_at<Code>(job->parts, row.factor)), sum = {};
    for (i64 tile = 0; tile < columns; tile += TILE) {
      const i64 end = tile + TILE < columns ? tile + TILE : columns;
      Factors factors;
      find_factors(job->parts, row, tile, end, factors);
      const float* of_spans = factors.factor;
      for (i64 group = tile; group < end; group += GROUP, of_spans += SPANS) {
        const u8* codes = row.codes + group / 2;
        ask_ahead(codes);
        if (PER == BLOCK) factor = for_lanes(of_spans, lanes, 0);
        sum = multiply_add(pair_products(codes, (const bfloat16*)job->room + group, levels), factor, sum);
      }
    }
    const float all = job->bias ? sum_of(sum) + to_float(job->bias[first]) : sum_of(sum);
    from_float(all, job->y[input * job->rows + first]);
  }
}

// Where each row of the weight is made of whole groups, and there is nothing but a factor.
static bool in_pairs(const Job* job, i64 input) {
  if (Code::CENTERED || job->columns % GROUP) return false;
  const bfloat16* x = job->x + input * job->columns;
  u32 strange = 0;
  for (i64 i = 0; i < job->columns; ++i) {
    const u32 exponent = x[i].bits & 0x7f80u, rest = x[i].bits & 0x7fu;
    strange |= exponent == 0x7f80u || (exponent == 0 && rest != 0);
  }
  return !strange;
}

#endif

// Levels as 16-bit integers. With AVX-512, where pairs of bfloat16 are slow: of 4-bit codes, by permutes of words. With
// AVX2: of codes of up to 4 bits by two tables of bytes, 10 shuffles for 64 of them where floats take 26; of 8-bit codes
// that are whole numbers, with a sign, as they are.
//
// A level is off by less than bfloat16 would have it: nf4's by 2**-12.5 of themselves. Of a result in bfloat16 that is 1 / 60
// of a rounding with normal weights and x, 1 / 8 in rows of 16384 x of one sign; a whole one in the worst case that was
// found, x of one sign and weights that are small next to an outlier in each block, where x is 0.

#if defined(EIGHT_LANES) && (CODE_BITS <= 4 || CODE_BITS == 8)
#define FIXED_POINT
typedef __m256i Words;
#elif CODE_BITS == 4 && defined(TABLE_IN_REGISTERS) && defined(__AVX512VNNI__) && defined(SLOW_PAIRS)
#define FIXED_POINT
typedef __m512i Words;
#endif

#ifdef FIXED_POINT
typedef short i16;
enum { LEVEL_MOST = 32767, WORDS = 2 * LANES };

static inline bool in_range(float x) { return x < 0x1p60f && x >= 0x1p-60f; }

static inline float largest_of(const float* levels) {
  float largest = 0.0f;
  for (int i = 0; i < 1 << CODE_BITS; ++i) {
    const float size = __builtin_fabsf(levels[i]);
    if (!(size <= largest)) largest = size;  // also NaN, which stays
    if (largest != largest) break;
  }
  return largest;
}

#if CODE_BITS == 8

struct FixedLevels {
  float unit;  // the level of 1
};

static inline FixedLevels load_fixed_levels(const float* levels) { return {levels[1]}; }

// Whether the levels are multiples of one number, as often as codes say.
static inline bool are_fixed(const float* levels) {
  const float unit = levels[1];
  bool are = unit > 0x1p-60f;
  for (int i = 0; i < 256; ++i) are &= __builtin_fabsf(levels[i] - (i8)i * unit) <= 0x1p-22f * __builtin_fabsf(levels[i]);
  return are && SPANS == 1;
}

static constexpr int fixed_element(int v, int w) { return v * 16 + w; }
static inline int first_of_sum(int) { return 0; }

static inline void decode_fixed(const u8* codes, const FixedLevels&, __m256i (&w)[4]) {
#pragma GCC unroll 4
  for (int v = 0; v < 4; ++v) w[v] = _mm256_cvtepi8_epi16(_mm_loadu_si128((const __m128i*)codes + v));
}

#else

// How far integers of levels are off. Where x is of one sign, that of all of them adds up: so the mean counts more.
static inline float loss_of(const float* levels, float inverse) {
  enum { COUNT = 1 << CODE_BITS, MEAN_COUNTS = 4 };
  float sum = 0.0f, squares = 0.0f;
  for (int i = 0; i < COUNT; ++i) {
    const float scaled = levels[i] * inverse, lost = scaled - __builtin_rintf(scaled);
    sum += lost, squares += lost * lost;
  }
  return (__builtin_fabsf(sum) / COUNT * MEAN_COUNTS + root(squares / COUNT)) / inverse;
}

// What levels are multiplied by: a power of 2, or what makes an integer of the largest one; whichever loses least.
static inline float fixed_scale(const float* levels) {
  enum { TRIED = 64, STEP_DOWN = 37 };  // the last of them costs 7 % of what integers tell apart
  const float largest = largest_of(levels);
  float best = float_of((254 + 14 - (bits_of(largest) >> 23)) << 23);  // the largest is 2**14 of them, or more
  if (best * largest > LEVEL_MOST) best /= 2.0f;
  float least = loss_of(levels, best);
  for (int i = 0; i < TRIED; ++i) {
    const float inverse = (LEVEL_MOST - i * STEP_DOWN) / largest, loss = loss_of(levels, inverse);
    if (loss < least) least = loss, best = inverse;
  }
  return best;
}

// Whether each level is kept better than bfloat16 would.
static inline bool are_fixed(const float* levels) {
  if (!in_range(largest_of(levels))) return false;
  const float inverse = fixed_scale(levels);
  bool are = true;
  for (int i = 0; i < 1 << CODE_BITS; ++i) {
    const float scaled = levels[i] * inverse;
    are &= __builtin_fabsf(scaled - __builtin_rintf(scaled)) <= 0x1p-10f * __builtin_fabsf(scaled);
  }
  return are;
}

#ifdef EIGHT_LANES

struct FixedLevels {
  __m256i low, high;  // the bytes of their integers
  float unit;         // the level of 1
};

static inline FixedLevels load_fixed_levels(const float* levels) {
  const float inverse = fixed_scale(levels);
  alignas(16) u8 low[16] = {}, high[16] = {};
  for (int i = 0; i < 1 << CODE_BITS; ++i) {
    const int level = (int)__builtin_rintf(levels[i] * inverse);
    low[i] = (u8)level, high[i] = (u8)(level >> 8);
  }
  return {load_twice(low), load_twice(high), 1.0f / inverse};
}

// Of 4-bit codes in wide blocks, bytes stay where they are in memory; else they are ordered as in `load_pairs`.
enum { IN_PLACE = CODE_BITS == 4 && SPAN >= GROUP / 2 };

// The element of a group whose integer is number w of vector v.
static constexpr int fixed_element(int v, int w) {
  const int half = w / 8, byte = v % 2 * 8 + w % 8, of_pair = v / 2;
  if (IN_PLACE) return half * 32 + byte * 2 + of_pair;
  return (half * 4 + byte % 4) * 8 + byte / 4 * 2 + of_pair;
}

// A sum of products is made of elements from here on, 32 or 16.
static inline int first_of_sum(int lane) { return lane / 4 * 32 + (IN_PLACE ? 0 : lane % 2 * 16); }

// The integers of a group's levels, in the order of `fixed_element`.
static inline void decode_fixed(const u8* codes, const FixedLevels& levels, __m256i (&w)[4]) {
  const __m256i pairs = IN_PLACE ? _mm256_loadu_si256((const __m256i*)codes) : load_pairs(codes), one = _mm256_set1_epi8((1 << CODE_BITS) - 1);
  const __m256i index[2] = {_mm256_and_si256(_mm256_srli_epi16(pairs, CODE_BITS), one), _mm256_and_si256(pairs, one)};
#pragma GCC unroll 2
  for (int i = 0; i < 2; ++i) {
    const __m256i low = _mm256_shuffle_epi8(levels.low, index[i]), high = _mm256_shuffle_epi8(levels.high, index[i]);
    w[2 * i] = _mm256_unpacklo_epi8(low, high), w[2 * i + 1] = _mm256_unpackhi_epi8(low, high);
  }
}

#else

// By permutes of words, where a word of the codes has four of them. Each index ends with a bit of the next code: the table
// is there twice.
struct FixedLevels {
  __m512i words;
  float unit;  // the level of 1
};

static inline FixedLevels load_fixed_levels(const float* levels) {
  const float inverse = fixed_scale(levels);
  alignas(64) i16 words[WORDS];
  for (int i = 0; i < WORDS; ++i) words[i] = (i16)(int)__builtin_rintf(levels[i % (1 << CODE_BITS)] * inverse);
  return {_mm512_load_si512(words), 1.0f / inverse};
}

// The element of a group whose integer is number w of vector v.
static constexpr int fixed_element(int v, int w) { return w * 4 + (v ^ 1); }

// A sum of products is made of 8 elements from here on.
static inline int first_of_sum(int lane) { return lane * 8; }

// The integers of a group's levels, in the order of `fixed_element`.
static inline void decode_fixed(const u8* codes, const FixedLevels& levels, __m512i (&w)[4]) {
  const __m512i words = _mm512_loadu_si512(codes);
#pragma GCC unroll 4
  for (int v = 0; v < 4; ++v) w[v] = _mm512_permutexvar_epi16(_mm512_srli_epi16(words, 4 * v), levels.words);
}

#endif
#endif
#endif

// Products of rows of x with levels that are integers (cpu_linear_integers.h), by products of 16 bits: an instruction of
// AVX2 multiplies 16 pairs. A row of bfloat16 and a 4096 x 4096 weight of nf4 take 0.75 ms on a thread of a
// Zen 3, and 1.5 as floats; four rows 1.9 and 2.9. With AVX-512 on an Intel processor, where an instruction for pairs of
// bfloat16 takes as long as two others, they take 0.9 ms on an Emerald Rapids, and 1.8 in such pairs (cpu_linear_pairs.h).
//
// x is made of integers too, with a power of 2 of its own for each group. What it would lose by that goes into second
// integers, which are multiplied only where they matter: in bfloat16, next to outliers. A group that loses more than
// a few of its numbers even so is multiplied as floats, and so are those with numbers that are not finite or of a size
// beyond in_range.

#ifdef FIXED_POINT

enum { FIXED_ROWS = 32, FIXED_AT_ONCE = 4 };  // rows of x that are laid out at a time, and multiplied
enum { X_BITS = 14 };                         // of x: its products with four pairs of levels fit into 31 bits
// A number is lost that is off by more than this part of itself: one of bfloat16 is as good as exact, of others as good as
// in a sum of floats. One of so many may be, among those that are not zero and share a scale: a normal distribution
// has fewer, near zero. The others are larger, so that these count little: but not if the largest alone were kept,
// which a weight may leave out, or in a block whose scale makes little of what is kept in another.
static constexpr float bearable_loss(const bfloat16*) { return 0x1p-12f; }
static constexpr float bearable_loss(const void*) { return 0x1p-20f; }
enum { KEPT_FOR_LOST = 16 };

// Where they lie in the job's room: for each FIXED_AT_ONCE rows, group by group.
struct Fixed {
  i64* rows;           // how many there are
  i16 *high, *second;  // integers, and those of what these leave, in units of 2**-X_BITS
  float* unit;         // what 1 stands for, of x times a level
  u8* both;            // whether second integers are needed
};

static inline i64 groups_of(i64 columns) { return columns / GROUP; }

// Rows that there is room for.
static inline i64 fixed_rows(i64 inputs) {
  return inputs < FIXED_ROWS ? (inputs + FIXED_AT_ONCE - 1) / FIXED_AT_ONCE * FIXED_AT_ONCE : (i64)FIXED_ROWS;
}

static inline i64 room_for_fixed(i64 columns, i64 inputs) {
  return 16 + fixed_rows(inputs) * (columns + 2 * groups_of(columns));
}

static inline Fixed find_fixed(const Job* job) {
  const i64 numbers = fixed_rows(job->inputs) * job->columns, groups = numbers / GROUP;
  i16* high = (i16*)(job->room + 16);
  float* unit = (float*)(high + 2 * numbers);
  return {(i64*)job->room, high, high + numbers, unit, (u8*)(unit + groups)};
}

// The bits of the largest magnitude of a group; those of something not finite, if there is any.
static inline u32 largest_bits(const float* x) {
  u32 largest = 0;
  for (int i = 0; i < GROUP; ++i) {
    const u32 size = bits_of(x[i]) & 0x7fffffffu;
    largest = size > largest ? size : largest;
  }
  return largest;
}

static inline Floats size_of(Floats x) { return (Floats)((Ints)x & 0x7fffffff); }

static inline void put_fixed(const float* integers, i16* to) {
  i16 in_order[GROUP];
  for (int i = 0; i < GROUP; ++i) in_order[i] = (i16)(i32)integers[i];
#pragma GCC unroll 128
  for (int i = 0; i < GROUP; ++i) to[i] = in_order[fixed_element(i / WORDS, i % WORDS)];
}

// Which lanes are lost, as -1.
static inline Ints are_lost(Floats left, Floats x) { return (Ints)(size_of(left) > size_of(x) * bearable_loss((const Number*)0)); }

static inline int count_of(Ints lost) {
  int count = 0;
  for (int l = 0; l < LANES; ++l) count -= lost[l];
  return count;
}

// A group of a row; false where it must not be rounded. `both` is set where its second integers are needed.
static bool fix_group(const Number* from, float level, i16* high, i16* second, float& unit, u8& both) {
  alignas(64) float x[GROUP], first[GROUP], then[GROUP];
  for (int i = 0; i < GROUP; ++i) x[i] = to_float(from[i]);
  const u32 largest = largest_bits(x), exponent = largest >> 23;
  __builtin_memset(high, 0, GROUP * sizeof *high);
  __builtin_memset(second, 0, GROUP * sizeof *second);
  unit = 0.0f;
  if (!in_range(float_of(largest))) return largest == 0;
  const float step = float_of((exponent + 1 - X_BITS) << 23);  // x is smaller than 2**X_BITS of them
  const float inverse = float_of((254 + X_BITS - 1 - exponent) << 23), finer = 1 << X_BITS;
  unit = step * level;
  bool good = true, good_then = true;
  for (int start = 0; start < GROUP; start += SPAN) {
    Ints there = {}, lost = {}, lost_then = {};
    for (int i = start; i < start + SPAN; i += LANES) {  // not in units, which may be too large for a number to be seen
      const Floats number = load(x + i), integers = round_all(number * inverse), left = number - integers * step;
      const Floats more = round_all(left * inverse * finer);
      store(integers, first + i), store(more, then + i);
      there += (Ints)(size_of(number) > 0.0f);
      lost += are_lost(left, number), lost_then += are_lost(left - more * (step / finer), number);
    }
    const int most = count_of(there) / KEPT_FOR_LOST;
    good &= count_of(lost) <= most, good_then &= count_of(lost_then) <= most;
  }
  put_fixed(first, high);
  if (good) return true;
  put_fixed(then, second);
  both = 1;
  return good_then;
}

// Rows [first, first + M) of those that are laid out; zeros for the rows that there are not. False where one must not be.
template <int M>
static bool fix_rows(const Job* job, const Fixed& to, float level, i64 input, i64 first, i64 count) {
  const i64 groups = groups_of(job->columns);
  for (i64 group = 0; group < groups; ++group) {
    to.both[first * groups + group] = 0;
    for (i64 m = 0; m < M; ++m) {
      const i64 at = first * groups + group * M + m;
      i16 *high = to.high + at * GROUP, *second = to.second + at * GROUP;
      static const Number nothing[GROUP] = {};
      const Number* x = m < count ? job->x + (input + first + m) * job->columns + group * GROUP : nothing;
      if (!fix_group(x, level, high, second, to.unit[at], to.both[first * groups + group])) return false;
    }
  }
  return true;
}

// Calls a function for the next FIXED_AT_ONCE rows, or for what is left of them.
#define FOR_FIXED(left, function, ...) \
  ((left) == 1 ? function<1>(__VA_ARGS__) : (left) == 2 ? function<2>(__VA_ARGS__) : function<FIXED_AT_ONCE>(__VA_ARGS__))

// Each row of the weight has to be made of whole groups, with nothing but factors.
static bool can_be_fixed(const Tables* tables, i64 columns) {
  return !Code::CENTERED && columns % GROUP == 0 && are_fixed(tables->levels);
}

// Lays out rows of x from `input` on; how many.
static i64 lay_out_fixed(const Job* job, i64 input) {
  if (!can_be_fixed(job->parts.tables, job->columns)) return 0;
  const Fixed to = find_fixed(job);
  const float level = load_fixed_levels(job->parts.tables->levels).unit;
  const i64 left = job->inputs - input, most = left < FIXED_ROWS ? left : (i64)FIXED_ROWS;
  i64& rows = *to.rows;
  for (rows = 0; rows < most; rows += FIXED_AT_ONCE)
    if (!FOR_FIXED(most - rows, fix_rows, job, to, level, input, rows, most - rows)) return rows;
  return rows = most;
}

// Of two vectors of levels: four products in each sum.
static inline Ints sum_products(const Words* levels, const i16* x) {
  const Words* numbers = (const Words*)x;
#ifdef EIGHT_LANES
  return (Ints)_mm256_madd_epi16(levels[0], _mm256_loadu_si256(numbers)) + (Ints)_mm256_madd_epi16(levels[1], _mm256_loadu_si256(numbers + 1));
#else
  const __m512i one = _mm512_dpwssd_epi32(_mm512_setzero_si512(), levels[0], _mm512_loadu_si512(numbers));
  return (Ints)_mm512_dpwssd_epi32(one, levels[1], _mm512_loadu_si512(numbers + 1));
#endif
}

// Adds the products of a group with M rows of x, of which the first integers begin at `high`.
template <int M>
static inline __attribute__((always_inline)) void add_fixed(const Words (&w)[4], const i16* high, const i16* second, bool both,
                                                            const float* units, Floats factor, Floats (&sums)[M]) {
#pragma GCC unroll 4
  for (int m = 0; m < M; ++m, high += GROUP, second += GROUP) {
    Floats part = __builtin_convertvector(sum_products(w, high), Floats) + __builtin_convertvector(sum_products(w + 2, high + 2 * WORDS), Floats);
    if (both) {
      const Ints rest = sum_products(w, second) + sum_products(w + 2, second + 2 * WORDS);
      part = multiply_add(__builtin_convertvector(rest, Floats), fill(1.0f / (1 << X_BITS)), part);
    }
    sums[m] = multiply_add(part * broadcast(units + m), factor, sums[m]);
  }
}

// Then they are read where they are: 1 / 30 of the time of one row of x.
enum { SCALES_ARE_FACTORS = PER == BLOCK && Code::SCALE == FLOAT32 && (int)Code::BLOCK == (int)SPAN && (SPANS == 1 || (int)LANES == 16) };

// The factors of a group by the lanes of its sums; nothing else is read.
static inline Floats for_sums(const float* of_spans, const Lanes& lanes) {
#ifdef EIGHT_LANES
  return for_lanes(of_spans, lanes, 0);
#else
  return permute((Floats)_mm512_maskz_loadu_ps((1 << SPANS) - 1, of_spans), lanes.span);
#endif
}

// Row `number` of the weight times M of the rows that are laid out, those from `at` on.
template <int M>
static void multiply_row_fixed(const Job* job, const Fixed& fixed, const FixedLevels& levels, const Lanes& lanes, i64 input, i64 at, i64 number) {
  const i64 columns = job->columns, groups = groups_of(columns);
  const Row row = find_row(job, number);
  Floats factor = PER == BLOCK ? Floats{} : fill(factor_at<Code>(job->parts, row.factor)), sums[M] = {};
  const i16 *high = fixed.high + at * columns, *second = fixed.second + at * columns;
  const float* units = fixed.unit + at * groups;
  const u8 *codes = row.codes, *both = fixed.both + at * groups;
  for (i64 tile = 0; tile < columns; tile += TILE) {
    const i64 end = tile + TILE < columns ? tile + TILE : columns;
    Factors factors;
    const float* of_spans = factors.factor;
    if (SCALES_ARE_FACTORS) of_spans = (const float*)job->parts.scale + (row.start + tile) / SPAN;
    else find_factors(job->parts, row, tile, end, factors);
    for (i64 group = tile; group < end; group += GROUP, of_spans += SPANS) {
      Words w[4];
      ask_ahead(codes);
      decode_fixed(codes, levels, w);
      if (PER == BLOCK) factor = for_sums(of_spans, lanes);
      add_fixed<M>(w, high, second, *both, units, factor, sums);
      codes += GROUP_BYTES, high += M * GROUP, second += M * GROUP, units += M, ++both;
    }
  }
  for (int m = 0; m < M && at + m < *fixed.rows; ++m) {
    const float sum = sum_of(sums[m]);
    from_float(job->bias ? sum + to_float(job->bias[number]) : sum, job->y[(input + at + m) * job->rows + number]);
  }
}

// Rows [first, last) of the weight times the rows of x that are laid out, `input` and those after it.
static void multiply_fixed(const Job* job, i64 input, i64 first, i64 last) {
  const FixedLevels levels = load_fixed_levels(job->parts.tables->levels);
  const Fixed fixed = find_fixed(job);
  Lanes lanes = {};
  for (int l = 0; l < LANES; ++l) lanes.span[l] = first_of_sum(l) / (int)SPAN;
  for (; first < last; first += ROWS_AT_ONCE) {
    const i64 end = last - first < ROWS_AT_ONCE ? last : first + ROWS_AT_ONCE;
    for (i64 at = 0; at < *fixed.rows; at += FIXED_AT_ONCE)
      for (i64 number = first; number < end; ++number)
        FOR_FIXED(*fixed.rows - at, multiply_row_fixed, job, fixed, levels, lanes, input, at, number);
  }
}
#endif

// ---- the entries of the library, on the threads of the host process

struct Work {
  const Job* job;
  void (*run)(const Job*, i64, i64, i64);
  i64 what;

  void take(Slice slice) const {
    const i64 first = slice.first_of(job->rows), last = slice.last_of(job->rows);
    if (first < last) run(job, what, first, last);
  }
};

static void run(const Work& work, i64 threads, Parallel parallel) { run_in_slices(work, threads * SLICES_PER_THREAD, threads, parallel); }

template <int M>
static void multiply_inputs(const Job* job, i64 input, i64 threads, Parallel parallel) {
  for (i64 phase = 0; phase < ALIGNMENT; phase += phase_step(job->columns)) lay_out<M>(job, input, phase, laid_out(job, phase));
  run({job, multiply<M>, input}, threads, parallel);
}

// Multiplies some rows of x, from `input` on; how many.
static i64 multiply_some(const Job* job, i64 input, i64 threads, Parallel parallel) {
  const i64 left = job->inputs - input;
#ifdef FIXED_POINT
  if (const i64 rows = lay_out_fixed(job, input)) {
    run({job, multiply_fixed, input}, threads, parallel);
    return rows;
  }
#endif
#ifdef PAIRS
  if (left == 1 && in_pairs(job, input)) {
    lay_out_pairs(job, input, (bfloat16*)job->room);
    run({job, multiply_in_pairs, input}, threads, parallel);
    return left;
  }
#endif
  if (left == 1) multiply_inputs<1>(job, input, threads, parallel);
  else if (left == 2) multiply_inputs<2>(job, input, threads, parallel);
  else multiply_inputs<MOST_INPUTS>(job, input, threads, parallel);
  return MOST_INPUTS;
}

// y = x times the weight, transposed, plus bias.
extern "C" void bnbx_multiply(const Job* job, i64 threads, Parallel parallel) {
  for (i64 input = 0; input < job->inputs;) input += multiply_some(job, input, threads, parallel);
}

// Whether x is multiplied as integers, if its numbers are not strange.
extern "C" i64 bnbx_in_integers(const Tables* tables, i64 columns) {
#ifdef FIXED_POINT
  return can_be_fixed(tables, columns);
#else
  return 0;
#endif
}

// The room that a job needs, in floats.
extern "C" i64 bnbx_room_for(i64 columns, i64 inputs) {
  i64 room = ALIGNMENT / phase_step(columns) * MOST_INPUTS * stride_of(columns);
#ifdef FIXED_POINT
  if (room < room_for_fixed(columns, inputs)) room = room_for_fixed(columns, inputs);
#endif
  return room;
}

// y = columns [first, last) of the weight.
extern "C" void bnbx_decode_columns(const Job* job, i64 threads, Parallel parallel) {
  run({job, decode_columns, 0}, threads, parallel);
}

// Whether the processor and the system let tiles be used.
extern "C" i64 bnbx_has_tiles() {
#if BFLOAT16_TILES
  return tiles_granted();
#else
  return 0;
#endif
}

// The room that each worker needs, in floats, for so many rows of x and outputs at a time.
extern "C" i64 bnbx_room_for_tiles(i64 rows, i64 panel) {
#if BFLOAT16_TILES
  return tile_room(rows, panel);
#else
  return 0;
#endif
}

// y = x times the weight, transposed, plus bias, or where `across`, x times the weight; only where there are tiles.
extern "C" void bnbx_multiply_tiles(const Job* job, i64 stride, i64 rows, i64 panel, i64 across, i64 threads, Parallel parallel) {
#if BFLOAT16_TILES
  if (across && panel > MOST_OUTPUTS) panel = MOST_OUTPUTS;  // what a line of the weight has room for
  run_in_slices(TileWork{job, stride, rows, panel, across != 0}, threads * SLICES_PER_THREAD, threads, parallel);
#endif
}

