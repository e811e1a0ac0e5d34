// Every exact floating-point function on the same inputs, one row of results each; bits, so that
// the sign of a zero shows.
extern "C" __global__ void floats(const float* a, const float* b, unsigned* out, int n) {
  const int i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i >= n) return;
  const float x = a[i], y = b[i];
  out += i;
  out[0 * n] = __float_as_uint(fmaxf(x, y));
  out[1 * n] = __float_as_uint(fminf(x, y));
  out[2 * n] = __float_as_uint(fabsf(x));
  out[3 * n] = __float_as_uint(__fadd_rn(x, y));
  out[4 * n] = __float_as_uint(__fmul_rn(x, y));
  out[5 * n] = __float_as_uint(__fdiv_rn(x, y));
  out[6 * n] = __float_as_uint(__fsqrt_rn(fabsf(x)));
  out[7 * n] = __float_as_uint(sqrtf(fabsf(x)));
  out[8 * n] = __float_as_uint(__fmaf_rn(x, y, 1.0f));
  out[9 * n] = __float_as_uint(x * y + 1.0f);
  out[10 * n] = __float_as_uint(floorf(x));
  out[11 * n] = __float_as_uint(rintf(x));
  out[12 * n] = __float_as_uint(truncf(x));
  out[13 * n] = __float_as_uint(copysignf(x, y));
  out[14 * n] = __float_as_uint(__saturatef(x));
  out[15 * n] = (unsigned)__float2int_rn(x);
  out[16 * n] = (unsigned)__float2int_rz(x);
  out[17 * n] = (unsigned)__float2int_ru(x);
  out[18 * n] = (unsigned)__float2int_rd(x);
  out[19 * n] = __float2uint_rn(x);
  out[20 * n] = __float2uint_rz(x);
  out[21 * n] = __float_as_uint(__int2float_rn(__float_as_int(x)));
  out[22 * n] = __float_as_uint(__uint2float_rn(__float_as_uint(x)));
  out[23 * n] = isnan(x) + 2 * isinf(x) + 4 * isfinite(x) + 8 * (signbit(x) != 0);
  out[24 * n] = __float_as_uint(max(x, y));
  out[25 * n] = __float_as_uint((float)((double)x * (double)y));
  out[26 * n] = __float_as_uint(__int_as_float(__float_as_int(x)));
}
