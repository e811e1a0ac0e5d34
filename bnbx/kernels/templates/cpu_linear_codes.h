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
