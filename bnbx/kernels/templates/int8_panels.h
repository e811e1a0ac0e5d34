// Many rows times a weight with vectors of 32 bytes and nothing that multiplies and adds bytes at once
// (AVX2): a tile of the weight is copied to where pairs of outputs lie beside one another.
//
// One stream of aligned vectors instead of one for each output: a third more products a second where the
// rows of a weight are 4096 codes apart. The copy pays from PANEL_LEAST rows on.

#if INT8_PANELS
enum { PANEL_ROWS = 4, PANEL_LEAST = 16, PANEL_CHUNK = 64 };  // rows: of x at a time; at least; with their sums kept

// Codes [0, count) of two outputs, a vector of each in turn, filled up with zeros.
static void copy_pair(const i8* first, const i8* second, i64 count, i8* to) {
  const i64 ahead = 2 * (second - first);  // the pair that is copied next
  i64 at = 0;
  for (; at + VECTOR <= count; at += VECTOR, to += 2 * VECTOR) {
    __builtin_prefetch(first + at + ahead);
    __builtin_prefetch(second + at + ahead);
    __builtin_memcpy(to, first + at, VECTOR);
    __builtin_memcpy(to + VECTOR, second + at, VECTOR);
  }
  if (at == count) return;
  __builtin_memset(to, 0, 2 * VECTOR);
  __builtin_memcpy(to, first + at, count - at);
  __builtin_memcpy(to + VECTOR, second + at, count - at);
}

// Adds to two outputs of ROWS rows. Sums are added to by written out instructions, since compilers move
// them between registers and memory when they choose.
template <int ROWS>
static __attribute__((noinline)) void add_pair(const i8* x, i64 stride, const i8* w, i64 count, i32 (*to)[TILE]) {
  Bytes sums[ROWS + ROWS % 2][2];
  UNROLL for (int r = 0; r < ROWS + ROWS % 2; ++r) sums[r][0] = sums[r][1] = no_bytes();
  for (i64 at = 0; at < count; at += VECTOR, w += 2 * VECTOR) {
    const Bytes first = load_bytes(w), second = load_bytes(w + VECTOR);
    UNROLL for (int r = 0; r < ROWS; ++r) {
      const Bytes codes = load_bytes(x + r * stride + at), a = products(first, codes), b = products(second, codes);
      asm volatile("vpaddd %1, %0, %0" : "+x"(sums[r][0]) : "x"(a));
      asm volatile("vpaddd %1, %0, %0" : "+x"(sums[r][1]) : "x"(b));
    }
  }
  UNROLL for (int r = 0; r < ROWS; r += 2) {
    i32 both[4] = {};
    fold(sums[r][0], sums[r][1], sums[r + 1][0], sums[r + 1][1], both);
    UNROLL for (int i = 0; i < 2 * (ROWS - r < 2 ? 1 : 2); ++i) to[r + i / 2][i % 2] += both[i];
  }
}

static inline i64 filled_up(i64 count) { return (count + VECTOR - 1) / VECTOR * VECTOR; }

static void copy_tile(const i8* const* weights, i64 at, i64 count, i8* pairs) {
  for (int c = 0; c < TILE; c += 2, pairs += 2 * filled_up(count))
    copy_pair(weights[c] + at, weights[c + 1] + at, count, pairs);
}

// TILE outputs of up to PANEL_ROWS rows: what codes [at, at + count) add.
template <int ROWS>
static void add_panel(const Product& job, i64 row, i64 at, i64 count, const i8* pairs, i32 (*sums)[TILE]) {
  const i64 filled = filled_up(count);
  const i8* x = job.x + row * job.stride + at;
  for (int c = 0; c < TILE; c += 2, pairs += 2 * filled)
    add_pair<ROWS>(x, job.stride, pairs, filled, (i32(*)[TILE])(sums[0] + c));
}

template <int ROWS>
static void finish_panel(const Product& job, i64 row, const Outputs& outputs, i64 at, const i32 (*sums)[TILE]) {
  FOR_NUMBER(job.number, (finish_tile<ROWS, Number>(job, row, outputs, at, sums)));
}

// Calls a function for up to PANEL_ROWS rows at a time.
#define FOR_PANELS(row, last, function, ...)                        \
  for (i64 r = row; r < last; r += PANEL_ROWS) switch (last - r) { \
    case 1: function<1>(job, r, __VA_ARGS__, sums + r - row); break; \
    case 2: function<2>(job, r, __VA_ARGS__, sums + r - row); break; \
    case 3: function<3>(job, r, __VA_ARGS__, sums + r - row); break; \
    default: function<4>(job, r, __VA_ARGS__, sums + r - row); \
  }

// TILE outputs of all rows. Where a row is longer than DEPTH, its parts are copied for each chunk of rows.
static __attribute__((noinline)) void multiply_panels(const Product& job, const Outputs& outputs, i64 output) {
  alignas(64) i8 pairs[TILE * DEPTH];
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
