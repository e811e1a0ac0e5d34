// The state of one launch: its threads, where each of them waits, and the order they run in.
#pragma once
#include <stdint.h>

#include <vector>

#include "fiber.h"
#include "runtime.h"

namespace cuda_on_cpu {

enum class State : unsigned char { ready, in_collective, at_barrier, exited };

struct Thread : ThreadInfo {
  State state;
  int line;  // of the kernel text, where it waits
  void* context;
  // What it brought to the warp collective it waits in, and what it gets from it or the barrier.
  uint64_t value, result;
  int argument, width;
};

// Lanes on their way to one collective; it takes place when every live lane of the mask arrived.
struct Meeting {
  const Collective* collective;
  unsigned mask;
  int line;
  unsigned arrived;
};

struct Warp {
  unsigned alive = 0;
  std::vector<Meeting> meetings;
};

// Numbers that depend on the schedule alone (splitmix64).
class Random {
 public:
  explicit Random(uint64_t seed) : state_(seed) {}
  size_t below(size_t bound);

 private:
  uint64_t state_;
};

// 0: first come, first served, lowest thread first. 1: the same, highest thread first. Others
// draw the next thread at random, with the schedule as the seed.
class Schedule {
 public:
  explicit Schedule(unsigned number) : number_(number), random_(number) {}
  // The i-th of `count` things in the schedule's order of first starts.
  size_t position(size_t i, size_t count) const { return number_ == 1 ? count - 1 - i : i; }
  bool random() const { return number_ >= 2; }
  std::vector<size_t> order(size_t count);  // of blocks
  void add(Thread* thread) { queue_.push_back(thread); }
  Thread* take();  // null when no thread is ready

 private:
  unsigned number_;
  Random random_;
  std::vector<Thread*> queue_;
  size_t head_ = 0;
};

class Scheduler {
 public:
  Scheduler(const Launch& launch, void (*body)(void**));
  void run();

  // Called on the stack of the running thread.
  uint64_t meet_in_warp(const Collective&, unsigned mask, uint64_t value, int argument, int width,
                        int line);
  int meet_in_block(bool predicate, int line);
  void suspend();
  [[noreturn]] void thread_main();
  bool in_stack_guard(const char* address) const { return stacks_.in_guard(address); }

 private:
  void run_block();
  void resume(Thread&);
  void wake(Thread&, uint64_t result);
  void hold_meeting(Warp&, size_t meeting);
  uint64_t outcome(const Meeting&, const Exchange&, Thread& warp_start, unsigned lane);
  void hold_complete_meetings(unsigned warp);
  void open_barrier();
  void report_deadlock();
  Thread* running() const { return static_cast<Thread*>(current); }

  const Launch& launch_;
  void (*body_)(void**);
  unsigned count_;
  std::vector<Thread> threads_;
  std::vector<Warp> warps_;
  FiberStacks stacks_;
  Schedule schedule_;
  void* own_context_ = nullptr;
  unsigned alive_ = 0, at_barrier_ = 0, true_predicates_ = 0;
};

// Set while a launch runs.
extern Scheduler* active;

// For the scheduler's own findings, which concern threads other than the running one.
bool failed();
void record_failure(const ThreadInfo& thread, int line, const char* format, ...)
    __attribute__((format(printf, 3, 4)));

}  // namespace cuda_on_cpu
