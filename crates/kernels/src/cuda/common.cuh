// What every kernel stands on. The files of all ops are compiled as one program, this one first; none
// includes anything, so that NVRTC needs no header of a toolkit.
//
// The same text is compiled for the CPU in the tests, where `emulate.h` stands in for the language: so
// kernels name threads, barriers, shared memory and warps by the words defined here alone.
//
// Products and sums are not contracted (--fmad=false): where a kernel's contract says so, its bits are
// those of its twin on the CPU. `fmaf` contracts where that is wanted.

#ifndef TRILITH_EMULATED

typedef unsigned char u8;
typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long long u64;

#define INFINITY __int_as_float(0x7f800000)

// A kernel: its name, threads of a block at most, its parameters, and the body.
#define KERNEL(name, threads, parameters, ...) \
    extern "C" __global__ void __launch_bounds__(threads) name parameters __VA_ARGS__

// Shared memory whose size the launch says; at most once in a kernel.
#define DYNAMIC_SHARED(type, name) \
    extern __shared__ __align__(128) u8 dynamic_shared[]; \
    type* name = reinterpret_cast<type*>(dynamic_shared)

__device__ inline void sync() { __syncthreads(); }
__device__ inline void sync_warp() { __syncwarp(); }

// Of the lane whose number differs by `mask`, or of lane `lane`.
template <class T> __device__ inline T shuffle_xor(T x, int mask) { return __shfl_xor_sync(~0u, x, mask); }
template <class T> __device__ inline T shuffle(T x, int lane) { return __shfl_sync(~0u, x, lane); }

struct bf16 { u16 bits; };

__device__ inline float as_float(u32 bits) { return __uint_as_float(bits); }
__device__ inline u32 as_bits(float x) { return __float_as_uint(x); }

// d [16, 8] += a [16, 16] b [16, 8], bf16 in, f32 out, over a warp: fragments as PTX lays them out
// (mma.sync.m16n8k16.row.col).
__device__ inline void mma_bf16(float (&d)[4], const u32 (&a)[4], const u32 (&b)[2]) {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

// Four 8 x 8 matrices of 16-bit values from shared memory: lane l names a row of 16 bytes of matrix l / 8.
__device__ inline void load_matrix_x4(u32 (&r)[4], const void* row) {
    u32 at = static_cast<u32>(__cvta_generic_to_shared(row));
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
        : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "r"(at) : "memory");
}
__device__ inline void load_matrix_x4_transposed(u32 (&r)[4], const void* row) {
    u32 at = static_cast<u32>(__cvta_generic_to_shared(row));
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
        : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "r"(at) : "memory");
}

// 16 bytes from global to shared memory, meanwhile; zeros where not `valid`.
__device__ inline void copy_async_16(void* shared, const void* global, bool valid) {
    u32 at = static_cast<u32>(__cvta_generic_to_shared(shared));
    int bytes = valid ? 16 : 0;
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" :: "r"(at), "l"(global), "r"(bytes) : "memory");
}
__device__ inline void copy_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int PENDING> __device__ inline void copy_async_wait() {
    asm volatile("cp.async.wait_group %0;" :: "n"(PENDING) : "memory");
}

// x, of which the compiler knows nothing: what follows from it is computed where it is needed, not kept.
__device__ inline u32 opaque(u32 x) {
    asm volatile("" : "+r"(x));
    return x;
}

// 2^x to 22 bits; what is below the normal numbers is 0.
__device__ inline float exp2_fast(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

// `pack_bf16` in one instruction: a NaN becomes another one.
__device__ inline u32 pack_bf16_fast(float low, float high) {
    u32 pair;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
    return pair;
}

#endif

// Round to nearest, ties to even; a NaN stays one.
__device__ inline bf16 to_bf16(float x) {
    u32 bits = as_bits(x);
    bf16 y;
    y.bits = (bits & 0x7fffffffu) > 0x7f800000u ? u16(bits >> 16 | 0x40)
                                                : u16((bits + 0x7fffu + (bits >> 16 & 1)) >> 16);
    return y;
}

__device__ inline float widen(float x) { return x; }
__device__ inline float widen(bf16 x) { return as_float(u32(x.bits) << 16); }

template <class T> __device__ inline T narrow(float x);
template <> __device__ inline float narrow<float>(float x) { return x; }
template <> __device__ inline bf16 narrow<bf16>(float x) { return to_bf16(x); }

// Two neighbours as one word, the first in the low half.
__device__ inline u32 pack_bf16(float low, float high) {
    return u32(to_bf16(low).bits) | u32(to_bf16(high).bits) << 16;
}

// Over the lanes of a warp, always in the same order; every lane gets it.
__device__ inline float warp_sum(float x) {
    for (int mask = 16; mask > 0; mask /= 2) x += shuffle_xor(x, mask);
    return x;
}
__device__ inline float warp_max(float x) {
    for (int mask = 16; mask > 0; mask /= 2) x = fmaxf(x, shuffle_xor(x, mask));
    return x;
}

// Over a block of whole warps, at most 32 of them, always in the same order; every thread gets it.
// `scratch` is shared memory of 33 floats, free for the next call at once.
__device__ inline float block_sum(float x, float* scratch) {
    x = warp_sum(x);
    u32 lane = threadIdx.x % 32, warp = threadIdx.x / 32, warps = blockDim.x / 32;
    sync();
    if (lane == 0) scratch[warp] = x;
    sync();
    if (warp == 0) {
        x = warp_sum(lane < warps ? scratch[lane] : 0.0f);
        if (lane == 0) scratch[32] = x;
    }
    sync();
    return scratch[32];
}
__device__ inline float block_max(float x, float* scratch) {
    x = warp_max(x);
    u32 lane = threadIdx.x % 32, warp = threadIdx.x / 32, warps = blockDim.x / 32;
    sync();
    if (lane == 0) scratch[warp] = x;
    sync();
    if (warp == 0) {
        x = warp_max(lane < warps ? scratch[lane] : -INFINITY);
        if (lane == 0) scratch[32] = x;
    }
    sync();
    return scratch[32];
}
