// quantize and dequantize: dynamic8, blocks of 256, float32 numbers, rounded stochastically
// dynamic exponent and linear fraction in 8 bits (arXiv:1511.04561, arXiv:2110.02861). Rendered from its spec by bnbx; change the spec, not this file.

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

// What keeps the bits that a 16-bit parameter loses when it is stored. bnbx/kernels/master.py says
// the same with torch operations.

// ---- stochastic rounding: up with the probability that makes the mean right; but to infinity only what
// rounding to nearest makes infinite

// 32 evenly distributed bits by seed and place: two rounds of multiply and shift.
DEVICE u32 noise(u32 seed, i64 place) {
  u32 x = (u32)place ^ ((u32)(place >> 32) * 0x9e3779b1u) ^ seed;
  x ^= x >> 16;
  x *= 0x7feb352du;
  x ^= x >> 15;
  x *= 0x846ca68bu;
  return x ^ (x >> 16);
}

DEVICE void round_stochastically(float x, u32 random, bfloat16& to) {
  const u32 bits = bits_of(x), magnitude = bits & 0x7fffffffu;
  const u32 up = (magnitude + (random & 0xffffu)) & 0xffff0000u;
  const u32 rounded = magnitude < 0x7f7f8000u && up == 0x7f800000u ? 0x7f7f0000u : up;
  from_float(magnitude < 0x7f800000u ? float_of(rounded | (bits & 0x80000000u)) : x, to);
}

DEVICE void round_stochastically(float x, u32 random, float16& to) {
  const u32 bits = bits_of(x), magnitude = bits & 0x7fffffffu;
  // Below 2**-14 the steps are 2**-24 throughout: 10 bits of them, and 14 of noise, are a float.
  const float places = float_of(magnitude) * 16777216.0f + (float)(random >> 18) * (1.0f / 16384.0f);
  const float small = (float)(i32)(magnitude < 0x38800000u ? places : 0.0f) * (1.0f / 16777216.0f);
  const u32 up = (magnitude + (random & 0x1fffu)) & 0xffffe000u;
  const u32 large = magnitude < 0x477ff000u && up == 0x47800000u ? 0x477fe000u : up;
  const u32 rounded = magnitude < 0x38800000u ? bits_of(small) : large;
  from_float(magnitude < 0x7f800000u ? float_of(rounded | (bits & 0x80000000u)) : x, to);
}

// ---- Kahan: the rounding error of the last store, in the parameter's dtype, is added back. The
// error is rounded stochastically itself: so even updates below its own resolution are not lost.

template <class T>
DEVICE float load_parameter(T p, T error) { return to_float(p) + to_float(error); }

template <class T>
DEVICE void store_parameter(float x, u32 random, T& p, T& error) {
  from_float(x, p);
  const float lost = x - to_float(p);
  round_stochastically(rule_abs(lost) < float_of(0x7f800000u) ? lost : 0.0f, random, error);
}

// ---- residual: the same error as a fraction of half a step of the parameter, in 8 bits

DEVICE float half_step(bfloat16 p) {
  const u32 exponent = (p.bits >> 7) & 0xffu;
  return exponent < 16u || exponent == 0xffu ? 0.0f : float_of((exponent - 8u) << 23);
}

DEVICE float half_step(float16 p) {
  const u32 exponent = (p.bits >> 10) & 0x1fu;
  return exponent == 0x1fu ? 0.0f : float_of(((exponent < 1u ? 1u : exponent) + 101u) << 23);
}

// Noise lies between -1/2 and 1/2, and by this much inside, so that a part which was a whole number
// stays one: as far off as float32 rounds the sum of parameter and error.
DEVICE float calm_zone(bfloat16) { return 1.0f / 128.0f; }
DEVICE float calm_zone(float16) { return 1.0f / 16.0f; }

template <class T>
DEVICE float load_parameter(T p, i8 error) {
  return to_float(p) + (float)error * (1.0f / 127.0f) * half_step(p);
}

template <class T>
DEVICE void store_parameter(float x, u32 random, T& p, i8& error) {
  from_float(x, p);
  const float half = half_step(p);
  float part = half > 0.0f ? (x - to_float(p)) * (1.0f / half) * 127.0f : 0.0f;
  const float calm = calm_zone(p);
  part += (float)(random >> 9) * (1.0f / 8388608.0f) * (1.0f - 2.0f * calm) + (calm - 0.5f);
  part = rule_min(rule_max(part, -127.0f), 127.0f);
  error = (i8)(i32)((part + 12582912.0f) - 12582912.0f);  // 1.5 * 2**23: rounds to a whole number
}

enum { LANES = 32, WARPS = 8, PIECE = 256 };
// Helpers of CUDA kernels: a warp, one of WARPS in a block, works on PIECE elements, four neighbors of each
// of its LANES at a time. The template defines these three before this, as cuda_module.py has them.

enum { VECTOR = 4, STRIDE = LANES * VECTOR, VECTORS = PIECE / STRIDE, PER_LANE = VECTORS * VECTOR };

template <class T>
struct alignas(VECTOR * sizeof(T)) Four {
  T item[VECTOR];
};

// This lane's elements of a piece of which `left` elements exist; `missing` stands for the others.
template <class T>
DEVICE void load_piece(const T* from, i64 left, bool aligned, T missing, T (&to)[PER_LANE]) {
#pragma unroll
  for (int j = 0; j < VECTORS; ++j) {
    const int at = j * STRIDE + (threadIdx.x & 31) * VECTOR;
    if (aligned && at + VECTOR <= left) {
      *(Four<T>*)(to + j * VECTOR) = *(const Four<T>*)(from + at);
    } else {
#pragma unroll
      for (int e = 0; e < VECTOR; ++e) to[j * VECTOR + e] = at + e < left ? from[at + e] : missing;
    }
  }
}

template <class T>
DEVICE void store_piece(T* to, i64 left, bool aligned, const T (&from)[PER_LANE]) {
#pragma unroll
  for (int j = 0; j < VECTORS; ++j) {
    const int at = j * STRIDE + (threadIdx.x & 31) * VECTOR;
    if (aligned && at + VECTOR <= left) {
      *(Four<T>*)(to + at) = *(const Four<T>*)(from + j * VECTOR);
    } else {
#pragma unroll
      for (int e = 0; e < VECTOR; ++e)
        if (at + e < left) to[at + e] = from[j * VECTOR + e];
    }
  }
}

// The place in its piece of this lane's element i.
DEVICE int place_of(int i) { return i / VECTOR * STRIDE + (threadIdx.x & 31) * VECTOR + i % VECTOR; }

// The sum over all lanes of a warp, the same in each.
DEVICE double sum_of_lanes(double x) {
#pragma unroll
  for (int distance = LANES / 2; distance > 0; distance /= 2) x += __shfl_xor_sync(0xffffffffu, x, distance);
  return x;
}

DEVICE bool is_aligned(const void* pointer) { return ((unsigned long long)pointer & 15u) == 0; }

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

// Blocks of quantized states on CUDA: a warp finds the largest magnitudes, and codes its piece.

// The largest value among `COUNT` neighboring lanes, the same in all of them.
template <int COUNT>
DEVICE u32 largest_of_lanes(u32 x) {
#if __CUDA_ARCH__ >= 800
  if (COUNT == LANES) return __reduce_max_sync(0xffffffffu, x);
#endif
#pragma unroll
  for (int distance = COUNT / 2; distance > 0; distance /= 2) {
    const u32 other = __shfl_xor_sync(0xffffffffu, x, distance);
    x = other > x ? other : x;
  }
  return x;
}

// Values by code in shared memory, for a pass that only decodes.
template <class Type>
struct Levels {
  float levels[1 << Type::BITS];

  DEVICE_MEMBER void fill(const Tables* tables) {
    for (int i = threadIdx.x; i < (1 << Type::BITS); i += LANES * WARPS) levels[i] = tables->levels[i];
  }
};

// A codebook in shared memory: values by code, and the table of the search.
template <class Type>
struct Shared {
  float levels[1 << Type::BITS];
  u32 search[Type::SHIFT ? Type::ENTRIES : 256];

  DEVICE_MEMBER void fill(const Tables* tables) {
    const u32* from = Type::SHIFT ? tables->entries : (const u32*)tables->thresholds;
    for (int i = threadIdx.x; i < (1 << Type::BITS); i += LANES * WARPS) levels[i] = tables->levels[i];
    for (int i = threadIdx.x; i < (int)(sizeof(search) / sizeof(u32)); i += LANES * WARPS) search[i] = from[i];
  }
};

// How the lanes and vectors of a piece fall into blocks, and how many pieces a block has.
template <class Type>
struct Layout {
  static constexpr int GROUP = Type::BLOCK < STRIDE ? Type::BLOCK / VECTOR : LANES;  // lanes of a block
  static constexpr bool WHOLE = Type::BLOCK >= PIECE;                               // both vectors in one block
  static constexpr int PIECES = Type::BLOCK > PIECE ? Type::BLOCK / PIECE : 1;
};

// The largest value among `COUNT` neighboring warps, the same in all of them. All warps of the launched
// block take part.
template <int COUNT>
DEVICE u32 largest_of_warps(u32 x, u32* largest) {
  const int warp = threadIdx.x / LANES;
  if (threadIdx.x % LANES == 0) largest[warp] = x;
  __syncthreads();
#pragma unroll
  for (int i = 0; i < COUNT; ++i) {
    const u32 other = largest[warp / COUNT * COUNT + i];
    x = other > x ? other : x;
  }
  __syncthreads();
  return x;
}

// Codes lie one after the other without gaps, the first in the highest bits. The four neighbors of a
// lane are the lower bits of a word: those of codes in even widths fill whole bytes, and those of odd
// widths do so together with the next lane's.
template <class Type>
struct Packed {
  static constexpr int WORD = VECTOR * Type::BITS;  // bits of a lane
  static constexpr bool ODD = WORD % 8 != 0;
};

// The bytes of `left` elements' codes.
template <class Type>
DEVICE i64 bytes_of(i64 left) {
  return (left * Type::BITS + 7) / 8;
}

// Codes of this lane, unpacked; those that do not exist are zero's.
template <class Type>
DEVICE void load_codes(const u8* from, i64 left, bool aligned, u8 (&codes)[PER_LANE]) {
  if (Type::BITS == 8) return load_piece(from, left, aligned, (u8)Type::ZERO_CODE, codes);
  const i64 bytes = bytes_of<Type>(left);
#pragma unroll
  for (int j = 0; j < VECTORS; ++j) {
    const int at = place_of(j * VECTOR), first = at * Type::BITS / 8;
    const int skipped = Packed<Type>::ODD ? at * Type::BITS % 8 : 0;
    u32 word = 0;
#pragma unroll
    for (int i = 0; i < (Packed<Type>::WORD + 7) / 8; ++i) word = word << 8 | (first + i < bytes ? from[first + i] : 0u);
    word >>= (Packed<Type>::ODD ? 4 - skipped : 0);
#pragma unroll
    for (int e = 0; e < VECTOR; ++e) {
      const u32 code = (word >> (Type::BITS * (VECTOR - 1 - e))) & ((1u << Type::BITS) - 1u);
      codes[j * VECTOR + e] = at + e < left ? (u8)code : (u8)Type::ZERO_CODE;
    }
  }
}

template <class Type>
DEVICE void store_codes(u8* to, i64 left, bool aligned, const u8 (&codes)[PER_LANE]) {
  if (Type::BITS == 8) return store_piece(to, left, aligned, codes);
  const i64 bytes = bytes_of<Type>(left);
#pragma unroll
  for (int j = 0; j < VECTORS; ++j) {
    const int at = place_of(j * VECTOR);
    u32 word = 0;
#pragma unroll
    for (int e = 0; e < VECTOR; ++e) word = word << Type::BITS | (at + e < left ? codes[j * VECTOR + e] : 0u);
    if (Packed<Type>::ODD) {  // of the bytes of two lanes, the first writes one more
      const u32 other = __shfl_xor_sync(0xffffffffu, word, 1);
      const bool second = threadIdx.x & 1;
      const unsigned long long pair = (unsigned long long)(second ? other : word) << Packed<Type>::WORD | (second ? word : other);
      const int first = (at - (second ? VECTOR : 0)) * Type::BITS / 8;
#pragma unroll
      for (int i = 0; i < Type::BITS; ++i)
        if ((i > Type::BITS / 2) == second && first + i < bytes) to[first + i] = (u8)(pair >> (8 * (Type::BITS - 1 - i)));
    } else {
#pragma unroll
      for (int i = 0; i < Packed<Type>::WORD / 8; ++i) {
        const int place = at * Type::BITS / 8 + i;
        if (place < bytes) to[place] = (u8)(word >> (Packed<Type>::WORD - 8 - 8 * i));
      }
    }
  }
}

template <class Type>
DEVICE void decode_piece(const u8 (&codes)[PER_LANE], const float* absmax, i64 left,
                         const float* levels, float (&x)[PER_LANE]) {
#pragma unroll
  for (int j = 0; j < VECTORS; ++j) {
    const int at = j * STRIDE + (threadIdx.x & 31) * VECTOR;
    const float scale = at < left ? absmax[Type::WHOLE ? 0 : at / Type::BLOCK] : 0.0f;
#pragma unroll
    for (int e = 0; e < VECTOR; ++e)
      x[j * VECTOR + e] = levels[codes[j * VECTOR + e]] * scale;
  }
}

// Where a block has several pieces, `largest_of_warp` has a place for each warp of the launched block,
// and `start` is the piece's place in its tensor.
template <class Type>
DEVICE void encode_piece(const float (&x)[PER_LANE], i64 left, const Shared<Type>& shared,
                         const Tables* tables, u8 (&codes)[PER_LANE], float* absmax,
                         u32* largest_of_warp = 0, i64 start = 0) {
  u32 largest[VECTORS];
#pragma unroll
  for (int j = 0; j < VECTORS; ++j) {
    const int at = j * STRIDE + (threadIdx.x & 31) * VECTOR;
    largest[j] = 0;
#pragma unroll
    for (int e = 0; e < VECTOR; ++e) {
      const u32 magnitude = bits_of(x[j * VECTOR + e]) & 0x7fffffffu;
      if (at + e < left && magnitude > largest[j]) largest[j] = magnitude;
    }
  }
  __syncwarp();  // every lane has read the old absmax before one writes the new
  if (Layout<Type>::WHOLE) largest[0] = largest[1] = largest[0] > largest[1] ? largest[0] : largest[1];
#pragma unroll
  for (int j = 0; j < VECTORS; ++j) {
    const int at = j * STRIDE + (threadIdx.x & 31) * VECTOR;
    largest[j] = Layout<Type>::WHOLE && j ? largest[0] : largest_of_lanes<Layout<Type>::GROUP>(largest[j]);
    if (Layout<Type>::PIECES > 1 && !j) largest[0] = largest_of_warps<Layout<Type>::PIECES>(largest[0], largest_of_warp);
    const Scale scale = make_scale<Type>(largest[j]);
#pragma unroll
    for (int e = 0; e < VECTOR; ++e) {
      const float scaled = x[j * VECTOR + e] * scale.inverse;
      const u8 code = encode<Type>(scaled, shared.search, (const float*)shared.search, tables->order);
      codes[j * VECTOR + e] = scale.inverse > 0.0f ? code : (u8)Type::ZERO_CODE;
    }
    const bool first = at % Type::BLOCK == 0 && (Layout<Type>::PIECES == 1 || start % Type::BLOCK == 0);
    if (first && at < left) absmax[at / Type::BLOCK] = scale.absmax;
  }
}

// The same where the absmax is that of the whole tensor.
template <class Type>
DEVICE void encode_whole_piece(const float (&x)[PER_LANE], u32 largest, const Shared<Type>& shared,
                               const Tables* tables, u8 (&codes)[PER_LANE]) {
  const Scale scale = make_scale<Type>(largest);
#pragma unroll
  for (int i = 0; i < PER_LANE; ++i) {
    const u8 code = encode<Type>(x[i] * scale.inverse, shared.search, (const float*)shared.search, tables->order);
    codes[i] = scale.inverse > 0.0f ? code : (u8)Type::ZERO_CODE;
  }
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
  static constexpr int BLOCK = 256, SHIFT = 17, HALF = 1401, ENTRIES = 2802, ZERO_CODE = 127;
  static constexpr int BITS = 8;
  static constexpr float UNIT = 1.0f;
  static constexpr u32 FLOOR = 0x34920000u, CEILING = 0x3f800001u;
  static constexpr bool SIGNED = true, ORDERED = true, SEGMENTS = true, MIRRORED = true, WHOLE = false;
};

struct Code : Codebook {
  static constexpr ScaleKind SCALE = FLOAT32;
  static constexpr bool CENTERED = false, TENSOR_SCALE = false, GRID = false;
  static constexpr int SECOND_BLOCK = 256;
};

typedef float Number;
enum { BLOCK, ROW, TENSOR };
enum { PER = BLOCK };  // what shares a scale

// What there is to know of a whole tensor: its largest magnitude as float bits, and the ends of its
// range as integers in the order of floats (the lower one inverted). All three only grow.
struct Whole {
  u32 largest;
  i32 high, low;
};

DEVICE i32 order_of(float x) {
  const i32 bits = (i32)bits_of(x);
  return bits ^ ((bits >> 31) & 0x7fffffff);
}

DEVICE float from_order(i32 order) { return float_of((u32)(order ^ ((order >> 31) & 0x7fffffff))); }

// A warp works on PIECE elements at a time, four neighbors of each lane; those of vector j lie from
// place_of(j * VECTOR) on.
DEVICE void load_floats(const Number* from, i64 left, float (&x)[PER_LANE]) {
  Number numbers[PER_LANE];
  load_piece(from, left, is_aligned(from), Number{}, numbers);
#pragma unroll
  for (int i = 0; i < PER_LANE; ++i) x[i] = to_float(numbers[i]);
}

// What this lane's vector j adds to a range.
DEVICE void measure_vector(const float (&x)[PER_LANE], int j, i64 left, Range& range) {
#pragma unroll
  for (int e = 0; e < VECTOR; ++e)
    if (place_of(j * VECTOR + e) < left) add_to_range(x[j * VECTOR + e], range);
}

// The range over `COUNT` neighboring lanes, the same in all of them.
template <int COUNT>
DEVICE void join_lanes(Range& range) {
  range.largest = largest_of_lanes<COUNT>(range.largest);
  if (!Code::CENTERED) return;
#pragma unroll
  for (int distance = COUNT / 2; distance > 0; distance /= 2) {
    const float high = __shfl_xor_sync(0xffffffffu, range.high, distance);
    const float low = __shfl_xor_sync(0xffffffffu, range.low, distance);
    range.high = high > range.high ? high : range.high;
    range.low = low < range.low ? low : range.low;
  }
}

// The first pass where a scale depends on the whole tensor.
extern "C" __global__ void __launch_bounds__(LANES * WARPS, 2)
bnbx_measure(const Number* __restrict__ numbers, const i64 count, Whole* whole) {
  Range range = empty_range();
  for (i64 start = ((i64)blockIdx.x * WARPS + threadIdx.x / LANES) * PIECE; start < count; start += (i64)gridDim.x * WARPS * PIECE) {
    float x[PER_LANE];
    load_floats(numbers + start, count - start, x);
#pragma unroll
    for (int i = 0; i < PER_LANE; ++i)  // a block that is not finite says nothing of the others
      if (Code::TENSOR_SCALE && (bits_of(x[i]) & 0x7fffffffu) >= 0x7f800000u) x[i] = 0.0f;
#pragma unroll
    for (int j = 0; j < VECTORS; ++j) measure_vector(x, j, count - start, range);
  }
  join_lanes<LANES>(range);
  if (threadIdx.x % LANES == 0) {
    atomicMax(&whole->largest, range.largest);
    if (Code::CENTERED) {
      atomicMax(&whole->high, order_of(range.high));
      atomicMax(&whole->low, ~order_of(range.low));
    }
  }
}

DEVICE Range range_of_tensor(const Whole& whole, i64 count) {
  const Range empty = {0u, 0.0f, 0.0f};
  const Range range = {whole.largest, from_order(whole.high), from_order(~whole.low)};
  return count ? range : empty;
}

// A unit is what a warp encodes in one go: PIECE elements, or a longer block, or a row.
enum { UNIT_PIECES = PER == BLOCK && Code::BLOCK > PIECE ? Code::BLOCK / PIECE : 1 };

extern "C" __global__ void __launch_bounds__(LANES * WARPS, 2)
bnbx_encode(const Number* __restrict__ numbers, const i64 rows, const i64 columns, const Whole* whole,
            const float* rand, const i64 rand_count, const float* ascending, const i64 written, const i64 seed, PARTS) {
  __shared__ Shared<Code> shared;
  shared.fill(tables);
  __syncthreads();
  GATHER_PARTS;
  const float* thresholds = (const float*)shared.search;
  const u8 zero = encode<Code>(0.0f, shared.search, thresholds, tables->order);
  const bool first = blockIdx.x == 0 && threadIdx.x == 0;
  const float scale_of_all = Code::TENSOR_SCALE ? tensor_scale_of<Code>(whole->largest) : 1.0f;
  if (Code::TENSOR_SCALE && first) *tensor_scale = scale_of_all;
  Scaling same = {0.0f, 0.0f};
  if (PER == TENSOR) same = keep_scale<Code>(parts, 0, range_of_tensor(*whole, columns), 1.0f, first);
  const i64 length = PER == ROW ? columns : (i64)UNIT_PIECES * PIECE;  // of a unit
  const i64 units = PER == ROW ? rows : (columns + length - 1) / length;
  const i64 row_bytes = (columns * Code::BITS + 7) / 8;
  for (i64 unit = (i64)blockIdx.x * WARPS + threadIdx.x / LANES; unit < units; unit += (i64)gridDim.x * WARPS) {
    const i64 start = unit * length;
    const i64 end = PER == ROW ? start + columns : columns;
    u8* packed = codes + (PER == ROW ? unit * row_bytes : start * Code::BITS / 8);
    const i64 pieces = PER == ROW ? (columns + PIECE - 1) / PIECE : (i64)UNIT_PIECES;
    const bool together = PER == ROW || (PER == BLOCK && Code::BLOCK >= PIECE);  // one scale for the unit
    if (together) {
      Range range = empty_range();
      for (i64 piece = 0; piece < pieces; ++piece) {
        const i64 at = start + piece * PIECE;
        float x[PER_LANE];
        load_floats(numbers + at, end - at, x);
#pragma unroll
        for (int j = 0; j < VECTORS; ++j) measure_vector(x, j, end - at, range);
      }
      join_lanes<LANES>(range);
      same = keep_scale<Code>(parts, unit, range, scale_of_all, threadIdx.x % LANES == 0);
    }
    for (i64 piece = 0; piece < pieces; ++piece) {
      const i64 at = start + piece * PIECE;
      const i64 left = end - at;
      if (left <= 0) break;
      float x[PER_LANE];
      u8 found[PER_LANE];
      load_floats(numbers + at, left, x);
#pragma unroll
      for (int j = 0; j < VECTORS; ++j) {
        Scaling scaling = same;
        if (PER == BLOCK && Code::BLOCK < PIECE) {
          constexpr int GROUP = Layout<Code>::GROUP;
          const i64 place = at + place_of(j * VECTOR);
          Range range = empty_range();
          measure_vector(x, j, left, range);
          join_lanes<GROUP>(range);
          const bool leader = threadIdx.x % GROUP == 0 && place < columns;
          scaling = keep_scale<Code>(parts, place / Code::BLOCK, range, scale_of_all, leader);
        }
#pragma unroll
        for (int e = 0; e < VECTOR; ++e) {
          const int i = j * VECTOR + e;
          const i64 place = at + place_of(i);
          const float uniform = rand ? rand[place % rand_count] : (float)(noise((u32)seed, place) >> 8) * (1.0f / 16777216.0f);
          const u8 code = encode_stochastically<Code>(scaled<Code>(x[i], scaling), uniform, shared.search, thresholds, tables->order, ascending, (int)written);
          found[i] = scaling.inverse > 0.0f ? code : zero;
        }
      }
      u8* to = packed + piece * PIECE * Code::BITS / 8;
      store_codes<Code>(to, left, is_aligned(to), found);
    }
  }
}

// Elements [start, start + count) of the tensor go to `numbers`; pieces are counted from its beginning.
extern "C" __global__ void __launch_bounds__(LANES * WARPS, 2)
bnbx_decode(Number* __restrict__ numbers, const i64 columns, const i64 start, const i64 count, PARTS) {
  __shared__ float levels[1 << Code::BITS];
  __shared__ float second_levels[Code::SCALE == SECOND ? 256 : 1];
  for (int i = threadIdx.x; i < (1 << Code::BITS); i += LANES * WARPS) levels[i] = tables->levels[i];
  if (Code::SCALE == SECOND)
    for (int i = threadIdx.x; i < 256; i += LANES * WARPS) second_levels[i] = second_tables->levels[i];
  __syncthreads();
  GATHER_PARTS;
  const i64 end = start + count;
  const i64 across = PER == ROW ? (columns + PIECE - 1) / PIECE : 1;  // pieces of a row
  const i64 row_bytes = (columns * Code::BITS + 7) / 8;
  const i64 first = PER == ROW ? start / columns * across : start / PIECE;
  const i64 last = PER == ROW ? end / columns * across : (end + PIECE - 1) / PIECE;
  for (i64 piece = first + (i64)blockIdx.x * WARPS + threadIdx.x / LANES; piece < last; piece += (i64)gridDim.x * WARPS) {
    const i64 row = piece / across;
    const i64 at = PER == ROW ? piece % across * PIECE : piece * PIECE;  // in the row
    const i64 left = columns - at;
    const u8* packed = codes + (PER == ROW ? row * row_bytes : (i64)0) + at * Code::BITS / 8;
    u8 found[PER_LANE];
    load_codes<Code>(packed, left, is_aligned(packed), found);
    Number x[PER_LANE];
#pragma unroll
    for (int j = 0; j < VECTORS; ++j) {
      const i64 place = at + place_of(j * VECTOR);
      const i64 block = PER == ROW ? row : PER == TENSOR ? (i64)0 : place / Code::BLOCK;
      const bool there = place < columns;
      const float factor = there ? factor_at<Code>(parts, block, second_levels) : 0.0f;
      const float middle = there ? center_at<Code>(parts, block) : 0.0f;
#pragma unroll
      for (int e = 0; e < VECTOR; ++e) {
        const float value = levels[found[j * VECTOR + e]] * factor;
        from_float(Code::CENTERED ? value + middle : value, x[j * VECTOR + e]);
      }
    }
    const i64 begin = (PER == ROW ? row * columns : (i64)0) + at;  // of the piece, in the tensor
    const i64 wanted = end - begin < left ? end - begin : left;
    if (begin >= start) {
      Number* to = numbers + (begin - start);
      store_piece(to, wanted, is_aligned(to), x);
    } else {
#pragma unroll
      for (int i = 0; i < PER_LANE; ++i)
        if (begin + place_of(i) >= start && place_of(i) < wanted) numbers[begin + place_of(i) - start] = x[i];
    }
  }
}
