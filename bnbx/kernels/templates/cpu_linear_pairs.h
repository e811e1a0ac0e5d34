// The product of one row of bfloat16 numbers with 4-bit codes, by instructions that multiply pairs of
// them: half as many permutes and shifts as with floats. A level is the sum of two bfloat16, which has 16
// bits of it or more: less is lost than 1 / 200 of a rounding of the result. Instructions for pairs take
// subnormal numbers for zero, and zero times infinity would be NaN where an infinite number meets a level
// that one bfloat16 is enough for: rows with such numbers are multiplied as floats.

#if CODE_BITS == 4 && defined(TABLE_IN_REGISTERS) && defined(__AVX512BF16__)
#define PAIRS

// The levels, twice: of a word's last five bits, that is what an index counts, one is of the next code.
struct PairLevels {
  __m512i high, low;
};

static inline PairLevels load_pair_levels(const Tables* tables) {
  alignas(64) bfloat16 high[32], low[32];
  for (int i = 0; i < 32; ++i) {
    from_float(tables->levels[i % 16], high[i]);
    from_float(tables->levels[i % 16] - to_float(high[i]), low[i]);
  }
  return {_mm512_load_si512(high), _mm512_load_si512(low)};
}

// The row of x in the order of the codes: word w of a group's 64 bytes, shifted down by 4 v bits, is the
// code of its element v ^ 1.
static void lay_out_pairs(const Job* job, i64 input, bfloat16* to) {
  const bfloat16* x = job->x + input * job->columns;
  for (i64 group = 0; group < job->columns; group += GROUP)
    for (int v = 0; v < 4; ++v)
      for (int word = 0; word < 32; ++word) to[group + v * 32 + word] = x[group + word * 4 + (v ^ 1)];
}

static inline Floats multiply_pairs(Floats sum, __m512i levels, __m512i x) {
  return (Floats)_mm512_dpbf16_ps((__m512)sum, (__m512bh)levels, (__m512bh)x);
}

static inline __attribute__((always_inline)) Floats pair_products(const u8* codes, const bfloat16* x, const PairLevels& levels) {
  const __m512i words = _mm512_loadu_si512(codes);
  Floats high = {}, low = {};
#pragma GCC unroll 4
  for (int v = 0; v < 4; ++v) {
    const __m512i index = _mm512_srli_epi16(words, 4 * v), numbers = _mm512_loadu_si512(x + v * 32);
    high = multiply_pairs(high, _mm512_permutexvar_epi16(index, levels.high), numbers);
    low = multiply_pairs(low, _mm512_permutexvar_epi16(index, levels.low), numbers);
  }
  return high + low;
}

// Rows [first, last) of the weight times a row of x.
static void multiply_in_pairs(const Job* job, i64 input, i64 first, i64 last) {
  const PairLevels levels = load_pair_levels(job->parts.tables);
  const i64 columns = job->columns;
  const Lanes lanes = find_lanes(find_row(job, first));  // groups begin with a span: all rows have the same
  for (; first < last; ++first) {
    const Row row = find_row(job, first);
    Floats factor = PER == BLOCK ? Floats{} : fill(factor_at<Code>(job->parts, row.factor)), sum = {};
    for (i64 tile = 0; tile < columns; tile += TILE) {
      const i64 end = tile + TILE < columns ? tile + TILE : columns;
      Factors factors;
      find_factors(job->parts, row, tile, end, factors);
      const float* of_spans = factors.factor;
      for (i64 group = tile; group < end; group += GROUP, of_spans += SPANS) {
        const u8* codes = row.codes + group / 2;
        ask_ahead(codes);
        if (PER == BLOCK) factor = for_lanes(of_spans, lanes, 0);
        sum = multiply_add(pair_products(codes, (const bfloat16*)job->room + group, levels), factor, sum);
      }
    }
    const float all = job->bias ? sum_of(sum) + to_float(job->bias[first]) : sum_of(sum);
    from_float(all, job->y[input * job->rows + first]);
  }
}

// Where each row of the weight is made of whole groups, and there is nothing but a factor.
static bool in_pairs(const Job* job, i64 input) {
  if (Code::CENTERED || job->columns % GROUP) return false;
  const bfloat16* x = job->x + input * job->columns;
  u32 strange = 0;
  for (i64 i = 0; i < job->columns; ++i) {
    const u32 exponent = x[i].bits & 0x7f80u, rest = x[i].bits & 0x7fu;
    strange |= exponent == 0x7f80u || (exponent == 0 && rest != 0);
  }
  return !strange;
}

#endif
