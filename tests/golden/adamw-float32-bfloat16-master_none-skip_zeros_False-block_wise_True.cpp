// adamw, no amsgrad, bfloat16 parameters, bfloat16 gradients, m: float32, v: float32
// Adam with decoupled weight decay (arXiv:1711.05101). Rendered from its spec by bnbx; change the spec, not this file.

// What numbers.h asks of a target: C++ on a CPU.

#define DEVICE static inline
DEVICE unsigned int bits_of(float x) { unsigned int bits; __builtin_memcpy(&bits, &x, 4); return bits; }
DEVICE float float_of(unsigned int bits) { float x; __builtin_memcpy(&x, &bits, 4); return x; }
DEVICE float root(float x) { return __builtin_sqrtf(x); }
DEVICE double root64(double x) { return __builtin_sqrt(x); }

// a * b + c, rounded once.
#if defined(__FMA__) || defined(__FP_FAST_FMAF) || defined(__aarch64__)
DEVICE float fused(float a, float b, float c) { return __builtin_fmaf(a, b, c); }
#else
// Where there is no instruction for it: the product is exact in double precision, and of a sum that is not, the last bit
// is set, so that rounding to float can take it neither for a number halfway nor for one on the other side of it.
DEVICE float fused(float a, float b, float c) {
  const double product = (double)a * b, sum = product + c;
  const double added = sum - product, lost = (product - (sum - added)) + (c - added);
  long long bits;
  __builtin_memcpy(&bits, &sum, 8);
  const long long next = bits + ((lost > 0.0) == (sum > 0.0) ? 1 : -1);
  bits = (lost < 0.0 || lost > 0.0) && !(bits & 1) ? next : bits;
  double odd;
  __builtin_memcpy(&odd, &bits, 8);
  return (float)odd;
}
#endif

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

// Work on the threads of the host process: each takes the next slice of it until there are none.

// The host's GOMP_parallel, so that kernels and torch share one pool of threads.
typedef void (*Parallel)(void (*)(void*), void*, unsigned, unsigned);

enum { SLICES_PER_THREAD = 4 };  // a thread that is interrupted holds up the others less

// A slice, one of `count`, and which of the threads that take part has it.
struct Slice {
  i64 number, count, worker;
  i64 first_of(i64 items) const { return items * number / count; }
  i64 last_of(i64 items) const { return items * (number + 1) / count; }  // one past it
};

template <class Work>
struct Pool {
  const Work* work;
  i64 slices, next, workers;
};

template <class Work>
static void take_slices(void* data) {
  Pool<Work>* pool = (Pool<Work>*)data;
  const i64 worker = __atomic_fetch_add(&pool->workers, 1, __ATOMIC_RELAXED);
  for (;;) {
    const i64 number = __atomic_fetch_add(&pool->next, 1, __ATOMIC_RELAXED);
    if (number >= pool->slices) return;
    pool->work->take({number, pool->slices, worker});
  }
}

// Work is a struct that says what to do with a slice: `void take(Slice slice) const`.
template <class Work>
static void run_in_slices(const Work& work, i64 slices, i64 threads, Parallel parallel) {
  Pool<Work> pool = {&work, threads > 1 && parallel ? slices : 1, 0, 0};
  if (pool.slices > 1) parallel(take_slices<Work>, &pool, (unsigned)threads, 0);
  else take_slices<Work>(&pool);
}

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

// What of the rule is the same for all elements. A copy that no store can change stays in registers.
template <class Number>
struct Scalars {
  Number beta1_;  // beta1
  Number k_1_minus_beta1_;  // 1 - beta1
  Number beta2_;  // beta2
  Number k_1_minus_beta2_;  // 1 - beta2
  Number c2_times_eps_;  // c2 * eps
  Number k_1_minus_lr_times_weight_decay_;  // 1 - lr * weight_decay
  Number lr_times_c2_over_c1_;  // lr * (c2 / c1)

  explicit Scalars(const float* given) : beta1_(given[0]), k_1_minus_beta1_(given[1]), beta2_(given[2]), k_1_minus_beta2_(given[3]), c2_times_eps_(given[4]), k_1_minus_lr_times_weight_decay_(given[5]), lr_times_c2_over_c1_(given[6]) {}
};

struct Job {
  const Row* rows;
  const void* scalars;  // Scalars
  const double* inputs;
  const void* const* tables;
  void* parts;   // a Part for each chunk
  void* values;  // a Values for each row
  i64 row_count;
  i64 chunk_count;
  void (*update)(const Job*, i64, i64);   // chunks [first, last) of the job
  void (*measure)(const Job*, i64, i64);  // the same before that, or null
  void (*reduce)(const Job*, i64, i64);   // and rows of it in between, or null
};

typedef float Several;
enum { SPAN = 1024, STEP = SPAN, STEPS = 1 };  // elements that are updated at a time

// The rule, for `Count` elements, as many as a Number has at a time.
template <class Number>
static inline __attribute__((always_inline)) void update_elements(
    Parameter* __restrict P, const Gradient* __restrict G, float* __restrict State_m, float* __restrict State_v,
const Scalars<Number>& Given, const Number Gradient_scale, const int Count) {
  const Number beta1_ = Given.beta1_;
  const Number k_1_minus_beta1_ = Given.k_1_minus_beta1_;
  const Number beta2_ = Given.beta2_;
  const Number k_1_minus_beta2_ = Given.k_1_minus_beta2_;
  const Number c2_times_eps_ = Given.c2_times_eps_;
  const Number k_1_minus_lr_times_weight_decay_ = Given.k_1_minus_lr_times_weight_decay_;
  const Number lr_times_c2_over_c1_ = Given.lr_times_c2_over_c1_;
  for (int I = 0; I < Count; I += sizeof(Number) / sizeof(float)) {
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
}

// Chunks [first, last) of a job.
extern "C" void bnbx_update(const Job* job, i64 first, i64 last) {
  const Row* row = &find_row(job->rows, job->row_count, first);
  const Scalars<float> scalars((const float*)job->scalars);
  const Scalars<Several> several((const float*)job->scalars);
  for (i64 chunk = first; chunk < last; ++chunk) {
    while (chunk >= row[1].FirstChunk) ++row;
    const i64 start = (chunk - row->FirstChunk) * CHUNK;
    const i64 left = row->Numel - start;
    const int count = (int)(left < CHUNK ? left : CHUNK);
    const float gradient_scale = *row->Gradient_scale_;
    Parameter* const parameters = row->p_ + start;
    const Gradient* const gradients = row->g_ + start;
    for (int at = 0; at < count; at += SPAN) {
      const int span = count - at < SPAN ? count - at : SPAN;
      float* state_m = row->m_ + start + at;
      float* state_v = row->v_ + start + at;
      Parameter* p = parameters + at;
      const Gradient* g = gradients + at;
      if (span < SPAN) {  // the last of a tensor
        update_elements<float>(p, g, state_m, state_v, scalars, gradient_scale, span);
        break;
      }
      update_elements<Several>(p, g, state_m, state_v, several, gradient_scale, STEP);
    }
  }
}

// ---- the entry of the library: the phases of some jobs, one after the other

enum Phase { MEASURE, REDUCE, UPDATE };

struct Work {
  const Job* jobs;
  i64 job_count;
  Phase phase;

  void take(Slice slice) const {
    for (i64 j = 0; j < job_count; ++j) {
      const Job* job = jobs + j;
      void (*const run)(const Job*, i64, i64) = phase == UPDATE ? job->update : phase == MEASURE ? job->measure : job->reduce;
      const i64 count = phase == REDUCE ? job->row_count : job->chunk_count;
      const i64 first = slice.first_of(count), last = slice.last_of(count);
      if (run && first < last) run(job, first, last);
    }
  }
};

extern "C" void bnbx_run(const Job* jobs, i64 job_count, i64 threads, Parallel parallel) {
  bool measured = false;
  for (i64 j = 0; j < job_count; ++j) measured = measured || jobs[j].measure;
  for (int phase = measured ? MEASURE : UPDATE; phase <= UPDATE; ++phase)
    run_in_slices(Work{jobs, job_count, (Phase)phase}, threads * SLICES_PER_THREAD, threads, parallel);
}

