// rmsprop, no momentum, no centered, float32 parameters, float32 gradients, v: dynamic8
// gradient over its root mean square, with momentum (Tieleman and Hinton, lecture 6.5, 2012; torch.optim.RMSprop). Rendered from its spec by bnbx; change the spec, not this file.

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

// What this plan works on: its dtypes, the traits of its codebooks, and a row of the launch's table.
typedef float Parameter;
typedef float Gradient;
enum { CHUNK = 256 };  // elements that the chunk numbers in rows count by

struct dynamic8_unsigned {
  static constexpr int BLOCK = 256, SHIFT = 16, HALF = 2900, ENTRIES = 2900, ZERO_CODE = 0;
  static constexpr int BITS = 8;
  static constexpr float UNIT = 1.0f;
  static constexpr u32 FLOOR = 0x342e0000u, CEILING = 0x3f800001u;
  static constexpr bool SIGNED = false, ORDERED = true, SEGMENTS = true, MIRRORED = false, WHOLE = false;
};

// A tensor. Rows end with one more whose FirstChunk is the number of chunks in all.
struct Row {
  Parameter* p_;
  const Gradient* g_;
  u8* v_;
  float* v_absmax_;
  const float* Gradient_scale_;
  i64 Numel;
  i64 FirstChunk;
};

// The row that holds a chunk.
DEVICE const Row& find_row(const Row* rows, i64 row_count, i64 chunk) {
  i64 low = 0, high = row_count - 1;
  while (low < high) {
    const i64 middle = (low + high + 1) / 2;
    if (rows[middle].FirstChunk <= chunk) low = middle;
    else high = middle - 1;
  }
  return rows[low];
}

// What of the rule is the same for all elements. A copy that no store can change stays in registers.
template <class Number>
struct Scalars {
  Number weight_decay_;  // weight_decay
  Number alpha_;  // alpha
  Number k_1_minus_alpha_;  // 1 - alpha
  Number eps_;  // eps
  Number lr_;  // lr

  explicit Scalars(const float* given) : weight_decay_(given[0]), alpha_(given[1]), k_1_minus_alpha_(given[2]), eps_(given[3]), lr_(given[4]) {}
};

struct Job {
  const Row* rows;
  const void* scalars;  // Scalars
  const double* inputs;
  const void* const* tables;
  void* parts;   // a Part for each chunk
  void* values;  // a Values for each row
  i64 row_count;
  i64 chunk_count;
  void (*update)(const Job*, i64, i64);   // chunks [first, last) of the job
  void (*measure)(const Job*, i64, i64);  // the same before that, or null
  void (*reduce)(const Job*, i64, i64);   // and rows of it in between, or null
};

// Whether work of different kinds is done at once: see cpu_stage.h. Of 16.8 M elements on a thread of a Granite Rapids,
// a step of 8-bit SGD takes 0.50 ns each so and not 0.81, AdamW 0.94 and not 1.24, and a tenth less since in lanes;
// compiled for AVX2, 0.79 and not 1.13, 1.45 and not 1.79. AMD's processors are left to themselves, where it was not measured; prefetching alone, in
// another form, cost a Zen 5 time.
#ifndef BNBX_OVERLAP
#if defined(__AVX2__) && !defined(__znver1__) && !defined(__znver2__) && !defined(__znver3__) && !defined(__znver4__) && !defined(__znver5__)
#define BNBX_OVERLAP 1
#else
#define BNBX_OVERLAP 0
#endif
#endif
enum { OVERLAP = BNBX_OVERLAP };
// Sixteen floats as one Number: what a rule's statements do to a float, they do to each of them. So a few elements can be
// updated between the codings of others, in one stream of instructions, where a loop would have to end: see cpu_stage.h.

#if defined(BLOCKS_BY_AVX512) && BNBX_OVERLAP
#define LANED

struct Mask {
  __mmask16 bits;
};

struct Lanes {
  __m512 x;

  Lanes() = default;
  Lanes(__m512 of) : x(of) {}
  Lanes(float of) : x(_mm512_set1_ps(of)) {}
  Lanes operator-() const { return _mm512_castsi512_ps(_mm512_xor_si512(_mm512_castps_si512(x), _mm512_set1_epi32((i32)0x80000000u))); }
};

DEVICE Lanes operator+(Lanes a, Lanes b) { return _mm512_add_ps(a.x, b.x); }
DEVICE Lanes operator-(Lanes a, Lanes b) { return _mm512_sub_ps(a.x, b.x); }
DEVICE Lanes operator*(Lanes a, Lanes b) { return _mm512_mul_ps(a.x, b.x); }
DEVICE Lanes operator/(Lanes a, Lanes b) { return _mm512_div_ps(a.x, b.x); }

DEVICE Mask operator<(Lanes a, Lanes b) { return {_mm512_cmp_ps_mask(a.x, b.x, _CMP_LT_OQ)}; }
DEVICE Mask operator<=(Lanes a, Lanes b) { return {_mm512_cmp_ps_mask(a.x, b.x, _CMP_LE_OQ)}; }
DEVICE Mask operator>(Lanes a, Lanes b) { return {_mm512_cmp_ps_mask(a.x, b.x, _CMP_GT_OQ)}; }
DEVICE Mask operator>=(Lanes a, Lanes b) { return {_mm512_cmp_ps_mask(a.x, b.x, _CMP_GE_OQ)}; }
DEVICE Mask operator==(Lanes a, Lanes b) { return {_mm512_cmp_ps_mask(a.x, b.x, _CMP_EQ_OQ)}; }
DEVICE Mask operator!=(Lanes a, Lanes b) { return {_mm512_cmp_ps_mask(a.x, b.x, _CMP_NEQ_UQ)}; }

DEVICE Lanes rule_fma(Lanes a, Lanes b, Lanes c) { return _mm512_fmadd_ps(a.x, b.x, c.x); }
DEVICE Lanes rule_fms(Lanes a, Lanes b, Lanes c) { return _mm512_fmsub_ps(a.x, b.x, c.x); }
DEVICE Lanes rule_fnma(Lanes a, Lanes b, Lanes c) { return _mm512_fnmadd_ps(a.x, b.x, c.x); }
DEVICE Lanes rule_where(Mask condition, Lanes yes, Lanes no) { return _mm512_mask_blend_ps(condition.bits, no.x, yes.x); }
DEVICE Lanes rule_where(bool condition, Lanes yes, Lanes no) { return condition ? yes : no; }
DEVICE Lanes rule_sqrt(Lanes x) { return _mm512_sqrt_ps(x.x); }
DEVICE Lanes rule_abs(Lanes x) { return _mm512_abs_ps(x.x); }
DEVICE Lanes rule_min(Lanes a, Lanes b) { return _mm512_min_ps(a.x, b.x); }  // b, where either is NaN
DEVICE Lanes rule_max(Lanes a, Lanes b) { return _mm512_max_ps(a.x, b.x); }

DEVICE Lanes rule_sign(Lanes x) {
  const __mmask16 signs = _mm512_cmp_ps_mask(x.x, _mm512_setzero_ps(), _CMP_LT_OQ) | _mm512_cmp_ps_mask(x.x, _mm512_setzero_ps(), _CMP_GT_OQ);
  const __m512 one = _mm512_or_ps(_mm512_and_ps(x.x, _mm512_set1_ps(-0.0f)), _mm512_set1_ps(1.0f));
  return _mm512_mask_blend_ps(signs, x.x, one);
}

DEVICE void rule_read(const float* from, Lanes& x) { x.x = _mm512_loadu_ps(from); }
DEVICE void rule_write(Lanes x, float* to) { _mm512_storeu_ps(to, x.x); }

DEVICE void rule_read(const bfloat16* from, Lanes& x) {
  const __m512i bits = _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)from));
  x.x = _mm512_castsi512_ps(_mm512_slli_epi32(bits, 16));
}

// As from_float rounds.
DEVICE void rule_write(Lanes x, bfloat16* to) {
  const __m512i bits = _mm512_castps_si512(x.x), last = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  const __m512i rounded = _mm512_srli_epi32(_mm512_add_epi32(_mm512_add_epi32(bits, _mm512_set1_epi32(0x7fff)), last), 16);
  const __mmask16 nan = _mm512_cmp_ps_mask(x.x, x.x, _CMP_UNORD_Q);
  _mm256_storeu_si256((__m256i*)to, _mm512_cvtepi32_epi16(_mm512_mask_blend_epi32(nan, rounded, _mm512_set1_epi32(0x7fc0))));
}

DEVICE void rule_read(const float16* from, Lanes& x) { x.x = _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)from)); }

DEVICE void rule_write(Lanes x, float16* to) {
  _mm256_storeu_si256((__m256i*)to, _mm512_cvtps_ph(x.x, _MM_FROUND_TO_NEAREST_INT));
}

// The largest magnitude in each lane, as an integer.
struct Magnitudes {
  __m512i bits = _mm512_setzero_si512();
};

DEVICE Magnitudes larger_magnitude(Magnitudes largest, Lanes x) {
  return {_mm512_max_epi32(largest.bits, _mm512_castps_si512(rule_abs(x).x))};
}

DEVICE i32 largest_of(Magnitudes found) { return _mm512_reduce_max_epi32(found.bits); }

typedef Lanes Several;
typedef Magnitudes Largest;
#endif


// Elements that are decoded, updated and encoded at a time, and steps in which they are updated: in lanes a few, with
// codings in between; as floats all, since a loop has to begin for them. There, 64 and 256 take 3 to 8 % more time.
#ifdef LANED
enum { SPAN_LIMIT = 64 };
#else
typedef float Several;
typedef i32 Largest;
static inline i32 largest_of(i32 found) { return found; }
enum { SPAN_LIMIT = OVERLAP ? 128 : CHUNK };
#endif
enum { SPAN = 256 < (int)SPAN_LIMIT ? 256 : (int)SPAN_LIMIT };
enum { STEP = sizeof(Several) > sizeof(float) ? (int)(sizeof(Several) / sizeof(float)) : (int)SPAN, STEPS = SPAN / STEP };

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


// The quantized states of a chunk on a CPU: from codes to numbers, and back.
//
// A chunk is worked on SPAN elements at a time: they are decoded, updated, and asked for further ahead. Its states can
// be encoded only when the largest magnitude of each block is known. With OVERLAP that is done beside the update of the
// next chunk, since updates wait for divisions and roots, and coding for permutes. And memory is asked for early, a
// little at a time so as not to fill the processor's queue of misses: its own prefetchers pause while coding touches
// neither parameters nor gradients.

// How far, in elements. Where other programs' steps come between, so that everything comes from memory, 256 cost 3 %
// more, and 1024 cost AdamW 15 %. And how far the next page, of which 8 lines cost 2 % more; pages of codes are few.
enum { AHEAD = 512, PAGE_AHEAD = 256, PAGE_LINES = 4 };

// Does no harm past the end of x.
template <bool WRITTEN, class Number>
static inline void ask_for(const Number* x, int count) {
  if (!OVERLAP) return;
  const int bytes = count * (int)sizeof(Number);
  for (int i = 0; i < bytes; i += LINE) __builtin_prefetch((const char*)x + i, WRITTEN);
  if (sizeof(Number) > 1) begin_page<WRITTEN>(x + PAGE_AHEAD, bytes, PAGE_LINES);
}

// For each chunk: open; decode, and encode, each span; close. At the end: flush.
template <class Type>
struct Stage {
  struct Piece : Type {
    static constexpr int BLOCK = SPAN;
  };
  enum { BUFFERS = OVERLAP ? 2 : 1 };  // of chunks in turn

  const Tables* const tables;
  alignas(64) float numbers[BUFFERS][CHUNK];
  alignas(64) u8 unpacked[BUFFERS][CHUNK];  // codes that are packed in memory, or fewer than a chunk

  // The chunk at hand.
  int buffer = 0, count;
  const u8* codes;
  const float* absmax;
  i32 largest[CHUNK / Type::BLOCK];  // magnitude in each block of what is updated, as float bits

  // The chunk whose numbers are encoded: `done` of `pending` are.
  const float* late_numbers;
  u8 *late_codes, *late_packed;  // the same where nothing has to be packed
  Scale late_scales[CHUNK / Type::BLOCK];
  int done = 0, pending = 0;

  explicit Stage(const Tables* of_type) : tables(of_type) {}

  float* numbers_at(int i) { return numbers[buffer] + i; }
  bool is_unpacked() const { return Type::BITS < 8 || count < CHUNK; }

  // Codes that a last chunk lacks are those of zero.
  void open(const u8* from, const float* absmax_from, int elements) {
    if (OVERLAP) buffer = 1 - buffer;
    codes = from, absmax = absmax_from, count = elements;
    __builtin_memset(largest, 0, sizeof largest);
    if (!is_unpacked()) return;
    if (count < CHUNK) __builtin_memset(unpacked[buffer], Type::ZERO_CODE, CHUNK);
    unpack_codes<Type::BITS>(from, count, unpacked[buffer]);
    codes = unpacked[buffer];
  }

  // The span at `at`, if there is one.
  void decode(int at) {
    if (at < count) decode_block<Piece>(codes + at, absmax[Type::WHOLE ? 0 : at / Type::BLOCK], tables, numbers_at(at));
  }

  // A magnitude in the span at `at`.
  void include(int at, i32 magnitude) {
    i32& most = largest[at / Type::BLOCK];
    if (magnitude > most) most = magnitude;
  }

  // The span at `at` is updated: where it ends a block, that block's largest is known, and the search for the next begins.
  void note(int at, Largest& most) {
    if ((at + SPAN) % Type::BLOCK && at + SPAN < count) return;
    include(at, largest_of(most));
    most = Largest();
  }

  // The next span of the chunk before.
  void encode() {
    if (done >= pending) return;
    const Scale scale = late_scales[Type::WHOLE ? 0 : done / Type::BLOCK];
    if (__builtin_expect(scale.inverse > 0.0f, 1)) encode_block<Piece>(late_numbers + done, scale.inverse, tables, late_codes + done);
    else __builtin_memset(late_codes + done, Type::ZERO_CODE, SPAN);
    done += SPAN;
  }

  void flush() {
    while (done < pending) encode();
    if (pending && late_codes != late_packed) pack_codes<Type::BITS>(late_codes, pending, late_packed);
    done = pending = 0;
  }

  // All spans are updated: to be encoded, to `to`, with scales that follow from their largest magnitudes.
  void close(u8* to, float* absmax_to) {
    flush();
    for (int block = 0; block * Type::BLOCK < count; ++block) {
      late_scales[block] = make_scale<Type>((u32)largest[block]);
      absmax_to[block] = late_scales[block].absmax;
    }
    hand_over(to);
  }

  // The same where the absmax is that of the whole tensor.
  void close_whole(u8* to, u32 largest_of_all) {
    flush();
    late_scales[0] = make_scale<Type>(largest_of_all);
    hand_over(to);
  }

  void hand_over(u8* to) {
    late_numbers = numbers_at(0), late_packed = to, late_codes = is_unpacked() ? unpacked[buffer] : to, pending = count;
    if (!OVERLAP) flush();
  }
};


// The rule, for `Count` elements, as many as a Number has at a time. The largest magnitudes of quantized states
// are found on the way, as integers: so the order of comparisons cannot matter, even for NaN.
template <class Number, class Found>
static inline __attribute__((always_inline)) void update_elements(
    Parameter* __restrict P, const Gradient* __restrict G, float* __restrict State_v,
const Scalars<Number>& Given, const Number Gradient_scale, const int Count, Found& Largest_v) {
  const Number weight_decay_ = Given.weight_decay_;
  const Number alpha_ = Given.alpha_;
  const Number k_1_minus_alpha_ = Given.k_1_minus_alpha_;
  const Number eps_ = Given.eps_;
  const Number lr_ = Given.lr_;
  Found Most_v = Largest_v;
  for (int I = 0; I < Count; I += sizeof(Number) / sizeof(float)) {
    Number p, g, v;
    rule_read(P + I, p);
    rule_read(G + I, g);
    g = g * Gradient_scale;
    rule_read(State_v + I, v);
    // g = g + weight_decay * p
    g = rule_fma(weight_decay_, p, g);
    // v = alpha * v + where(centered, alpha * (1 - alpha) * d * d, (1 - alpha) * g * g)
    v = rule_fma(alpha_, v, ((k_1_minus_alpha_ * g) * g));
    // n = g / (sqrt(v) + eps)
    Number n = g / (rule_sqrt(v) + eps_);
    // m = where(momentum, momentum * m + n, n)
    Number m = n;
    // u = m
    Number u = m;
    // p = p - lr * u
    p = rule_fnma(lr_, u, p);
    rule_write(p, P + I);
    rule_write(v, State_v + I);
    Most_v = larger_magnitude(Most_v, v);
  }
  Largest_v = Most_v;
}

// Chunks [first, last) of a job.
extern "C" void bnbx_update(const Job* job, i64 first, i64 last) {
  const Row* row = &find_row(job->rows, job->row_count, first);
  const Scalars<float> scalars((const float*)job->scalars);
  const Scalars<Several> several((const float*)job->scalars);
  const Tables* tables_dynamic8_unsigned = (const Tables*)job->tables[0];
  Stage<dynamic8_unsigned> stage_v(tables_dynamic8_unsigned);
  for (i64 chunk = first; chunk < last; ++chunk) {
    while (chunk >= row[1].FirstChunk) ++row;
    const i64 start = (chunk - row->FirstChunk) * CHUNK;
    const i64 left = row->Numel - start;
    const int count = (int)(left < CHUNK ? left : CHUNK);
    const float gradient_scale = *row->Gradient_scale_;
    Parameter* const parameters = row->p_ + start;
    const Gradient* const gradients = row->g_ + start;
    u8* codes_v = row->v_ + start * dynamic8_unsigned::BITS / 8;
    float* absmax_v = row->v_absmax_ + start / dynamic8_unsigned::BLOCK;
    stage_v.open(codes_v, absmax_v, count);
    Largest largest_v = Largest();
    stage_v.decode(0);
    for (int at = 0; at < count; at += SPAN) {
      const int span = count - at < SPAN ? count - at : SPAN;
      float* state_v = stage_v.numbers_at(at);
      ask_for<true>(parameters + at + AHEAD, SPAN);
      Parameter* p = parameters + at;
      const Gradient* g = gradients + at;
      if (span < SPAN) {  // the last of a tensor; `close` encodes what is left of the chunk before
        i32 rest_v = 0;
        update_elements<float>(p, g, state_v, scalars, gradient_scale, span, rest_v);
        stage_v.include(at, rest_v);
        stage_v.note(at, largest_v);
        break;
      }
      update_elements<Several>(p, g, state_v, several, gradient_scale, STEP, largest_v);
      ask_for<false>(gradients + at + AHEAD, SPAN);
      ask_for<true>(codes_v + (at + AHEAD) * dynamic8_unsigned::BITS / 8, SPAN * dynamic8_unsigned::BITS / 8);
      stage_v.encode();
      if (STEPS > 1) update_elements<Several>(p + 1 * STEP, g + 1 * STEP, state_v + 1 * STEP, several, gradient_scale, STEP, largest_v);
      if (STEPS > 2) update_elements<Several>(p + 2 * STEP, g + 2 * STEP, state_v + 2 * STEP, several, gradient_scale, STEP, largest_v);
      stage_v.decode(at + SPAN);
      if (STEPS > 3) update_elements<Several>(p + 3 * STEP, g + 3 * STEP, state_v + 3 * STEP, several, gradient_scale, STEP, largest_v);
      stage_v.note(at, largest_v);
    }
    stage_v.close(codes_v, absmax_v);
  }
  stage_v.flush();
}

// ---- the entry of the library: the phases of some jobs, one after the other

enum Phase { MEASURE, REDUCE, UPDATE };

struct Work {
  const Job* jobs;
  i64 job_count;
  Phase phase;

  void take(Slice slice) const {
    for (i64 j = 0; j < job_count; ++j) {
      const Job* job = jobs + j;
      void (*const run)(const Job*, i64, i64) = phase == UPDATE ? job->update : phase == MEASURE ? job->measure : job->reduce;
      const i64 count = phase == REDUCE ? job->row_count : job->chunk_count;
      const i64 first = slice.first_of(count), last = slice.last_of(count);
      if (run && first < last) run(job, first, last);
    }
  }
};

extern "C" void bnbx_run(const Job* jobs, i64 job_count, i64 threads, Parallel parallel) {
  bool measured = false;
  for (i64 j = 0; j < job_count; ++j) measured = measured || jobs[j].measure;
  for (int phase = measured ? MEASURE : UPDATE; phase <= UPDATE; ++phase)
    run_in_slices(Work{jobs, job_count, (Phase)phase}, threads * SLICES_PER_THREAD, threads, parallel);
}

