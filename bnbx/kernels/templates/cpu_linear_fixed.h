// Products of rows of x with levels that are integers (cpu_linear_integers.h), by products of 16 bits: an instruction of
// AVX2 multiplies 16 pairs. A row of bfloat16 and a 4096 x 4096 weight of nf4 take 0.75 ms on a thread of a
// Zen 3, and 1.5 as floats; four rows 1.9 and 2.9. With AVX-512 on an Intel processor, where an instruction for pairs of
// bfloat16 takes as long as two others, they take 0.9 ms on an Emerald Rapids, and 1.8 in such pairs (cpu_linear_pairs.h).
//
// x is made of integers too, with a power of 2 of its own for each group. What it would lose by that goes into second
// integers, which are multiplied only where they matter: in bfloat16, next to outliers. A group that loses more than
// a few of its numbers even so is multiplied as floats, and so are those with numbers that are not finite or of a size
// beyond in_range.

#ifdef FIXED_POINT

enum { FIXED_ROWS = 32, FIXED_AT_ONCE = 4 };  // rows of x that are laid out at a time, and multiplied
enum { X_BITS = 14 };                         // of x: its products with four pairs of levels fit into 31 bits
// A number is lost that is off by more than this part of itself: one of bfloat16 is as good as exact, of others as good as
// in a sum of floats. One of so many may be, among those that are not zero and share a scale: a normal distribution
// has fewer, near zero. The others are larger, so that these count little: but not if the largest alone were kept,
// which a weight may leave out, or in a block whose scale makes little of what is kept in another.
static constexpr float bearable_loss(const bfloat16*) { return 0x1p-12f; }
static constexpr float bearable_loss(const void*) { return 0x1p-20f; }
enum { KEPT_FOR_LOST = 16 };

// Where they lie in the job's room: for each FIXED_AT_ONCE rows, group by group.
struct Fixed {
  i64* rows;           // how many there are
  i16 *high, *second;  // integers, and those of what these leave, in units of 2**-X_BITS
  float* unit;         // what 1 stands for, of x times a level
  u8* both;            // whether second integers are needed
};

static inline i64 groups_of(i64 columns) { return columns / GROUP; }

// Rows that there is room for.
static inline i64 fixed_rows(i64 inputs) {
  return inputs < FIXED_ROWS ? (inputs + FIXED_AT_ONCE - 1) / FIXED_AT_ONCE * FIXED_AT_ONCE : (i64)FIXED_ROWS;
}

static inline i64 room_for_fixed(i64 columns, i64 inputs) {
  return 16 + fixed_rows(inputs) * (columns + 2 * groups_of(columns));
}

static inline Fixed find_fixed(const Job* job) {
  const i64 numbers = fixed_rows(job->inputs) * job->columns, groups = numbers / GROUP;
  i16* high = (i16*)(job->room + 16);
  float* unit = (float*)(high + 2 * numbers);
  return {(i64*)job->room, high, high + numbers, unit, (u8*)(unit + groups)};
}

// The bits of the largest magnitude of a group; those of something not finite, if there is any.
static inline u32 largest_bits(const float* x) {
  u32 largest = 0;
  for (int i = 0; i < GROUP; ++i) {
    const u32 size = bits_of(x[i]) & 0x7fffffffu;
    largest = size > largest ? size : largest;
  }
  return largest;
}

static inline Floats size_of(Floats x) { return (Floats)((Ints)x & 0x7fffffff); }

static inline void put_fixed(const float* integers, i16* to) {
  i16 in_order[GROUP];
  for (int i = 0; i < GROUP; ++i) in_order[i] = (i16)(i32)integers[i];
#pragma GCC unroll 128
  for (int i = 0; i < GROUP; ++i) to[i] = in_order[fixed_element(i / WORDS, i % WORDS)];
}

// Which lanes are lost, as -1.
static inline Ints are_lost(Floats left, Floats x) { return (Ints)(size_of(left) > size_of(x) * bearable_loss((const Number*)0)); }

static inline int count_of(Ints lost) {
  int count = 0;
  for (int l = 0; l < LANES; ++l) count -= lost[l];
  return count;
}

// A group of a row; false where it must not be rounded. `both` is set where its second integers are needed.
static bool fix_group(const Number* from, float level, i16* high, i16* second, float& unit, u8& both) {
  alignas(64) float x[GROUP], first[GROUP], then[GROUP];
  for (int i = 0; i < GROUP; ++i) x[i] = to_float(from[i]);
  const u32 largest = largest_bits(x), exponent = largest >> 23;
  __builtin_memset(high, 0, GROUP * sizeof *high);
  __builtin_memset(second, 0, GROUP * sizeof *second);
  unit = 0.0f;
  if (!in_range(float_of(largest))) return largest == 0;
  const float step = float_of((exponent + 1 - X_BITS) << 23);  // x is smaller than 2**X_BITS of them
  const float inverse = float_of((254 + X_BITS - 1 - exponent) << 23), finer = 1 << X_BITS;
  unit = step * level;
  bool good = true, good_then = true;
  for (int start = 0; start < GROUP; start += SPAN) {
    Ints there = {}, lost = {}, lost_then = {};
    for (int i = start; i < start + SPAN; i += LANES) {  // not in units, which may be too large for a number to be seen
      const Floats number = load(x + i), integers = round_all(number * inverse), left = number - integers * step;
      const Floats more = round_all(left * inverse * finer);
      store(integers, first + i), store(more, then + i);
      there += (Ints)(size_of(number) > 0.0f);
      lost += are_lost(left, number), lost_then += are_lost(left - more * (step / finer), number);
    }
    const int most = count_of(there) / KEPT_FOR_LOST;
    good &= count_of(lost) <= most, good_then &= count_of(lost_then) <= most;
  }
  put_fixed(first, high);
  if (good) return true;
  put_fixed(then, second);
  both = 1;
  return good_then;
}

// Rows [first, first + M) of those that are laid out; zeros for the rows that there are not. False where one must not be.
template <int M>
static bool fix_rows(const Job* job, const Fixed& to, float level, i64 input, i64 first, i64 count) {
  const i64 groups = groups_of(job->columns);
  for (i64 group = 0; group < groups; ++group) {
    to.both[first * groups + group] = 0;
    for (i64 m = 0; m < M; ++m) {
      const i64 at = first * groups + group * M + m;
      i16 *high = to.high + at * GROUP, *second = to.second + at * GROUP;
      static const Number nothing[GROUP] = {};
      const Number* x = m < count ? job->x + (input + first + m) * job->columns + group * GROUP : nothing;
      if (!fix_group(x, level, high, second, to.unit[at], to.both[first * groups + group])) return false;
    }
  }
  return true;
}

// Calls a function for the next FIXED_AT_ONCE rows, or for what is left of them.
#define FOR_FIXED(left, function, ...) \
  ((left) == 1 ? function<1>(__VA_ARGS__) : (left) == 2 ? function<2>(__VA_ARGS__) : function<FIXED_AT_ONCE>(__VA_ARGS__))

// Each row of the weight has to be made of whole groups, with nothing but factors.
static bool can_be_fixed(const Tables* tables, i64 columns) {
  return !Code::CENTERED && columns % GROUP == 0 && are_fixed(tables->levels);
}

// Lays out rows of x from `input` on; how many.
static i64 lay_out_fixed(const Job* job, i64 input) {
  if (!can_be_fixed(job->parts.tables, job->columns)) return 0;
  const Fixed to = find_fixed(job);
  const float level = load_fixed_levels(job->parts.tables->levels).unit;
  const i64 left = job->inputs - input, most = left < FIXED_ROWS ? left : (i64)FIXED_ROWS;
  i64& rows = *to.rows;
  for (rows = 0; rows < most; rows += FIXED_AT_ONCE)
    if (!FOR_FIXED(most - rows, fix_rows, job, to, level, input, rows, most - rows)) return rows;
  return rows = most;
}

// Of two vectors of levels: four products in each sum.
static inline Ints sum_products(const Words* levels, const i16* x) {
  const Words* numbers = (const Words*)x;
#ifdef EIGHT_LANES
  return (Ints)_mm256_madd_epi16(levels[0], _mm256_loadu_si256(numbers)) + (Ints)_mm256_madd_epi16(levels[1], _mm256_loadu_si256(numbers + 1));
#else
  const __m512i one = _mm512_dpwssd_epi32(_mm512_setzero_si512(), levels[0], _mm512_loadu_si512(numbers));
  return (Ints)_mm512_dpwssd_epi32(one, levels[1], _mm512_loadu_si512(numbers + 1));
#endif
}

// Adds the products of a group with M rows of x, of which the first integers begin at `high`.
template <int M>
static inline __attribute__((always_inline)) void add_fixed(const Words (&w)[4], const i16* high, const i16* second, bool both,
                                                            const float* units, Floats factor, Floats (&sums)[M]) {
#pragma GCC unroll 4
  for (int m = 0; m < M; ++m, high += GROUP, second += GROUP) {
    Floats part = __builtin_convertvector(sum_products(w, high), Floats) + __builtin_convertvector(sum_products(w + 2, high + 2 * WORDS), Floats);
    if (both) {
      const Ints rest = sum_products(w, second) + sum_products(w + 2, second + 2 * WORDS);
      part = multiply_add(__builtin_convertvector(rest, Floats), fill(1.0f / (1 << X_BITS)), part);
    }
    sums[m] = multiply_add(part * broadcast(units + m), factor, sums[m]);
  }
}

// Then they are read where they are: 1 / 30 of the time of one row of x.
enum { SCALES_ARE_FACTORS = PER == BLOCK && Code::SCALE == FLOAT32 && (int)Code::BLOCK == (int)SPAN && (SPANS == 1 || (int)LANES == 16) };

// The factors of a group by the lanes of its sums; nothing else is read.
static inline Floats for_sums(const float* of_spans, const Lanes& lanes) {
#ifdef EIGHT_LANES
  return for_lanes(of_spans, lanes, 0);
#else
  return permute((Floats)_mm512_maskz_loadu_ps((1 << SPANS) - 1, of_spans), lanes.span);
#endif
}

// Row `number` of the weight times M of the rows that are laid out, those from `at` on.
template <int M>
static void multiply_row_fixed(const Job* job, const Fixed& fixed, const FixedLevels& levels, const Lanes& lanes, i64 input, i64 at, i64 number) {
  const i64 columns = job->columns, groups = groups_of(columns);
  const Row row = find_row(job, number);
  Floats factor = PER == BLOCK ? Floats{} : fill(factor_at<Code>(job->parts, row.factor)), sums[M] = {};
  const i16 *high = fixed.high + at * columns, *second = fixed.second + at * columns;
  const float* units = fixed.unit + at * groups;
  const u8 *codes = row.codes, *both = fixed.both + at * groups;
  for (i64 tile = 0; tile < columns; tile += TILE) {
    const i64 end = tile + TILE < columns ? tile + TILE : columns;
    Factors factors;
    const float* of_spans = factors.factor;
    if (SCALES_ARE_FACTORS) of_spans = (const float*)job->parts.scale + (row.start + tile) / SPAN;
    else find_factors(job->parts, row, tile, end, factors);
    for (i64 group = tile; group < end; group += GROUP, of_spans += SPANS) {
      Words w[4];
      ask_ahead(codes);
      decode_fixed(codes, levels, w);
      if (PER == BLOCK) factor = for_sums(of_spans, lanes);
      add_fixed<M>(w, high, second, *both, units, factor, sums);
      codes += GROUP_BYTES, high += M * GROUP, second += M * GROUP, units += M, ++both;
    }
  }
  for (int m = 0; m < M && at + m < *fixed.rows; ++m) {
    const float sum = sum_of(sums[m]);
    from_float(job->bias ? sum + to_float(job->bias[number]) : sum, job->y[(input + at + m) * job->rows + number]);
  }
}

// Rows [first, last) of the weight times the rows of x that are laid out, `input` and those after it.
static void multiply_fixed(const Job* job, i64 input, i64 first, i64 last) {
  const FixedLevels levels = load_fixed_levels(job->parts.tables->levels);
  const Fixed fixed = find_fixed(job);
  Lanes lanes = {};
  for (int l = 0; l < LANES; ++l) lanes.span[l] = first_of_sum(l) / (int)SPAN;
  for (; first < last; first += ROWS_AT_ONCE) {
    const i64 end = last - first < ROWS_AT_ONCE ? last : first + ROWS_AT_ONCE;
    for (i64 at = 0; at < *fixed.rows; at += FIXED_AT_ONCE)
      for (i64 number = first; number < end; ++number)
        FOR_FIXED(*fixed.rows - at, multiply_row_fixed, job, fixed, levels, lanes, input, at, number);
  }
}
#endif
