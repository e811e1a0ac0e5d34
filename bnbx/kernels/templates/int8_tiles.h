// Many rows times a weight where the processor has a matrix unit (cpu_tiles.h): 512 rows of float32 take
// 12 ms instead of 43 with vectors, at 4096 x 4096 on a thread of an Emerald Rapids, other programs running.
// The sums alone take 7 ms of that on a quiet machine; the unit needs 3, the second cache has no more.
//
// The weight's codes are read as they lie in memory (tile A), and the codes of 16 rows of x, turned in
// place once for each call, are what they meet (tile B). Sums come out with outputs down and rows of x
// across, and are turned back 16 x 16 at a time. The other way around, each part of the weight would be
// turned: for 512 rows twice the work, for 16 rows 64 times.

#if INT8_TILES
// Outputs and rows at a time: each tile that is loaded is used twice. The fewest rows: up to MOST_ROWS,
// which vectors multiply as fast as the weight comes from memory, both take the same time.
enum { BLOCK = 2 * TILE_ROWS, TILES_LEAST = MOST_ROWS + 1 };
// DEPTH codes of so many rows of x (1 MiB) stay in the second cache (2 MiB) while the weight passes by:
// all 512 rows at once take 11 ms instead of 7, 128 at a time 8.
enum { CHUNK = 256 };
// Where rows are longer, the sums of so many outputs are kept, for parts of x to meet as many.
enum { KEPT = 256 };
enum { NEXT = 4 };  // rows of the weight that come into the second cache while a block of rows passes by

struct Kept {
  alignas(64) i32 sums[CHUNK / BLOCK][BLOCK][BLOCK];  // by row block, output, row
};

// Codes [at, at + count) of up to BLOCK outputs, those that fill no tile copied and filled up with zeros.
struct Part {
  i64 at, whole;
  const i8* codes;
  bool rest;
  alignas(64) i8 filled[BLOCK][TILE_BYTES];
};

static inline i64 at_most(i64 most, i64 count) { return count < most ? count : most; }

static void find_part(const Product& job, i64 out, i64 outs, i64 at, Part& part) {
  const i64 count = at_most(DEPTH, job.depth - at), rest = count % TILE_BYTES;
  part.at = at, part.whole = count - rest, part.rest = rest > 0;
  part.codes = job.weight + out * job.depth + at;
  if (!part.rest) return;
  __builtin_memset(part.filled, 0, sizeof part.filled);
  for (i64 c = 0; c < outs; ++c) __builtin_memcpy(part.filled[c], part.codes + c * job.depth + part.whole, rest);
}

// Adds what codes [0, count) give to a block, or to its last outputs (OUTS 1), its first rows (ROWS 1).
// Sums are in tiles 0 to 3, the weight in 4 and 5, x in 6 and 7.
template <int OUTS, int ROWS>
static inline void add_block(const i8* w, i64 w_stride, const i8* x, i64 x_stride, i64 count, const i8* next) {
  for (const i8* end = w + count; w < end; w += TILE_BYTES, x += TILE_BYTES, next += TILE_BYTES) {
    UNROLL for (int r = 0; r < NEXT; ++r) __builtin_prefetch(next + r * w_stride, 0, 2);
    tile_load<6>(x, x_stride);
    if (ROWS == 2) tile_load<7>(x + TILE_ROWS * x_stride, x_stride);
    if (OUTS == 2) {
      tile_load<4>(w, w_stride);
      tile_add<0, 4, 6>();
      if (ROWS == 2) tile_add<1, 4, 7>();
    }
    tile_load<5>(w + (OUTS - 1) * TILE_ROWS * w_stride, w_stride);
    tile_add<2, 5, 6>();
    if (ROWS == 2) tile_add<3, 5, 7>();
  }
}

// A part's sums of a block, added to those of the parts before; those that nobody asked for are left as
// they were.
template <int OUTS, int ROWS>
static __attribute__((noinline)) void sum_block(const Product& job, const Part& part, i64 row, i64 next, i32 (*sums)[BLOCK]) {
  enum { ACROSS = BLOCK * 4 };
  const i8* x = job.x + row * job.stride + part.at;
  i32 *upper = sums[0], *lower = sums[(OUTS - 1) * TILE_ROWS];
  if (part.at == 0) {
    tile_zero<0>(), tile_zero<1>(), tile_zero<2>(), tile_zero<3>();
  } else {
    if (OUTS == 2) tile_load<0>(upper, ACROSS);
    if (OUTS == 2 && ROWS == 2) tile_load<1>(upper + TILE_ROWS, ACROSS);
    tile_load<2>(lower, ACROSS);
    if (ROWS == 2) tile_load<3>(lower + TILE_ROWS, ACROSS);
  }
  add_block<OUTS, ROWS>(part.codes, job.depth, x, job.stride, part.whole, part.codes + next * job.depth);
  if (part.rest) add_block<OUTS, ROWS>(part.filled[0], TILE_BYTES, x + part.whole, job.stride, TILE_BYTES, part.codes);
  if (OUTS == 2) tile_store<0>(upper, ACROSS);
  if (OUTS == 2 && ROWS == 2) tile_store<1>(upper + TILE_ROWS, ACROSS);
  tile_store<2>(lower, ACROSS);
  if (ROWS == 2) tile_store<3>(lower + TILE_ROWS, ACROSS);
}

// What codes from `at` on add to `outs` outputs from `out` on, of `rows` rows from `row` on.
static void sum_outputs(const Product& job, i64 row, i64 rows, i64 out, i64 outs, i64 at, Kept& kept) {
  Part part;
  find_part(job, out, outs, at, part);
  const u8 last = (u8)((outs - 1) % TILE_ROWS + 1);  // of the last outputs there may be fewer
  const u8 filled[TILE_COUNT] = {TILE_ROWS, TILE_ROWS, last, last, TILE_ROWS, last, TILE_ROWS, TILE_ROWS};
  set_up_tiles(filled);
  for (i64 r = 0; r < rows; r += BLOCK) {
    i32(*to)[BLOCK] = kept.sums[r / BLOCK];
    const i64 next = BLOCK + r / BLOCK * NEXT;
    const bool wide = rows - r > TILE_ROWS;
    if (outs > TILE_ROWS) wide ? sum_block<2, 2>(job, part, row + r, next, to) : sum_block<2, 1>(job, part, row + r, next, to);
    else wide ? sum_block<1, 2>(job, part, row + r, next, to) : sum_block<1, 1>(job, part, row + r, next, to);
  }
}

// Results of up to 16 rows, FEW at a time.
template <class Number>
static void finish_rows(const Product& job, i64 row, i64 count, const Outputs& outputs, i64 at, const i32 (*sums)[TILE]) {
  enum { FEW = 4 };
  i64 r = 0;
  for (; r + FEW <= count; r += FEW) finish_tile<FEW, Number>(job, row + r, outputs, at, sums + r);
  for (; r < count; ++r) finish_tile<1, Number>(job, row + r, outputs, at, sums + r);
}

static void finish_outputs(const Product& job, i64 row, i64 rows, i64 out, i64 outs, const Kept& kept, Outputs& outputs) {
  const i64 at = out % GROUP;
  if (at == 0) find_outputs(job, out / GROUP, outputs);
  for (i64 c = 0; c < outs; c += TILE)
    gather_weights(job, outputs.weights + at + c, outputs.outliers + (at + c) * job.outliers);
  alignas(64) i32 turned[TILE_ROWS][TILE];
  for (i64 r = 0; r < rows; r += TILE_ROWS)
    for (i64 c = 0; c < outs; c += TILE) {
      turn(kept.sums[r / BLOCK][c] + r % BLOCK, BLOCK * 4, turned, sizeof turned[0]);
      const i64 count = at_most(TILE_ROWS, rows - r);
      FOR_NUMBER(job.number, (finish_rows<Number>(job, row + r, count, outputs, at + c, turned)));
    }
}

// Not inline: its stack is its own, 256 KiB where TOGETHER is KEPT, 32 KiB where it is BLOCK.
template <int TOGETHER>
static __attribute__((noinline)) void multiply_outputs(const Product& job, i64 first, i64 last, i64 slice) {
  const i64 end = at_most(job.outs, last * GROUP);
  Kept kept[TOGETHER / BLOCK];
  Outputs outputs;
  outputs.outliers = job.weight_outliers + slice * GROUP * job.outliers;
  for (i64 row = 0; row < job.rows; row += CHUNK) {
    const i64 rows = at_most(CHUNK, job.rows - row);
    for (i64 out = first * GROUP; out < end; out += TOGETHER) {
      const i64 outs = at_most(TOGETHER, end - out);
      i64 at = 0;
      do  // where rows are empty too: the sums are zeros
        for (i64 c = 0; c < outs; c += BLOCK) sum_outputs(job, row, rows, out + c, at_most(BLOCK, outs - c), at, kept[c / BLOCK]);
      while ((at += DEPTH) < job.depth);
      for (i64 c = 0; c < outs; c += BLOCK) finish_outputs(job, row, rows, out + c, at_most(BLOCK, outs - c), kept[c / BLOCK], outputs);
    }
  }
  give_up_tiles();
}

static void multiply_tiles(const void* data, i64 first, i64 last, i64 slice) {
  const Product& job = *(const Product*)data;
  job.depth > DEPTH ? multiply_outputs<KEPT>(job, first, last, slice) : multiply_outputs<BLOCK>(job, first, last, slice);
}

// Rows [16 first, 16 last) to what tiles of the weight meet. What rows past the last and codes past
// `depth` hold does not matter: sums of those are not asked for, and these meet zeros.
static void prepare_tiles(const void* data, i64 first, i64 last, i64) {
  const Product& job = *(const Product*)data;
  for (i64 row = first * TILE_ROWS; row < last * TILE_ROWS; row += TILE_ROWS) {
    for (i64 r = row; r < at_most(job.rows, row + TILE_ROWS); ++r)
      FOR_NUMBER(job.number, keep_outliers<Number>(job, r));
    i8* x = job.x + row * job.stride;
    for (i64 at = 0; at < job.depth; at += TILE_BYTES) turn(x + at, job.stride, x + at, job.stride);
  }
}

static bool use_tiles(const Product& job) { return job.rows >= TILES_LEAST && tiles_granted(); }
#endif
