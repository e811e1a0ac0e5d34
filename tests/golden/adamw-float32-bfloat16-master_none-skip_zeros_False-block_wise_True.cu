// adamw, no amsgrad, bfloat16 parameters, bfloat16 gradients, m: float32, v: float32
// Adam with decoupled weight decay (arXiv:1711.05101). Rendered from its spec by bnbx; change the spec, not this file.

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

typedef float Number;  // what a rule's statements work on

// What this plan works on: its dtypes, the traits of its codebooks, and a row of the launch's table.
typedef bfloat16 Parameter;
typedef bfloat16 Gradient;
enum { CHUNK = 1024 };  // elements that the chunk numbers in rows count by

// A tensor. Rows end with one more whose FirstChunk is the number of chunks in all.
struct Row {
  Parameter* p_;
  const Gradient* g_;
  float* m_;
  float* v_;
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
            const float* __restrict__ found_inf) {
  if (*found_inf != 0.0f) return;
  const float beta1_ = scalars[0];  // beta1
  const float k_1_minus_beta1_ = scalars[1];  // 1 - beta1
  const float beta2_ = scalars[2];  // beta2
  const float k_1_minus_beta2_ = scalars[3];  // 1 - beta2
  const float c2_times_eps_ = scalars[4];  // c2 * eps
  const float k_1_minus_lr_times_weight_decay_ = scalars[5];  // 1 - lr * weight_decay
  const float lr_times_c2_over_c1_ = scalars[6];  // lr * (c2 / c1)
  const i64 pieces = CHUNK / PIECE;  // of a chunk
  const i64 stride = (i64)gridDim.x * WARPS;
  for (i64 Piece = (i64)blockIdx.x * WARPS + threadIdx.x / LANES; Piece < chunk_count * pieces; Piece += stride) {
    const i64 Chunk = Piece / pieces;
    const Row& Here = find_row(rows, row_count, Chunk);
    const i64 Start = (Chunk - Here.FirstChunk) * CHUNK + Piece % pieces * PIECE;
    const i64 Left = Here.Numel - Start;
    if (Left <= 0) continue;
    const float Gradient_scale = *Here.Gradient_scale_;
    const bool Aligned = is_aligned(Here.p_) && is_aligned(Here.g_) && is_aligned(Here.m_) && is_aligned(Here.v_);
    Parameter P[PER_LANE];
    Gradient G[PER_LANE];
    load_piece(Here.p_ + Start, Left, Aligned, Parameter{}, P);
    load_piece(Here.g_ + Start, Left, Aligned, Gradient{}, G);
    float State_m[PER_LANE];
    load_piece((const float*)Here.m_ + Start, Left, Aligned, 0.0f, State_m);
    float State_v[PER_LANE];
    load_piece((const float*)Here.v_ + Start, Left, Aligned, 0.0f, State_v);

#pragma unroll
    for (int I = 0; I < PER_LANE; ++I) {
      Number p, g, m, v;
      rule_read(P + I, p);
      rule_read(G + I, g);
      g = g * Gradient_scale;
      rule_read(State_m + I, m);
      rule_read(State_v + I, v);
      // m = beta1 * m + (1 - beta1) * g
      m = rule_fma(beta1_, m, (k_1_minus_beta1_ * g));
      // v = beta2 * v + (1 - beta2) * g * g
      v = rule_fma(beta2_, v, ((k_1_minus_beta2_ * g) * g));
      // vmax = where(amsgrad, max(vmax, v), v)
      Number vmax = v;
      // u = c2 / c1 * m / (sqrt(vmax) + c2 * eps), without c2 / c1
      Number u = m / (rule_sqrt(vmax) + c2_times_eps_);
      // p = p * (1 - lr * weight_decay)
      p = k_1_minus_lr_times_weight_decay_ * p;
      // p = p - lr * u
      p = rule_fnma(lr_times_c2_over_c1_, u, p);
      rule_write(p, P + I);
      rule_write(m, State_m + I);
      rule_write(v, State_v + I);
    }
    store_piece(Here.p_ + Start, Left, Aligned, P);
    store_piece(Here.m_ + Start, Left, Aligned, State_m);
    store_piece(Here.v_ + Start, Left, Aligned, State_v);
  }
}
