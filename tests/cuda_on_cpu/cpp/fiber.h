// Fibers: a stack for every CUDA thread, and a switch between them.
#pragma once
#include <stddef.h>
#include <stdint.h>
#include <sys/mman.h>
#include <unistd.h>

#include <new>

// Saves the running context and stores its stack pointer, then continues the other context.
extern "C" void cuda_on_cpu_switch(void** save_here, void* continue_there);

namespace cuda_on_cpu {

// A context which, when first continued, calls `entry`; `entry` must never return.
void* new_context(char* stack_top, void (*entry)());

// Equal stacks in one mapping, an unmapped page below each, so that an overflow faults.
class FiberStacks {
 public:
  FiberStacks(unsigned count, size_t usable)
      : page_(static_cast<size_t>(sysconf(_SC_PAGESIZE))),
        stride_(usable + page_),
        bytes_(stride_ * count) {
    void* memory = mmap(nullptr, bytes_, PROT_READ | PROT_WRITE,
                        MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (memory == MAP_FAILED) throw std::bad_alloc();
    memory_ = static_cast<char*>(memory);
    for (unsigned i = 0; i < count; ++i) mprotect(memory_ + i * stride_, page_, PROT_NONE);
  }
  ~FiberStacks() { munmap(memory_, bytes_); }
  FiberStacks(const FiberStacks&) = delete;
  FiberStacks& operator=(const FiberStacks&) = delete;

  const char* begin(unsigned i) const { return memory_ + i * stride_ + page_; }
  const char* end(unsigned i) const { return memory_ + (i + 1) * stride_; }
  // Staggered, or the busy ends of all stacks would compete for the same cache sets.
  char* top(unsigned i) const { return memory_ + (i + 1) * stride_ - (i % 16) * 256; }
  bool in_guard(const char* address) const {
    if (address < memory_ || address >= memory_ + bytes_) return false;
    return static_cast<size_t>(address - memory_) % stride_ < page_;
  }

 private:
  size_t page_, stride_, bytes_;
  char* memory_;
};

}  // namespace cuda_on_cpu
