// A GPU played by one core, so that the text of the kernels runs where there is none. Compiled in front of
// `common.cuh` with -DTRILITH_EMULATED, it stands in for the language: every thread of a block is a fiber
// that runs until it meets a barrier or an operation of its warp; blocks run one after the other.
//
// What a GPU would answer with garbage or a hang stops the process with kernel, block and thread: barriers
// and operations of a warp that not all threads reach, rows that are not aligned, addresses nothing lies at.
// Shared memory is full of NaN when a block begins (static shared memory in shared objects alone), so are
// copies under way; and threads run in ascending order in one stretch between barriers, in descending order
// in the next: what reads too early reads NaN, or what differs from what is expected.

#pragma once

#include "fibers.h"
#include "launch.h"
#include "warp.h"

struct __attribute__((aligned(8), may_alias)) uint2 { u32 x, y; };
struct __attribute__((aligned(16), may_alias)) uint4 { u32 x, y, z, w; };
struct __attribute__((aligned(8), may_alias)) int2 { int x, y; };
struct __attribute__((aligned(16), may_alias)) int4 { int x, y, z, w; };
struct __attribute__((aligned(8), may_alias)) float2 { float x, y; };
struct __attribute__((aligned(16), may_alias)) float4 { float x, y, z, w; };
inline uint2 make_uint2(u32 x, u32 y) { return {x, y}; }
inline uint4 make_uint4(u32 x, u32 y, u32 z, u32 w) { return {x, y, z, w}; }
inline int2 make_int2(int x, int y) { return {x, y}; }
inline int4 make_int4(int x, int y, int z, int w) { return {x, y, z, w}; }
inline float2 make_float2(float x, float y) { return {x, y}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }

#define __device__
#define __host__
#define __global__
#define __constant__ static
#define __shared__ static
#define __forceinline__ inline __attribute__((always_inline))
#define __restrict__ __restrict
#define __launch_bounds__(...)
#define __align__(bytes) __attribute__((aligned(bytes)))
// As an attribute it may stand anywhere in a declaration.
#define alignas(bytes) __attribute__((aligned(bytes)))

#define KERNEL(name, threads, parameters, ...) \
    static void name parameters __VA_ARGS__ \
    extern "C" { \
    extern EMULATED_SYMBOL const u32 threads_of_##name; \
    const u32 threads_of_##name = threads; \
    extern EMULATED_SYMBOL const u32 arguments_of_##name; \
    const u32 arguments_of_##name = emulated::count_of(name); \
    EMULATED_SYMBOL void emulated_##name(void** arguments) { emulated::call_with(name, arguments); } \
    } \
    EMULATED_STATE emulated::Known known_##name = {emulated_##name, threads, nullptr}; \
    EMULATED_STATE emulated::Register register_##name(known_##name);

#define DYNAMIC_SHARED(type, name) type* name = reinterpret_cast<type*>(emulated::machine->shared)

struct bf16 { u16 bits; };

inline float as_float(u32 bits) {
    float x;
    memcpy(&x, &bits, 4);
    return x;
}
inline u32 as_bits(float x) {
    u32 bits;
    memcpy(&bits, &x, 4);
    return bits;
}

// The C library has a `sync` that writes disks back: ours stays within the program.
__attribute__((visibility("hidden"))) inline void sync() {
    using namespace emulated;
    Machine& m = *machine;
    if (++m.at_barrier == m.alive) {
        release_barrier(m.now);
    } else {
        wait_as(SYNC);
    }
}
inline void sync_warp() {
    using namespace emulated;
    exchange(SYNC_WARP, [](Exchange&, u32) {}, nothing);
}

template <class T> inline T shuffle_xor(T x, int mask) {
    if (mask < 0 || mask >= 32) emulated::fail("shuffle_xor with mask %d", mask);
    u32 lane = emulated::machine->now->thread % 32;
    return emulated::shuffled(emulated::SHUFFLE_XOR, x, lane ^ u32(mask));
}
template <class T> inline T shuffle(T x, int lane) {
    return emulated::shuffled(emulated::SHUFFLE, x, u32(lane) % 32);
}

inline void mma_bf16(float (&d)[4], const u32 (&a)[4], const u32 (&b)[2]) {
    using namespace emulated;
    u32 me = 0;
    const Exchange& side = exchange(MMA, [&](Exchange& s, u32 lane) {
        me = lane;
        memcpy(s.words[lane], a, 16);
        memcpy(s.words[lane] + 4, b, 8);
        memcpy(s.words[lane] + 6, d, 16);
    }, multiply);
    for (u32 i = 0; i < 4; ++i) d[i] = side.product[me / 4 + i / 2 * 8][2 * (me % 4) + i % 2];
}

inline void load_matrix_x4(u32 (&r)[4], const void* row) { emulated::load_matrices<false>(r, row); }
inline void load_matrix_x4_transposed(u32 (&r)[4], const void* row) { emulated::load_matrices<true>(r, row); }

// Arrives when it is waited for, not before.
inline void copy_async_16(void* shared, const void* global, bool valid) {
    using namespace emulated;
    check_row("copy_async_16", shared);
    if (reinterpret_cast<uintptr_t>(global) % 16 != 0) {
        fail("copy_async_16 from %p, not a multiple of 16 bytes", global);
    }
    memset(shared, 0xff, 16);
    Fiber* self = machine->now;
    self->copies.push_back({static_cast<u8*>(shared), static_cast<const u8*>(global), valid, self->committed});
}
inline void copy_async_commit() { ++emulated::machine->now->committed; }
template <int PENDING> inline void copy_async_wait() {
    emulated::Fiber* self = emulated::machine->now;
    size_t kept = 0;
    for (const emulated::Copy& copy : self->copies) {
        if (copy.group + PENDING >= self->committed) {
            self->copies[kept++] = copy;
        } else if (copy.valid) {
            memcpy(copy.to, copy.from, 16);
        } else {
            memset(copy.to, 0, 16);
        }
    }
    self->copies.resize(kept);
}

inline u32 opaque(u32 x) { return x; }
inline float exp2_fast(float x) { return exp2f(x); }

inline u32 pack_bf16(float low, float high);
inline u32 pack_bf16_fast(float low, float high) { return pack_bf16(low, high); }

// Threads do not interrupt each other.
template <class T> inline T atomicAdd(T* at, T x) {
    static_assert(std::is_integral<T>::value, "sums of floats depend on the order");
    T was = *at;
    *at = was + x;
    return was;
}
inline u32 atomicMax(u32* at, u32 x) {
    u32 was = *at;
    *at = was > x ? was : x;
    return was;
}
inline u32 atomicMin(u32* at, u32 x) {
    u32 was = *at;
    *at = was < x ? was : x;
    return was;
}
inline u32 atomicOr(u32* at, u32 x) {
    u32 was = *at;
    *at = was | x;
    return was;
}

inline int min(int a, int b) { return a < b ? a : b; }
inline int max(int a, int b) { return a > b ? a : b; }
inline u32 min(u32 a, u32 b) { return a < b ? a : b; }
inline u32 max(u32 a, u32 b) { return a > b ? a : b; }
inline u64 min(u64 a, u64 b) { return a < b ? a : b; }
inline u64 max(u64 a, u64 b) { return a > b ? a : b; }
inline float min(float a, float b) { return fminf(a, b); }
inline float max(float a, float b) { return fmaxf(a, b); }
template <class T> inline T __ldg(const T* at) { return *at; }
inline int __popc(u32 x) { return __builtin_popcount(x); }
inline int __clz(u32 x) { return x == 0 ? 32 : __builtin_clz(x); }
inline int __ffs(u32 x) { return __builtin_ffs(int(x)); }
inline void __threadfence() {}

#if defined(__PIC__) && !defined(__PIE__)
// What is not a kernel is called directly.
#pragma GCC visibility push(hidden)
#endif
