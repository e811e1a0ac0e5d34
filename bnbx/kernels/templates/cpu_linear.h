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

struct Job {
  Parts parts;
  i64 rows, columns;   // of the weight
  i64 inputs;          // rows of x
  const Number* x;     // inputs * columns
  const Number* bias;  // rows of them, or null
  Number* y;           // inputs * rows; or the columns that are decoded
  i64 first, last;     // which those are, [first, last)
  float* room;         // for MOST_INPUTS rows of x, laid out for each phase: see bnbx_room_for
};

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

extern "C" i64 bnbx_room_for(i64 columns) {
  return ALIGNMENT / phase_step(columns) * MOST_INPUTS * stride_of(columns);
}

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

// What the levels of a row's elements [from, to) are multiplied by, and what is added then.
struct Factors {
  float factor[MOST_FACTORS], center[Code::CENTERED ? MOST_FACTORS : 1];
};

static inline void find_factors(const Parts& parts, const Row& row, i64 from, i64 to, Factors& factors) {
  if (PER != BLOCK) return;
  const i64 per_block = Code::BLOCK / SPAN;
  const i64 first = (row.start + from) / SPAN, count = (row.start + to - 1) / SPAN + 1 - first;
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

// Adds the products of a group's levels in w with M rows of x to total. Of a group that is not WHOLE, only
// elements [low, high) are the row's.
template <int M, int CHAINS, bool WHOLE>
static inline __attribute__((always_inline)) void add_group(
    Floats (&w)[VECTORS], const float* x, const float* factors, const float* centers, const Lanes& lanes, int low,
    int high, Floats factor, Floats center, Floats (&total)[M][CHAINS]) {
  if (M == 1 && WHOLE && STEP != LANES && !Code::CENTERED) {  // a lane has one factor: it is for the sum
    Floats part[2] = {w[0] * load(x), w[1] * load(x + LANES)};
#pragma GCC unroll 8
    for (int v = 2; v < VECTORS; ++v) part[v % 2] = multiply_add(w[v], load(x + v * LANES), part[v % 2]);
    if (PER == BLOCK) factor = for_lanes(factors, lanes, 0);
    total[0][0] = multiply_add(part[0] + part[1], factor, total[0][0]);
    return;
  }
#pragma GCC unroll 16
  for (int v = 0; v < VECTORS; ++v) {
    if (PER == BLOCK) factor = for_lanes(factors, lanes, v);
    if (PER == BLOCK && Code::CENTERED) center = for_lanes(centers, lanes, v);
    w[v] = Code::CENTERED ? multiply_add(w[v], factor, center) : w[v] * factor;
    if (!WHOLE) w[v] = cut(w[v], lanes, v, low, high);
#pragma GCC unroll 4
    for (int m = 0; m < M; ++m)
      total[m][v % CHAINS] = multiply_add(w[v], load(x + (v * M + m) * LANES), total[m][v % CHAINS]);
  }
}

// Adds the products of M rows of x with a row's elements [from, to) to sums. `from` is a multiple of
// GROUP; x is laid out for the row's phase, and begins there.
template <int M>
static inline void add_products(const Parts& parts, const Row& row, i64 from, i64 to, const float* x,
                                const Levels& levels, float* sums) {
  enum { CHAINS = M < 4 ? 4 : 2 };  // of additions that need not wait for each other
  Factors factors;
  find_factors(parts, row, from, to, factors);
  const Lanes lanes = find_lanes(row);
  Floats factor = {}, center = {};
  if (PER != BLOCK) {
    factor = fill(factor_at<Code>(parts, row.factor));
    center = fill(center_at<Code>(parts, row.factor));
  }
  Floats total[M][CHAINS] = {};
  for (i64 group = from; group < to; group += GROUP, x += GROUP * M) {
    const float* here = factors.factor + (group - from) / SPAN;
    const float* center_here = factors.center + (Code::CENTERED ? (group - from) / SPAN : 0);
    const i64 low = row.phase - group, high = row.end - group;
    const u8* codes = row.codes + group / 8 * CODE_BITS;
    Floats w[VECTORS];
    if (low <= 0 && high >= GROUP) {
      decode_group(codes, levels, w);
      add_group<M, CHAINS, true>(w, x, here, center_here, lanes, 0, GROUP, factor, center, total);
    } else {
      const int begin = low > 0 ? (int)low : 0, end = high < GROUP ? (int)high : (int)GROUP;
      decode_group(load_part(codes, end).codes, levels, w);
      add_group<M, CHAINS, false>(w, x, here, center_here, lanes, begin, end, factor, center, total);
    }
  }
#pragma GCC unroll 4
  for (int m = 0; m < M; ++m) {
    Floats sum = total[m][0];
#pragma GCC unroll 4
    for (int c = 1; c < CHAINS; ++c) sum += total[m][c];
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
