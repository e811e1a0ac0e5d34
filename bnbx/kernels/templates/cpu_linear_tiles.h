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
