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
