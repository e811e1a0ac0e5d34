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
