// Sixteen floats as one Number: what a rule's statements do to a float, they do to each of them. So a few elements can be
// updated between the codings of others, in one stream of instructions, where a loop would have to end: see cpu_stage.h.

#if defined(BLOCKS_BY_AVX512) && BNBX_OVERLAP
#define LANED

struct Mask {
  __mmask16 bits;
};

struct Lanes {
  __m512 x;

  Lanes() = default;
  Lanes(__m512 of) : x(of) {}
  Lanes(float of) : x(_mm512_set1_ps(of)) {}
  Lanes operator-() const { return _mm512_castsi512_ps(_mm512_xor_si512(_mm512_castps_si512(x), _mm512_set1_epi32((i32)0x80000000u))); }
};

DEVICE Lanes operator+(Lanes a, Lanes b) { return _mm512_add_ps(a.x, b.x); }
DEVICE Lanes operator-(Lanes a, Lanes b) { return _mm512_sub_ps(a.x, b.x); }
DEVICE Lanes operator*(Lanes a, Lanes b) { return _mm512_mul_ps(a.x, b.x); }
DEVICE Lanes operator/(Lanes a, Lanes b) { return _mm512_div_ps(a.x, b.x); }

DEVICE Mask operator<(Lanes a, Lanes b) { return {_mm512_cmp_ps_mask(a.x, b.x, _CMP_LT_OQ)}; }
DEVICE Mask operator<=(Lanes a, Lanes b) { return {_mm512_cmp_ps_mask(a.x, b.x, _CMP_LE_OQ)}; }
DEVICE Mask operator>(Lanes a, Lanes b) { return {_mm512_cmp_ps_mask(a.x, b.x, _CMP_GT_OQ)}; }
DEVICE Mask operator>=(Lanes a, Lanes b) { return {_mm512_cmp_ps_mask(a.x, b.x, _CMP_GE_OQ)}; }
DEVICE Mask operator==(Lanes a, Lanes b) { return {_mm512_cmp_ps_mask(a.x, b.x, _CMP_EQ_OQ)}; }
DEVICE Mask operator!=(Lanes a, Lanes b) { return {_mm512_cmp_ps_mask(a.x, b.x, _CMP_NEQ_UQ)}; }

DEVICE Lanes rule_fma(Lanes a, Lanes b, Lanes c) { return _mm512_fmadd_ps(a.x, b.x, c.x); }
DEVICE Lanes rule_fms(Lanes a, Lanes b, Lanes c) { return _mm512_fmsub_ps(a.x, b.x, c.x); }
DEVICE Lanes rule_fnma(Lanes a, Lanes b, Lanes c) { return _mm512_fnmadd_ps(a.x, b.x, c.x); }
DEVICE Lanes rule_where(Mask condition, Lanes yes, Lanes no) { return _mm512_mask_blend_ps(condition.bits, no.x, yes.x); }
DEVICE Lanes rule_where(bool condition, Lanes yes, Lanes no) { return condition ? yes : no; }
DEVICE Lanes rule_sqrt(Lanes x) { return _mm512_sqrt_ps(x.x); }
DEVICE Lanes rule_abs(Lanes x) { return _mm512_abs_ps(x.x); }
DEVICE Lanes rule_min(Lanes a, Lanes b) { return _mm512_min_ps(a.x, b.x); }  // b, where either is NaN
DEVICE Lanes rule_max(Lanes a, Lanes b) { return _mm512_max_ps(a.x, b.x); }

DEVICE Lanes rule_sign(Lanes x) {
  const __mmask16 signs = _mm512_cmp_ps_mask(x.x, _mm512_setzero_ps(), _CMP_LT_OQ) | _mm512_cmp_ps_mask(x.x, _mm512_setzero_ps(), _CMP_GT_OQ);
  const __m512 one = _mm512_or_ps(_mm512_and_ps(x.x, _mm512_set1_ps(-0.0f)), _mm512_set1_ps(1.0f));
  return _mm512_mask_blend_ps(signs, x.x, one);
}

DEVICE void rule_read(const float* from, Lanes& x) { x.x = _mm512_loadu_ps(from); }
DEVICE void rule_write(Lanes x, float* to) { _mm512_storeu_ps(to, x.x); }

DEVICE void rule_read(const bfloat16* from, Lanes& x) {
  const __m512i bits = _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)from));
  x.x = _mm512_castsi512_ps(_mm512_slli_epi32(bits, 16));
}

// As from_float rounds.
DEVICE void rule_write(Lanes x, bfloat16* to) {
  const __m512i bits = _mm512_castps_si512(x.x), last = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  const __m512i rounded = _mm512_srli_epi32(_mm512_add_epi32(_mm512_add_epi32(bits, _mm512_set1_epi32(0x7fff)), last), 16);
  const __mmask16 nan = _mm512_cmp_ps_mask(x.x, x.x, _CMP_UNORD_Q);
  _mm256_storeu_si256((__m256i*)to, _mm512_cvtepi32_epi16(_mm512_mask_blend_epi32(nan, rounded, _mm512_set1_epi32(0x7fc0))));
}

DEVICE void rule_read(const float16* from, Lanes& x) { x.x = _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)from)); }

DEVICE void rule_write(Lanes x, float16* to) {
  _mm256_storeu_si256((__m256i*)to, _mm512_cvtps_ph(x.x, _MM_FROUND_TO_NEAREST_INT));
}

// The largest magnitude in each lane, as an integer.
struct Magnitudes {
  __m512i bits = _mm512_setzero_si512();
};

DEVICE Magnitudes larger_magnitude(Magnitudes largest, Lanes x) {
  return {_mm512_max_epi32(largest.bits, _mm512_castps_si512(rule_abs(x).x))};
}

DEVICE i32 largest_of(Magnitudes found) { return _mm512_reduce_max_epi32(found.bits); }

typedef Lanes Several;
typedef Magnitudes Largest;
#endif
