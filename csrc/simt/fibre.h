/* A stack that can be left and come back to, on one OS thread. On x86-64 and AArch64 a change of stacks is a few
 * instructions (ucontext makes a system call each time); elsewhere it is ucontext's. */
#pragma once
#include <stddef.h>
#include <stdint.h>

#if defined(__SANITIZE_ADDRESS__)
#define PK_SIMT_ASAN
#elif defined(__has_feature)
#if __has_feature(address_sanitizer)
#define PK_SIMT_ASAN
#endif
#endif
#if defined(PK_SIMT_ASAN)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

#if !defined(__x86_64__) && !defined(__aarch64__) && !defined(PK_SIMT_UCONTEXT)
#define PK_SIMT_UCONTEXT
#endif
#if !defined(PK_SIMT_UCONTEXT)
/* Saves the registers that a call keeps on the stack, that stack in *save, and goes on from the stack `load`. */
extern "C" void pk_simt_switch(void **save, void *load) __attribute__((visibility("hidden")));
#define PK_SIMT_TEXT(registers)                                                                                        \
    asm(".text\n.globl pk_simt_switch\n.hidden pk_simt_switch\n.type pk_simt_switch, %function\n.p2align 4\n"          \
        "pk_simt_switch:\n" registers ".size pk_simt_switch, .-pk_simt_switch\n");
#else
#include <ucontext.h>
#endif

namespace simt {
struct Fibre {
    void *sp = nullptr;
    char *stack = nullptr; /* NULL: the host's own */
    size_t size = 0;
#if defined(PK_SIMT_UCONTEXT)
    ucontext_t context;
#endif
#if defined(PK_SIMT_ASAN)
    void *fake = nullptr;
#endif
};

#if defined(__x86_64__) && !defined(PK_SIMT_UCONTEXT)
constexpr int SAVED = 6, RETURN = 6; /* words that a switch pops before it returns, and where to */
#define PK_SIMT_SWITCH                                                                                                 \
    PK_SIMT_TEXT("pushq %rbp\npushq %rbx\npushq %r12\npushq %r13\npushq %r14\npushq %r15\nmovq %rsp, (%rdi)\n"         \
                 "movq %rsi, %rsp\npopq %r15\npopq %r14\npopq %r13\npopq %r12\npopq %rbx\npopq %rbp\nret\n")
#elif !defined(PK_SIMT_UCONTEXT)
constexpr int SAVED = 20, RETURN = 11; /* x30 */
#define PK_SIMT_SWITCH                                                                                                 \
    PK_SIMT_TEXT("sub sp, sp, #160\nstp x19, x20, [sp]\nstp x21, x22, [sp, #16]\nstp x23, x24, [sp, #32]\n"            \
                 "stp x25, x26, [sp, #48]\nstp x27, x28, [sp, #64]\nstp x29, x30, [sp, #80]\nstp d8, d9, [sp, #96]\n"  \
                 "stp d10, d11, [sp, #112]\nstp d12, d13, [sp, #128]\nstp d14, d15, [sp, #144]\nmov x9, sp\n"          \
                 "str x9, [x0]\nmov sp, x1\nldp x19, x20, [sp]\nldp x21, x22, [sp, #16]\nldp x23, x24, [sp, #32]\n"    \
                 "ldp x25, x26, [sp, #48]\nldp x27, x28, [sp, #64]\nldp x29, x30, [sp, #80]\nldp d8, d9, [sp, #96]\n"  \
                 "ldp d10, d11, [sp, #112]\nldp d12, d13, [sp, #128]\nldp d14, d15, [sp, #144]\nadd sp, sp, #160\n"    \
                 "ret\n")
#endif

constexpr size_t ENTRY = 4 << 10; /* more than the frames of entry() take until it calls a kernel */
/* The next change to `f` calls entry() at the top of its stack. */
inline void prepare(Fibre &f, void (*entry)(), size_t offset) {
#if defined(PK_SIMT_UCONTEXT)
    getcontext(&f.context);
    f.context.uc_stack.ss_sp = f.stack;
    f.context.uc_stack.ss_size = f.size - offset;
    f.context.uc_link = nullptr;
    makecontext(&f.context, entry, 0);
#else
    const uintptr_t top = reinterpret_cast<uintptr_t>(f.stack + f.size - offset) & ~uintptr_t(63);
    /* as if called: the stack is 16-byte aligned before the return address is pushed */
    void **words = reinterpret_cast<void **>(top) - (SAVED + 2);
    for (int i = 0; i < SAVED + 2; ++i) words[i] = nullptr;
    words[RETURN] = reinterpret_cast<void *>(entry);
    f.sp = words;
#endif
#if defined(PK_SIMT_ASAN)
    f.fake = nullptr;
    /* entry() never returns: where it lay is free again */
    __asan_unpoison_memory_region(f.stack + f.size - offset - ENTRY, ENTRY);
#endif
}

/* The first function of a fibre. */
inline void arrived([[maybe_unused]] Fibre &now, [[maybe_unused]] Fibre &host) {
#if defined(PK_SIMT_ASAN)
    const void *bottom;
    size_t size;
    __sanitizer_finish_switch_fiber(now.fake, &bottom, &size);
    if (!host.stack && !host.size) host.stack = static_cast<char *>(const_cast<void *>(bottom)), host.size = size;
#endif
}

/* Leaves `from` for `to`; returns when something changes back. last: `from` never comes back. */
inline void change(Fibre &from, Fibre &to, Fibre &host, [[maybe_unused]] bool last = false) {
#if defined(PK_SIMT_ASAN)
    __sanitizer_start_switch_fiber(last ? nullptr : &from.fake, to.stack, to.size);
#endif
#if defined(PK_SIMT_UCONTEXT)
    swapcontext(&from.context, &to.context);
#else
    pk_simt_switch(&from.sp, to.sp);
#endif
    arrived(from, host);
}
} // namespace simt
