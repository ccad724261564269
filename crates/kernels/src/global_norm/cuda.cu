// Sums of squares, bit by bit those of the CPU: 32 partial sums over every 32nd element, folded upper half onto
// lower; so a warp takes a chunk.

namespace global_norm {

// Elements on their way.
constexpr u32 DEPTH = 32;

template <class T> __device__ inline float squares(const T* x, u32 n) {
    float sum = 0.0f;
    u32 at = threadIdx.x % 32;
    for (; at + 32 * (DEPTH - 1) < n; at += 32 * DEPTH) {
        T ahead[DEPTH];
#pragma unroll
        for (u32 i = 0; i < DEPTH; i++) ahead[i] = x[at + 32 * i];
#pragma unroll
        for (u32 i = 0; i < DEPTH; i++) sum += widen(ahead[i]) * widen(ahead[i]);
    }
    for (; at < n; at += 32) sum += widen(x[at]) * widen(x[at]);
    return warp_sum(sum);
}

// chunks [count, 4]: the address of each, low half first, its length, and whether it is bf16.
__device__ inline void squares_of_chunks(const u32* chunks, float* sums, u32 count) {
    u32 chunk = blockIdx.x * (blockDim.x / 32) + threadIdx.x / 32;
    if (chunk >= count) return;
    const u32* which = chunks + u64(chunk) * 4;
    u64 address = u64(which[1]) << 32 | which[0];
    float sum = which[3] != 0 ? squares(reinterpret_cast<const bf16*>(address), which[2])
                              : squares(reinterpret_cast<const float*>(address), which[2]);
    if (threadIdx.x % 32 == 0) sums[chunk] = sum;
}

}  // namespace global_norm

KERNEL(global_norm_squares, 128, (const u32* chunks, float* sums, u32 count),
       { global_norm::squares_of_chunks(chunks, sums, count); })
