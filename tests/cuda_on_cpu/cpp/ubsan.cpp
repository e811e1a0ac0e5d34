// Reports what g++ -fsanitize=bounds,alignment,... finds in a kernel: the handlers here take the
// place of the undefined-behavior sanitizer's library, which is not linked and would end the
// process. The structures are those that g++ emits.
#include <stdint.h>
#include <string.h>

#include "runtime.h"

namespace {

struct SourceLocation {
  const char* file;
  uint32_t line, column;
};

struct TypeDescriptor {
  uint16_t kind;  // 0 integer, 1 floating, 0xffff other
  uint16_t info;  // of an integer: log2 of the width in bits, twice, plus 1 if signed
  char name[1];   // quoted
};

struct OutOfBounds {
  SourceLocation location;
  const TypeDescriptor *array, *index;
};

struct TypeMismatch {
  SourceLocation location;
  const TypeDescriptor* type;
  uint8_t log2_alignment;
  uint8_t access;
};

struct ShiftOutOfBounds {
  SourceLocation location;
  const TypeDescriptor *value, *distance;
};

struct Overflow {
  SourceLocation location;
  const TypeDescriptor* type;
};

struct FloatCastOverflow {
  SourceLocation location;
  const TypeDescriptor *from, *to;
};

// Integers of up to 64 bits are handed over as themselves, zero extended.
long long integer(const TypeDescriptor* type, uintptr_t value) {
  const unsigned bits = 1u << (type->info >> 1);
  const bool is_signed = type->info & 1;
  if (!is_signed || bits >= 64) return static_cast<long long>(value);
  const unsigned unused = 64 - bits;
  return static_cast<long long>(static_cast<uint64_t>(value) << unused) >> unused;
}

// A float is handed over as its bits, in an integer.
double floating(const TypeDescriptor* type, uintptr_t value) {
  if (type->info == 32) {
    float result;
    memcpy(&result, &value, sizeof result);
    return static_cast<double>(result);
  }
  double result;
  memcpy(&result, &value, sizeof result);
  return result;
}

const char* access_name(uint8_t access) {
  static const char* const names[] = {"load of", "store to", "reference to", "member access in",
                                      "member call on"};
  return access < sizeof names / sizeof names[0] ? names[access] : "use of";
}

}  // namespace

#define CUDA_ON_CPU_SITE cuda_on_cpu::site_of(__builtin_return_address(0)), 0

extern "C" {

void __ubsan_handle_out_of_bounds(const OutOfBounds* data, uintptr_t index) {
  cuda_on_cpu::fail_at_site(CUDA_ON_CPU_SITE, "index %lld is out of bounds for type %s",
                            integer(data->index, index), data->array->name);
}

void __ubsan_handle_type_mismatch_v1(const TypeMismatch* data, uintptr_t address) {
  if (address == 0) {
    cuda_on_cpu::fail_at_site(CUDA_ON_CPU_SITE, "%s type %s through a null pointer",
                              access_name(data->access), data->type->name);
  }
  cuda_on_cpu::fail_at_site(CUDA_ON_CPU_SITE,
                            "%s type %s at misaligned address 0x%zx, expected a multiple of %u",
                            access_name(data->access), data->type->name,
                            static_cast<size_t>(address), 1u << data->log2_alignment);
}

void __ubsan_handle_shift_out_of_bounds(const ShiftOutOfBounds* data, uintptr_t value,
                                        uintptr_t distance) {
  cuda_on_cpu::fail_at_site(CUDA_ON_CPU_SITE, "shift of %lld by %lld is undefined for type %s",
                            integer(data->value, value), integer(data->distance, distance),
                            data->value->name);
}

void __ubsan_handle_divrem_overflow(const Overflow* data, uintptr_t, uintptr_t) {
  cuda_on_cpu::fail_at_site(CUDA_ON_CPU_SITE, "division by zero or overflow in type %s",
                            data->type->name);
}

void __ubsan_handle_float_cast_overflow(const FloatCastOverflow* data, uintptr_t value) {
  cuda_on_cpu::fail_at_site(CUDA_ON_CPU_SITE, "%g is out of range for type %s",
                            floating(data->from, value), data->to->name);
}

void __ubsan_handle_builtin_unreachable(const SourceLocation*) {
  cuda_on_cpu::fail_at_site(CUDA_ON_CPU_SITE, "unreachable code was reached");
}

}  // extern "C"
