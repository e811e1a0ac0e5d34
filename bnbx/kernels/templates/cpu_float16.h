// float16 on a CPU: spans of it are converted on the way in and out of the update loop, by the
// processor's own instructions where it has them; compilers do not vectorize those by themselves.

#if defined(__AVX512F__)
#include <immintrin.h>
#endif

static inline void load_floats(const float16* from, int count, float* to) {
  int i = 0;
#if defined(__AVX512F__)
  for (; i + 16 <= count; i += 16)
    _mm512_storeu_ps(to + i, _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)(from + i))));
#endif
  for (; i < count; ++i) to[i] = to_float(from[i]);
}

static inline void store_floats(const float* from, int count, float16* to) {
  int i = 0;
#if defined(__AVX512F__)
  for (; i + 16 <= count; i += 16)
    _mm256_storeu_si256((__m256i*)(to + i), _mm512_cvtps_ph(_mm512_loadu_ps(from + i), _MM_FROUND_TO_NEAREST_INT));
#endif
  for (; i < count; ++i) from_float(from[i], to[i]);
}
