// Runs the threads of a block as fibers on one OS thread. A thread runs until it meets a barrier
// or a warp collective, so what CUDA promises holds here, and nothing more: between two meetings
// the order of threads is the schedule's.
#include "scheduler.h"

#include <stdio.h>
#include <string.h>

#include <algorithm>
#include <string>

// Static __shared__ variables live in this section; the linker knows where it begins and ends.
extern "C" char __start_cuda_shared[] __attribute__((weak, visibility("hidden")));
extern "C" char __stop_cuda_shared[] __attribute__((weak, visibility("hidden")));

namespace cuda_on_cpu {

ThreadInfo* current = nullptr;
cuda_device::uint3 block_index;
cuda_device::dim3 block_size;
cuda_device::dim3 grid_size;
alignas(1024) char dynamic_shared[max_dynamic_shared];
Scheduler* active = nullptr;

namespace {

constexpr size_t stack_bytes = 128 * 1024;

void enter_thread() { active->thread_main(); }

// A NaN as a float, and an unlikely number as an integer: whoever reads it unset will notice.
void poison(char* begin, char* end) {
  if (begin != end) memset(begin, 0xFF, static_cast<size_t>(end - begin));
}

}  // namespace

// ---- the order of things ------------------------------------------------------------------------

size_t Random::below(size_t bound) {
  uint64_t z = (state_ += 0x9E3779B97F4A7C15u);
  z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9u;
  z = (z ^ (z >> 27)) * 0x94D049BB133111EBu;
  return static_cast<size_t>((z ^ (z >> 31)) % bound);
}

std::vector<size_t> Schedule::order(size_t count) {
  std::vector<size_t> result(count);
  for (size_t i = 0; i < count; ++i) result[i] = position(i, count);
  if (random()) {
    for (size_t i = count; i > 1; --i) std::swap(result[i - 1], result[random_.below(i)]);
  }
  return result;
}

Thread* Schedule::take() {
  if (head_ == queue_.size()) {
    queue_.clear();
    head_ = 0;
    return nullptr;
  }
  if (random()) std::swap(queue_[head_], queue_[head_ + random_.below(queue_.size() - head_)]);
  return queue_[head_++];
}

// ---- threads ------------------------------------------------------------------------------------

Scheduler::Scheduler(const Launch& launch, void (*body)(void**))
    : launch_(launch),
      body_(body),
      count_(launch.block[0] * launch.block[1] * launch.block[2]),
      threads_(count_),
      warps_((count_ + warp_size - 1) / warp_size),
      stacks_(count_, stack_bytes),
      schedule_(launch.schedule) {
  for (unsigned i = 0; i < count_; ++i) {
    Thread& thread = threads_[i];
    const unsigned row = i / launch.block[0];
    thread.index = {i % launch.block[0], row % launch.block[1], row / launch.block[1]};
    thread.linear = i;
    thread.stack_begin = stacks_.begin(i);
    thread.stack_end = stacks_.end(i);
    thread.context = new_context(stacks_.top(i), enter_thread);
  }
}

void Scheduler::suspend() { cuda_on_cpu_switch(&running()->context, own_context_); }

void Scheduler::resume(Thread& thread) {
  current = &thread;
  cuda_on_cpu_switch(&own_context_, thread.context);
  current = nullptr;
}

// The fiber outlives the thread: the next block's thread of this number starts after suspend().
void Scheduler::thread_main() {
  for (;;) {
    body_(launch_.arguments);
    running()->state = State::exited;
    --alive_;
    const unsigned warp = current->linear / warp_size;
    warps_[warp].alive &= ~(1u << current->linear % warp_size);
    hold_complete_meetings(warp);
    suspend();
  }
}

void Scheduler::wake(Thread& thread, uint64_t result) {
  thread.result = result;
  thread.state = State::ready;
  schedule_.add(&thread);
}

// ---- blocks -------------------------------------------------------------------------------------

void Scheduler::run() {
  const size_t x = launch_.grid[0], y = launch_.grid[1], z = launch_.grid[2];
  for (size_t i : schedule_.order(x * y * z)) {
    block_index = {static_cast<unsigned>(i % x), static_cast<unsigned>(i / x % y),
                   static_cast<unsigned>(i / (x * y))};
    run_block();
    if (failed()) return;
  }
}

void Scheduler::run_block() {
  poison(__start_cuda_shared, __stop_cuda_shared);
  poison(dynamic_shared, dynamic_shared + launch_.shared_bytes);
  if (observer) {
    observer->block_starts(__start_cuda_shared, __stop_cuda_shared, launch_.shared_bytes);
  }
  alive_ = count_;
  for (unsigned i = 0; i < count_; ++i) {
    warps_[i / warp_size].alive |= 1u << i % warp_size;
    wake(threads_[schedule_.position(i, count_)], 0);
  }
  while (alive_ > 0 && !failed()) {
    if (Thread* thread = schedule_.take()) {
      resume(*thread);
    } else if (at_barrier_ == alive_) {
      open_barrier();
    } else {
      report_deadlock();
    }
  }
}

// ---- the block's barrier ------------------------------------------------------------------------

int Scheduler::meet_in_block(bool predicate, int line) {
  Thread* thread = running();
  thread->state = State::at_barrier;
  thread->line = line;
  true_predicates_ += predicate;
  ++at_barrier_;
  suspend();
  return static_cast<int>(thread->result);
}

void Scheduler::open_barrier() {
  const Thread* first = nullptr;
  for (const Thread& thread : threads_) {
    if (thread.state != State::at_barrier) continue;
    if (!first) first = &thread;
    if (thread.line != first->line) {
      record_failure(thread, thread.line,
                     "divergent barrier: waits at this __syncthreads while thread %u waits at the "
                     "one in line %d",
                     first->linear, first->line);
      return;
    }
  }
  if (alive_ < count_) {
    record_failure(*first, first->line,
                   "divergent barrier: waits at __syncthreads, but %u of %u threads of the block "
                   "have exited",
                   count_ - alive_, count_);
    return;
  }
  if (observer) observer->block_synchronized();
  for (unsigned i = 0; i < count_; ++i) {
    wake(threads_[schedule_.position(i, count_)], true_predicates_);
  }
  at_barrier_ = true_predicates_ = 0;
}

// ---- warp collectives ---------------------------------------------------------------------------

uint64_t Scheduler::meet_in_warp(const Collective& collective, unsigned mask, uint64_t value,
                                 int argument, int width, int line) {
  Thread* thread = running();
  const unsigned lane = thread->linear % warp_size;
  if (!(mask >> lane & 1)) {
    fail_at_line(line, "%s: lane %u is not in its own mask 0x%08x", collective.name, lane, mask);
  }
  if (width < 1 || width > 32 || (width & (width - 1))) {
    fail_at_line(line, "%s: width %d is not a power of two up to 32", collective.name, width);
  }
  thread->state = State::in_collective;
  thread->line = line;
  thread->value = value;
  thread->argument = argument;
  thread->width = width;

  const unsigned number = thread->linear / warp_size;
  std::vector<Meeting>& meetings = warps_[number].meetings;
  auto same = [&](const Meeting& m) {
    return m.collective == &collective && m.mask == mask && m.line == line;
  };
  auto meeting = std::find_if(meetings.begin(), meetings.end(), same);
  if (meeting == meetings.end()) {
    meeting = meetings.insert(meeting, Meeting{&collective, mask, line, 0});
  }
  meeting->arrived |= 1u << lane;
  hold_complete_meetings(number);
  suspend();
  return thread->result;
}

void Scheduler::hold_complete_meetings(unsigned number) {
  Warp& warp = warps_[number];
  for (size_t i = warp.meetings.size(); i-- > 0;) {
    const Meeting& meeting = warp.meetings[i];
    if ((meeting.mask & warp.alive) == meeting.arrived) hold_meeting(warp, i);
  }
}

void Scheduler::hold_meeting(Warp& warp, size_t position) {
  const Meeting meeting = warp.meetings[position];
  warp.meetings.erase(warp.meetings.begin() + static_cast<std::ptrdiff_t>(position));
  const unsigned number = static_cast<unsigned>(&warp - warps_.data());
  Thread* lanes = &threads_[number * warp_size];

  Exchange exchange;
  exchange.lanes = meeting.arrived;
  auto takes_part = [&](unsigned lane) { return meeting.arrived >> lane & 1; };
  for (unsigned lane = 0; lane < warp_size; ++lane) {
    exchange.value[lane] = takes_part(lane) ? lanes[lane].value : 0;
  }
  if (observer && meeting.collective == &sync_warp) {
    observer->warp_synchronized(number, meeting.arrived);
  }
  for (unsigned i = 0; i < warp_size; ++i) {
    const unsigned lane = static_cast<unsigned>(schedule_.position(i, warp_size));
    if (takes_part(lane)) wake(lanes[lane], outcome(meeting, exchange, *lanes, lane));
  }
}

uint64_t Scheduler::outcome(const Meeting& meeting, const Exchange& exchange, Thread& warp_start,
                            unsigned lane) {
  if (!meeting.collective->source) {
    return meeting.collective->combine(exchange, static_cast<int>(lane));
  }
  const Thread& thread = (&warp_start)[lane];
  const int source =
      meeting.collective->source(static_cast<int>(lane), thread.argument, thread.width);
  if (!(exchange.lanes >> source & 1)) {
    record_failure(thread, thread.line, "%s: lane %u reads lane %d, which does not take part",
                   meeting.collective->name, lane, source);
  }
  return exchange.value[source];
}

// ---- no thread can go on ------------------------------------------------------------------------

void Scheduler::report_deadlock() {
  std::string waits;
  for (unsigned number = 0; number < warps_.size(); ++number) {
    for (const Meeting& m : warps_[number].meetings) {
      char text[160];
      snprintf(text, sizeof text, "; lanes 0x%08x of warp %u wait in %s line %d with mask 0x%08x",
               m.arrived, number, m.collective->name, m.line, m.mask);
      if (waits.size() < 200) waits += text;
    }
  }
  const Thread* stuck = nullptr;
  const Thread* at_barrier = nullptr;
  for (const Thread& thread : threads_) {
    if (thread.state == State::in_collective && !stuck) stuck = &thread;
    if (thread.state == State::at_barrier && !at_barrier) at_barrier = &thread;
  }
  if (at_barrier) {
    char text[80];
    snprintf(text, sizeof text, "; %u threads wait at __syncthreads, thread %u in line %d",
             at_barrier_, at_barrier->linear, at_barrier->line);
    waits += text;
  }
  record_failure(*stuck, stuck->line, "deadlock: %u of %u threads have exited%s", count_ - alive_,
                 count_, waits.c_str());
}

}  // namespace cuda_on_cpu
