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
