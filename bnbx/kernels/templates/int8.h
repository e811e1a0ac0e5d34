// The arithmetic of LLM.int8() (arXiv:2208.07339), element by element, as C++ and CUDA kernels share
// it; bnbx/kernels/int8_reference.py says the same with torch operations, and the bits are equal.
//
// A row of numbers x is kept as codes round(x * (1 / absmax * 127)) and its absmax. An outlier is a number
// of at least the threshold; its column is multiplied in floats and has code 0. The product of rows x
// and w is (sum(code_x * code_w) * absmax_x / 127**2 + sum over outlier columns(x * code_w / 127)) * absmax_w:
// in this order no part overflows that is not larger than the whole.

enum { INT8_MOST = 127 };
#define INT8_STEP (1.0f / 127.0f)

// What magnitudes are compared with, as float bits: those of an outlier are not below it. No number is
// an outlier where the threshold is 0.
DEVICE u32 int8_limit(float threshold) { return threshold > 0.0f ? bits_of(threshold) : 0xffffffffu; }

// NaN is no outlier: it stays among the codes of its row and shows in the row's absmax.
DEVICE bool int8_outlier(u32 magnitude, u32 limit) { return magnitude >= limit && magnitude <= 0x7f800000u; }

// What a row is multiplied by; 0 where it has no codes: NaN or infinity in it, or nothing but zeros
// (or numbers so small that this is infinite).
DEVICE float int8_inverse(u32 largest) {
  const float absmax = float_of(largest);
  const float inverse = 1.0f / absmax * (float)INT8_MOST;  // in two roundings, as files have it
  return largest < 0x7f800000u && bits_of(inverse) < 0x7f800000u ? inverse : 0.0f;
}

// Nearest, ties to even: the sum has no room for a fraction.
DEVICE i8 int8_code(float x, float inverse, u32 limit) {
  const u32 code = bits_of(x * inverse + 12582912.0f) - 0x4b400000u;
  return (bits_of(x) & 0x7fffffffu) < limit ? (i8)code : (i8)0;
}

DEVICE float int8_number(i8 code, float absmax) { return (float)code * absmax * INT8_STEP; }

// What sums of products of codes are multiplied by for a row of x, and codes in outlier columns.
DEVICE float int8_row_factor(float absmax) { return absmax * INT8_STEP * INT8_STEP; }
DEVICE float int8_part(i8 code) { return (float)code * INT8_STEP; }

// For one output, or for a vector of them.
template <class Floats>
DEVICE Floats int8_product(Floats sum, float row_factor, Floats outliers, Floats absmax_w, Floats bias) {
  return (sum * row_factor + outliers) * absmax_w + bias;
}
