// Numbers of any dtype on a CPU, to floats and back. float16 goes by the processor's own instructions
// where it has them: compilers do not vectorize its conversions by themselves.

#if defined(__AVX512F__) || defined(__F16C__)
#include <immintrin.h>
#endif

// Where they are floats: `from` itself, or in `room`.
static inline const float* load_numbers(const float* from, int, float*) { return from; }

static inline const float* load_numbers(const bfloat16* from, int count, float* room) {
  for (int i = 0; i < count; ++i) room[i] = to_float(from[i]);
  return room;
}

static inline const float* load_numbers(const float16* from, int count, float* room) {
  int i = 0;
#if defined(__AVX512F__)
  for (; i + 16 <= count; i += 16)
    _mm512_storeu_ps(room + i, _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)(from + i))));
#elif defined(__F16C__)
  for (; i + 8 <= count; i += 8)
    _mm256_storeu_ps(room + i, _mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)(from + i))));
#endif
  for (; i < count; ++i) room[i] = to_float(from[i]);
  return room;
}

static inline void store_numbers(const float* from, int count, float* to) { __builtin_memcpy(to, from, count * sizeof(float)); }

static inline void store_numbers(const float* from, int count, bfloat16* to) {
  for (int i = 0; i < count; ++i) from_float(from[i], to[i]);
}

static inline void store_numbers(const float* from, int count, float16* to) {
  int i = 0;
#if defined(__AVX512F__)
  for (; i + 16 <= count; i += 16)
    _mm256_storeu_si256((__m256i*)(to + i), _mm512_cvtps_ph(_mm512_loadu_ps(from + i), _MM_FROUND_TO_NEAREST_INT));
#elif defined(__F16C__)
  for (; i + 8 <= count; i += 8)
    _mm_storeu_si128((__m128i*)(to + i), _mm256_cvtps_ph(_mm256_loadu_ps(from + i), _MM_FROUND_TO_NEAREST_INT));
#endif
  for (; i < count; ++i) from_float(from[i], to[i]);
}
