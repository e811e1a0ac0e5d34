// What each warp collective computes.
#include <algorithm>

#include "runtime.h"

namespace cuda_on_cpu {

namespace {

// ---- shuffles: the lane whose value a lane gets; `width` splits the warp into segments ----------

int segment_start(int lane, int width) { return lane & ~(width - 1); }

int from_index(int lane, int index, int width) {
  return segment_start(lane, width) + (index & (width - 1));
}

int from_below(int lane, int delta, int width) {
  return lane - delta < segment_start(lane, width) ? lane : lane - delta;
}

int from_above(int lane, int delta, int width) {
  return lane + delta >= segment_start(lane, width) + width ? lane : lane + delta;
}

// A later segment is out of reach; an earlier one is not.
int from_partner(int lane, int mask, int width) {
  const int partner = lane ^ mask;
  return partner >= segment_start(lane, width) + width ? lane : partner;
}

// ---- votes and reductions -----------------------------------------------------------------------

uint64_t nothing(const Exchange&, int) { return 0; }

uint64_t lanes_that_are_true(const Exchange& exchange, int) {
  unsigned result = 0;
  for (unsigned lane = 0; lane < warp_size; ++lane) {
    if ((exchange.lanes >> lane & 1) && exchange.value[lane]) result |= 1u << lane;
  }
  return result;
}

uint64_t lanes_that_equal_mine(const Exchange& exchange, int mine) {
  unsigned result = 0;
  for (unsigned lane = 0; lane < warp_size; ++lane) {
    const bool equal = exchange.value[lane] == exchange.value[mine];
    if ((exchange.lanes >> lane & 1) && equal) result |= 1u << lane;
  }
  return result;
}

template <class Number, Number (*combine)(Number, Number)>
uint64_t reduce(const Exchange& exchange, int) {
  Number result = 0;
  bool first = true;
  for (unsigned lane = 0; lane < warp_size; ++lane) {
    if (!(exchange.lanes >> lane & 1)) continue;
    const Number value = static_cast<Number>(exchange.value[lane]);
    result = first ? value : combine(result, value);
    first = false;
  }
  return static_cast<uint32_t>(result);
}

template <class Number>
Number smaller(Number a, Number b) {
  return std::min(a, b);
}
template <class Number>
Number larger(Number a, Number b) {
  return std::max(a, b);
}
uint32_t sum(uint32_t a, uint32_t b) { return a + b; }
uint32_t bits_in_both(uint32_t a, uint32_t b) { return a & b; }
uint32_t bits_in_either(uint32_t a, uint32_t b) { return a | b; }
uint32_t bits_in_one(uint32_t a, uint32_t b) { return a ^ b; }

}  // namespace

const Collective sync_warp = {"__syncwarp", nullptr, nothing};
const Collective shuffle = {"__shfl_sync", from_index, nullptr};
const Collective shuffle_up = {"__shfl_up_sync", from_below, nullptr};
const Collective shuffle_down = {"__shfl_down_sync", from_above, nullptr};
const Collective shuffle_xor = {"__shfl_xor_sync", from_partner, nullptr};
const Collective ballot = {"warp vote", nullptr, lanes_that_are_true};
const Collective match_any = {"__match_any_sync", nullptr, lanes_that_equal_mine};
const Collective reduce_add = {"__reduce_add_sync", nullptr, reduce<uint32_t, sum>};
const Collective reduce_and = {"__reduce_and_sync", nullptr, reduce<uint32_t, bits_in_both>};
const Collective reduce_or = {"__reduce_or_sync", nullptr, reduce<uint32_t, bits_in_either>};
const Collective reduce_xor = {"__reduce_xor_sync", nullptr, reduce<uint32_t, bits_in_one>};
const Collective reduce_min_signed = {"__reduce_min_sync", nullptr, reduce<int32_t, smaller>};
const Collective reduce_min_unsigned = {"__reduce_min_sync", nullptr, reduce<uint32_t, smaller>};
const Collective reduce_max_signed = {"__reduce_max_sync", nullptr, reduce<int32_t, larger>};
const Collective reduce_max_unsigned = {"__reduce_max_sync", nullptr, reduce<uint32_t, larger>};

}  // namespace cuda_on_cpu
