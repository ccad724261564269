// Rectangles inside matrices.

namespace block {

// A matrix that is added, of either type; null where there is none. Rows are `ld` apart, one serves all where
// that is 0.
struct Added {
    const void* data;
    u64 ld;
    u32 is_bf16;

    template <int N> __device__ bool fits() const {
        return ld % N == 0 && (is_bf16 ? lies<N>(static_cast<const bf16*>(data)) : lies<N>(static_cast<const float*>(data)));
    }

    template <class L> __device__ void add_to(Run<float, L::N>& sum, L run, u64 row, u32 column) const {
        if (data == nullptr) return;
        u64 at = row * ld + column;
        Run<float, L::N> x = is_bf16 ? load_run(run, static_cast<const bf16*>(data) + at)
                                     : load_run(run, static_cast<const float*>(data) + at);
        for (int i = 0; i < L::N; i++) sum.at[i] += x.at[i];
    }
};

// c = a + first + second, in f32 until the end.
template <class C, class A>
__device__ void sum(C* c, u64 ldc, const A* a, u64 lda, Added first, Added second, u32 cols, u32 tiles) {
    constexpr int N = run_of<C, A, bf16>();
    bool fits = ldc % N == 0 && lda % N == 0 && lies<N>(c) && lies<N>(a) && first.fits<N>() && second.fits<N>();
    for_each_run_of_row<N>(cols, tiles, fits, [&](auto run, u64 row, u32 column) {
        auto x = load_run(run, a + row * lda + column);
        first.add_to(x, run, row, column);
        second.add_to(x, run, row, column);
        store_run(c + row * ldc + column, x);
    });
}

}  // namespace block

#define BLOCK(NAMES, C, A)                                                                                 \
    KERNEL(block_sum_##NAMES, 256,                                                                         \
           (C * c, u64 ldc, const A* a, u64 lda, const void* first, u64 ld_first, u32 first_is_bf16,       \
            const void* second, u64 ld_second, u32 second_is_bf16, u32 cols, u32 tiles), {                 \
               block::Added one = {first, ld_first, first_is_bf16}, two = {second, ld_second, second_is_bf16}; \
               block::sum(c, ldc, a, lda, one, two, cols, tiles);                                          \
           })

BLOCK(f32_f32, float, float)
BLOCK(f32_bf16, float, bf16)
BLOCK(bf16_f32, bf16, float)
BLOCK(bf16_bf16, bf16, bf16)
