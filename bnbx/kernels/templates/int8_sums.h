// Sums of products of codes: a few rows of x times a few rows of a weight, both read as they lie in
// memory. Vectors of bytes are multiplied by the processor's own instruction where it has one.
//
// That instruction takes one side without a sign: 128 is added to the weight's codes (one bit
// flipped), and 128 times the sum of x is taken off in the end (OFFSET). The rows of x are filled up
// with zeros to a whole vector.

#if defined(__AVX512VNNI__) && defined(__AVX512BW__)
#include <immintrin.h>
#define INT8_VECTORS 1
typedef __m512i Bytes;
static inline Bytes load_bytes(const i8* from) { return _mm512_loadu_si512((const void*)from); }
static inline Bytes no_bytes() { return _mm512_setzero_si512(); }
static inline Bytes flip_signs(Bytes x) { return _mm512_xor_si512(x, _mm512_set1_epi8((char)0x80)); }
// Written out, since compilers move the sums between registers and memory when they choose.
#define ADD_PRODUCTS(sum, w, x) asm volatile("vpdpbusd %2, %1, %0" : "+v"(sum) : "v"(w), "v"(x))
// Adds up four vectors of sums.
static inline void fold(Bytes a, Bytes b, Bytes c, Bytes d, i32* to) {
  const Bytes ab = _mm512_add_epi32(_mm512_unpacklo_epi32(a, b), _mm512_unpackhi_epi32(a, b));
  const Bytes cd = _mm512_add_epi32(_mm512_unpacklo_epi32(c, d), _mm512_unpackhi_epi32(c, d));
  const Bytes all = _mm512_add_epi32(_mm512_unpacklo_epi64(ab, cd), _mm512_unpackhi_epi64(ab, cd));
  const __m256i half = _mm256_add_epi32(_mm512_castsi512_si256(all), _mm512_extracti64x4_epi64(all, 1));
  const __m128i sums = _mm_add_epi32(_mm256_castsi256_si128(half), _mm256_extracti128_si256(half, 1));
  _mm_storeu_si128((__m128i*)to, _mm_add_epi32(_mm_loadu_si128((const __m128i*)to), sums));
}
enum { VECTOR = 64, MOST_ROWS = 6, OFFSET = 128 };  // 6 x 4 sums in 32 registers

#elif defined(__AVX2__)
#include <immintrin.h>
#define INT8_VECTORS 1
typedef __m256i Bytes;
static inline Bytes no_bytes() { return _mm256_setzero_si256(); }
static inline void fold(Bytes a, Bytes b, Bytes c, Bytes d, i32* to) {
  const Bytes all = _mm256_hadd_epi32(_mm256_hadd_epi32(a, b), _mm256_hadd_epi32(c, d));
  const __m128i sums = _mm_add_epi32(_mm256_castsi256_si128(all), _mm256_extracti128_si256(all, 1));
  _mm_storeu_si128((__m128i*)to, _mm_add_epi32(_mm_loadu_si128((const __m128i*)to), sums));
}
#if defined(__AVXVNNI__)
static inline Bytes load_bytes(const i8* from) { return _mm256_loadu_si256((const __m256i*)from); }
static inline Bytes flip_signs(Bytes x) { return _mm256_xor_si256(x, _mm256_set1_epi8((char)0x80)); }
#define ADD_PRODUCTS(sum, w, x) asm volatile("%{vex%} vpdpbusd %2, %1, %0" : "+x"(sum) : "x"(w), "x"(x))
enum { VECTOR = 32, MOST_ROWS = 2, OFFSET = 128 };  // 2 x 4 sums in 16 registers
#else
// Two neighbors at a time add up in 16 bits: the unsigned side is the magnitude of the weight's codes,
// which may be 128, the other the codes of x (no larger than 127) with the weight's signs put on them.
#define INT8_PANELS 1
static inline Bytes load_bytes(const i8* from) { return _mm256_loadu_si256((const __m256i*)from); }
static inline Bytes flip_signs(Bytes x) { return x; }
static inline Bytes products(Bytes w, Bytes x) {
  const Bytes pairs = _mm256_maddubs_epi16(_mm256_abs_epi8(w), _mm256_sign_epi8(x, w));
  return _mm256_madd_epi16(pairs, _mm256_set1_epi16(1));
}
#define ADD_PRODUCTS(sum, w, x) sum = _mm256_add_epi32(sum, products(w, x))
enum { VECTOR = 32, MOST_ROWS = 2, OFFSET = 0 };
#endif

#else
enum { VECTOR = 64, MOST_ROWS = 4, OFFSET = 0 };
#endif

#define UNROLL _Pragma("GCC unroll 8")

// Adds to `to` what codes [0, count) of ROWS rows of x and COLUMNS rows of a weight give.
template <int ROWS, int COLUMNS, int WIDTH>
static __attribute__((noinline)) void add_sums(const i8* x, i64 stride, const i8* const* w, i64 count, i32 (*to)[WIDTH]) {
#if INT8_VECTORS
  Bytes sums[ROWS][COLUMNS];
  UNROLL for (int r = 0; r < ROWS; ++r)
    UNROLL for (int c = 0; c < COLUMNS; ++c) sums[r][c] = no_bytes();
  const i8* from[COLUMNS];
  UNROLL for (int c = 0; c < COLUMNS; ++c) from[c] = w[c];
  for (i64 at = 0; at < count; at += VECTOR) {
    Bytes weights[COLUMNS];
    UNROLL for (int c = 0; c < COLUMNS; ++c) weights[c] = flip_signs(load_bytes(from[c] + at));
#if INT8_PANELS  // the rows after the next: with one row of x, 1.3 ms become 0.9 for a weight of 16 MB
    UNROLL for (int c = 0; c < COLUMNS; ++c) __builtin_prefetch(from[c] + at + 2 * COLUMNS * (from[1] - from[0]));
#endif
    UNROLL for (int r = 0; r < ROWS; ++r) {
      const Bytes codes = load_bytes(x + r * stride + at);
      UNROLL for (int c = 0; c < COLUMNS; ++c) ADD_PRODUCTS(sums[r][c], weights[c], codes);
    }
  }
  UNROLL for (int r = 0; r < ROWS; ++r)
    UNROLL for (int c = 0; c < COLUMNS; c += 4)
      fold(sums[r][c], sums[r][c + 1], sums[r][c + 2], sums[r][c + 3], to[r] + c);
#else
  for (int r = 0; r < ROWS; ++r)
    for (int c = 0; c < COLUMNS; ++c) {
      const i8 *a = x + r * stride, *b = w[c];
      i32 sum = 0;
      for (i64 i = 0; i < count; ++i) sum += (i32)a[i] * (i32)b[i];
      to[r][c] += sum;
    }
#endif
}
