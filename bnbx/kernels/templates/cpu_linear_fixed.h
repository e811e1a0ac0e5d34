// Products of rows of bfloat16 numbers with codes of up to 4 bits, by AVX2's products of 16-bit integers. To
// decode 64 codes to integers takes 10 shuffles where floats take 26, and one instruction multiplies 16 pairs. A
// row of x and a 4096 x 4096 weight take 0.75 ms on a thread of a Zen 3, and 1.5 as floats; four rows 1.9 and 2.9.
//
// Levels are integers of 16 bits, and so is x, with a power of 2 of its own for each group. What x would lose by that
// goes into a second integer, which is multiplied only where it matters: next to outliers. In all, about 1 / 40 of
// a rounding of the result is lost. Rows with numbers that are not finite, or too small, are multiplied as floats.

#if defined(PLANES_OF_16) && CODE_BITS <= 4
#define FIXED_POINT
typedef short i16;

enum { FIXED_ROWS = 32, FIXED_AT_ONCE = 4 };        // rows of x that are laid out at a time, and multiplied
enum { X_BITS = 14, LEVEL_MOST = 32767 };           // products of 4 pairs fit into 31 bits
static constexpr float FIXED_LOSS = 1.0f / 65536;  // of x, that may be lost

// Where they lie in the job's room: for each FIXED_AT_ONCE rows, group by group.
struct Fixed {
  i64* rows;           // how many there are
  i16 *high, *second;  // integers, and those of what these leave, in units of 2**-X_BITS
  float* unit;         // what 1 stands for
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

// The levels as integers, in two tables of bytes.
struct FixedLevels {
  __m256i low, high;
  float unit;
};

static inline float largest_of(const float* levels) {
  float largest = 0.0f;
  for (int i = 0; i < 1 << CODE_BITS; ++i) {
    const float size = __builtin_fabsf(levels[i]);
    if (!(size <= largest)) largest = size;  // also NaN, which stays
    if (largest != largest) break;
  }
  return largest;
}

// How far integers of levels are off. Where x is of one sign, that of all of them adds up: so the mean counts more.
static inline float loss_of(const float* levels, float inverse) {
  enum { COUNT = 1 << CODE_BITS, MEAN_COUNTS = 4 };
  float sum = 0.0f, squares = 0.0f;
  for (int i = 0; i < COUNT; ++i) {
    const float scaled = levels[i] * inverse, lost = scaled - __builtin_rintf(scaled);
    sum += lost, squares += lost * lost;
  }
  return (__builtin_fabsf(sum) / COUNT * MEAN_COUNTS + root(squares / COUNT)) / inverse;
}

// What levels are multiplied by: a power of 2, or what makes an integer of the largest one; whichever loses least.
static inline float fixed_scale(const float* levels) {
  enum { TRIED = 64, STEP_DOWN = 37 };  // the last of them costs 7 % of what integers tell apart
  const float largest = largest_of(levels);
  float best = float_of((254 + 14 - (bits_of(largest) >> 23)) << 23);  // the largest is 2**14 of them, or more
  if (best * largest > LEVEL_MOST) best /= 2.0f;
  float least = loss_of(levels, best);
  for (int i = 0; i < TRIED; ++i) {
    const float inverse = (LEVEL_MOST - i * STEP_DOWN) / largest, loss = loss_of(levels, inverse);
    if (loss < least) least = loss, best = inverse;
  }
  return best;
}

static inline FixedLevels load_fixed_levels(const float* levels) {
  const float inverse = fixed_scale(levels);
  alignas(16) u8 low[16] = {}, high[16] = {};
  for (int i = 0; i < 1 << CODE_BITS; ++i) {
    const int level = (int)__builtin_rintf(levels[i] * inverse);
    low[i] = (u8)level, high[i] = (u8)(level >> 8);
  }
  return {load_twice(low), load_twice(high), 1.0f / inverse};
}

// Of 4-bit codes in wide blocks, bytes stay where they are in memory; else they are ordered as in `load_pairs`.
enum { IN_PLACE = CODE_BITS == 4 && SPAN >= GROUP / 2 };

// The element of a group whose integer is number w of vector v.
static constexpr int fixed_element(int v, int w) {
  const int half = w / 8, byte = v % 2 * 8 + w % 8, of_pair = v / 2;
  if (IN_PLACE) return half * 32 + byte * 2 + of_pair;
  return (half * 4 + byte % 4) * 8 + byte / 4 * 2 + of_pair;
}

// A sum of products is made of elements from here on, 32 or 16.
static inline int first_of_sum(int lane) { return lane / 4 * 32 + (IN_PLACE ? 0 : lane % 2 * 16); }

static inline bool in_range(float x) { return x < 0x1p60f && x >= 0x1p-60f; }

// The bits of the largest magnitude of a group; those of something not finite, if there is any.
static inline u32 largest_bits(const float* x) {
  u32 largest = 0;
  for (int i = 0; i < GROUP; ++i) {
    const u32 size = bits_of(x[i]) & 0x7fffffffu;
    largest = size > largest ? size : largest;
  }
  return largest;
}

static inline Floats round_all(Floats x) { return (Floats)_mm256_round_ps((__m256)x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
static inline Floats size_of(Floats x) { return (Floats)((Ints)x & 0x7fffffff); }

static inline void put_fixed(const float* integers, i16* to) {
  i16 in_order[GROUP];
  for (int i = 0; i < GROUP; ++i) in_order[i] = (i16)(i32)integers[i];
#pragma GCC unroll 64
  for (int i = 0; i < GROUP; ++i) to[i] = in_order[fixed_element(i / 16, i % 16)];
}

// A group of a row; false where it must not be rounded. `both` is set where its second integers are needed.
static bool fix_group(const bfloat16* from, i16* high, i16* second, float& unit, u8& both) {
  alignas(64) float x[GROUP], first[GROUP], then[GROUP];
  for (int i = 0; i < GROUP; ++i) x[i] = to_float(from[i]);
  const u32 largest = largest_bits(x), exponent = largest >> 23;
  __builtin_memset(high, 0, GROUP * sizeof *high);
  __builtin_memset(second, 0, GROUP * sizeof *second);
  unit = 0.0f;
  if (!in_range(float_of(largest))) return largest == 0;
  unit = float_of((exponent + 1 - X_BITS) << 23);  // x is smaller than 2**X_BITS of them
  const float inverse = float_of((254 + X_BITS - 1 - exponent) << 23);
  Floats sum = {}, lost = {}, lost_then = {};
  for (int i = 0; i < GROUP; i += LANES) {
    const Floats scaled = load(x + i) * inverse, integers = round_all(scaled);
    const Floats left = (scaled - integers) * (float)(1 << X_BITS), more = round_all(left);
    store(integers, first + i), store(more, then + i);
    sum += size_of(scaled), lost += size_of(left), lost_then += size_of(left - more);
  }
  put_fixed(first, high);
  const float others = sum_of(sum) - float_of(largest) * inverse, bearable = FIXED_LOSS * others * (1 << X_BITS);
  if (sum_of(lost) <= bearable) return true;
  put_fixed(then, second);
  both = 1;
  return sum_of(lost_then) <= bearable;
}

// Rows [first, first + M) of those that are laid out; zeros for the rows that there are not. False where one must not be.
template <int M>
static bool fix_rows(const Job* job, const Fixed& to, i64 input, i64 first, i64 count) {
  const i64 groups = groups_of(job->columns);
  for (i64 group = 0; group < groups; ++group) {
    to.both[first * groups + group] = 0;
    for (i64 m = 0; m < M; ++m) {
      const i64 at = first * groups + group * M + m;
      i16 *high = to.high + at * GROUP, *second = to.second + at * GROUP;
      static const bfloat16 nothing[GROUP] = {};
      const bfloat16* x = m < count ? job->x + (input + first + m) * job->columns + group * GROUP : nothing;
      if (!fix_group(x, high, second, to.unit[at], to.both[first * groups + group])) return false;
    }
  }
  return true;
}

// Calls a function for the next FIXED_AT_ONCE rows, or for what is left of them.
#define FOR_FIXED(left, function, ...) \
  ((left) == 1 ? function<1>(__VA_ARGS__) : (left) == 2 ? function<2>(__VA_ARGS__) : function<FIXED_AT_ONCE>(__VA_ARGS__))

// Lays out rows of x from `input` on; how many. Each row of the weight has to be made of whole groups, with
// nothing but factors.
static i64 lay_out_fixed(const Job* job, i64 input) {
  const float largest = largest_of(job->parts.tables->levels);
  if (Code::CENTERED || job->columns % GROUP || !in_range(largest)) return 0;
  const Fixed to = find_fixed(job);
  const i64 left = job->inputs - input, most = left < FIXED_ROWS ? left : (i64)FIXED_ROWS;
  i64& rows = *to.rows;
  for (rows = 0; rows < most; rows += FIXED_AT_ONCE)
    if (!FOR_FIXED(most - rows, fix_rows, job, to, input, rows, most - rows)) return rows;
  return rows = most;
}

static inline Ints sum_products(const __m256i* levels, const i16* x) {
  const __m256i* numbers = (const __m256i*)x;
  return (Ints)_mm256_madd_epi16(levels[0], numbers[0]) + (Ints)_mm256_madd_epi16(levels[1], numbers[1]);
}

// The integers of a group's levels, in the order of `fixed_element`.
static inline void decode_fixed(const u8* codes, const FixedLevels& levels, __m256i (&w)[4]) {
  const __m256i pairs = IN_PLACE ? _mm256_loadu_si256((const __m256i*)codes) : load_pairs(codes), one = _mm256_set1_epi8((1 << CODE_BITS) - 1);
  const __m256i index[2] = {_mm256_and_si256(_mm256_srli_epi16(pairs, CODE_BITS), one), _mm256_and_si256(pairs, one)};
#pragma GCC unroll 2
  for (int i = 0; i < 2; ++i) {
    const __m256i low = _mm256_shuffle_epi8(levels.low, index[i]), high = _mm256_shuffle_epi8(levels.high, index[i]);
    w[2 * i] = _mm256_unpacklo_epi8(low, high), w[2 * i + 1] = _mm256_unpackhi_epi8(low, high);
  }
}

// Adds the products of a group with M rows of x, of which the first integers begin at `high`.
template <int M>
static inline __attribute__((always_inline)) void add_fixed(const __m256i (&w)[4], const i16* high, const i16* second, bool both,
                                                            const float* units, Floats factor, Floats (&sums)[M]) {
#pragma GCC unroll 4
  for (int m = 0; m < M; ++m, high += GROUP, second += GROUP) {
    Floats part = __builtin_convertvector(sum_products(w, high), Floats) + __builtin_convertvector(sum_products(w + 2, high + 32), Floats);
    if (both) {
      const Ints rest = sum_products(w, second) + sum_products(w + 2, second + 32);
      part = multiply_add(__builtin_convertvector(rest, Floats), fill(1.0f / (1 << X_BITS)), part);
    }
    sums[m] = multiply_add(part * (Floats)_mm256_broadcast_ss(units + m), factor, sums[m]);
  }
}

// Then they are read where they are: 1 / 30 of the time of one row of x.
enum { SCALES_ARE_FACTORS = PER == BLOCK && Code::SCALE == FLOAT32 && SPANS == 1 && (int)Code::BLOCK == (int)SPAN };

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
      __m256i w[4];
      __builtin_prefetch(codes + CODES_AHEAD);
      decode_fixed(codes, levels, w);
      if (PER == BLOCK) factor = for_lanes(of_spans, lanes, 0);
      add_fixed<M>(w, high, second, *both, units, factor, sums);
      codes += GROUP_BYTES, high += M * GROUP, second += M * GROUP, units += M, ++both;
    }
  }
  for (int m = 0; m < M && at + m < *fixed.rows; ++m) {
    const float sum = sum_of(sums[m]) * levels.unit;
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
