// The switch between stacks, which the language cannot express: it saves only the registers that
// the calling convention asks a function to keep.
#include "fiber.h"

#if defined(__x86_64__)
asm(R"(
  .text
  .p2align 4
  .hidden cuda_on_cpu_switch
  .globl cuda_on_cpu_switch
  .type cuda_on_cpu_switch, @function
cuda_on_cpu_switch:
  push %rbp
  push %rbx
  push %r12
  push %r13
  push %r14
  push %r15
  mov %rsp, (%rdi)
  mov %rsi, %rsp
  pop %r15
  pop %r14
  pop %r13
  pop %r12
  pop %rbx
  pop %rbp
  ret
  .size cuda_on_cpu_switch, . - cuda_on_cpu_switch
)");
#elif defined(__aarch64__)
asm(R"(
  .text
  .p2align 4
  .hidden cuda_on_cpu_switch
  .globl cuda_on_cpu_switch
  .type cuda_on_cpu_switch, %function
cuda_on_cpu_switch:
  sub sp, sp, #160
  stp x19, x20, [sp]
  stp x21, x22, [sp, #16]
  stp x23, x24, [sp, #32]
  stp x25, x26, [sp, #48]
  stp x27, x28, [sp, #64]
  stp x29, x30, [sp, #80]
  stp d8, d9, [sp, #96]
  stp d10, d11, [sp, #112]
  stp d12, d13, [sp, #128]
  stp d14, d15, [sp, #144]
  mov x9, sp
  str x9, [x0]
  mov sp, x1
  ldp x19, x20, [sp]
  ldp x21, x22, [sp, #16]
  ldp x23, x24, [sp, #32]
  ldp x25, x26, [sp, #48]
  ldp x27, x28, [sp, #64]
  ldp x29, x30, [sp, #80]
  ldp d8, d9, [sp, #96]
  ldp d10, d11, [sp, #112]
  ldp d12, d13, [sp, #128]
  ldp d14, d15, [sp, #144]
  add sp, sp, #160
  ret
  .size cuda_on_cpu_switch, . - cuda_on_cpu_switch
)");
#else
#error "cuda_on_cpu switches fibers on x86-64 and aarch64 only"
#endif

namespace cuda_on_cpu {

void* new_context(char* stack_top, void (*entry)()) {
  void** top = reinterpret_cast<void**>(stack_top);
#if defined(__x86_64__)
  *--top = nullptr;  // where entry would return to; also aligns its frame
  *--top = reinterpret_cast<void*>(entry);
  return top - 6;  // rbp, rbx, r12 to r15: no meaning yet
#else
  top -= 20;
  top[11] = reinterpret_cast<void*>(entry);  // x30
  return top;
#endif
}

}  // namespace cuda_on_cpu
