// sgd, no momentum, no nesterov, float32 parameters, float32 gradients
// stochastic gradient descent, with (Nesterov) momentum (Sutskever et al., ICML 2013; torch.optim.SGD). Rendered from its spec by bnbx; change the spec, not this file.

#define DEVICE static inline
DEVICE unsigned int bits_of(float x) { unsigned int bits; __builtin_memcpy(&bits, &x, 4); return bits; }
DEVICE float float_of(unsigned int bits) { float x; __builtin_memcpy(&x, &bits, 4); return x; }
DEVICE float root(float x) { return __builtin_sqrtf(x); }
DEVICE double root64(double x) { return __builtin_sqrt(x); }

// Numbers, as C++ and CUDA kernels share them. The target defines before this: DEVICE (how a function
// is declared), bits_of and float_of (a float's bits), and root and root64 (correctly rounded square
// roots).

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

// ---- functions of the rule language

DEVICE float rule_sqrt(float x) { return root(x); }
DEVICE float rule_abs(float x) { return float_of(bits_of(x) & 0x7fffffffu); }
// The sign bit on a one: vectorized, one comparison and not three.
DEVICE float rule_sign(float x) { return x < 0.0f || x > 0.0f ? float_of((bits_of(x) & 0x80000000u) | 0x3f800000u) : x; }
DEVICE float rule_min(float a, float b) { return a < b ? a : b; }
DEVICE float rule_max(float a, float b) { return a > b ? a : b; }

DEVICE double rule_sqrt(double x) { return root64(x); }
DEVICE double rule_abs(double x) { return x < 0.0 ? -x : x + 0.0; }  // the sum makes -0 a 0
DEVICE double rule_sign(double x) { return x > 0.0 ? 1.0 : (x < 0.0 ? -1.0 : x); }
DEVICE double rule_min(double a, double b) { return a < b ? a : b; }
DEVICE double rule_max(double a, double b) { return a > b ? a : b; }

// What this plan works on: its dtypes, the traits of its codebooks, and a row of the launch's table.
typedef float Parameter;
typedef float Gradient;
enum { CHUNK = 1024 };  // elements that the chunk numbers in rows count by

// A tensor. Rows end with one more whose FirstChunk is the number of chunks in all.
struct Row {
  Parameter* p_;
  const Gradient* g_;
  const float* gradient_scale_;
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

// What of the rule is the same for all elements.
struct Scalars {
  float weight_decay_;  // weight_decay
  float lr_;  // lr
};

struct Job {
  const Row* rows;
  i64 row_count, chunk_count;
  const Scalars* scalars;
  const double* inputs;
  const void* const* tables;
  void* parts;   // a Part for each chunk
  void* values;  // a Values for each row
  void (*update)(const Job*, i64, i64);
  void (*measure)(const Job*, i64, i64);  // these two null where one pass is enough
  void (*reduce)(const Job*, i64, i64);
};

enum { SPAN = 1024 };  // elements that are updated at a time

// The rule, for `Count` elements. The largest magnitudes of quantized states are found on the way,
// as integers: so the order of comparisons cannot matter, even for NaN.
static inline __attribute__((always_inline)) void update_elements(
    Parameter* __restrict P, const Gradient* __restrict G,
const Scalars& Given, const float Gradient_scale, const int Count) {
  const float weight_decay_ = Given.weight_decay_;
  const float lr_ = Given.lr_;
  for (int I = 0; I < Count; ++I) {
    float p = to_float(P[I]);
    float g = to_float(G[I]) * Gradient_scale;
    // g = g + weight_decay * p
    g = g + (weight_decay_ * p);
    // m = where(momentum, where(step == 1, g, momentum * m + (1 - dampening) * g), g)
    float m = g;
    // u = where(nesterov, g + momentum * m, m)
    float u = m;
    // p = p - lr * u
    p = p - (lr_ * u);
    from_float(p, P[I]);
  }
}

// Chunks [first, last) of a job.
extern "C" void bnbx_update(const Job* job, i64 first, i64 last) {
  const Row* row = &find_row(job->rows, job->row_count, first);
  const Scalars scalars = *job->scalars;  // a copy that no store can change, so that it stays in registers
  for (i64 chunk = first; chunk < last; ++chunk) {
    while (chunk >= row[1].FirstChunk) ++row;
    const i64 start = (chunk - row->FirstChunk) * CHUNK;
    const i64 left = row->Numel - start;
    const int count = (int)(left < CHUNK ? left : CHUNK);
    const float gradient_scale = *row->gradient_scale_;
    for (int at = 0; at < count; at += SPAN) {
      const int span = count - at < SPAN ? count - at : SPAN;
      Parameter* p = row->p_ + start + at;
      const Gradient* g = row->g_ + start + at;
      if (span == SPAN)  // the same with the count known to the compiler
        update_elements(p, g, scalars, gradient_scale, SPAN);
      else
        update_elements(p, g, scalars, gradient_scale, span);
    }
  }
}

// ---- running jobs on the threads of the host process

enum Phase { MEASURE, REDUCE, UPDATE };

struct Work {
  const Job* jobs;
  i64 job_count, slices, next;
  Phase phase;
};

static void work_on(void* data) {
  Work* work = (Work*)data;
  for (;;) {
    const i64 slice = __atomic_fetch_add(&work->next, 1, __ATOMIC_RELAXED);
    if (slice >= work->slices) return;
    for (i64 j = 0; j < work->job_count; ++j) {
      const Job* job = work->jobs + j;
      void (*const run)(const Job*, i64, i64) =
          work->phase == UPDATE ? job->update : work->phase == MEASURE ? job->measure : job->reduce;
      const i64 count = work->phase == REDUCE ? job->row_count : job->chunk_count;
      const i64 first = count * slice / work->slices;
      const i64 last = count * (slice + 1) / work->slices;
      if (run && first < last) run(job, first, last);
    }
  }
}

// `parallel` is the host's GOMP_parallel, so that kernels and torch share one pool of threads.
// More slices than threads: a thread that is interrupted holds up the others less.
extern "C" void bnbx_run(const Job* jobs, i64 job_count, i64 threads,
                         void (*parallel)(void (*)(void*), void*, unsigned, unsigned)) {
  bool measured = false;
  for (i64 j = 0; j < job_count; ++j) measured = measured || jobs[j].measure;
  for (int phase = measured ? MEASURE : UPDATE; phase <= UPDATE; ++phase) {
    Work work = {jobs, job_count, 1, 0, (Phase)phase};
    if (threads > 1 && parallel) {
      work.slices = threads * 4;
      parallel(work_on, &work, (unsigned)threads, 0);
    } else {
      work_on(&work);
    }
  }
}

