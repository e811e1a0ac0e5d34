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

struct ByteHistory {
  // The last write.
  uint32_t write_time = never;
  uint32_t writer = 0;  // thread
  uint32_t write_block = 0;
  uint32_t write_site = 0;
  bool write_was_atomic = false;
  // The reads since: all of one warp, or of several.
  bool read_by_earlier_block = false;
  int16_t reader_warp = 0;
  uint32_t read_time = never;  // the last of them
  uint32_t reader_lanes = 0;
  uint32_t read_block = 0;
  uint32_t read_site = 0;
};

class Clock {
 public:
  void start_launch();
  void start_block(unsigned thread_count);
  void synchronize_block() { barrier_ = now_++; }
  void synchronize_warp(unsigned warp, unsigned lanes);

  // Blocks are ordered only by a fence before an atomic in one, and an atomic on the same
  // address in the other.
  void thread_fence(unsigned thread) { fenced_[thread] = true; }
  void atomic_access(unsigned thread, const void* address);

  uint32_t now() const { return now_; }
  uint32_t block() const { return block_; }
  bool in_this_block(uint32_t time) const { return time > block_start_; }

  bool write_is_ordered(const ByteHistory&, unsigned thread) const;
  bool reads_are_ordered(const ByteHistory&, unsigned thread) const;
  void record_write(ByteHistory&, unsigned thread, bool atomic, uint32_t site) const;
  void record_read(ByteHistory&, unsigned thread, uint32_t site) const;

 private:
  typedef std::map<uint32_t, uint32_t> TimeByBlock;

  bool has_acquired(uint32_t block, uint32_t time) const;
  bool recent_reads_are_ordered(const ByteHistory&, unsigned thread) const;
  // Until when `lane` of a warp has seen what lane `other` did.
  uint32_t seen(unsigned warp, unsigned lane, unsigned other) const {
    return seen_[(warp * warp_size + lane) * warp_size + other];
  }
  uint32_t& seen(unsigned warp, unsigned lane, unsigned other) {
    return seen_[(warp * warp_size + lane) * warp_size + other];
  }

  uint32_t now_ = 1, block_ = 0, block_start_ = 0, barrier_ = 0;
  std::vector<uint32_t> seen_;
  std::vector<bool> fenced_;
  TimeByBlock acquired_;
  std::map<const void*, TimeByBlock> published_;
};

}  // namespace cuda_on_cpu
