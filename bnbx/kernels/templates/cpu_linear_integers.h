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
