// The happens-before relation of one launch. Within a warp __syncwarp orders lanes, within a block
// __syncthreads orders threads; shuffles and votes order nothing, as on a GPU.
#include "history.h"

#include <algorithm>

namespace cuda_on_cpu {

// ---- time ---------------------------------------------------------------------------------------

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
  fenced_.assign(thread_count, never);
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
  published[block_] = std::max(published[block_], fenced_[thread]);
}

// ---- order --------------------------------------------------------------------------------------

bool Clock::has_acquired(uint32_t block, uint32_t time) const {
  const auto found = acquired_.find(block);
  return found != acquired_.end() && time <= found->second;
}

bool Clock::is_ordered(const Write& write, unsigned thread) const {
  if (write.time == never) return true;
  if (!in_this_block(write.time)) return has_acquired(write.block, write.time);
  if (write.time <= barrier_ || write.thread == thread) return true;
  const unsigned warp = thread / warp_size;
  return write.thread / warp_size == warp &&
         write.time <= seen(warp, thread % warp_size, write.thread % warp_size);
}

bool Clock::are_ordered_in_block(const Accesses& accesses, unsigned thread) const {
  if (accesses.time <= barrier_) return true;
  const unsigned warp = thread / warp_size;
  if (accesses.warp != static_cast<int>(warp)) return false;
  for (unsigned lane = 0; lane < warp_size; ++lane) {
    const bool another = (accesses.lanes >> lane & 1) && lane != thread % warp_size;
    if (another && accesses.time > seen(warp, thread % warp_size, lane)) return false;
  }
  return true;
}

bool Clock::are_ordered(const Accesses& accesses, unsigned thread) const {
  if (accesses.time == never) return true;
  if (accesses.by_earlier_block) return false;
  if (!in_this_block(accesses.time)) return has_acquired(accesses.block, accesses.time);
  return are_ordered_in_block(accesses, thread);
}

// ---- records ------------------------------------------------------------------------------------

void Clock::add(Accesses& accesses, unsigned thread, uint32_t site) const {
  const unsigned warp = thread / warp_size;
  const unsigned lane = 1u << thread % warp_size;
  if (!in_this_block(accesses.time) || are_ordered_in_block(accesses, thread)) {
    accesses.warp = static_cast<int16_t>(warp);
    accesses.lanes = lane;
  } else if (accesses.warp == static_cast<int>(warp)) {
    accesses.lanes |= lane;
  } else {
    accesses.warp = several_warps;
  }
  accesses.time = now_;
  accesses.block = block_;
  accesses.site = site;
}

void Clock::add_read(Accesses& reads, unsigned thread, uint32_t site) const {
  const bool earlier = reads.time != never && !in_this_block(reads.time);
  if (earlier && !has_acquired(reads.block, reads.time)) reads.by_earlier_block = true;
  add(reads, thread, site);
}

// The updates of one address form a sequence: this one comes after those of earlier blocks.
void Clock::add_atomic(Accesses& atomics, unsigned thread, uint32_t site) const {
  add(atomics, thread, site);
}

}  // namespace cuda_on_cpu
