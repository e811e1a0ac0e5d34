// products with a quantized weight: 4-bit codes, blocks of 64, quantized scales, bfloat16 numbers
// Rendered by bnbx; change the templates, not this file.

// What numbers.h asks of a target: CUDA.

#define DEVICE __device__ __forceinline__ static
#define DEVICE_MEMBER __device__ __forceinline__
DEVICE unsigned int bits_of(float x) { return __float_as_uint(x); }
DEVICE float float_of(unsigned int bits) { return __uint_as_float(bits); }
DEVICE float root(float x) { return sqrtf(x); }
DEVICE double root64(double x) { return sqrt(x); }
DEVICE float fused(float a, float b, float c) { return fmaf(a, b, c); }

// Numbers, as C++ and CUDA kernels share them. The target defines before this: DEVICE (how a function
// is declared), bits_of and float_of (a float's bits), root and root64 (correctly rounded square
// roots), and fused (a * b + c, rounded once).

typedef unsigned char u8;
typedef signed char i8;
typedef unsigned short u16;
typedef int i32;
typedef unsigned int u32;
typedef long long i64;

// ---- storage types of parameters and gradients: rounded to nearest even, NaN kept

struct bfloat16 { u16 bits; };
struct float16 { u16 bits; };

DEVICE float to_float(float x) { return x; }

DEVICE float to_float(bfloat16 x) { return float_of((u32)x.bits << 16); }

DEVICE float to_float(float16 x) {
  const u32 magnitude = (u32)(x.bits & 0x7fffu) << 13;
  // 2**112 moves the exponent from bias 15 to bias 127, subnormals included.
  const float finite = float_of(magnitude) * float_of(0x77800000u);
  const bool special = (x.bits & 0x7c00u) == 0x7c00u;
  const u32 bits = special ? (magnitude | 0x7f800000u) : bits_of(finite);
  return float_of(bits | ((u32)(x.bits & 0x8000u) << 16));
}

DEVICE void from_float(float x, float& to) { to = x; }

DEVICE void from_float(float x, bfloat16& to) {
  const u32 bits = bits_of(x);
  const u32 rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  to.bits = (u16)((bits & 0x7fffffffu) > 0x7f800000u ? 0x7fc0u : rounded);
}

DEVICE void from_float(float x, float16& to) {
  const u32 bits = bits_of(x);
  const u32 magnitude = bits & 0x7fffffffu;
  // Below 2**-14, adding 0.5 makes the addition itself round to multiples of 2**-24.
  const u32 subnormal = bits_of(float_of(magnitude) + 0.5f) - 0x3f000000u;
  const u32 normal = (magnitude + 0xc8000fffu + ((magnitude >> 13) & 1u)) >> 13;
  u32 half = magnitude < 0x38800000u ? subnormal : normal;
  half = magnitude >= 0x477ff000u ? 0x7c00u : half;
  half = magnitude > 0x7f800000u ? 0x7e00u : half;
  to.bits = (u16)(half | ((bits >> 16) & 0x8000u));
}

// ---- what a rule's statements work on: a Number, which is a float, or several where a target has them

template <class Stored>
DEVICE void rule_read(const Stored* from, float& x) { x = to_float(*from); }

template <class Stored>
DEVICE void rule_write(float x, Stored* to) { from_float(x, *to); }

// ---- functions of the rule language

DEVICE float rule_fma(float a, float b, float c) { return fused(a, b, c); }    // a * b + c
DEVICE float rule_fms(float a, float b, float c) { return fused(a, b, -c); }   // a * b - c
DEVICE float rule_fnma(float a, float b, float c) { return fused(-a, b, c); }  // c - a * b
DEVICE float rule_where(bool condition, float yes, float no) { return condition ? yes : no; }
DEVICE float rule_sqrt(float x) { return root(x); }
DEVICE float rule_abs(float x) { return float_of(bits_of(x) & 0x7fffffffu); }
// The sign bit on a one: vectorized, one comparison and not three.
DEVICE float rule_sign(float x) { return x < 0.0f || x > 0.0f ? float_of((bits_of(x) & 0x80000000u) | 0x3f800000u) : x; }
DEVICE float rule_min(float a, float b) { return a < b ? a : b; }
DEVICE float rule_max(float a, float b) { return a > b ? a : b; }

DEVICE double rule_where(bool condition, double yes, double no) { return condition ? yes : no; }
DEVICE double rule_sqrt(double x) { return root64(x); }
DEVICE double rule_abs(double x) { return x < 0.0 ? -x : x + 0.0; }  // the sum makes -0 a 0
DEVICE double rule_sign(double x) { return x > 0.0 ? 1.0 : (x < 0.0 ? -1.0 : x); }
DEVICE double rule_min(double a, double b) { return a < b ? a : b; }
DEVICE double rule_max(double a, double b) { return a > b ? a : b; }

// Quantized states, as C++ and CUDA kernels share them.

// The tables of one codebook; see bnbx/kernels/codebook.py, which packs them.
struct Tables {
  float levels[256];      // value by code, over the unit
  u8 planes[4][256];      // the same, byte by byte
  u8 order[256];          // code by rank
  float thresholds[256];  // ascending, padded with infinity
  u32 turn[16];           // these six: see Segments in codebook.py
  float slope[16], offset[16], high[16];
  u8 lower[16];
  u32 cuts[8];
  u32 entries[1];  // as many as the codebook needs
};

// What a block's largest magnitude (as float bits) makes of the block. NaN or infinity: the block
// reads as NaN from now on. Below the smallest normal number, or without a finite inverse: the block
// is zero. Otherwise the codes are those of x * inverse, in which absmax becomes the table's unit.
struct Scale {
  float absmax, inverse;
};

template <class Type>
DEVICE Scale make_scale(u32 largest) {
  Scale scale = {largest >= 0x7f800000u ? float_of(0x7fc00000u) : 0.0f, 0.0f};
  if (largest < 0x00800000u || largest >= 0x7f800000u) return scale;
  const float inverse = Type::UNIT / float_of(largest);
  if (bits_of(inverse) < 0x7f800000u) scale.absmax = float_of(largest), scale.inverse = inverse;
  return scale;
}

// Where the search for x looks, and what it adds to the entry found there: an exact search, since
// each entry carries over just past the one threshold in its bucket. See `Buckets` in codebook.py.
struct Place {
  u32 entry, low;
};

template <class Type>
DEVICE Place find_place(float x) {
  const u32 mask = (1u << Type::SHIFT) - 1u;
  const u32 bits = bits_of(x);
  // A codebook without negative thresholds has one answer for all negative x, that of 0.
  u32 a = Type::SIGNED ? bits & 0x7fffffffu : (i32)bits > 0 ? bits : 0u;
  a = a < Type::CEILING ? a : Type::CEILING;
  const u32 small = a < 1u ? a : 1u;
  const u32 w = a < Type::FLOOR ? small : a - Type::FLOOR + (1u << Type::SHIFT);
  const u32 negative = Type::SIGNED ? bits >> 31 : 0u;
  const Place place = {(w >> Type::SHIFT) + negative * Type::HALF, (w & mask) ^ (negative ? mask : 0u)};
  return place;
}

// The number of thresholds below x, by halving, for codebooks without such entries.
DEVICE u32 count_thresholds(float x, const float* thresholds) {
  u32 rank = 0;
  for (u32 step = 128; step > 0; step >>= 1) rank += thresholds[rank + step - 1] < x ? step : 0;
  return rank;
}

template <class Type>
DEVICE u32 find_rank(float x, const u32* entries, const float* thresholds) {
  if (Type::SHIFT == 0) return count_thresholds(x, thresholds);
  const Place place = find_place<Type>(x);
  return (entries[place.entry] + place.low) >> Type::SHIFT;
}

template <class Type>
DEVICE u8 encode(float x, const u32* entries, const float* thresholds, const u8* order) {
  const u32 rank = find_rank<Type>(x, entries, thresholds);
  return (u8)(Type::ORDERED ? rank : order[rank]);
}

// The parts of a tensor; see bnbx/kernels/encoding.py. Those that an encoding lacks are null.
struct Parts {
  u8* codes;
  void* scale;
  float* center;
  float* tensor_scale;
  float* second_scale;
  float* mean;
  const Tables* tables;         // of the codes
  const Tables* second_tables;  // of quantized scales
};

#define PARTS u8* codes, void* scale, float* center, float* tensor_scale, float* second_scale, float* mean, const Tables* tables, const Tables* second_tables
#define GATHER_PARTS const Parts parts = {codes, scale, center, tensor_scale, second_scale, mean, tables, second_tables}

// Scales of blocks, as C++ and CUDA kernels share them: how they are found, kept and read.
// bnbx/kernels/coding_reference.py says the same with torch operations; the bits are equal.
// `Code` is the encoding's traits: those of its codebook, and of its scales (scale_traits.j2). `Parts` is
// made from PARTS of coding_source.py (parts.j2).

enum ScaleKind { FLOAT32, BFLOAT16, E4M3, E8M0, SECOND };

// ---- e4m3 without its sign: 4 bits of exponent (bias 7), 3 of fraction, 0x7f is NaN

DEVICE float from_e4m3(u8 code) {
  const float finite = float_of((u32)(code & 0x7fu) << 20) * float_of(0x7b800000u);  // times 2**120
  return (code & 0x7fu) == 0x7fu ? float_of(0x7fc00000u) : finite;
}

// Nearest, ties to even, of 0 <= x <= 448, or NaN.
DEVICE u8 to_e4m3(float x) {
  const u32 bits = bits_of(x);
  const u32 small = bits_of(x + 16384.0f) - bits_of(16384.0f);  // the sum rounds to multiples of 2**-9
  const u32 normal = ((bits + 0x7ffffu + ((bits >> 20) & 1u)) >> 20) - (120u << 3);
  return bits > 0x7f800000u ? (u8)0x7fu : (u8)(bits < 0x3c800000u ? small : normal);
}

// ---- reading

// What the levels of a block are multiplied by; `second_levels` are those of quantized scales.
template <class Code>
DEVICE float factor_at(const Parts& parts, i64 block, const float* second_levels) {
  if (Code::SCALE == BFLOAT16) return to_float(((const bfloat16*)parts.scale)[block]);
  if (Code::SCALE == SECOND)
    return second_levels[((const u8*)parts.scale)[block]] * parts.second_scale[block / Code::SECOND_BLOCK] + *parts.mean;
  if (Code::SCALE == E8M0) {
    const u32 byte = ((const u8*)parts.scale)[block];
    return float_of(byte == 255u ? 0x7fc00000u : byte ? byte << 23 : 1u << 22);
  }
  if (Code::SCALE == E4M3) {
    const float step = from_e4m3(((const u8*)parts.scale)[block]);
    return Code::TENSOR_SCALE ? step * *parts.tensor_scale : step;
  }
  return ((const float*)parts.scale)[block];
}

template <class Code>
DEVICE float factor_at(const Parts& parts, i64 block) {
  return factor_at<Code>(parts, block, Code::SCALE == SECOND ? parts.second_tables->levels : 0);
}

template <class Code>
DEVICE float center_at(const Parts& parts, i64 block) {
  return Code::CENTERED ? parts.center[block] : 0.0f;
}

// ---- finding

// What is to be known of a block's numbers: the largest magnitude, as float bits, so that NaN is the
// largest of all; and the ends of its range, where the encoding subtracts its mid-point.
struct Range {
  u32 largest;
  float high, low;
};

DEVICE Range empty_range() {
  const Range range = {0u, float_of(0xff800000u), float_of(0x7f800000u)};
  return range;
}

DEVICE void add_to_range(float x, Range& range) {
  const u32 magnitude = bits_of(x) & 0x7fffffffu;
  range.largest = magnitude > range.largest ? magnitude : range.largest;
  range.high = x > range.high ? x : range.high;
  range.low = x < range.low ? x : range.low;
}

// What turns x into the number whose nearest table entry is its code: (x - center) * inverse.
// inverse is 0 where a block has no numbers to keep: the codes are then that of zero.
struct Scaling {
  float center, inverse;
};

// Below this absmax a block is scaled as if it had this: the inverse stays finite. Not so on a grid.
DEVICE float smallest_absmax() { return 1e-38f; }

DEVICE float finite_or_most(float x) {
  const float most = float_of(0x7f7fffffu);
  return x < most ? x : most;
}

template <class Code>
DEVICE float inverse_of(float absmax) {
  if (Code::GRID) return 1.0f / absmax;
  return absmax >= smallest_absmax() ? finite_or_most(Code::UNIT * (1.0f / absmax)) : 1e38f;
}

// The absmax that a block keeps: where a unit above 1 would make the inverse overflow, a larger one.
template <class Code>
DEVICE float kept_absmax(float absmax) {
  const float least = Code::UNIT * smallest_absmax();
  return Code::UNIT > 1.0f && absmax > 0.0f && absmax < least ? least : absmax;
}

// Where x falls in the table. On a grid, a block without an inverse keeps signs alone.
template <class Code>
DEVICE float scaled(float x, const Scaling& scaling) {
  if (Code::GRID && scaling.inverse > float_of(0x7f7fffffu)) return x > 0.0f ? 2.0f : -2.0f;
  return (Code::CENTERED ? x - scaling.center : x) * scaling.inverse;
}

// The scale of a whole tensor, by its largest finite magnitude: that block's e4m3 scale becomes 448.
template <class Code>
DEVICE float tensor_scale_of(u32 largest) {
  const float scale = float_of(largest) / (448.0f * Code::UNIT);
  return scale > 0.0f ? scale : 1.0f;
}

// Finds a block's scale, and keeps it if `keep`: where several threads find the same, one writes it.
template <class Code>
DEVICE Scaling keep_scale(const Parts& parts, i64 block, const Range& range, float tensor_scale, bool keep) {
  Scaling scaling = {0.0f, 0.0f};
  u32 largest = range.largest;
  if (Code::CENTERED) {
    scaling.center = 0.5f * range.high + 0.5f * range.low;
    const u32 above = bits_of(range.high - scaling.center) & 0x7fffffffu;
    const u32 below = bits_of(range.low - scaling.center) & 0x7fffffffu;
    if (largest >= 0x7f800000u) scaling.center = float_of(0x7fc00000u);
    else largest = above > below ? above : below;
    if (keep) parts.center[block] = scaling.center;
  }
  const bool finite = largest < 0x7f800000u;
  const float absmax = float_of(finite ? largest : 0x7fc00000u);
  if (Code::SCALE == E8M0) {
    const i32 exponent = (i32)(largest >> 23) - (i32)(bits_of(Code::UNIT) >> 23) + 127;
    const u32 byte = finite ? (u32)(exponent < 0 ? 0 : exponent > 254 ? 254 : exponent) : 255u;
    if (keep) ((u8*)parts.scale)[block] = (u8)byte;
    if (finite) scaling.inverse = float_of(byte < 254u ? (254u - byte) << 23 : 1u << 22);
  } else if (Code::SCALE == E4M3) {
    const float step = Code::TENSOR_SCALE ? absmax / Code::UNIT / tensor_scale : absmax / Code::UNIT;
    const u8 kept = to_e4m3(step > 448.0f ? 448.0f : step);
    if (keep) ((u8*)parts.scale)[block] = kept;
    const float factor = Code::TENSOR_SCALE ? from_e4m3(kept) * tensor_scale : from_e4m3(kept);
    if (finite && factor > 0.0f) scaling.inverse = finite_or_most(1.0f / factor);
  } else if (Code::SCALE == BFLOAT16) {
    bfloat16 kept;
    const float most = float_of(0x7f7f0000u);
    from_float(absmax > most ? most : kept_absmax<Code>(absmax), kept);
    if (keep) ((bfloat16*)parts.scale)[block] = kept;
    const float factor = to_float(kept);
    if ((bits_of(factor) & 0x7fffffffu) < 0x7f800000u) scaling.inverse = inverse_of<Code>(factor);
  } else {
    const float kept = kept_absmax<Code>(absmax);
    if (keep) ((float*)parts.scale)[block] = kept;
    if (finite) scaling.inverse = inverse_of<Code>(kept);
  }
  return scaling;
}

// ---- stochastic rounding: to one of the two neighbors of x, in proportion to nearness

// `numbers` are the table's, ascending, `written` of them; `uniform` lies in [0, 1).
template <class Code>
DEVICE u8 encode_stochastically(float x, float uniform, const u32* entries, const float* thresholds, const u8* order, const float* numbers, int written) {
  const int rank = (int)find_rank<Code>(x, entries, thresholds);
  int low = rank - (numbers[rank] > x ? 1 : 0);
  low = low < 0 ? 0 : low > written - 2 ? written - 2 : low;
  const float span = numbers[low + 1] - numbers[low];
  const float part = (x - numbers[low]) / (span > 0.0f ? span : 1.0f);
  return order[low + (uniform < part ? 1 : 0)];
}

struct Codebook {
  static constexpr int BITS = 4, BLOCK = 64;
};
struct Code : Codebook {
  static constexpr ScaleKind SCALE = SECOND;
  static constexpr bool CENTERED = false, TENSOR_SCALE = false, GRID = false;
  static constexpr int SECOND_BLOCK = 256;
};

typedef bfloat16 Number;  // what x and y are made of
enum { BLOCK, ROW, TENSOR };
enum { PER = BLOCK };  // what shares a scale

enum { LANES = 32, WARPS = 8, ROWS = 2 };
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


// y = a row of x times the weight, transposed, plus bias.
extern "C" __global__ void __launch_bounds__(LANES * WARPS, 2)
bnbx_multiply_1(const i64 row_count, const i64 columns, const Number* __restrict__ x, const i64 inputs,
                const Number* __restrict__ bias, Number* __restrict__ y, PARTS) {
  __shared__ Levels levels;
  __shared__ Inputs<1> shared;
  load_levels(tables, levels);
  GATHER_PARTS;
  if (PER == ROW || columns % SPAN == 0)
    multiply<1, false>(parts, row_count, columns, x, inputs, bias, y, levels, shared);
  else
    multiply<1, true>(parts, row_count, columns, x, inputs, bias, y, levels, shared);
}

// y = up to 2 rows of x times the weight, transposed, plus bias.
extern "C" __global__ void __launch_bounds__(LANES * WARPS, 2)
bnbx_multiply_2(const i64 row_count, const i64 columns, const Number* __restrict__ x, const i64 inputs,
                const Number* __restrict__ bias, Number* __restrict__ y, PARTS) {
  __shared__ Levels levels;
  __shared__ Inputs<2> shared;
  load_levels(tables, levels);
  GATHER_PARTS;
  if (PER == ROW || columns % SPAN == 0)
    multiply<2, false>(parts, row_count, columns, x, inputs, bias, y, levels, shared);
  else
    multiply<2, true>(parts, row_count, columns, x, inputs, bias, y, levels, shared);
}

// y = up to 4 rows of x times the weight, transposed, plus bias.
extern "C" __global__ void __launch_bounds__(LANES * WARPS, 2)
bnbx_multiply_4(const i64 row_count, const i64 columns, const Number* __restrict__ x, const i64 inputs,
                const Number* __restrict__ bias, Number* __restrict__ y, PARTS) {
  __shared__ Levels levels;
  __shared__ Inputs<4> shared;
  load_levels(tables, levels);
  GATHER_PARTS;
  if (PER == ROW || columns % SPAN == 0)
    multiply<4, false>(parts, row_count, columns, x, inputs, bias, y, levels, shared);
  else
    multiply<4, true>(parts, row_count, columns, x, inputs, bias, y, levels, shared);
}
