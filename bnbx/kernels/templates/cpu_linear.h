// Products of a few rows of x with a quantized weight on a CPU. Each row of the weight is decoded
// group by group, in registers, and multiplied with up to MOST_INPUTS rows of x on the way.
//
// Groups are counted from a multiple of ALIGNMENT in the flattened weight, at or before the row's first
// element: so a group begins in a byte, and blocks in it at multiples of ALIGNMENT. How far before,
// the phase, may differ between rows; x is laid out once for each phase that there is.

enum { MOST_INPUTS = 4, ALIGNMENT = 16, TILE = 8192, ROWS_AT_ONCE = 32 };
// Elements that have one factor; blocks are multiples of it.
enum { SPAN = PER == BLOCK && (int)Code::BLOCK < (int)GROUP ? (int)Code::BLOCK : (int)GROUP, SPANS = GROUP / SPAN };
enum { MOST_FACTORS = TILE / SPAN + SPANS + LANES };
// Where a weight comes from memory, it is asked for so early: bytes of codes, and rows of scales. A fifth
// of the time of one row of x, measured between products that leave nothing of it in the caches.
#ifdef SLOW_PAIRS
enum { CODES_AHEAD = 4096 };  // 4 to 10 % less than with 2048 on an Emerald Rapids
#else
enum { CODES_AHEAD = 2048 };
#endif
enum { ROWS_AHEAD = 2, PAGE_AHEAD = 1024, PAGE_LINES = 6 };
enum { SCALE_BYTES = Code::SCALE == FLOAT32 ? 4 : Code::SCALE == BFLOAT16 ? 2 : 1 };

// A row of the weight from its aligned beginning on; its elements are [phase, end).
struct Row {
  const u8* codes;
  i64 start;   // where the aligned beginning lies in the flattened weight
  i64 factor;  // which factor is that of the whole row, where scales are not per block
  int phase;
  i64 end;
};

static inline Row find_row(const Job* job, i64 number) {
  const i64 columns = job->columns;
  if (PER == ROW) {
    const i64 bytes = (columns * CODE_BITS + 7) / 8;
    return {job->parts.codes + number * bytes, 0, number, 0, columns};
  }
  const i64 first = number * columns, phase = first % ALIGNMENT, start = first - phase;
  return {job->parts.codes + start / 8 * CODE_BITS, start, 0, (int)phase, phase + columns};
}

// Every phase is a multiple of this.
static inline i64 phase_step(i64 columns) {
  const i64 power = columns & -columns;
  return PER == ROW || power > ALIGNMENT ? (i64)ALIGNMENT : power;
}

static inline i64 stride_of(i64 columns) { return (columns + ALIGNMENT + GROUP - 1) / GROUP * GROUP; }

static inline float* laid_out(const Job* job, i64 phase) {
  return job->room + (phase >> __builtin_ctzll(phase_step(job->columns))) * MOST_INPUTS * stride_of(job->columns);
}

// M rows of x as those of a phase read them: group by group, and in it vector by vector, of each row in
// turn. Zero outside of the row, and for rows that there are not.
template <int M>
static void lay_out(const Job* job, i64 input, i64 phase, float* to) {
  const i64 columns = job->columns;
  for (i64 group = 0; group < stride_of(columns); group += GROUP, to += GROUP * M)
    for (int m = 0; m < M; ++m) {
      const Number* x = job->x + (input + m) * columns;
      for (int i = 0; i < GROUP; ++i) {
        const i64 column = group + element_at(i) - phase;
        const bool there = column >= 0 && column < columns && input + m < job->inputs;
        to[(i / LANES * M + m) * LANES + i % LANES] = there ? to_float(x[column]) : 0.0f;
      }
    }
}

// For the codes of each group.
static inline void ask_ahead(const u8* codes) {
  __builtin_prefetch(codes + CODES_AHEAD);
  begin_page<false>(codes + CODES_AHEAD + PAGE_AHEAD, GROUP_BYTES, PAGE_LINES);
}

// What the levels of a row's elements [from, to) are multiplied by, and what is added then.
struct Factors {
  float factor[MOST_FACTORS], center[Code::CENTERED ? MOST_FACTORS : 1];
};

static inline void find_factors(const Parts& parts, const Row& row, i64 from, i64 to, Factors& factors) {
  if (PER != BLOCK) return;
  const i64 per_block = Code::BLOCK / SPAN;
  const i64 first = (row.start + from) / SPAN, count = (row.start + to - 1) / SPAN + 1 - first;
  const u8* ahead = (const u8*)parts.scale + (first + ROWS_AHEAD * count) / per_block * SCALE_BYTES;
  for (i64 byte = 0; byte < count / per_block * SCALE_BYTES; byte += 64) __builtin_prefetch(ahead + byte);
  for (i64 i = 0; i < count; ++i) factors.factor[i] = factor_at<Code>(parts, (first + i) / per_block);
  if (Code::CENTERED)
    for (i64 i = 0; i < count; ++i) factors.center[i] = center_at<Code>(parts, (first + i) / per_block);
}

// What all groups of a row have in common.
struct Lanes {
  Ints first, span;  // the element of each lane in vector 0, and its span
  int offset;        // where the row's aligned beginning lies in its span
};

static inline Lanes find_lanes(const Row& row) {
  Lanes lanes;
  lanes.offset = (int)(row.start % SPAN);
  for (int l = 0; l < LANES; ++l) lanes.first[l] = first_element(l);
  lanes.span = (lanes.first + lanes.offset) / (int)SPAN;
  return lanes;
}

// Numbers of a group's spans for the lanes of its vector v. Where elements are in order, a vector lies in
// one span; else lane l is in the same one in every vector.
static inline Floats for_lanes(const float* of_spans, const Lanes& lanes, int v) {
#ifdef EIGHT_LANES
  if (SPANS == 1 && lanes.offset == 0) return (Floats)_mm256_broadcast_ss(of_spans);  // a permute takes as long as three shuffles
#endif
  return STEP == LANES ? fill(of_spans[(lanes.offset + v * LANES) / SPAN]) : permute(load(of_spans), lanes.span);
}

// Zero where the elements of vector v are outside of [low, high).
static inline Floats cut(Floats w, const Lanes& lanes, int v, int low, int high) {
  const Ints element = lanes.first + v * (int)STEP;
  return (Floats)((Ints)w & (element >= low & element < high));
}

// The codes of a group that may end beyond the row: nothing is read from there.
struct Part {
  u8 codes[GROUP_BYTES];
};

static inline Part load_part(const u8* codes, i64 count) {
  Part part = {};
  __builtin_memcpy(part.codes, codes, (count * CODE_BITS + 7) / 8);
  return part;
}

// What is added to while a row is gone through, group by group.
template <int M>
struct Totals {
  enum { CHAINS = M < 4 ? 4 : 2 };  // of additions that need not wait for each other
  Floats factor, center;            // of all blocks, where scales are not per block
  Floats sum[M][CHAINS];
};

// Where a group lies: its codes, the rows of x, the factors and centers of its spans.
struct Cursor {
  const u8* codes;
  const float *x, *factors, *centers;
};

template <int M>
static inline void step(Cursor& at) {
  at.codes += GROUP_BYTES;
  at.x += GROUP * M;
  at.factors += SPANS;
  at.centers += Code::CENTERED ? SPANS : 0;
}

// Adds the products of a group with M rows of x. Of a group that is not WHOLE, only elements [low, high) are the
// row's, and their codes have been copied to `codes`.
template <int M, bool WHOLE>
static inline __attribute__((always_inline)) void add_group(const u8* codes, const Cursor& at, const Lanes& lanes, const Levels& levels,
                                                            int low, int high, Totals<M>& totals) {
  Floats w[VECTORS], factor = totals.factor, center = totals.center;
  decode_group(codes, levels, w);
  if (M == 1 && WHOLE && STEP != LANES && !Code::CENTERED) {  // a lane has one factor: it is for the sum
    Floats part[2] = {w[0] * load(at.x), w[1] * load(at.x + LANES)};
#pragma GCC unroll 8
    for (int v = 2; v < VECTORS; ++v) part[v % 2] = multiply_add(w[v], load(at.x + v * LANES), part[v % 2]);
    if (PER == BLOCK) factor = for_lanes(at.factors, lanes, 0);
    totals.sum[0][0] = multiply_add(part[0] + part[1], factor, totals.sum[0][0]);
    return;
  }
#pragma GCC unroll 16
  for (int v = 0; v < VECTORS; ++v) {
    if (PER == BLOCK) factor = for_lanes(at.factors, lanes, v);
    if (PER == BLOCK && Code::CENTERED) center = for_lanes(at.centers, lanes, v);
    w[v] = Code::CENTERED ? multiply_add(w[v], factor, center) : w[v] * factor;
    if (!WHOLE) w[v] = cut(w[v], lanes, v, low, high);
#pragma GCC unroll 4
    for (int m = 0; m < M; ++m) {
      Floats& sum = totals.sum[m][v % Totals<M>::CHAINS];
      sum = multiply_add(w[v], load(at.x + (v * M + m) * LANES), sum);
    }
  }
}

// The same for a group at either end of a row.
template <int M>
static inline void add_end(const Cursor& at, const Lanes& lanes, const Levels& levels, i64 low, i64 high, Totals<M>& totals) {
  const int begin = low > 0 ? (int)low : 0, end = high < GROUP ? (int)high : (int)GROUP;
  const Part part = load_part(at.codes, end);
  add_group<M, false>(part.codes, at, lanes, levels, begin, end, totals);
}

// Adds the products of M rows of x with a row's elements [from, to) to sums. `from` is a multiple of GROUP, and so
// is `to`, or it is the end; x is laid out for the row's phase, and begins there.
template <int M>
static inline void add_products(const Parts& parts, const Row& row, i64 from, i64 to, const float* x, const Levels& levels, float* sums) {
  Factors factors;
  find_factors(parts, row, from, to, factors);
  const Lanes lanes = find_lanes(row);
  Totals<M> totals = {};
  if (PER != BLOCK) {
    totals.factor = fill(factor_at<Code>(parts, row.factor));
    totals.center = fill(center_at<Code>(parts, row.factor));
  }
  Cursor at = {row.codes + from / 8 * CODE_BITS, x, factors.factor, factors.center};
  if (from < row.phase) {
    add_end<M>(at, lanes, levels, row.phase - from, row.end - from, totals);
    step<M>(at);
    from += GROUP;
  }
  for (i64 whole = (to - from) / GROUP; whole > 0; --whole, step<M>(at)) {
    ask_ahead(at.codes);
    add_group<M, true>(at.codes, at, lanes, levels, 0, GROUP, totals);
  }
  if (from < to && (to - from) % GROUP) add_end<M>(at, lanes, levels, 0, (to - from) % GROUP, totals);
#pragma GCC unroll 4
  for (int m = 0; m < M; ++m) {
    Floats sum = totals.sum[m][0];
#pragma GCC unroll 4
    for (int c = 1; c < Totals<M>::CHAINS; ++c) sum += totals.sum[m][c];
    sums[m] += sum_of(sum);
  }
}

// Rows [first, last) of the weight times M rows of x, those from `input` on.
template <int M>
static void multiply(const Job* job, i64 input, i64 first, i64 last) {
  const Levels levels = load_levels(job->parts.tables);
  const i64 stride = stride_of(job->columns);
  for (; first < last; first += ROWS_AT_ONCE) {
    const int count = (int)(last - first < ROWS_AT_ONCE ? last - first : ROWS_AT_ONCE);
    float sums[ROWS_AT_ONCE][M] = {};
    for (i64 tile = 0; tile < stride; tile += TILE / M)  // what is used of x by all rows stays in the cache
      for (int r = 0; r < count; ++r) {
        const Row row = find_row(job, first + r);
        const i64 end = tile + TILE / M < row.end ? tile + TILE / M : row.end;
        if (tile < end) add_products<M>(job->parts, row, tile, end, laid_out(job, row.phase) + tile * M, levels, sums[r]);
      }
    for (int r = 0; r < count; ++r)
      for (int m = 0; m < M && input + m < job->inputs; ++m) {
        const i64 number = first + r;
        const float sum = job->bias ? sums[r][m] + to_float(job->bias[number]) : sums[r][m];
        from_float(sum, job->y[(input + m) * job->rows + number]);
      }
  }
}
