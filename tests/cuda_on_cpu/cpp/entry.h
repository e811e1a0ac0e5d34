// Describes a kernel's parameters to Python and unpacks its arguments.
#pragma once
#include <type_traits>
#include <utility>

#include "runtime.h"

namespace cuda_on_cpu {

template <class T>
constexpr char kind_of() {
  if (std::is_void<T>::value) return 'v';
  if (std::is_pointer<T>::value) return 'p';
  if (std::is_same<T, bool>::value) return 'b';
  if (std::is_floating_point<T>::value) return 'f';
  if (std::is_integral<T>::value) return std::is_signed<T>::value ? 'i' : 'u';
  return 's';
}

template <class T>
constexpr uint32_t size_of() {
  if constexpr (std::is_void<T>::value) {
    return 0;
  } else {
    return sizeof(T);
  }
}

template <class T>
constexpr Parameter describe() {
  static_assert(std::is_trivially_copyable<T>::value, "kernel parameters are copied as bytes");
  using Pointee = std::remove_cv_t<std::remove_pointer_t<T>>;
  if (!std::is_pointer<T>::value) return {kind_of<T>(), 0, size_of<T>(), 0};
  return {'p', kind_of<Pointee>(), sizeof(void*), size_of<Pointee>()};
}

// Fails to compile for anything but a function that returns void, as a kernel must.
template <auto kernel>
struct Entry;

template <class... Parameters, void (*kernel)(Parameters...)>
struct Entry<kernel> {
  static constexpr uint32_t count = sizeof...(Parameters);
  static constexpr Parameter parameters[] = {describe<Parameters>()..., Parameter()};

  static __attribute__((no_sanitize("thread"))) void call(void** arguments) {
    call_with(arguments, std::index_sequence_for<Parameters...>());
  }

 private:
  template <size_t... i>
  static __attribute__((no_sanitize("thread"))) void call_with(void** arguments,
                                                               std::index_sequence<i...>) {
    static_cast<void>(arguments);  // for a kernel without parameters
    kernel(*static_cast<Parameters*>(arguments[i])...);
  }
};

// Takes what stands between the parentheses of __launch_bounds__, if anything.
constexpr unsigned launch_bound(unsigned max_threads = max_block_threads, unsigned = 0,
                                unsigned = 0) {
  return max_threads;
}

// The Python side appends one of these for every kernel it finds.
template <auto kernel>
class Registration {
 public:
  Registration(const char* name, unsigned max_threads)
      : record_{name, Entry<kernel>::call, Entry<kernel>::parameters, Entry<kernel>::count,
                max_threads, nullptr} {
    register_kernel(record_);
  }

 private:
  KernelRecord record_;
};

}  // namespace cuda_on_cpu
