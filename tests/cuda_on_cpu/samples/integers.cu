// Every integer intrinsic on the same inputs, one row of results each.
extern "C" __global__ void integers(const unsigned* a, const unsigned* b, unsigned* out, int n) {
  const int i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i >= n) return;
  const unsigned x = a[i], y = b[i];
  const int sx = (int)x, sy = (int)y;
  const unsigned long long wide = (unsigned long long)x << 32 | y;
  const long long swide = (long long)wide;
  out += i;
  out[0 * n] = __popc(x);
  out[1 * n] = __popcll(wide);
  out[2 * n] = __clz(sx);
  out[3 * n] = __clzll(swide);
  out[4 * n] = __ffs(sx);
  out[5 * n] = __ffsll(swide);
  out[6 * n] = __brev(x);
  out[7 * n] = __byte_perm(x, y, x >> 7 ^ y);
  out[8 * n] = __funnelshift_l(x, y, y);
  out[9 * n] = __funnelshift_r(x, y, y);
  out[10 * n] = __funnelshift_lc(x, y, y & 63);
  out[11 * n] = __funnelshift_rc(x, y, y & 63);
  out[12 * n] = __umulhi(x, y);
  out[13 * n] = __mulhi(sx, sy);
  out[14 * n] = (unsigned)__umul64hi(wide, wide ^ 0x123456789abcdefULL);
  out[15 * n] = (unsigned)__mul64hi(swide, swide ^ 0x123456789abcdefLL);
  out[16 * n] = __dp4a(sx, sy, 7);
  out[17 * n] = __dp4a(x, y, 7u);
  out[18 * n] = min(sx, sy);
  out[19 * n] = max(x, y);
  out[20 * n] = min(x, sy);
  out[21 * n] = (unsigned)max(swide, (long long)sy);
  out[22 * n] = abs(sx);
  out[23 * n] = (unsigned)(wide >> (y & 63));
  uchar4 bytes = *reinterpret_cast<const uchar4*>(a + i);
  out[24 * n] = make_uint4(bytes.x, bytes.y, bytes.z, bytes.w).z;
}
