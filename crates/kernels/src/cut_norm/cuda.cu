// Norms of rows whose columns are cut among ranks: of d columns `valid` are there.

namespace cut_norm {

// out [M] = sums of x, or of (x - mean)^2; without means they are 0.
template <bool WHOLE, class X>
__device__ void sums(const X* x, const float* means, float* out, u32 threads, u32 rows, u32 d, u32 valid,
                     bool squares, float* scratch) {
    Team team(threads);
    u64 row = u64(blockIdx.x) * team.teams + team.index;
    u32 end = row < rows ? valid : 0;
    float mean = row < rows && means != nullptr ? means[row] : 0.0f, sum[1] = {0.0f};
    x += row * d;
    for (u32 at = team.lane * 8; at < end; at += team.threads * 8) {
        Run<X, 8> xs = load_eight<WHOLE>(x, at, d);
        for (int i = 0; i < 8; i++) {
            float from = widen(xs.at[i]) - mean;
            if (at + i < end) sum[0] += squares ? from * from : from;
        }
    }
    team_sums(team, sum, scratch);
    if (row < rows && team.lane == 0) out[row] = sum[0];
}

template <bool WHOLE, class X, class W>
__device__ void apply(const X* x, const W* w, const W* b, const float* means, const float* invs, X* y, u32 threads,
                      u32 rows, u32 d, u32 valid) {
    Team team(threads);
    u64 row = u64(blockIdx.x) * team.teams + team.index;
    if (row >= rows) return;
    float mean = means == nullptr ? 0.0f : means[row], inv = invs[row];
    for (u32 at = team.lane * 8; at < d; at += team.threads * 8) {
        Run<X, 8> xs = load_eight<WHOLE>(x + row * d, at, d), ys;
        Run<W, 8> ws = load_eight<WHOLE>(w, at, d), bs = {};
        if (b != nullptr) bs = load_eight<WHOLE>(b, at, d);
        for (int i = 0; i < 8; i++) {
            float value = (widen(xs.at[i]) - mean) * inv * widen(ws.at[i]);
            if (b != nullptr) value += widen(bs.at[i]);
            ys.at[i] = at + i < valid ? narrow<X>(value) : X{};
        }
        store_eight<WHOLE>(y + row * d, at, d, ys);
    }
}

// out [M, 2] = sums of dy w and of dy w (x - mean) inv.
template <bool WHOLE, class X, class W>
__device__ void backward_sums(const X* x, const W* w, const float* means, const float* invs, const X* dy,
                              float* out, u32 threads, u32 rows, u32 d, u32 valid, float* scratch) {
    Team team(threads);
    u64 row = u64(blockIdx.x) * team.teams + team.index;
    bool active = row < rows;
    u32 end = active ? valid : 0;
    float mean = active && means != nullptr ? means[row] : 0.0f, inv = active ? invs[row] : 0.0f;
    float both[2] = {0.0f, 0.0f};
    for (u32 at = team.lane * 8; at < end; at += team.threads * 8) {
        Run<X, 8> xs = load_eight<WHOLE>(x + row * d, at, d), dys = load_eight<WHOLE>(dy + row * d, at, d);
        Run<W, 8> ws = load_eight<WHOLE>(w, at, d);
        for (int i = 0; i < 8; i++) {
            float scaled = widen(dys.at[i]) * widen(ws.at[i]);
            if (at + i >= end) continue;
            both[0] += scaled;
            both[1] += scaled * ((widen(xs.at[i]) - mean) * inv);
        }
    }
    team_sums(team, both, scratch);
    if (active && team.lane == 0) {
        out[2 * row] = both[0];
        out[2 * row + 1] = both[1];
    }
}

// dx from the sums [M, 2] of whole rows; partial [2, blocks, d]: the gradients of w and b of the rows that each
// block takes.
template <bool WHOLE, class X, class W>
__device__ void backward(const X* x, const W* w, const float* means, const float* invs, const float* sums,
                         const X* dy, const X* carried, X* dx, float* partial, u32 threads, u32 rows, u32 d,
                         u32 valid, float* scratch) {
    Team team(threads);
    u32 own = own_column(team);
    float totals[2][8] = {};
    u64 end = own < d ? rows : 0;
    for (u64 row = u64(blockIdx.x) * team.teams + team.index; row < end; row += u64(gridDim.x) * team.teams) {
        u64 from = row * d;
        float mean = means == nullptr ? 0.0f : means[row], inv = invs[row];
        float sum = means == nullptr ? 0.0f : sums[2 * row], along = sums[2 * row + 1];
        Run<X, 8> xs = load_eight<WHOLE>(x + from, own, d), dys = load_eight<WHOLE>(dy + from, own, d), dxs;
        Run<W, 8> ws = load_eight<WHOLE>(w, own, d);
        Run<X, 8> kept = {};
        if (carried != nullptr) kept = load_eight<WHOLE>(carried + from, own, d);
        for (int i = 0; i < 8; i++) {
            if (own + i >= valid) {
                dxs.at[i] = X{};
                continue;
            }
            float normed = (widen(xs.at[i]) - mean) * inv, gradient = widen(dys.at[i]);
            totals[0][i] += gradient * normed;
            totals[1][i] += gradient;
            float back = (gradient * widen(ws.at[i]) - sum - normed * along) * inv;
            dxs.at[i] = narrow<X>(carried == nullptr ? back : widen(kept.at[i]) + back);
        }
        store_eight<WHOLE>(dx + from, own, d, dxs);
    }
    write_sums<WHOLE>(team, totals, partial, d, scratch);
}

}  // namespace cut_norm

#define CUT_NORM_SUMS(NAMES, WHOLE, X)                                                                       \
    KERNEL(cut_norm_sums_##NAMES, 256,                                                                       \
           (const X* x, const float* means, float* out, u32 threads, u32 rows, u32 d, u32 valid, u32 squares), \
           {                                                                                                 \
               __shared__ float scratch[TEAM_WARPS];                                                         \
               cut_norm::sums<WHOLE>(x, means, out, threads, rows, d, valid, squares != 0, scratch);         \
           })

CUT_NORM_SUMS(f32, true, float)
CUT_NORM_SUMS(f32_ragged, false, float)
CUT_NORM_SUMS(bf16, true, bf16)
CUT_NORM_SUMS(bf16_ragged, false, bf16)

#define CUT_NORM(NAMES, WHOLE, X, W)                                                                             \
    KERNEL(cut_norm_apply_##NAMES, 256,                                                                          \
           (const X* x, const W* w, const W* b, const float* means, const float* invs, X* y, u32 threads,        \
            u32 rows, u32 d, u32 valid),                                                                         \
           { cut_norm::apply<WHOLE>(x, w, b, means, invs, y, threads, rows, d, valid); })                        \
    KERNEL(cut_norm_backward_sums_##NAMES, 256,                                                                  \
           (const X* x, const W* w, const float* means, const float* invs, const X* dy, float* out, u32 threads, \
            u32 rows, u32 d, u32 valid), {                                                                       \
               __shared__ float scratch[2 * TEAM_WARPS];                                                         \
               cut_norm::backward_sums<WHOLE>(x, w, means, invs, dy, out, threads, rows, d, valid, scratch);     \
           })                                                                                                    \
    KERNEL(cut_norm_backward_##NAMES, 512,                                                                       \
           (const X* x, const W* w, const float* means, const float* invs, const float* sums, const X* dy,       \
            const X* carried, X* dx, float* partial, u32 threads, u32 rows, u32 d, u32 valid), {                 \
               __shared__ float scratch[16 * HALF_BLOCK];                                                        \
               cut_norm::backward<WHOLE>(x, w, means, invs, sums, dy, carried, dx, partial, threads, rows, d,    \
                                         valid, scratch);                                                        \
           })

CUT_NORM(f32_f32, true, float, float)
CUT_NORM(f32_f32_ragged, false, float, float)
CUT_NORM(bf16_f32, true, bf16, float)
CUT_NORM(bf16_f32_ragged, false, bf16, float)
CUT_NORM(bf16_bf16, true, bf16, bf16)
CUT_NORM(bf16_bf16_ragged, false, bf16, bf16)

KERNEL(cut_norm_invert, 256, (float* x, u64 n, float eps), {
    constexpr int N = run_of<float>();
    for_each_run<N>(n, lies<N>(x), [&](auto run, u64 at) {
        auto means = load_run(run, x + at);
        for (int i = 0; i < run.N; i++) means.at[i] = 1.0f / sqrtf(means.at[i] + eps);
        store_run(x + at, means);
    });
})
