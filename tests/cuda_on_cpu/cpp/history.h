// Who touched a byte last, and whether what a thread does now is ordered after it.
//
// Time advances at synchronization only, so an access is ordered after an earlier one if the time
// of the earlier one is not past what the thread has since been synchronized with.
#pragma once
#include <stdint.h>

#include <map>
#include <vector>

#include "runtime.h"

namespace cuda_on_cpu {

constexpr uint32_t never = 0;
constexpr int16_t several_warps = -1;

struct Write {
  uint32_t time = never;
  uint32_t thread = 0;
  uint32_t block = 0;
  uint32_t site = 0;
};

// Accesses that need no order among themselves: reads, or atomic updates. Those that are ordered
// before a later one are forgotten: whatever is ordered after the later one is after them too.
struct Accesses {
  uint32_t time = never;  // of the last of them
  uint32_t lanes = 0;     // who, if all are of one warp
  uint32_t block = 0;
  uint32_t site = 0;
  int16_t warp = 0;
  bool by_earlier_block = false;  // some are, and this block is not ordered after them
};

struct ByteHistory {
  Write write;  // the last one; what came before was ordered before it, or was reported
  Accesses reads, atomics;
};

class Clock {
 public:
  void start_launch();
  void start_block(unsigned thread_count);
  void synchronize_block() { barrier_ = now_++; }
  void synchronize_warp(unsigned warp, unsigned lanes);

  // Blocks are ordered only by a fence and then an atomic in one, and an atomic on the same
  // address in the other.
  void thread_fence(unsigned thread) { fenced_[thread] = now_++; }
  void atomic_access(unsigned thread, const void* address);

  bool in_this_block(uint32_t time) const { return time > block_start_; }

  bool is_ordered(const Write&, unsigned thread) const;
  bool are_ordered(const Accesses&, unsigned thread) const;
  Write new_write(unsigned thread, uint32_t site) const { return {now_, thread, block_, site}; }
  void add_read(Accesses&, unsigned thread, uint32_t site) const;
  void add_atomic(Accesses&, unsigned thread, uint32_t site) const;

 private:
  typedef std::map<uint32_t, uint32_t> TimeByBlock;

  bool has_acquired(uint32_t block, uint32_t time) const;
  bool are_ordered_in_block(const Accesses&, unsigned thread) const;
  void add(Accesses&, unsigned thread, uint32_t site) const;
  // Until when `lane` of a warp has seen what lane `other` did.
  uint32_t seen(unsigned warp, unsigned lane, unsigned other) const {
    return seen_[(warp * warp_size + lane) * warp_size + other];
  }
  uint32_t& seen(unsigned warp, unsigned lane, unsigned other) {
    return seen_[(warp * warp_size + lane) * warp_size + other];
  }

  uint32_t now_ = 1, block_ = 0, block_start_ = 0, barrier_ = 0;
  std::vector<uint32_t> seen_;
  std::vector<uint32_t> fenced_;  // the time of each thread's last fence
  TimeByBlock acquired_;
  std::map<const void*, TimeByBlock> published_;
};

}  // namespace cuda_on_cpu
