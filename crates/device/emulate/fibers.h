// Every thread of a block is a fiber that runs until it must wait for others.

#pragma once

// A switch of our own is many times as fast as that of the C library, which asks the system.
#if defined(__x86_64__) && !defined(EMULATED_PORTABLE)
#define EMULATED_SWITCHES 1
#else
#define EMULATED_SWITCHES 0
#endif

#include <csignal>
#include <cmath>
#include <cstdarg>
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <pthread.h>
#include <sys/mman.h>
#include <type_traits>
#include <unistd.h>
#include <utility>
#include <vector>
#if !EMULATED_SWITCHES
#include <ucontext.h>
#endif

typedef unsigned char u8;
typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long long u64;

struct uint3 { u32 x, y, z; };
typedef uint3 dim3;

// Static shared memory lies in .bss, which is overwritten when a block begins; the emulator's own words
// must not lie there.
#define EMULATED_STATE __attribute__((section(".data"))) static

EMULATED_STATE uint3 threadIdx = {0, 0, 0};
EMULATED_STATE uint3 blockIdx = {0, 0, 0};
EMULATED_STATE uint3 blockDim = {1, 1, 1};
EMULATED_STATE uint3 gridDim = {1, 1, 1};

namespace emulated {

constexpr u32 WARP = 32, MOST_THREADS = 1024, MOST_SHARED = 227 << 10;
constexpr size_t STACK = 64 << 10;
// Stacks begin at different cache lines of a page, so that those of a warp do not evict each other.
constexpr size_t STACK_STRIDE = STACK + 17 * 64;
constexpr size_t LEAST_STACK = 4 << 10;

struct Copy { u8* to; const u8* from; bool valid; u32 group; };

enum Wait : u32 { RUNS, SYNC, SYNC_WARP, SHUFFLE, SHUFFLE_XOR, MMA, LOAD, LOAD_TRANSPOSED, ENDED };
inline const char* word(u32 wait) {
    static const char* const WORDS[] = {"run", "sync", "sync_warp", "shuffle", "shuffle_xor", "mma_bf16",
                                        "load_matrix_x4", "load_matrix_x4_transposed", "have ended"};
    return WORDS[wait];
}

struct Fiber {
#if EMULATED_SWITCHES
    void* stack_pointer;
#else
    ucontext_t context;
#endif
    u8* stack;
    uint3 index;
    u32 thread;
    std::vector<Copy> copies;
    u32 committed;
};

// Operands of one operation of a warp and what comes of it. There are two: while slow lanes fetch the
// results of one, fast ones bring the operands of the next.
struct Exchange {
    u32 words[WARP][12];
    const void* rows[WARP];
    alignas(32) float product[16][8];
    u32 loaded[WARP][4];
};

struct Warp {
    u32 arrived, ended, turn, wait;
    Exchange sides[2];
};

struct Machine {
    Fiber fibers[MOST_THREADS];
    Fiber main;
    Fiber* idle[MOST_THREADS];
    u32 idle_count;
    Fiber* ready[MOST_THREADS];
    u32 ready_first, ready_count;
    Fiber* fiber_of[MOST_THREADS];
    u8 waits[MOST_THREADS];
    Warp warps[MOST_THREADS / WARP];
    Fiber* now;
    u32 threads, started, alive, at_barrier;
    bool descending;
    u8* shared_end;
    u8* shared;
    u32 shared_bytes;
    const char* name;
    void (*kernel)(void**);
    void** arguments;
};

EMULATED_STATE Machine* machine = nullptr;
EMULATED_STATE pthread_mutex_t one_launch = PTHREAD_MUTEX_INITIALIZER;

// What KERNEL leaves of each kernel.
struct Known { void (*call)(void**); u32 threads; const Known* next; };
EMULATED_STATE const Known* known = nullptr;
struct Register {
    Register(Known& kernel) { kernel.next = known; known = &kernel; }
};

inline void say_where() {
    uint3 b = blockIdx, t = threadIdx;
    const char* name = machine->name;
    fprintf(stderr, "kernel %s, block (%u, %u, %u), thread (%u, %u, %u): ", name, b.x, b.y, b.z, t.x, t.y, t.z);
}

[[noreturn]] __attribute__((noinline, cold, format(printf, 1, 2))) inline void fail(const char* format, ...) {
    say_where();
    va_list words;
    va_start(words, format);
    vfprintf(stderr, format, words);
    va_end(words);
    fputc('\n', stderr);
    abort();
}

#if EMULATED_SWITCHES
asm(R"(
    .text
    .p2align 4
    .type emulated_switch, @function
emulated_switch:
    pushq %rbp
    pushq %rbx
    pushq %r12
    pushq %r13
    pushq %r14
    pushq %r15
    movq %rsp, (%rdi)
    movq %rsi, %rsp
    popq %r15
    popq %r14
    popq %r13
    popq %r12
    popq %rbx
    popq %rbp
    popq %rcx
    jmpq *%rcx
    .size emulated_switch, . - emulated_switch
)");
extern "C" __attribute__((visibility("hidden"))) void emulated_switch(void** from, void* to);
inline void change(Fiber* from, Fiber* to) { emulated_switch(&from->stack_pointer, to->stack_pointer); }
#else
inline void change(Fiber* from, Fiber* to) { swapcontext(&from->context, &to->context); }
#endif

[[noreturn]] void work();

inline void prepare(Fiber& fiber) {
#if EMULATED_SWITCHES
    // Six registers, where to go, and where the caller's return address would be.
    void** top = reinterpret_cast<void**>(fiber.stack + STACK) - 2;
    while (reinterpret_cast<uintptr_t>(top) % 16 != 0) --top;
    top[0] = reinterpret_cast<void*>(&work);
    top[1] = nullptr;
    fiber.stack_pointer = top - 6;
#else
    getcontext(&fiber.context);
    fiber.context.uc_stack.ss_sp = fiber.stack;
    fiber.context.uc_stack.ss_size = STACK;
    fiber.context.uc_link = nullptr;
    makecontext(&fiber.context, reinterpret_cast<void (*)()>(&work), 0);
#endif
}

inline uint3 index_of(u32 thread) {
    return {thread % blockDim.x, thread / blockDim.x % blockDim.y, thread / blockDim.x / blockDim.y};
}

[[noreturn]] __attribute__((noinline, cold)) inline void report_stuck() {
    Machine& m = *machine;
    u32 counts[ENDED + 1] = {};
    for (u32 t = 0; t < m.threads; ++t) ++counts[m.waits[t]];
    threadIdx = m.now->index;
    say_where();
    fprintf(stderr, "threads wait for what others never reach:");
    for (u32 wait = SYNC; wait <= ENDED; ++wait) {
        if (counts[wait] == 0) continue;
        u32 first = 0;
        while (m.waits[first] != wait) ++first;
        uint3 at = index_of(first);
        const char* in = wait == ENDED ? "" : "in ";
        fprintf(stderr, " %u %s%s, the first (%u, %u, %u);", counts[wait], in, word(wait), at.x, at.y, at.z);
    }
    fprintf(stderr, " of %u threads\n", m.threads);
    abort();
}

inline void wake(Fiber* fiber) {
    Machine& m = *machine;
    m.ready[(m.ready_first + m.ready_count++) % MOST_THREADS] = fiber;
    m.waits[fiber->thread] = RUNS;
}

// Whoever may run goes on, threads that have begun first, so that few stacks are in use.
inline void leave(Fiber* from) {
    Machine& m = *machine;
    Fiber* next;
    if (m.ready_count > 0) {
        next = m.ready[m.ready_first];
        m.ready_first = (m.ready_first + 1) % MOST_THREADS;
        --m.ready_count;
    } else if (m.started < m.threads) {
        next = m.idle[--m.idle_count];
    } else if (m.alive == 0) {
        next = &m.main;
    } else {
        report_stuck();
    }
    if (next == from) return;
    m.now = next;
    threadIdx = next->index;
    change(from, next);
}

__attribute__((noinline)) inline void wait_as(u32 wait) {
    Machine& m = *machine;
    Fiber* self = m.now;
    if (static_cast<u8*>(__builtin_frame_address(0)) < self->stack + LEAST_STACK) {
        fail("more than %zu bytes of local variables", STACK - LEAST_STACK);
    }
    m.waits[self->thread] = wait;
    leave(self);
}

inline void release_barrier(Fiber* but) {
    Machine& m = *machine;
    m.at_barrier = 0;
    m.descending = !m.descending;
    for (u32 i = 0; i < m.threads; ++i) {
        u32 t = m.descending ? m.threads - 1 - i : i;
        if (m.waits[t] == SYNC && m.fiber_of[t] != but) wake(m.fiber_of[t]);
    }
}

inline void end_thread(Fiber* self) {
    Machine& m = *machine;
    Warp& warp = m.warps[self->thread / WARP];
    ++warp.ended;
    m.waits[self->thread] = ENDED;
    --m.alive;
    if (warp.arrived > 0 && warp.wait != SYNC_WARP) {
        fail("ends while %u lanes of its warp are in %s", warp.arrived, word(warp.wait));
    }
    if (warp.arrived > 0 && warp.arrived + warp.ended == WARP) {
        warp.arrived = 0;
        ++warp.turn;
        u32 first = self->thread / WARP * WARP;
        for (u32 t = first; t < first + WARP; ++t) {
            if (m.waits[t] == SYNC_WARP) wake(m.fiber_of[t]);
        }
    }
    if (m.alive > 0 && m.at_barrier == m.alive) release_barrier(nullptr);
}

// The life of a fiber: it runs one thread after another for as long as they do not wait.
[[noreturn]] inline void work() {
    for (;;) {
        Machine& m = *machine;
        Fiber* self = m.now;
        if (m.started < m.threads) {
            u32 i = m.started++;
            u32 t = m.descending ? m.threads - 1 - i : i;
            self->thread = t;
            self->index = threadIdx = index_of(t);
            self->copies.clear();
            self->committed = 0;
            m.fiber_of[t] = self;
            m.waits[t] = RUNS;
            m.kernel(m.arguments);
            end_thread(self);
            if (m.ready_count == 0 && m.started < m.threads) continue;
        }
        m.idle[m.idle_count++] = self;
        leave(self);
    }
}

}  // namespace emulated
