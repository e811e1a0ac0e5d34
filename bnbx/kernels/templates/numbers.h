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
