// Kernels that use every word the emulator plays.

namespace emulated_test {

template <class T> __device__ void sums(const T* x, float* y, u32 d) {
    __shared__ float scratch[33];
    float sum = 0.0f;
    for (u32 i = threadIdx.x; i < d; i += blockDim.x) sum += widen(x[u64(blockIdx.x) * d + i]);
    sum = block_sum(sum, scratch);
    float most = block_max(float(threadIdx.x), scratch);
    if (threadIdx.x == 0) y[2 * blockIdx.x] = sum;
    if (threadIdx.x == 0) y[2 * blockIdx.x + 1] = most;
}

// c [16, 16] = a [16, 16] b [16, 16] of one warp; b is [n, k] in memory, or [k, n] when TRANSPOSED.
template <bool TRANSPOSED> __device__ void product(const bf16* a, const bf16* b, float* c) {
    __shared__ __align__(16) bf16 x[16 * 16], y[16 * 16];
    u32 lane = threadIdx.x;
    for (u32 i = lane; i < 256; i += 32) x[i] = a[i];
    for (u32 i = lane; i < 256; i += 32) y[i] = b[i];
    sync_warp();
    u32 matrix = lane / 8, row = lane % 8;
    u32 of_a[4], of_b[4];
    load_matrix_x4(of_a, &x[(matrix % 2 * 8 + row) * 16 + matrix / 2 * 8]);
    // Matrices 0 and 1 are both halves of k for the first 8 columns.
    if (TRANSPOSED) {
        load_matrix_x4_transposed(of_b, &y[(matrix % 2 * 8 + row) * 16 + matrix / 2 * 8]);
    } else {
        load_matrix_x4(of_b, &y[(matrix / 2 * 8 + row) * 16 + matrix % 2 * 8]);
    }
#pragma unroll
    for (u32 half = 0; half < 2; ++half) {
        float d[4] = {0.0f, 0.0f, 0.0f, 1.0f};
        u32 columns[2] = {of_b[2 * half], of_b[2 * half + 1]};
        mma_bf16(d, of_a, columns);
        for (u32 i = 0; i < 4; ++i) c[(lane / 4 + i / 2 * 8) * 16 + half * 8 + lane % 4 * 2 + i % 2] = d[i];
    }
}

// y = sum of `tiles` tiles of 4 blockDim floats, of which those from `n` on are zeros; two are under way.
__device__ void pipeline(const float* x, float* y, u32 n, u32 tiles) {
    DYNAMIC_SHARED(float, shared);
    u32 tile_size = 4 * blockDim.x, mine = 4 * threadIdx.x;
    auto fetch = [&](u32 tile) {
        u32 at = tile * tile_size + mine;
        bool valid = tile < tiles && at < n;
        if (tile < tiles) copy_async_16(shared + tile % 2 * tile_size + mine, x + (valid ? at : 0), valid);
        copy_async_commit();
    };
    fetch(0);
    fetch(1);
    float sum = 0.0f;
    for (u32 tile = 0; tile < tiles; ++tile) {
        copy_async_wait<1>();
        sync();
        // Another thread's.
        const float* other = shared + tile % 2 * tile_size + 4 * (blockDim.x - 1 - threadIdx.x);
        for (u32 i = 0; i < 4; ++i) sum += other[i];
        sync();
        fetch(tile + 2);
    }
    copy_async_wait<0>();
    y[threadIdx.x] = sum;
}

// Only the first n threads are there after the first barrier.
__device__ void some_leave(float* y, u32 n) {
    __shared__ float x[128];
    x[threadIdx.x] = float(threadIdx.x);
    sync();
    if (threadIdx.x >= n) return;
    float other = x[127 - threadIdx.x];
    sync();
    x[threadIdx.x] = other;
    sync();
    y[threadIdx.x] = x[n - 1 - threadIdx.x];
}

__device__ void unwritten(float* y) {
    __shared__ float x[64];
    DYNAMIC_SHARED(float, z);
    y[2 * threadIdx.x] = x[threadIdx.x];
    y[2 * threadIdx.x + 1] = z[threadIdx.x];
    sync();
    x[threadIdx.x] = z[threadIdx.x] = 1.0f;
}

__device__ void without_barrier(float* y, u32 wait) {
    __shared__ float x[64];
    u32 i = threadIdx.x;
    x[i] = float(i);
    if (wait > 0) sync();
    y[i] = x[(i + 1) % 64] + x[(i + 63) % 64];
}

}  // namespace emulated_test

KERNEL(test_sums_f32, 256, (const float* x, float* y, u32 d), { emulated_test::sums(x, y, d); })
KERNEL(test_sums_bf16, 256, (const bf16* x, float* y, u32 d), { emulated_test::sums(x, y, d); })
KERNEL(test_product, 32, (const bf16* a, const bf16* b, float* c), { emulated_test::product<false>(a, b, c); })
KERNEL(test_product_transposed, 32, (const bf16* a, const bf16* b, float* c),
       { emulated_test::product<true>(a, b, c); })
KERNEL(test_pipeline, 64, (const float* x, float* y, u32 n, u32 tiles),
       { emulated_test::pipeline(x, y, n, tiles); })
KERNEL(test_some_leave, 128, (float* y, u32 n), { emulated_test::some_leave(y, n); })
KERNEL(test_unwritten, 64, (float* y), { emulated_test::unwritten(y); })
KERNEL(test_without_barrier, 64, (float* y, u32 wait), { emulated_test::without_barrier(y, wait); })
KERNEL(test_shuffles, 64, (u32* y), {
    u32 i = threadIdx.x, next = shuffle(i * i, int(i + 1)), other = shuffle_xor(i, 5);
    y[2 * i] = next, y[2 * i + 1] = other;
})
KERNEL(test_places, 24, (u64* y, u64 first, float scale), {
    u64 block = (u64(blockIdx.z) * gridDim.y + blockIdx.y) * gridDim.x + blockIdx.x;
    u32 thread = (threadIdx.z * blockDim.y + threadIdx.y) * blockDim.x + threadIdx.x;
    y[block * 24 + thread] = first + u64(scale * float(block * 24 + thread));
})

// Those that must stop the process.
KERNEL(test_apart, 64, (float* y), {
    if (threadIdx.x < 32) sync();
    if (threadIdx.x >= 32 && threadIdx.x < 40) y[threadIdx.x] = warp_sum(1.0f);
    if (threadIdx.x >= 40) sync();
})
KERNEL(test_left, 32, (float* y), {
    if (threadIdx.x < 7) return;
    y[threadIdx.x] = warp_sum(1.0f);
})
KERNEL(test_behind, 32, (float* y, u32 at), { y[at] = 1.0f; })
KERNEL(test_behind_shared, 32, (float* y, u32 at), {
    DYNAMIC_SHARED(float, x);
    x[at] = 1.0f;
    y[0] = x[0];
})
KERNEL(test_crooked, 32, (const float* x), {
    DYNAMIC_SHARED(float, to);
    copy_async_16(to, x + 1, true);
})
