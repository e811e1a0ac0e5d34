// Vectors of LANES floats. Arithmetic on these types is the compiler's own, for any processor; what
// needs an instruction of its own is here, once for each instruction set that has it.

#if defined(__AVX512F__) && defined(__AVX512BW__)
#include <immintrin.h>
enum { LANES = 16 };
#elif defined(__AVX2__) && defined(__FMA__)
#include <immintrin.h>
#define EIGHT_LANES
enum { LANES = 8 };
#else
enum { LANES = 4 };
#endif

// Processors that multiply pairs of bfloat16 at half of the speed of pairs of integers (0.81 and 0.39 ns for a vector on an
// Emerald Rapids): those of Intel, known by instructions that AMD's lack.
#if defined(__AVX512FP16__) || defined(BNBX_SLOW_PAIRS)
#define SLOW_PAIRS
#endif

typedef float Floats __attribute__((vector_size(4 * LANES)));
typedef i32 Ints __attribute__((vector_size(4 * LANES)));

static inline Floats load(const float* from) {
  Floats x;
  __builtin_memcpy(&x, from, sizeof x);
  return x;
}

static inline void store(Floats x, float* to) { __builtin_memcpy(to, &x, sizeof x); }

static inline Floats fill(float x) {
  Floats all;
  for (int l = 0; l < LANES; ++l) all[l] = x;
  return all;
}

#if defined(__AVX512F__) && defined(__AVX512BW__)

static inline Floats multiply_add(Floats a, Floats b, Floats c) {
  return (Floats)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
}

// x[index] for each lane; the last four bits of an index count.
static inline Floats permute(Floats x, Ints index) {
  return (Floats)_mm512_permutexvar_ps((__m512i)index, (__m512)x);
}

static inline Floats broadcast(const float* x) { return (Floats)_mm512_set1_ps(*x); }

// To the nearest integers.
static inline Floats round_all(Floats x) { return (Floats)_mm512_roundscale_ps((__m512)x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }

// The sum of all lanes; here and below, always in the same order.
static inline float sum_of(Floats x) { return _mm512_reduce_add_ps((__m512)x); }

// 16 floats in registers.
struct Table16 { Floats values; };
static inline Table16 load_table(const float* from) { return {load(from)}; }
static inline Floats look_up(const Table16& table, Ints index) { return permute(table.values, index); }

#elif defined(__AVX2__) && defined(__FMA__)

static inline Floats multiply_add(Floats a, Floats b, Floats c) {
  return (Floats)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
}

// x[index] for each lane; the last three bits of an index count.
static inline Floats permute(Floats x, Ints index) {
  return (Floats)_mm256_permutevar8x32_ps((__m256)x, (__m256i)index);
}

static inline Floats broadcast(const float* x) { return (Floats)_mm256_broadcast_ss(x); }

static inline Floats round_all(Floats x) { return (Floats)_mm256_round_ps((__m256)x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }

static inline float sum_of(Floats x) {
  const __m128 four = _mm_add_ps(_mm256_castps256_ps128((__m256)x), _mm256_extractf128_ps((__m256)x, 1));
  const __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)));
}

#else

static inline Floats multiply_add(Floats a, Floats b, Floats c) { return a * b + c; }

static inline float sum_of(Floats x) { return (x[0] + x[2]) + (x[1] + x[3]); }

static inline Floats permute(Floats x, Ints index) {
  Floats found;
  for (int l = 0; l < LANES; ++l) found[l] = x[index[l] % LANES];
  return found;
}

#endif
