// The two functions that Python calls, and what turns a failing thread into an error: failures
// are recorded here, hardware faults included, and the thread that caused one never runs again.
#include <pthread.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <string.h>
#include <ucontext.h>

#include <memory>

#include "scheduler.h"

// The first byte of this module in memory, so that sites can be told as offsets.
extern "C" const char __ehdr_start[] __attribute__((visibility("hidden")));

#define CUDA_ON_CPU_EXPORT extern "C" __attribute__((visibility("default")))

namespace cuda_on_cpu {

Observer* observer = nullptr;

namespace {

KernelRecord* kernels = nullptr;
Failure failure;
bool has_failed = false;
pthread_t launching_thread;

void record(const ThreadInfo& thread, int line, uintptr_t site, uintptr_t other_site,
            const char* format, va_list arguments) {
  if (has_failed) return;
  has_failed = true;
  failure = Failure();
  vsnprintf(failure.message, sizeof failure.message, format, arguments);
  failure.line = line;
  failure.site = site;
  failure.other_site = other_site;
  failure.block = block_index;
  failure.thread = thread.index;
}

[[noreturn]] void leave_thread() {
  for (;;) active->suspend();
}

}  // namespace

bool failed() { return has_failed; }

void record_failure(const ThreadInfo& thread, int line, const char* format, ...) {
  va_list arguments;
  va_start(arguments, format);
  record(thread, line, 0, 0, format, arguments);
  va_end(arguments);
}

void fail_at_line(int line, const char* format, ...) {
  va_list arguments;
  va_start(arguments, format);
  record(*current, line, 0, 0, format, arguments);
  va_end(arguments);
  leave_thread();
}

void fail_at_site(uintptr_t site, uintptr_t other_site, const char* format, ...) {
  va_list arguments;
  va_start(arguments, format);
  record(*current, 0, site, other_site, format, arguments);
  va_end(arguments);
  leave_thread();
}

uintptr_t site_of(const void* return_address) {
  return reinterpret_cast<uintptr_t>(return_address) - 1 -
         reinterpret_cast<uintptr_t>(__ehdr_start);
}

uint64_t meet_in_warp(const Collective& collective, unsigned mask, uint64_t value, int argument,
                      int width, int line) {
  return active->meet_in_warp(collective, mask, value, argument, width, line);
}

int meet_in_block(bool predicate, int line) { return active->meet_in_block(predicate, line); }

void register_kernel(KernelRecord& kernel) {
  kernel.next = kernels;
  kernels = &kernel;
}

// ---- hardware faults ----------------------------------------------------------------------------

namespace {

constexpr int fault_signals[] = {SIGSEGV, SIGBUS, SIGFPE, SIGILL};
constexpr size_t fault_count = sizeof fault_signals / sizeof fault_signals[0];
struct sigaction previous_actions[fault_count];

uintptr_t program_counter(const void* context) {
  const ucontext_t* registers = static_cast<const ucontext_t*>(context);
#if defined(__x86_64__)
  return static_cast<uintptr_t>(registers->uc_mcontext.gregs[REG_RIP]);
#else
  return static_cast<uintptr_t>(registers->uc_mcontext.pc);
#endif
}

void restore_actions() {
  for (size_t i = 0; i < fault_count; ++i) {
    sigaction(fault_signals[i], &previous_actions[i], nullptr);
  }
}

// Runs on its own stack, and leaves it for good by switching to the scheduler.
void on_fault(int number, siginfo_t* info, void* context) {
  if (!current || !pthread_equal(pthread_self(), launching_thread)) {
    restore_actions();  // not ours: the instruction faults again, and Python's handler sees it
    return;
  }
  const uintptr_t site = site_of(reinterpret_cast<const void*>(program_counter(context) + 1));
  const char* address = static_cast<const char*>(info->si_addr);
  if (number == SIGFPE) fail_at_site(site, 0, "integer division by zero or overflow");
  if (number == SIGILL) fail_at_site(site, 0, "unreachable code was reached");
  if (active->in_stack_guard(address)) fail_at_site(site, 0, "the thread's stack overflowed");
  // The processor tells no address for a misaligned vector access.
  if (info->si_code == SI_KERNEL) fail_at_site(site, 0, "misaligned or wild memory access");
  fail_at_site(site, 0, "invalid memory access at address %p", info->si_addr);
}

// While one lives, faults of kernel code end the launch instead of the process.
class FaultHandlers {
 public:
  FaultHandlers() : stack_(new char[stack_bytes]) {
    stack_t stack = {};
    stack.ss_sp = stack_.get();
    stack.ss_size = stack_bytes;
    sigaltstack(&stack, &previous_stack_);
    struct sigaction action = {};
    action.sa_sigaction = on_fault;
    action.sa_flags = SA_SIGINFO | SA_ONSTACK | SA_NODEFER;
    for (size_t i = 0; i < fault_count; ++i) {
      sigaction(fault_signals[i], &action, &previous_actions[i]);
    }
  }
  ~FaultHandlers() {
    restore_actions();
    sigaltstack(&previous_stack_, nullptr);
  }
  FaultHandlers(const FaultHandlers&) = delete;
  FaultHandlers& operator=(const FaultHandlers&) = delete;

 private:
  static constexpr size_t stack_bytes = 64 * 1024;
  std::unique_ptr<char[]> stack_;
  stack_t previous_stack_;
};

}  // namespace

// ---- what Python calls --------------------------------------------------------------------------

// The first kernel of a linked list.
CUDA_ON_CPU_EXPORT const KernelRecord* cuda_on_cpu_kernels() { return kernels; }

// Null when all went well. The caller has checked the launch, and runs one at a time.
CUDA_ON_CPU_EXPORT const Failure* cuda_on_cpu_launch(const KernelRecord* kernel,
                                                     const Launch* launch) {
  has_failed = false;
  launching_thread = pthread_self();
  grid_size = {launch->grid[0], launch->grid[1], launch->grid[2]};
  block_size = {launch->block[0], launch->block[1], launch->block[2]};
  if (observer) observer->launch_starts(*launch);
  Scheduler scheduler(*launch, kernel->call);
  FaultHandlers handlers;
  active = &scheduler;
  scheduler.run();
  active = nullptr;
  return has_failed ? &failure : nullptr;
}

}  // namespace cuda_on_cpu
