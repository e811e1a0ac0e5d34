// Checks every memory access of a kernel: g++ -fsanitize=thread calls a hook before each, and the
// hooks here take the place of the thread sanitizer's library, which is not linked. Found are
// accesses out of bounds, races in shared and global memory, and reads of shared memory that no
// thread of the block has written.
#include <elf.h>
#include <link.h>
#include <stdio.h>

#include <algorithm>
#include <string>
#include <vector>

#include "history.h"
#include "runtime.h"

extern "C" const char __ehdr_start[] __attribute__((visibility("hidden")));
// __constant__ variables live in this section.
extern "C" const char __start_cuda_constant[] __attribute__((weak, visibility("hidden")));
extern "C" const char __stop_cuda_constant[] __attribute__((weak, visibility("hidden")));

namespace cuda_on_cpu {

namespace {

enum class Access { read, write, atomic };

struct Region {
  uintptr_t begin, end;
  bool shared;
  std::string label;
  std::vector<ByteHistory> bytes;
};

class Checker final : public Observer {
 public:
  Checker() { observer = this; }

  void launch_starts(const Launch&) override;
  void block_starts(const char* shared_begin, const char* shared_end,
                    size_t dynamic_bytes) override;
  void block_synchronized() override { clock_.synchronize_block(); }
  void warp_synchronized(unsigned warp, unsigned lanes) override {
    clock_.synchronize_warp(warp, lanes);
  }
  void thread_fence() override { clock_.thread_fence(current->linear); }
  void atomic_access(const void* address, size_t bytes, uintptr_t site) override {
    clock_.atomic_access(current->linear, address);
    check(reinterpret_cast<uintptr_t>(address), bytes, Access::atomic, site);
  }

  void check(uintptr_t address, size_t bytes, Access, uintptr_t site);

 private:
  Region* find(uintptr_t address, size_t bytes);
  void check_byte(Region&, ByteHistory&, uintptr_t address, size_t bytes, Access, uintptr_t site);
  [[noreturn]] void fail_out_of_bounds(uintptr_t address, size_t bytes, Access, uintptr_t site);
  [[noreturn]] void fail_race(const Region&, uintptr_t address, size_t bytes, Access,
                              uintptr_t site, const char* earlier, uint32_t earlier_time,
                              uint32_t earlier_site);

  Clock clock_;
  unsigned thread_count_ = 0;
  std::vector<Region> buffers_;  // by address
  std::vector<Region> shared_;
  Region* last_ = nullptr;  // where the previous access fell
};

Checker checker;

const char* name_of(Access access) {
  return access == Access::read ? "read" : access == Access::write ? "write" : "atomic update";
}

bool lies_in(uintptr_t address, size_t bytes, const void* begin, const void* end) {
  return address >= reinterpret_cast<uintptr_t>(begin) &&
         address + bytes <= reinterpret_cast<uintptr_t>(end);
}

// Constant tables are part of this module: of a segment that is not writable (or no longer, once
// the loader is done with it), or __constant__.
bool is_constant(uintptr_t address, size_t bytes) {
  if (lies_in(address, bytes, __start_cuda_constant, __stop_cuda_constant)) return true;
  const auto* header = reinterpret_cast<const ElfW(Ehdr)*>(__ehdr_start);
  const auto* segment = reinterpret_cast<const ElfW(Phdr)*>(__ehdr_start + header->e_phoff);
  for (unsigned i = 0; i < header->e_phnum; ++i, ++segment) {
    const bool read_only = segment->p_type == PT_LOAD && !(segment->p_flags & PF_W);
    if (!read_only && segment->p_type != PT_GNU_RELRO) continue;
    const char* begin = __ehdr_start + segment->p_vaddr;
    if (lies_in(address, bytes, begin, begin + segment->p_memsz)) return true;
  }
  return false;
}

}  // namespace

// ---- what memory there is -----------------------------------------------------------------------

void Checker::launch_starts(const Launch& launch) {
  thread_count_ = launch.block[0] * launch.block[1] * launch.block[2];
  clock_.start_launch();
  last_ = nullptr;
  shared_.clear();
  buffers_.clear();
  for (uint32_t i = 0; i < launch.buffer_count; ++i) {
    const Buffer& buffer = launch.buffers[i];
    buffers_.push_back({buffer.begin, buffer.begin + buffer.size, false, buffer.label,
                        std::vector<ByteHistory>(buffer.size)});
  }
}

void Checker::block_starts(const char* shared_begin, const char* shared_end,
                           size_t dynamic_bytes) {
  clock_.start_block(thread_count_);
  last_ = nullptr;
  shared_.clear();
  auto add = [this](const char* begin, size_t bytes, const char* label) {
    const uintptr_t start = reinterpret_cast<uintptr_t>(begin);
    if (bytes) shared_.push_back({start, start + bytes, true, label, {}});
    if (bytes) shared_.back().bytes.resize(bytes);
  };
  add(shared_begin, static_cast<size_t>(shared_end - shared_begin), "static shared memory");
  add(dynamic_shared, dynamic_bytes, "dynamic shared memory");
}

Region* Checker::find(uintptr_t address, size_t bytes) {
  auto holds = [=](const Region& r) { return address >= r.begin && address + bytes <= r.end; };
  if (last_ && holds(*last_)) return last_;
  for (Region& region : shared_) {
    if (holds(region)) return last_ = &region;
  }
  auto lies_before = [](uintptr_t a, const Region& r) { return a < r.begin; };
  auto next = std::upper_bound(buffers_.begin(), buffers_.end(), address, lies_before);
  if (next == buffers_.begin() || !holds(next[-1])) return nullptr;
  return last_ = &next[-1];
}

// ---- the checks ---------------------------------------------------------------------------------

void Checker::check(uintptr_t address, size_t bytes, Access access, uintptr_t site) {
  if (lies_in(address, bytes, current->stack_begin, current->stack_end)) return;
  Region* region = find(address, bytes);
  if (!region) {
    if (access == Access::read && is_constant(address, bytes)) return;
    fail_out_of_bounds(address, bytes, access, site);
  }
  ByteHistory* history = &region->bytes[address - region->begin];
  for (size_t i = 0; i < bytes; ++i) {
    check_byte(*region, history[i], address + i, bytes, access, site);
  }
}

void Checker::check_byte(Region& region, ByteHistory& byte, uintptr_t address, size_t bytes,
                         Access access, uintptr_t site) {
  const unsigned thread = current->linear;
  const uint32_t short_site = static_cast<uint32_t>(site);
  if (region.shared && access != Access::write && byte.write.time == never) {
    fail_at_site(site, 0, "%s of uninitialized shared memory: %zu bytes, offset %zu of %s",
                 name_of(access), bytes, address - region.begin, region.label.c_str());
  }
  if (!clock_.is_ordered(byte.write, thread)) {
    fail_race(region, address, bytes, access, site, "write", byte.write.time, byte.write.site);
  }
  if (access != Access::atomic && !clock_.are_ordered(byte.atomics, thread)) {
    fail_race(region, address, bytes, access, site, "atomic update", byte.atomics.time,
              byte.atomics.site);
  }
  if (access != Access::read && !clock_.are_ordered(byte.reads, thread)) {
    fail_race(region, address, bytes, access, site, "read", byte.reads.time, byte.reads.site);
  }
  if (access == Access::read) {
    clock_.add_read(byte.reads, thread, short_site);
  } else if (access == Access::atomic) {
    clock_.add_atomic(byte.atomics, thread, short_site);
  } else {
    byte = ByteHistory();
    byte.write = clock_.new_write(thread, short_site);
  }
}

// ---- the reports --------------------------------------------------------------------------------

void Checker::fail_out_of_bounds(uintptr_t address, size_t bytes, Access access, uintptr_t site) {
  bool before = false;
  uintptr_t distance = 4096;  // farther than this from all memory, an address is just wild
  const Region* nearest = nullptr;
  for (const auto* regions : {&shared_, &buffers_}) {
    for (const Region& region : *regions) {
      const bool starts_before = address < region.begin;
      const uintptr_t gap = starts_before ? region.begin - address : address + bytes - region.end;
      if (gap >= distance) continue;
      nearest = &region;
      distance = gap;
      before = starts_before;
    }
  }
  if (!nearest) {
    fail_at_site(site, 0,
                 "out of bounds %s of %zu bytes at 0x%zx: no argument, buffer or shared memory is "
                 "near",
                 name_of(access), bytes, static_cast<size_t>(address));
  }
  fail_at_site(site, 0,
               "out of bounds %s of %zu bytes: %s %zu %s %s, the nearest memory, which has %zu "
               "bytes",
               name_of(access), bytes, before ? "starts" : "ends", static_cast<size_t>(distance),
               before ? "before" : "past", nearest->label.c_str(),
               static_cast<size_t>(nearest->end - nearest->begin));
}

void Checker::fail_race(const Region& region, uintptr_t address, size_t bytes, Access access,
                        uintptr_t site, const char* earlier, uint32_t earlier_time,
                        uint32_t earlier_site) {
  fail_at_site(site, earlier_site,
               "race: %s of %zu bytes, offset %zu of %s, is not ordered after the %s by another %s",
               name_of(access), bytes, static_cast<size_t>(address - region.begin),
               region.label.c_str(), earlier,
               clock_.in_this_block(earlier_time) ? "thread of the block" : "block");
}

}  // namespace cuda_on_cpu

// ---- the hooks that instrumented code calls -----------------------------------------------------

using cuda_on_cpu::Access;

namespace {

// No thread runs while the module is loaded, but its constructors are instrumented.
void on_access(void* address, size_t bytes, Access access, const void* caller) {
  if (!cuda_on_cpu::current || bytes == 0) return;
  cuda_on_cpu::checker.check(reinterpret_cast<uintptr_t>(address), bytes, access,
                             cuda_on_cpu::site_of(caller));
}

}  // namespace

extern "C" {

void __tsan_init() {}

#define CUDA_ON_CPU_HOOKS(bytes)                                           \
  void __tsan_read##bytes(void* address) {                                 \
    on_access(address, bytes, Access::read, __builtin_return_address(0));  \
  }                                                                        \
  void __tsan_write##bytes(void* address) {                                \
    on_access(address, bytes, Access::write, __builtin_return_address(0)); \
  }
CUDA_ON_CPU_HOOKS(1)
CUDA_ON_CPU_HOOKS(2)
CUDA_ON_CPU_HOOKS(4)
CUDA_ON_CPU_HOOKS(8)
CUDA_ON_CPU_HOOKS(16)
#undef CUDA_ON_CPU_HOOKS

void __tsan_read_range(void* address, size_t bytes) {
  on_access(address, bytes, Access::read, __builtin_return_address(0));
}
void __tsan_write_range(void* address, size_t bytes) {
  on_access(address, bytes, Access::write, __builtin_return_address(0));
}

}  // extern "C"
