// What a compiled kernel and the runtime beneath it know of each other.
//
// The kernel text is one translation unit, instrumented as the mode asks. The runtime (the .cpp
// files beside this header) is compiled once, without instrumentation, and linked in: so the
// checker sees the memory accesses of the kernel and nothing else.
#pragma once
#include <stddef.h>
#include <stdint.h>

#include "types.h"

// For the few inline functions below that touch the runtime's own memory from kernel code.
#define CUDA_ON_CPU_UNCHECKED inline __attribute__((no_sanitize("thread")))

namespace cuda_on_cpu {

constexpr unsigned warp_size = 32;
constexpr unsigned max_block_threads = 1024;
constexpr size_t max_dynamic_shared = 227 * 1024;

// ---- the thread that runs now -------------------------------------------------------------------

struct ThreadInfo {
  cuda_device::uint3 index;
  unsigned linear;  // x fastest; warps are 32 neighbors in this order
  const char* stack_begin;
  const char* stack_end;
};

extern ThreadInfo* current;  // null while no CUDA thread runs
extern cuda_device::uint3 block_index;
extern cuda_device::dim3 block_size;
extern cuda_device::dim3 grid_size;
extern char dynamic_shared[max_dynamic_shared];

CUDA_ON_CPU_UNCHECKED cuda_device::uint3 thread_index() { return current->index; }
CUDA_ON_CPU_UNCHECKED cuda_device::uint3 current_block() { return block_index; }
CUDA_ON_CPU_UNCHECKED cuda_device::dim3 current_block_size() { return block_size; }
CUDA_ON_CPU_UNCHECKED cuda_device::dim3 current_grid_size() { return grid_size; }

// ---- places where threads wait for each other ---------------------------------------------------

// What the lanes that meet in a warp collective brought along.
struct Exchange {
  uint64_t value[warp_size];
  unsigned lanes;  // bit i: lane i takes part
};

// A warp collective either hands each lane the value of one source lane (the shuffles), or
// combines the values of all lanes that take part (votes, reductions).
struct Collective {
  const char* name;
  int (*source)(int lane, int argument, int width);
  uint64_t (*combine)(const Exchange&, int lane);
};

extern const Collective sync_warp, ballot, match_any;
extern const Collective shuffle, shuffle_up, shuffle_down, shuffle_xor;
extern const Collective reduce_add, reduce_and, reduce_or, reduce_xor;
extern const Collective reduce_min_signed, reduce_min_unsigned;
extern const Collective reduce_max_signed, reduce_max_unsigned;

uint64_t meet_in_warp(const Collective&, unsigned mask, uint64_t value, int argument, int width,
                      int line);
// Returns how many threads of the block brought a true predicate.
int meet_in_block(bool predicate, int line);

// ---- failures -----------------------------------------------------------------------------------

// Read by the Python side through ctypes: keep both in step.
struct Failure {
  char message[512];
  uint64_t site;        // offset in this module of the offending instruction, 0: see line
  uint64_t other_site;  // likewise of the earlier access in a race, 0: none
  int32_t line;         // of the kernel text, 0: see site
  cuda_device::uint3 block, thread;
};

// Both record the failure, unless there is one already, and leave the running thread for good.
[[noreturn]] void fail_at_line(int line, const char* format, ...)
    __attribute__((format(printf, 2, 3)));
[[noreturn]] void fail_at_site(uintptr_t site, uintptr_t other_site, const char* format, ...)
    __attribute__((format(printf, 3, 4)));

// The offset in this module of the instruction before a return address.
uintptr_t site_of(const void* return_address);

// ---- launching ----------------------------------------------------------------------------------

struct Buffer {
  uint64_t begin, size;
  const char* label;
};

struct Launch {
  uint32_t grid[3], block[3];
  uint64_t shared_bytes;
  uint32_t schedule;
  uint32_t buffer_count;
  const Buffer* buffers;  // by address, without overlap
  void** arguments;  // one pointer per parameter, as cuLaunchKernel takes them
};

struct Parameter {
  char kind;      // p pointer, f floating, i signed, u unsigned, b bool, s structure
  char pointee;   // for pointers: one of the above, or v for void
  uint32_t size;  // bytes
  uint32_t pointee_size;
};

struct KernelRecord {
  const char* name;
  void (*call)(void** arguments);
  const Parameter* parameters;
  uint32_t parameter_count;
  uint32_t max_threads;  // __launch_bounds__, or the limit of the hardware
  KernelRecord* next;
};

void register_kernel(KernelRecord&);

// ---- observation --------------------------------------------------------------------------------

// What the checker needs to hear about; check.cpp installs itself when it is linked in.
class Observer {
 public:
  virtual void launch_starts(const Launch&) = 0;
  virtual void block_starts(const char* shared_begin, const char* shared_end,
                            size_t dynamic_bytes) = 0;
  virtual void block_synchronized() = 0;
  virtual void warp_synchronized(unsigned warp, unsigned lanes) = 0;
  virtual void atomic_access(const void* address, size_t bytes, uintptr_t site) = 0;
  virtual void thread_fence() = 0;

 protected:
  ~Observer() = default;
};

extern Observer* observer;

}  // namespace cuda_on_cpu
