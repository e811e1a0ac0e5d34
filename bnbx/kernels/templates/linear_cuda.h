// Products of a few rows of x with a quantized weight on CUDA. A warp takes ROWS rows of the weight at
// once, and each of its lanes SPAN neighbors of a row, whose codes it holds in registers; x waits in shared memory.
//
// Spans are counted from a multiple of SPAN in the flattened weight, at or before the row's first element.
// How far before is the row's phase; 0 in every row where the columns are a multiple of SPAN.

enum { SPAN = 32, HALF = SPAN / 2, TILE = LANES * SPAN };
enum { WORDS = SPAN * Code::BITS / 32 };  // of a span's codes
enum { LOAD = WORDS % 4 == 0 ? 4 : WORDS % 2 == 0 ? 2 : 1 };  // words that are loaded together

struct alignas(LOAD * 4) Together {
  u32 word[LOAD];
};

// Values by code in shared memory. Those of scales that are codes stay where they are: a lane asks for one
// of them for each span, long before it needs it.
struct Levels {
  float level[1 << Code::BITS];
};

DEVICE void load_levels(const Tables* tables, Levels& levels) {
  for (int i = threadIdx.x; i < (1 << Code::BITS); i += LANES * WARPS) levels.level[i] = tables->levels[i];
}

DEVICE const float* second_levels(const Parts& parts) { return Code::SCALE == SECOND ? parts.second_tables->levels : 0; }

// A row of the weight from its aligned beginning on: its elements are [phase, end).
struct Row {
  const u8* codes;
  i64 number, start, end;
  int phase;
  bool aligned;  // words can be loaded together
};

DEVICE Row find_row(const Parts& parts, i64 number, i64 columns) {
  const i64 first = PER == ROW ? (i64)0 : number * columns;
  Row row;
  row.number = number;
  row.phase = (int)(first % SPAN);
  row.start = first - row.phase;
  row.end = row.phase + columns;
  row.codes = parts.codes + (PER == ROW ? number * ((columns * Code::BITS + 7) / 8) : row.start / 8 * Code::BITS);
  row.aligned = ((unsigned long long)row.codes & (LOAD * 4 - 1)) == 0;
  return row;
}

DEVICE i64 block_of(const Row& row, i64 element) {
  return PER == ROW ? row.number : PER == TENSOR ? (i64)0 : (row.start + element) / Code::BLOCK;
}

// The codes from `element` on, the first one in the highest bits; what lies beyond the row is zero.
DEVICE void load_words(const Row& row, i64 element, u32 (&words)[WORDS]) {
  const u8* from = row.codes + element / 8 * Code::BITS;
  if (row.aligned && element + SPAN <= row.end) {
#pragma unroll
    for (int i = 0; i < WORDS; i += LOAD) *(Together*)(words + i) = *(const Together*)(from + 4 * i);
#pragma unroll
    for (int i = 0; i < WORDS; ++i) words[i] = __byte_perm(words[i], 0, 0x0123);
    return;
  }
  const i64 left = ((row.end - element) * Code::BITS + 7) / 8;
#pragma unroll
  for (int i = 0; i < WORDS; ++i) {
    words[i] = 0;
#pragma unroll
    for (int byte = 0; byte < 4; ++byte)
      if (4 * i + byte < left) words[i] |= (u32)from[4 * i + byte] << (24 - 8 * byte);
  }
}

DEVICE u32 code_at(const u32 (&words)[WORDS], int k) {
  const int word = k * Code::BITS / 32, down = 32 - Code::BITS - k * Code::BITS % 32;
  const u32 bits = down >= 0 ? words[word] >> down : words[word] << -down | words[(word + 1) % WORDS] >> (32 + down);
  return bits & ((1u << Code::BITS) - 1u);
}

// What a lane needs of a row for the products with SPAN neighbors.
enum { FACTORS = PER == BLOCK && Code::BLOCK < SPAN ? 2 : 1 };  // blocks that the neighbors are in
struct Span {
  alignas(LOAD * 4) u32 words[WORDS];
  float factor[FACTORS], middle[FACTORS];
};

DEVICE void load_span(const Parts& parts, const Row& row, i64 element, Span& span) {
  if (element >= row.end) return;
  load_words(row, element, span.words);
#pragma unroll
  for (int i = 0; i < FACTORS; ++i) {
    if (element + i * HALF >= row.end) continue;
    const i64 block = block_of(row, element + i * HALF);
    span.factor[i] = factor_at<Code>(parts, block, second_levels(parts));
    span.middle[i] = center_at<Code>(parts, block);
  }
}

// M rows of x, columns [tile - SPAN, tile + TILE) of them, zero where there are none. The place of a column is
// its remainder first: so that lanes that read, SPAN columns apart, read from different banks.
template <int M>
struct Inputs {
  float x[M][SPAN][LANES + 1];
};

// The same on its way there: what each thread brings.
enum { BROUGHT = (SPAN + TILE + LANES * WARPS - 1) / (LANES * WARPS) };

template <int M>
DEVICE void fetch_inputs(const Number* x, i64 inputs, i64 columns, i64 tile, Number (&brought)[M][BROUGHT]) {
#pragma unroll
  for (int m = 0; m < M; ++m)
#pragma unroll
    for (int j = 0; j < BROUGHT; ++j) {
      const int i = threadIdx.x + j * (LANES * WARPS);
      const i64 column = tile - SPAN + i;
      const bool there = i < SPAN + TILE && column >= 0 && column < columns && m < inputs;
      brought[m][j] = there ? x[m * columns + column] : Number{};
    }
}

template <int M>
DEVICE void put_inputs(const Number (&brought)[M][BROUGHT], Inputs<M>& to) {
#pragma unroll
  for (int m = 0; m < M; ++m)
#pragma unroll
    for (int j = 0; j < BROUGHT; ++j) {
      const int i = threadIdx.x + j * (LANES * WARPS);
      if (i < SPAN + TILE) to.x[m][i % SPAN][i / SPAN] = to_float(brought[m][j]);
    }
}

// The level of code k. Its place is in bytes, so that finding it takes a shift and a mask.
DEVICE float level_at(const Levels& levels, const u32 (&words)[WORDS], int k) {
  const int down = 32 - Code::BITS - k * Code::BITS % 32;  // bits below the code in its word; of two words, negative
  const u32 word = words[k * Code::BITS / 32], mask = ((1u << Code::BITS) - 1u) * 4u;
  const u32 place = down < 0 ? code_at(words, k) * 4u : (down >= 2 ? word >> (down >= 2 ? down - 2 : 0) : word << (2 - down & 3)) & mask;
  return *(const float*)((const char*)levels.level + place);
}

// Adds the products with a span of each row to sums. WHOLE: all of its elements are the rows'. x is zero where a
// row has no elements.
template <int M, bool SHIFTED, bool WHOLE>
DEVICE void add_spans(const Row (&rows)[ROWS], const Span (&spans)[ROWS], i64 element, const Levels& levels,
                      const Inputs<M>& inputs, float (&sums)[ROWS][M]) {
  const int lane = threadIdx.x % LANES;
  int low[ROWS], high[ROWS];
#pragma unroll
  for (int r = 0; r < ROWS; ++r) {
    low[r] = (int)(rows[r].phase > element ? rows[r].phase - element : 0);
    high[r] = (int)(rows[r].end - element < SPAN ? rows[r].end - element : SPAN);
  }
#pragma unroll
  for (int k = 0; k < SPAN; ++k)
#pragma unroll
    for (int r = 0; r < ROWS; ++r) {
      const float factor = spans[r].factor[k / HALF % FACTORS], middle = spans[r].middle[k / HALF % FACTORS];
      const float level = level_at(levels, spans[r].words, k);
      float w = Code::CENTERED ? fmaf(level, factor, middle) : level * factor;
      if (!WHOLE) w = k >= low[r] && k < high[r] ? w : 0.0f;
      const int place = SHIFTED ? (k - rows[r].phase) & (SPAN - 1) : k;
      const int at = lane + (SHIFTED && k < rows[r].phase ? 0 : 1);
#pragma unroll
      for (int m = 0; m < M; ++m) sums[r][m] = fmaf(w, inputs.x[m][place][at], sums[r][m]);
    }
}

// What the next tile needs is on its way while a tile is multiplied: memory takes longer to answer than that.
// Not where there are no registers for it: where rows are shifted, or a span is large; and not x, if it has more
// than two rows.
template <int M, bool SHIFTED>
DEVICE void multiply(const Parts& parts, i64 row_count, i64 columns, const Number* x, i64 inputs, const Number* bias, Number* y,
                     const Levels& levels, Inputs<M>& shared) {
  const int lane = threadIdx.x % LANES;
  const i64 end = columns + (SHIFTED ? SPAN : 0);
  constexpr bool AHEAD = !SHIFTED && WORDS + FACTORS <= 7, X_AHEAD = AHEAD && M <= 2;
  for (i64 first = (i64)blockIdx.x * WARPS * ROWS; first < row_count; first += (i64)gridDim.x * WARPS * ROWS) {
    const i64 number = first + threadIdx.x / LANES * ROWS;
    Row rows[ROWS];
    Span coming[ROWS] = {};
    Number brought[M][BROUGHT];
    float sums[ROWS][M] = {};
#pragma unroll
    for (int r = 0; r < ROWS; ++r) {
      rows[r] = find_row(parts, number + r < row_count ? number + r : row_count - 1, columns);
      if (AHEAD) load_span(parts, rows[r], lane * SPAN, coming[r]);
    }
    if (X_AHEAD) fetch_inputs<M>(x, inputs, columns, 0, brought);
    for (i64 tile = 0; tile < end; tile += TILE) {
      const i64 element = tile + lane * SPAN;
      Span spans[ROWS];
      bool whole = true;
      if (!X_AHEAD) fetch_inputs<M>(x, inputs, columns, tile, brought);
      __syncthreads();
      put_inputs<M>(brought, shared);
      __syncthreads();
#pragma unroll
      for (int r = 0; r < ROWS; ++r) {
        if (!AHEAD) load_span(parts, rows[r], element, coming[r]);
        spans[r] = coming[r];
        if (AHEAD && tile + TILE < end) load_span(parts, rows[r], element + TILE, coming[r]);
        whole = whole && element >= rows[r].phase && element + SPAN <= rows[r].end;
      }
      if (X_AHEAD && tile + TILE < end) fetch_inputs<M>(x, inputs, columns, tile + TILE, brought);
      if (whole) add_spans<M, SHIFTED, true>(rows, spans, element, levels, shared, sums);
      else add_spans<M, SHIFTED, false>(rows, spans, element, levels, shared, sums);
    }
#pragma unroll
    for (int r = 0; r < ROWS; ++r)
#pragma unroll
      for (int m = 0; m < M; ++m) {
        float sum = sums[r][m];
#pragma unroll
        for (int distance = LANES / 2; distance > 0; distance /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, distance);
        if (lane != 0 || number + r >= row_count || m >= inputs) continue;
        if (bias) sum += to_float(bias[number + r]);
        from_float(sum, y[m * row_count + number + r]);
      }
  }
}

// Columns [first, first + width) of the weight as numbers, with the bits that dequantizing gives.
extern "C" __global__ void __launch_bounds__(LANES * WARPS, 2)
bnbx_decode_columns(const i64 row_count, const i64 columns, const i64 first, const i64 width, Number* __restrict__ to, PARTS) {
  __shared__ Levels levels;
  load_levels(tables, levels);
  __syncthreads();
  GATHER_PARTS;
  for (i64 i = (i64)blockIdx.x * (LANES * WARPS) + threadIdx.x; i < row_count * width; i += (i64)gridDim.x * (LANES * WARPS)) {
    const Row row = find_row(parts, i / width, columns);
    const i64 element = row.phase + first + i % width;
    const i64 bit = element * Code::BITS;
    const int end = (int)(bit % 8) + Code::BITS;
    const u8* from = row.codes + bit / 8;
    const u32 pair = (u32)from[0] << 8 | (end > 8 ? (u32)from[1] : 0u);
    const float level = levels.level[pair >> (16 - end) & ((1u << Code::BITS) - 1u)];
    const i64 block = block_of(row, element);
    const float value = level * factor_at<Code>(parts, block, second_levels(parts));
    from_float(Code::CENTERED ? value + center_at<Code>(parts, block) : value, to[i]);
  }
}
