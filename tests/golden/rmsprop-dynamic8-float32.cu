// rmsprop, no momentum, no centered, float32 parameters, float32 gradients, v: dynamic8
// gradient over its root mean square, with momentum (Tieleman and Hinton, lecture 6.5, 2012; torch.optim.RMSprop). Rendered from its spec by bnbx; change the spec, not this file.

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

typedef float Number;  // what a rule's statements work on

// What this plan works on: its dtypes, the traits of its codebooks, and a row of the launch's table.
typedef float Parameter;
typedef float Gradient;
enum { CHUNK = 256 };  // elements that the chunk numbers in rows count by

struct dynamic8_unsigned {
  static constexpr int BLOCK = 256, SHIFT = 16, HALF = 2900, ENTRIES = 2900, ZERO_CODE = 0;
  static constexpr int BITS = 8;
  static constexpr float UNIT = 1.0f;
  static constexpr u32 FLOOR = 0x342e0000u, CEILING = 0x3f800001u;
  static constexpr bool SIGNED = false, ORDERED = true, SEGMENTS = true, MIRRORED = false, WHOLE = false;
};

// A tensor. Rows end with one more whose FirstChunk is the number of chunks in all.
struct Row {
  Parameter* p_;
  const Gradient* g_;
  u8* v_;
  float* v_absmax_;
  const float* Gradient_scale_;
  i64 Numel;
  i64 FirstChunk;
};

// The row that holds a chunk.
DEVICE const Row& find_row(const Row* rows, i64 row_count, i64 chunk) {
  i64 low = 0, high = row_count - 1;
  while (low < high) {
    const i64 middle = (low + high + 1) / 2;
    if (rows[middle].FirstChunk <= chunk) low = middle;
    else high = middle - 1;
  }
  return rows[low];
}

// One launch updates all tensors; each warp takes pieces of PIECE elements in turn.
extern "C" __global__ void __launch_bounds__(LANES * WARPS, 16 / WARPS)
bnbx_update(const Row* __restrict__ rows, const i64 row_count, const i64 chunk_count,
            const float* __restrict__ scalars, const double* __restrict__ inputs,
            const float* __restrict__ found_inf, const Tables* __restrict__ tables_dynamic8_unsigned) {
  if (*found_inf != 0.0f) return;
  __shared__ Shared<dynamic8_unsigned> shared_dynamic8_unsigned;
  shared_dynamic8_unsigned.fill(tables_dynamic8_unsigned);
  __syncthreads();
  const float weight_decay_ = scalars[0];  // weight_decay
  const float alpha_ = scalars[1];  // alpha
  const float k_1_minus_alpha_ = scalars[2];  // 1 - alpha
  const float eps_ = scalars[3];  // eps
  const float lr_ = scalars[4];  // lr
  const i64 pieces = CHUNK / PIECE;  // of a chunk
  const i64 stride = (i64)gridDim.x * WARPS;
  for (i64 Piece = (i64)blockIdx.x * WARPS + threadIdx.x / LANES; Piece < chunk_count * pieces; Piece += stride) {
    const i64 Chunk = Piece / pieces;
    const Row& Here = find_row(rows, row_count, Chunk);
    const i64 Start = (Chunk - Here.FirstChunk) * CHUNK + Piece % pieces * PIECE;
    const i64 Left = Here.Numel - Start;
    if (Left <= 0) continue;
    const float Gradient_scale = *Here.Gradient_scale_;
    const bool Aligned = is_aligned(Here.p_) && is_aligned(Here.g_) && is_aligned(Here.v_);
    Parameter P[PER_LANE];
    Gradient G[PER_LANE];
    load_piece(Here.p_ + Start, Left, Aligned, Parameter{}, P);
    load_piece(Here.g_ + Start, Left, Aligned, Gradient{}, G);
    float State_v[PER_LANE];
    u8 Codes_v[PER_LANE];
    float* Absmax_v = Here.v_absmax_ + Start / dynamic8_unsigned::BLOCK;
    load_codes<dynamic8_unsigned>(Here.v_ + Start * dynamic8_unsigned::BITS / 8, Left, Aligned, Codes_v);
    decode_piece<dynamic8_unsigned>(Codes_v, Absmax_v, Left, shared_dynamic8_unsigned.levels, State_v);

#pragma unroll
    for (int I = 0; I < PER_LANE; ++I) {
      Number p, g, v;
      rule_read(P + I, p);
      rule_read(G + I, g);
      g = g * Gradient_scale;
      rule_read(State_v + I, v);
      // g = g + weight_decay * p
      g = rule_fma(weight_decay_, p, g);
      // v = alpha * v + where(centered, alpha * (1 - alpha) * d * d, (1 - alpha) * g * g)
      v = rule_fma(alpha_, v, ((k_1_minus_alpha_ * g) * g));
      // n = g / (sqrt(v) + eps)
      Number n = g / (rule_sqrt(v) + eps_);
      // m = where(momentum, momentum * m + n, n)
      Number m = n;
      // u = m
      Number u = m;
      // p = p - lr * u
      p = rule_fnma(lr_, u, p);
      rule_write(p, P + I);
      rule_write(v, State_v + I);
    }
    store_piece(Here.p_ + Start, Left, Aligned, P);
    encode_piece<dynamic8_unsigned>(State_v, Left, shared_dynamic8_unsigned, tables_dynamic8_unsigned, Codes_v, Absmax_v);
    store_codes<dynamic8_unsigned>(Here.v_ + Start * dynamic8_unsigned::BITS / 8, Left, Aligned, Codes_v);
  }
}
