// Many rows of bfloat16 times a weight where the processor has a matrix unit (cpu_tiles_bfloat16.h). torch multiplies
// panels by it too, but packs x and each panel on every call: 512 rows by 4096 x 4096 take it 50 ms on a thread of an
// Emerald Rapids, of which the unit itself needs 7.
//
// Rows of x are copied, 32 at a time, but stay as they are (tile A). The weight is decoded to what they meet (tile B), some outputs and
// DEPTH of its columns at a time, so that it stays in the caches; so do the sums of these outputs with all rows of x, or
// many of them, which are added to once for each DEPTH.

#if BFLOAT16_TILES
enum { TILE_SIDE = 32, TILE_NUMBERS = TILE_SIDE * TILE_ROWS, DEPTH = 256 };

// What a call is about, and what each of its workers has in the job's room.
struct TileWork {
  const Job* job;
  i64 stride;  // from a row of x to the next one
  i64 rows;    // of x at a time
  i64 panel;   // outputs at a time, a multiple of TILE_SIDE
  i64 slices, next, workers;
};

struct TileRoom {
  float* sums;        // of each 16 rows and 16 outputs in turn, together
  bfloat16* weights;  // of each 16 outputs and 32 columns in turn, together
};

static inline i64 tiles_of(i64 rows) { return (rows + TILE_ROWS - 1) / TILE_ROWS; }

// In floats.
static i64 tile_room(i64 rows, i64 panel) { return (tiles_of(rows) * TILE_ROWS + DEPTH / 2) * panel + TILE_ROWS; }

static TileRoom find_tile_room(const TileWork& work, i64 worker) {
  float* room = work.job->room + worker * tile_room(work.rows, work.panel);
  room += (64 - (unsigned long long)room % 64) / 4 % 16;
  return {room, (bfloat16*)(room + tiles_of(work.rows) * TILE_ROWS * work.panel)};
}

// ---- the weight

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
      for (int p = 0; p < JOINED; ++p) staged[g][p][o] = o < outs ? pairs[p] : _mm512_setzero_si512();
    }
  }
  enum { TILE_OF = ROWS_BETWEEN == 1 ? TILE_NUMBERS : TILE_SIDE };
  for (i64 g = 0; g < groups; ++g, to += GROUP * TILE_ROWS)
    for (int p = 0; p < JOINED; ++p) turn(staged[g][p], TILE_BYTES, to + p * TILE_OF, ROWS_BETWEEN * TILE_BYTES);
}
#else
enum { WHOLE_GROUPS = 0 };
static void decode_groups(const Job*, const Levels&, i64, i64, i64, i64, bfloat16*) {}
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

// Columns [from, to) of outputs [at, at + outs) to tiles.
static void decode_tiles(const Job* job, const Levels& levels, i64 at, i64 outs, i64 from, i64 to, bfloat16* tiles) {
  const bool in_groups = WHOLE_GROUPS && (PER == ROW || job->columns % ALIGNMENT == 0);
  const i64 groups = in_groups ? (to - from) / GROUP : 0, rest = from + groups * GROUP;
  for (i64 o = 0; o < outs; o += TILE_ROWS, tiles += DEPTH * TILE_ROWS) {
    const i64 some = outs - o < TILE_ROWS ? outs - o : TILE_ROWS;
    if (groups) decode_groups(job, levels, at + o, some, from, groups, tiles);
    if (rest < to) decode_rest(job, levels, at + o, some, rest, to, tiles + (rest - from) * TILE_ROWS);
  }
  if (outs % TILE_SIDE && outs % TILE_SIDE <= TILE_ROWS) __builtin_memset(tiles, 0, sizeof(bfloat16) * DEPTH * TILE_ROWS);
}

// ---- products

// Sums are in tiles 0 to 3, x in 4 and 5, the weight in 6 and 7.
static void set_up_products() {
  u8 rows[TILE_COUNT];
  for (u8& each : rows) each = TILE_ROWS;
  set_up_tiles(rows);
}

// Columns [from, to) of up to 16 rows of x to tiles that zeros fill up: read from where they are, 512 rows take twice as
// long, as lines of many rows have one place in the cache.
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
    bfloat16* y = job->y + (first + row) * job->rows + at;
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
  const i64 columns = work.job->columns, next = work.panel * TILE_ROWS;
  alignas(64) bfloat16 x[2 * TILE_ROWS * DEPTH];
  for (i64 from = 0; from < columns; from += DEPTH) {
    const i64 to = from + DEPTH < columns ? from + DEPTH : columns, count = (to - from + TILE_SIDE - 1) / TILE_SIDE;
    decode_tiles(work.job, levels, at, outs, from, to, room.weights);
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

static void work_on_tiles(void* data) {
  TileWork* work = (TileWork*)data;
  const TileRoom room = find_tile_room(*work, __atomic_fetch_add(&work->workers, 1, __ATOMIC_RELAXED));
  const i64 outputs = work->job->rows, pieces = (outputs + TILE_SIDE - 1) / TILE_SIDE;
  for (;;) {
    const i64 slice = __atomic_fetch_add(&work->next, 1, __ATOMIC_RELAXED);
    if (slice >= work->slices) return;
    const i64 begin = pieces * slice / work->slices * TILE_SIDE, end = pieces * (slice + 1) / work->slices * TILE_SIDE;
    if (begin < end) multiply_slice(*work, room, begin, end < outputs ? end : outputs);
  }
}
#endif

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

// y = x times the weight, transposed, plus bias; only where there are tiles.
extern "C" void bnbx_multiply_tiles(const Job* job, i64 stride, i64 rows, i64 panel, i64 threads, void (*parallel)(void (*)(void*), void*, unsigned, unsigned)) {
#if BFLOAT16_TILES
  TileWork work = {job, stride, rows, panel, 1, 0, 0};
  if (threads > 1 && parallel) {
    work.slices = threads * 4;
    parallel(work_on_tiles, &work, (unsigned)threads, 0);
  } else {
    work.slices = 1;
    work_on_tiles(&work);
  }
#endif
}
