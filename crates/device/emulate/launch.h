// Launches: block after block of a kernel.

#pragma once

#include "fibers.h"

namespace emulated {

// Static shared memory of a shared object.
#if defined(__PIC__) && !defined(__PIE__)
extern "C" __attribute__((visibility("hidden"))) u8 __bss_start[];
extern "C" __attribute__((visibility("hidden"))) u8 _end[];
inline u8* static_shared() { return __bss_start; }
inline size_t static_shared_bytes() { return _end - __bss_start; }
constexpr bool STATIC_SHARED_IS_KNOWN = true;
#else
inline u8* static_shared() { return nullptr; }
inline size_t static_shared_bytes() { return 0; }
constexpr bool STATIC_SHARED_IS_KNOWN = false;
#endif

inline void* pages(size_t bytes) {
    constexpr int KIND = MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE;
    void* at = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, KIND, -1, 0);
    if (at == MAP_FAILED) {
        perror("memory of the emulated GPU");
        abort();
    }
    return at;
}

inline void begin_machine() {
    if (machine != nullptr) return;
    machine = new Machine();
    Machine& m = *machine;
    // Addresses behind shared memory are nobody's.
    constexpr size_t GUARD = 64 << 10;
    size_t bytes = (MOST_SHARED + GUARD - 1) / GUARD * GUARD;
    m.shared_end = static_cast<u8*>(pages(bytes + GUARD)) + bytes;
    mprotect(m.shared_end, GUARD, PROT_NONE);
    size_t all = MOST_THREADS * STACK_STRIDE;
    u8* stacks = static_cast<u8*>(pages(all));
    madvise(stacks, all, MADV_HUGEPAGE);
    for (u32 i = 0; i < MOST_THREADS; ++i) {
        Fiber& fiber = m.fibers[i];
        fiber.stack = stacks + i * STACK_STRIDE;
        prepare(fiber);
        m.idle[MOST_THREADS - 1 - i] = &fiber;
    }
    m.idle_count = MOST_THREADS;
}

inline void run_block() {
    Machine& m = *machine;
    memset(m.shared, 0xff, m.shared_end - m.shared);
    if (static_shared_bytes() > 0) memset(static_shared(), 0xff, static_shared_bytes());
    for (u32 w = 0; w * WARP < m.threads; ++w) {
        Warp& warp = m.warps[w];
        warp.arrived = warp.ended = warp.turn = 0;
        // Lanes that are not there.
        if ((w + 1) * WARP > m.threads) warp.ended = (w + 1) * WARP - m.threads;
    }
    memset(m.waits, ENDED, sizeof m.waits);
    m.started = m.at_barrier = 0;
    m.alive = m.threads;
    leave(&m.main);
    for (u8* at = m.shared + m.shared_bytes; at < m.shared_end; ++at) {
        if (*at != 0xff) fail("a thread of the block wrote behind the %u bytes of shared memory", m.shared_bytes);
    }
}

struct Faults { struct sigaction segv, bus, fpe; };
EMULATED_STATE Faults faults = {};

// Says where; then what the process does about such faults happens.
inline void on_fault(int signal, siginfo_t* info, void*) {
    say_where();
    if (signal == SIGFPE) {
        fprintf(stderr, "divides a whole number by zero\n");
    } else {
        fprintf(stderr, "uses address %p, where nothing lies or which is not aligned\n", info->si_addr);
    }
    sigaction(SIGSEGV, &faults.segv, nullptr);
    sigaction(SIGBUS, &faults.bus, nullptr);
    sigaction(SIGFPE, &faults.fpe, nullptr);
}

inline void check_launch(const u32 grid[3], const u32 block[3], u32 shared_bytes) {
    u64 threads = u64(block[0]) * block[1] * block[2];
    if (u64(grid[0]) * grid[1] * grid[2] == 0 || threads == 0) fail("launched with nothing to do");
    if (grid[0] > 0x7fffffffu || grid[1] > 65535 || grid[2] > 65535) {
        fail("launched with a grid of (%u, %u, %u)", grid[0], grid[1], grid[2]);
    }
    if (block[0] > 1024 || block[1] > 1024 || block[2] > 64 || threads > MOST_THREADS) {
        fail("launched with blocks of (%u, %u, %u) threads", block[0], block[1], block[2]);
    }
    if (shared_bytes > MOST_SHARED) fail("launched with %u bytes of shared memory", shared_bytes);
    const Known* kernel = known;
    while (kernel != nullptr && kernel->call != machine->kernel) kernel = kernel->next;
    if (kernel == nullptr) fail("no such kernel");
    u32 most = kernel->threads;
    if (threads > most) fail("launched with blocks of %llu threads, %u at most", threads, most);
}

template <class... P, size_t... I>
inline void call_with(void (*kernel)(P...), void** arguments, std::index_sequence<I...>) {
    kernel(*static_cast<std::remove_reference_t<P>*>(arguments[I])...);
}
template <class... P> inline void call_with(void (*kernel)(P...), void** arguments) {
    call_with(kernel, arguments, std::index_sequence_for<P...>());
}
template <class... P> constexpr u32 count_of(void (*)(P...)) { return sizeof...(P); }

}  // namespace emulated

#define EMULATED_SYMBOL __attribute__((visibility("default")))

// Runs all blocks of a launch. `arguments` point to the arguments.
extern "C" EMULATED_SYMBOL inline __attribute__((used)) void emulate_launch(
    void (*kernel)(void**), const char* name, const u32 grid[3], const u32 block[3], u32 shared_bytes,
    void** arguments) {
    using namespace emulated;
    pthread_mutex_lock(&one_launch);
    begin_machine();
    Machine& m = *machine;
    m.name = name;
    m.kernel = kernel;
    m.arguments = arguments;
    blockIdx = threadIdx = {0, 0, 0};
    check_launch(grid, block, shared_bytes);
    m.threads = block[0] * block[1] * block[2];
    m.shared_bytes = shared_bytes;
    m.shared = m.shared_end - (shared_bytes + 127) / 128 * 128;
    gridDim = {grid[0], grid[1], grid[2]};
    blockDim = {block[0], block[1], block[2]};
    struct sigaction action = {};
    action.sa_sigaction = on_fault;
    action.sa_flags = SA_SIGINFO;
    sigaction(SIGSEGV, &action, &faults.segv);
    sigaction(SIGBUS, &action, &faults.bus);
    sigaction(SIGFPE, &action, &faults.fpe);
    for (u32 z = 0; z < grid[2]; ++z) {
        for (u32 y = 0; y < grid[1]; ++y) {
            for (u32 x = 0; x < grid[0]; ++x) {
                blockIdx = {x, y, z};
                m.descending = (x + y + z) % 2 == 1;
                run_block();
            }
        }
    }
    sigaction(SIGSEGV, &faults.segv, nullptr);
    sigaction(SIGBUS, &faults.bus, nullptr);
    sigaction(SIGFPE, &faults.fpe, nullptr);
    pthread_mutex_unlock(&one_launch);
}
