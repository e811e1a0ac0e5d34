// Many rows times a weight where nothing multiplies bytes and adds the products to 32 bits at once
// (AVX2): a tile of the weight is copied to where pairs of outputs lie beside one another.
//
// Aligned vectors in one stream instead of one for each output, and four rows of x for each instead of
// two: 512 rows take 123 ms instead of 165, at 4096 x 4096 on a Zen 3. The copy pays from PANEL_LEAST rows on.

#if INT8_PANELS
// Bytes of a pair's vectors; rows of x at a time; the fewest; those whose sums are kept.
enum { PAIR = 4 * VECTOR, PANEL_ROWS = 4, PANEL_LEAST = 16, PANEL_CHUNK = 64 };

// A vector of each of two outputs: their codes, then the magnitudes.
static inline void put_pair(const i8* first, const i8* second, i8* to) {
  const Bytes a = load_bytes(first), b = load_bytes(second);
  const Bytes made[4] = {a, b, _mm256_abs_epi8(a), _mm256_abs_epi8(b)};
  __builtin_memcpy(to, made, sizeof made);
}

// Codes [0, count) of two outputs. What fills up the last vectors meets zeros in x.
static void copy_pair(const i8* first, const i8* second, i64 count, i8* to) {
  const i64 ahead = 2 * (second - first);  // the pair that is copied next
  i64 at = 0;
  for (; at + VECTOR <= count; at += VECTOR, to += PAIR) {
    __builtin_prefetch(first + at + ahead);
    __builtin_prefetch(second + at + ahead);
    put_pair(first + at, second + at, to);
  }
  if (at == count) return;
  i8 rest[2][VECTOR] = {};
  __builtin_memcpy(rest[0], first + at, count - at);
  __builtin_memcpy(rest[1], second + at, count - at);
  put_pair(rest[0], rest[1], to);
}

static inline i64 filled_up(i64 count) { return (count + VECTOR - 1) / VECTOR * VECTOR; }

static void copy_tile(const i8* const* weights, i64 at, i64 count, i8* pairs) {
  for (int c = 0; c < TILE; c += 2, pairs += filled_up(count) / VECTOR * PAIR)
    copy_pair(weights[c] + at, weights[c + 1] + at, count, pairs);
}

// Adds to two outputs of ROWS rows. Written out: compilers move the sums between registers and memory
// when they choose; and with each step for both outputs at once and the weight's signs from memory,
// there are 10 % more products a second than with one output after the other.
template <int ROWS>
static __attribute__((noinline)) void add_pair(const i8* x, i64 stride, const i8* w, i64 count, i32 (*to)[TILE]) {
  enum { EVEN = ROWS + ROWS % 2 };
  Bytes sums[EVEN][2];
  UNROLL for (int r = 0; r < EVEN; ++r) sums[r][0] = sums[r][1] = no_bytes();
  const Bytes ones = _mm256_set1_epi16(1);
  for (i64 at = 0; at < count; at += VECTOR, w += PAIR) {
    const Bytes *signs = (const Bytes*)w, first = signs[2], second = signs[3];
    UNROLL for (int r = 0; r < ROWS; ++r) {
      Bytes a, b = load_bytes(x + r * stride + at);
      asm volatile(
          "vpsignb %4, %3, %2\n\tvpsignb %5, %3, %3\n\t"
          "vpmaddubsw %2, %6, %2\n\tvpmaddubsw %3, %7, %3\n\t"
          "vpmaddwd %8, %2, %2\n\tvpmaddwd %8, %3, %3\n\t"
          "vpaddd %2, %0, %0\n\tvpaddd %3, %1, %1"
          : "+&x"(sums[r][0]), "+&x"(sums[r][1]), "=&x"(a), "+&x"(b)
          : "m"(signs[0]), "m"(signs[1]), "x"(first), "x"(second), "x"(ones));
    }
  }
  UNROLL for (int r = 0; r < ROWS; r += 2) {
    i32 four[4] = {};
    fold(sums[r][0], sums[r][1], sums[r + 1][0], sums[r + 1][1], four);
    UNROLL for (int i = 0; i < 4 && r + i / 2 < ROWS; ++i) to[r + i / 2][i % 2] += four[i];
  }
}

// A tile's outputs of up to PANEL_ROWS rows: what codes [at, at + count) add.
template <int ROWS>
static void add_panel(const Product& job, i64 row, i64 at, i64 count, const i8* pairs, i32 (*sums)[TILE]) {
  const i64 filled = filled_up(count);
  const i8* x = job.x + row * job.stride + at;
  for (int c = 0; c < TILE; c += 2, pairs += filled / VECTOR * PAIR)
    add_pair<ROWS>(x, job.stride, pairs, filled, (i32(*)[TILE])(sums[0] + c));
}

template <int ROWS>
static void finish_panel(const Product& job, i64 row, const Outputs& outputs, i64 at, const i32 (*sums)[TILE]) {
  FOR_NUMBER(job.number, (finish_tile<ROWS, Number>(job, row, outputs, at, sums)));
}

// Calls a function for PANEL_ROWS rows at a time, and for what is left.
#define FOR_PANELS(row, last, function, ...)                           \
  for (i64 r = row; r < last; r += PANEL_ROWS) {                       \
    switch (last - r) {                                                \
      case 1: function<1>(job, r, __VA_ARGS__, sums + r - row); break; \
      case 2: function<2>(job, r, __VA_ARGS__, sums + r - row); break; \
      case 3: function<3>(job, r, __VA_ARGS__, sums + r - row); break; \
      default: function<4>(job, r, __VA_ARGS__, sums + r - row);       \
    }                                                                  \
  }

// A tile's outputs of all rows. Where rows are longer than DEPTH, parts are copied for each chunk of rows.
static __attribute__((noinline)) void multiply_panels(const Product& job, const Outputs& outputs, i64 output) {
  alignas(64) i8 pairs[TILE / 2 * DEPTH / VECTOR * PAIR];  // 128 KiB, in the second cache
  alignas(64) i32 sums[PANEL_CHUNK][TILE];
  const i8* const* weights = outputs.weights + output;
  gather_weights(job, weights, outputs.outliers + output * job.outliers);
  for (i64 row = 0; row < job.rows; row += PANEL_CHUNK) {
    const i64 last = row + PANEL_CHUNK < job.rows ? row + PANEL_CHUNK : job.rows;
    __builtin_memset(sums, 0, sizeof sums);
    for (i64 at = 0; at < job.depth; at += DEPTH) {
      const i64 count = job.depth - at < DEPTH ? job.depth - at : DEPTH;
      if (row == 0 || job.depth > DEPTH) copy_tile(weights, at, count, pairs);
      FOR_PANELS(row, last, add_panel, at, count, pairs)
    }
    FOR_PANELS(row, last, finish_panel, outputs, output)
  }
}
#endif
