// Sums over ranks, bit by bit those of the CPU: in f32, in the order of the terms, rounded once.

namespace rank_sum {

// arrays: the address of each, low half first.
template <class T> __device__ inline T* array(const u32* arrays, u32 which) {
    return reinterpret_cast<T*>(u64(arrays[2 * which + 1]) << 32 | arrays[2 * which]);
}

// arrays: the terms, then what becomes their sum; a term may be among those. `fits`: all lie for runs.
template <class T> __device__ void sum(const u32* arrays, u32 terms, u32 sums, u32 fits, u64 n) {
    constexpr int N = run_of<T>();
    for_each_run<N>(n, fits != 0, [&](auto run, u64 at) {
        auto total = load_run(run, array<T>(arrays, 0) + at);
        for (u32 term = 1; term < terms; term++) {
            auto next = load_run(run, array<T>(arrays, term) + at);
            for (int i = 0; i < run.N; i++) total.at[i] += next.at[i];
        }
        for (u32 which = terms; which < terms + sums; which++) store_run(array<T>(arrays, which) + at, total);
    });
}

}  // namespace rank_sum

#define RANK_SUM(NAME, T)                                                                       \
    KERNEL(rank_sum_##NAME, 256, (const u32* arrays, u32 terms, u32 sums, u32 fits, u64 n), \
           { rank_sum::sum<T>(arrays, terms, sums, fits, n); })

RANK_SUM(f32, float)
RANK_SUM(bf16, bf16)
