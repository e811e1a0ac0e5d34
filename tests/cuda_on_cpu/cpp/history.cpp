// The happens-before relation of one launch. Within a warp __syncwarp orders lanes, within a block
// __syncthreads orders threads; shuffles and votes order nothing, as on a GPU.
#include "history.h"

#include <algorithm>

namespace cuda_on_cpu {

// ---- time --------------------------------------------------------------------------------------

void Clock::start_launch() {
  now_ = 1;
  block_ = 0;
  published_.clear();
}

void Clock::start_block(unsigned thread_count) {
  ++block_;
  block_start_ = barrier_ = now_++;
  const size_t warps = (thread_count + warp_size - 1) / warp_size;
  seen_.assign(warps * warp_size * warp_size, never);
  fenced_.assign(thread_count, false);
  acquired_.clear();
}

// Every lane that takes part now knows what any of them knew, and all they did so far.
void Clock::synchronize_warp(unsigned warp, unsigned lanes) {
  for (unsigned other = 0; other < warp_size; ++other) {
    uint32_t latest = never;
    for (unsigned lane = 0; lane < warp_size; ++lane) {
      if (lanes >> lane & 1) latest = std::max(latest, seen(warp, lane, other));
    }
    if (lanes >> other & 1) latest = now_;
    for (unsigned lane = 0; lane < warp_size; ++lane) {
      if (lanes >> lane & 1) seen(warp, lane, other) = latest;
    }
  }
  ++now_;
}

void Clock::atomic_access(unsigned thread, const void* address) {
  TimeByBlock& published = published_[address];
  for (const auto& [block, time] : published) {
    acquired_[block] = std::max(acquired_[block], time);
  }
  if (!fenced_[thread]) return;
  for (const auto& [block, time] : acquired_) published[block] = std::max(published[block], time);
  published[block_] = now_++;
}

// ---- order -------------------------------------------------------------------------------------

bool Clock::has_acquired(uint32_t block, uint32_t time) const {
  const auto found = acquired_.find(block);
  return found != acquired_.end() && time <= found->second;
}

bool Clock::write_is_ordered(const ByteHistory& byte, unsigned thread) const {
  if (byte.write_time == never) return true;
  if (!in_this_block(byte.write_time)) return has_acquired(byte.write_block, byte.write_time);
  if (byte.write_time <= barrier_ || byte.writer == thread) return true;
  const unsigned warp = thread / warp_size;
  return byte.writer / warp_size == warp &&
         byte.write_time <= seen(warp, thread % warp_size, byte.writer % warp_size);
}

bool Clock::recent_reads_are_ordered(const ByteHistory& byte, unsigned thread) const {
  if (byte.read_time <= barrier_) return true;
  const unsigned warp = thread / warp_size;
  if (byte.reader_warp != static_cast<int>(warp)) return false;
  for (unsigned lane = 0; lane < warp_size; ++lane) {
    const bool another = (byte.reader_lanes >> lane & 1) && lane != thread % warp_size;
    if (another && byte.read_time > seen(warp, thread % warp_size, lane)) return false;
  }
  return true;
}

bool Clock::reads_are_ordered(const ByteHistory& byte, unsigned thread) const {
  if (byte.read_time == never) return true;
  if (byte.read_by_earlier_block) return false;
  if (!in_this_block(byte.read_time)) return has_acquired(byte.read_block, byte.read_time);
  return recent_reads_are_ordered(byte, thread);
}

// ---- records -----------------------------------------------------------------------------------

void Clock::record_write(ByteHistory& byte, unsigned thread, bool atomic, uint32_t site) const {
  byte.write_time = now_;
  byte.writer = thread;
  byte.write_block = block_;
  byte.write_site = site;
  byte.write_was_atomic = atomic;
}

void Clock::record_read(ByteHistory& byte, unsigned thread, uint32_t site) const {
  const unsigned warp = thread / warp_size;
  const unsigned lane = 1u << thread % warp_size;
  const bool first_of_block = !in_this_block(byte.read_time);
  if (first_of_block && byte.read_time != never) byte.read_by_earlier_block = true;
  // A later write that is ordered after this read is also ordered after those before it.
  if (first_of_block || recent_reads_are_ordered(byte, thread)) {
    byte.reader_warp = static_cast<int16_t>(warp);
    byte.reader_lanes = lane;
  } else if (byte.reader_warp == static_cast<int>(warp)) {
    byte.reader_lanes |= lane;
  } else {
    byte.reader_warp = several_warps;
  }
  byte.read_time = now_;
  byte.read_block = block_;
  byte.read_site = site;
}

}  // namespace cuda_on_cpu
