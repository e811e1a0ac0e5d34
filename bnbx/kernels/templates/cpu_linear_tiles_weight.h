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
