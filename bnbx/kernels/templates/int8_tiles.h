// Many rows times a weight where the processor has a matrix unit (cpu_tiles.h): 512 rows take 7 ms
// instead of 50 with vectors, at 4096 x 4096 on a thread of a Granite Rapids; 3 ms is what the unit needs.
//
// The weight's codes are read as they lie in memory (tile A), and the codes of 16 rows of x, turned in
// place once for each call, are what they meet (tile B). Sums come out with outputs down and rows of x
// across, and are turned back 16 x 16 at a time. The other way around, each part of the weight would be
// turned: for 512 rows twice the work, for 16 rows 64 times.

#if INT8_TILES
// Fewest rows of x; outputs and rows of x at a time, for which each tile that is loaded is used twice.
enum { TILES_LEAST = MOST_ROWS + 1, BLOCK = 2 * TILE_ROWS };
// Bytes of x that pass by all outputs at a time: they stay in the second cache (2 MiB) beside a block
// of the weight. All 512 rows at once take 11 ms, 128 at a time 8.
enum { CHUNK_BYTES = 1 << 20, NEXT = 4 };

// Sums are in tiles 0 to 3, the weight in 4 and 5, x in 6 and 7. Tiles of the last outputs have fewer rows.
static void set_up(int last) {
  const u8 rows[TILE_COUNT] = {TILE_ROWS, TILE_ROWS, (u8)last, (u8)last, TILE_ROWS, (u8)last, TILE_ROWS, TILE_ROWS};
  set_up_tiles(rows);
}

// Adds what codes [0, count) give to a block, or to its last outputs (OUTS 1), its first rows (ROWS 1).
// `next` is what comes into the second cache meanwhile, from NEXT rows of the weight: 5 % less time.
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

// Codes that fill no tile, filled up with zeros.
struct Rest {
  i8 codes[BLOCK][TILE_BYTES];
};

// All sums of a block; those that nobody asked for are left as they were.
template <int OUTS, int ROWS>
static __attribute__((noinline)) void sum_block(const Product& job, const i8* w, const Rest& rest, const i8* x, const i8* next, i32 (*sums)[BLOCK]) {
  enum { ACROSS = BLOCK * 4 };
  const i64 whole = job.depth / TILE_BYTES * TILE_BYTES;
  tile_zero<0>(), tile_zero<1>(), tile_zero<2>(), tile_zero<3>();
  add_block<OUTS, ROWS>(w, job.depth, x, job.stride, whole, next);
  if (whole < job.depth) add_block<OUTS, ROWS>(rest.codes[0], TILE_BYTES, x + whole, job.stride, TILE_BYTES, next + whole);
  if (OUTS == 2) {
    tile_store<0>(sums, ACROSS);
    if (ROWS == 2) tile_store<1>(sums[0] + TILE_ROWS, ACROSS);
  }
  tile_store<2>(sums[(OUTS - 1) * TILE_ROWS], ACROSS);
  if (ROWS == 2) tile_store<3>(sums[(OUTS - 1) * TILE_ROWS] + TILE_ROWS, ACROSS);
}

// Results of up to 16 rows, FEW at a time.
template <class Number>
static void finish_rows(const Product& job, i64 row, i64 count, const Outputs& outputs, i64 at, const i32 (*sums)[TILE]) {
  enum { FEW = 4 };
  i64 r = 0;
  for (; r + FEW <= count; r += FEW) finish_tile<FEW, Number>(job, row + r, outputs, at, sums + r);
  for (; r < count; ++r) finish_tile<1, Number>(job, row + r, outputs, at, sums + r);
}

static void finish_block(const Product& job, i64 row, i64 rows, const Outputs& outputs, i64 at, i64 outs, const i32 (*sums)[BLOCK]) {
  alignas(64) i32 turned[TILE_ROWS][TILE];
  for (i64 r = 0; r < rows; r += TILE_ROWS)
    for (i64 c = 0; c < outs; c += TILE) {
      turn(sums[c] + r, sizeof sums[0], turned, sizeof turned[0]);
      const i64 count = rows - r < TILE_ROWS ? rows - r : TILE_ROWS;
      FOR_NUMBER(job.number, (finish_rows<Number>(job, row + r, count, outputs, at + c, turned)));
    }
}

// Outputs [at, at + outs) of a group, of rows [row, last).
static void multiply_block(const Product& job, i64 row, i64 last, const Outputs& outputs, i64 at, i64 outs) {
  const i8 *w = outputs.weights[at], *x = job.x + row * job.stride, *next = w + BLOCK * job.depth;
  const i64 rest = job.depth % TILE_BYTES;
  alignas(64) i32 sums[BLOCK][BLOCK] = {};
  alignas(64) Rest filled = {};
  for (i64 c = 0; rest && c < outs; ++c) __builtin_memcpy(filled.codes[c], w + (c + 1) * job.depth - rest, rest);
  for (i64 r = row; r < last; r += BLOCK, x += BLOCK * job.stride, next += NEXT * job.depth) {
    const i64 rows = last - r < BLOCK ? last - r : BLOCK;
    if (outs > TILE_ROWS && rows > TILE_ROWS) sum_block<2, 2>(job, w, filled, x, next, sums);
    else if (outs > TILE_ROWS) sum_block<2, 1>(job, w, filled, x, next, sums);
    else if (rows > TILE_ROWS) sum_block<1, 2>(job, w, filled, x, next, sums);
    else sum_block<1, 1>(job, w, filled, x, next, sums);
    for (i64 c = 0; r == row && c < outs; c += TILE)  // not before: now they are in the cache
      gather_weights(job, outputs.weights + at + c, outputs.outliers + (at + c) * job.outliers);
    finish_block(job, r, rows, outputs, at, outs, sums);
  }
}

static void multiply_tiles(const void* data, i64 first, i64 last, i64 slice) {
  const Product& job = *(const Product*)data;
  const i64 blocks = CHUNK_BYTES / (BLOCK * job.stride), chunk = blocks > 1 ? blocks * BLOCK : BLOCK;
  Outputs outputs;
  outputs.outliers = job.weight_outliers + slice * GROUP * job.outliers;
  for (i64 row = 0; row < job.rows; row += chunk)
    for (i64 group = first; group < last; ++group) {
      find_outputs(job, group, outputs);
      for (i64 at = 0; at < outputs.width; at += BLOCK) {
        const i64 outs = outputs.width - at < BLOCK ? outputs.width - at : BLOCK;
        const bool change = outs % TILE_ROWS || (group == first && at == 0);
        if (change) set_up((int)((outs - 1) % TILE_ROWS) + 1);
        multiply_block(job, row, row + chunk < job.rows ? row + chunk : job.rows, outputs, at, outs);
      }
    }
  give_up_tiles();
}

// Rows [16 first, 16 last) to what tiles of the weight meet; those past the last are zeros.
static void prepare_tiles(const void* data, i64 first, i64 last, i64) {
  const Product& job = *(const Product*)data;
  const i64 filled = (job.depth + TILE_BYTES - 1) / TILE_BYTES * TILE_BYTES;
  for (i64 row = first * TILE_ROWS; row < last * TILE_ROWS; row += TILE_ROWS) {
    i8* x = job.x + row * job.stride;
    for (i64 r = 0; r < TILE_ROWS; ++r) {
      const i64 known = row + r < job.rows ? job.depth : 0;
      if (known) FOR_NUMBER(job.number, keep_outliers<Number>(job, row + r));
      __builtin_memset(x + r * job.stride + known, 0, filled - known);
    }
    for (i64 at = 0; at < filled; at += TILE_BYTES) turn(x + at, job.stride, x + at, job.stride);
  }
}

static bool use_tiles(const Product& job) { return job.rows >= TILES_LEAST && tiles_granted(); }
#endif
