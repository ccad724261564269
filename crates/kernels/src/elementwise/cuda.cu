// Sums, copies and scalings of whole arrays.

namespace elementwise {

template <class Y, class X> __device__ void add_assign(Y* y, const X* x, u64 n) {
    constexpr int N = run_of<Y, X>();
    for_each_run<N>(n, lies<N>(y) && lies<N>(x), [&](auto run, u64 at) {
        auto sum = load_run(run, y + at), added = load_run(run, x + at);
        for (int i = 0; i < run.N; i++) sum.at[i] += added.at[i];
        store_run(y + at, sum);
    });
}

__device__ inline void max_assign(float* y, const float* x, u64 n) {
    constexpr int N = run_of<float>();
    for_each_run<N>(n, lies<N>(y) && lies<N>(x), [&](auto run, u64 at) {
        auto top = load_run(run, y + at), other = load_run(run, x + at);
        for (int i = 0; i < run.N; i++) top.at[i] = fmaxf(top.at[i], other.at[i]);
        store_run(y + at, top);
    });
}

template <class T> __device__ void add(const T* a, const T* b, T* y, u64 n) {
    constexpr int N = run_of<T>();
    for_each_run<N>(n, lies<N>(a) && lies<N>(b) && lies<N>(y), [&](auto run, u64 at) {
        auto sum = load_run(run, a + at), added = load_run(run, b + at);
        for (int i = 0; i < run.N; i++) sum.at[i] += added.at[i];
        store_run(y + at, sum);
    });
}

template <class Y, class X> __device__ void copy(Y* y, const X* x, u64 n) {
    constexpr int N = run_of<Y, X>();
    for_each_run<N>(n, lies<N>(y) && lies<N>(x), [&](auto run, u64 at) { store_run(y + at, load_run(run, x + at)); });
}

__device__ inline void round_to_bf16(float* y, u64 n) {
    constexpr int N = run_of<float>();
    for_each_run<N>(n, lies<N>(y), [&](auto run, u64 at) {
        auto x = load_run(run, y + at);
        for (int i = 0; i < run.N; i++) x.at[i] = widen(to_bf16(x.at[i]));
        store_run(y + at, x);
    });
}

template <class Y> __device__ void scale(Y* y, float factor, u64 n) {
    constexpr int N = run_of<Y>();
    for_each_run<N>(n, lies<N>(y), [&](auto run, u64 at) {
        auto x = load_run(run, y + at);
        for (int i = 0; i < run.N; i++) x.at[i] *= factor;
        store_run(y + at, x);
    });
}

// partial [blocks, d]: the sums of the rows that each block takes.
template <bool WHOLE, class X>
__device__ void column_sums(const X* x, float* partial, u32 threads, u32 rows, u32 d, float* scratch) {
    Team team(threads);
    u32 own = own_column(team);
    float sums[1][8] = {};
    u64 end = own < d ? rows : 0;
#pragma unroll 4
    for (u64 row = u64(blockIdx.x) * team.teams + team.index; row < end; row += u64(gridDim.x) * team.teams) {
        Run<X, 8> xs = load_eight<WHOLE>(x + row * d, own, d);
        for (int i = 0; i < 8; i++) sums[0][i] += widen(xs.at[i]);
    }
    write_sums<WHOLE>(team, sums, partial, d, scratch);
}

}  // namespace elementwise

#define ELEMENTWISE_PAIR(NAMES, Y, X)                                      \
    KERNEL(elementwise_add_assign_##NAMES, 256, (Y * y, const X* x, u64 n), \
           { elementwise::add_assign(y, x, n); })                          \
    KERNEL(elementwise_copy_##NAMES, 256, (Y * y, const X* x, u64 n), { elementwise::copy(y, x, n); })

ELEMENTWISE_PAIR(f32_f32, float, float)
ELEMENTWISE_PAIR(f32_bf16, float, bf16)
ELEMENTWISE_PAIR(bf16_f32, bf16, float)
ELEMENTWISE_PAIR(bf16_bf16, bf16, bf16)

#define ELEMENTWISE_SUMS(NAMES, WHOLE, X)                                                  \
    KERNEL(elementwise_column_sums_##NAMES, 512,                                           \
           (const X* x, float* partial, u32 threads, u32 rows, u32 d), {                   \
               __shared__ float scratch[8 * HALF_BLOCK];                                   \
               elementwise::column_sums<WHOLE>(x, partial, threads, rows, d, scratch);     \
           })

#define ELEMENTWISE_ONE(NAME, T)                                                                               \
    KERNEL(elementwise_add_##NAME, 256, (const T* a, const T* b, T* y, u64 n),                                 \
           { elementwise::add(a, b, y, n); })                                                                  \
    KERNEL(elementwise_scale_##NAME, 256, (T * y, u64 n, float factor), { elementwise::scale(y, factor, n); }) \
    ELEMENTWISE_SUMS(NAME, true, T)                                                                            \
    ELEMENTWISE_SUMS(NAME##_ragged, false, T)

ELEMENTWISE_ONE(f32, float)
ELEMENTWISE_ONE(bf16, bf16)

KERNEL(elementwise_max_assign_f32_f32, 256, (float* y, const float* x, u64 n),
       { elementwise::max_assign(y, x, n); })
KERNEL(elementwise_round_to_bf16, 256, (float* y, u64 n), { elementwise::round_to_bf16(y, n); })
