// LayerNorm of rows.

namespace layer_norm {

template <bool WHOLE, class X, class W>
__device__ void forward(const X* x, const W* w, const W* b, X* y, float* means, float* inv_stds, u32 threads,
                        u32 rows, u32 d, float eps, float* scratch) {
    Team team(threads);
    u64 row = u64(blockIdx.x) * team.teams + team.index;
    u32 end = row < rows ? d : 0;
    x += row * d;
    y += row * d;
    float sum[1] = {0.0f}, squares[1] = {0.0f};
    for (u32 at = team.lane * 8; at < end; at += team.threads * 8) {
        Run<X, 8> xs = load_eight<WHOLE>(x, at, d);
        for (int i = 0; i < 8; i++) sum[0] += widen(xs.at[i]);
    }
    team_sums(team, sum, scratch);
    float mean = sum[0] / float(d);
    // Two passes: subtracting squares of large means would cancel.
    for (u32 at = team.lane * 8; at < end; at += team.threads * 8) {
        Run<X, 8> xs = load_eight<WHOLE>(x, at, d);
        for (int i = 0; i < 8; i++) {
            float from = widen(xs.at[i]) - mean;
            if (WHOLE || at + i < d) squares[0] += from * from;
        }
    }
    team_sums(team, squares, scratch);
    float inv = 1.0f / sqrtf(squares[0] / float(d) + eps);
    if (row < rows && team.lane == 0) {
        means[row] = mean;
        inv_stds[row] = inv;
    }
    for (u32 at = team.lane * 8; at < end; at += team.threads * 8) {
        Run<X, 8> xs = load_eight<WHOLE>(x, at, d), ys;
        Run<W, 8> ws = load_eight<WHOLE>(w, at, d), bs = load_eight<WHOLE>(b, at, d);
        for (int i = 0; i < 8; i++)
            ys.at[i] = narrow<X>((widen(xs.at[i]) - mean) * inv * widen(ws.at[i]) + widen(bs.at[i]));
        store_eight<WHOLE>(y, at, d, ys);
    }
}

// dx of the row of a team, in the columns of the block's tile, and their weight and bias gradients added to
// `sums`.
template <bool WHOLE, class X, class W>
__device__ inline void backward_row(const Team& team, bool active, const X* x, const W* w, const float* means,
                                    const float* inv_stds, const X* dy, const X* carried, X* dx, u32 d,
                                    float (&sums)[2][8], float* scratch) {
    u32 own = own_column(team), end = active ? d : 0;
    Run<X, 8> kept = {};
    // Under way while the row is summed.
    if (own < end && carried != nullptr) kept = load_eight<WHOLE>(carried, own, d);
    float mean = active ? *means : 0.0f, inv = active ? *inv_stds : 0.0f;
    float both[2] = {0.0f, 0.0f};
#pragma unroll 1
    for (u32 at = team.lane * 8; at < end; at += team.threads * 8) {
        Run<X, 8> xs = load_eight<WHOLE>(x, at, d), dys = load_eight<WHOLE>(dy, at, d);
        Run<W, 8> ws = load_eight<WHOLE>(w, at, d);
        for (int i = 0; i < 8; i++) {
            float scaled = widen(dys.at[i]) * widen(ws.at[i]);
            both[0] += scaled;
            both[1] += scaled * ((widen(xs.at[i]) - mean) * inv);
        }
    }
    team_sums(team, both, scratch);
    if (own >= end) return;
    float sum = both[0] / float(d), along = both[1] / float(d);
    Run<X, 8> xs = load_eight<WHOLE>(x, own, d), dys = load_eight<WHOLE>(dy, own, d), dxs;
    Run<W, 8> ws = load_eight<WHOLE>(w, own, d);
    for (int i = 0; i < 8; i++) {
        float normed = (widen(xs.at[i]) - mean) * inv, gradient = widen(dys.at[i]);
        sums[0][i] += gradient * normed;
        sums[1][i] += gradient;
        float back = (gradient * widen(ws.at[i]) - sum - normed * along) * inv;
        dxs.at[i] = narrow<X>(carried == nullptr ? back : widen(kept.at[i]) + back);
    }
    store_eight<WHOLE>(dx, own, d, dxs);
}

// partial [2, blocks, d]: the weight and bias gradients of the rows that each block takes.
template <bool WHOLE, class X, class W>
__device__ void backward(const X* x, const W* w, const float* means, const float* inv_stds, const X* dy,
                         const X* carried, X* dx, float* partial, u32 threads, u32 rows, u32 d,
                         float* scratch) {
    Team team(threads);
    float sums[2][8] = {};
    for (u64 first = u64(blockIdx.x) * team.teams; first < rows; first += u64(gridDim.x) * team.teams) {
        u64 row = first + team.index, from = row * d;
        backward_row<WHOLE>(team, row < rows, x + from, w, means + row, inv_stds + row, dy + from,
                            carried == nullptr ? nullptr : carried + from, dx + from, d, sums, scratch);
    }
    write_sums<WHOLE>(team, sums, partial, d, scratch);
}

}  // namespace layer_norm

#define LAYER_NORM(NAMES, WHOLE, X, W)                                                                        \
    KERNEL(layer_norm_forward_##NAMES, 256,                                                                   \
           (const X* x, const W* w, const W* b, X* y, float* means, float* inv_stds, u32 threads, u32 rows,   \
            u32 d, float eps), {                                                                              \
               __shared__ float scratch[TEAM_WARPS];                                                          \
               layer_norm::forward<WHOLE>(x, w, b, y, means, inv_stds, threads, rows, d, eps, scratch);       \
           })                                                                                                 \
    KERNEL(layer_norm_backward_##NAMES, 512,                                                                  \
           (const X* x, const W* w, const float* means, const float* inv_stds, const X* dy, const X* carried, \
            X* dx, float* partial, u32 threads, u32 rows, u32 d), {                                           \
               __shared__ float scratch[16 * HALF_BLOCK];                                                     \
               layer_norm::backward<WHOLE>(x, w, means, inv_stds, dy, carried, dx, partial, threads, rows, d, \
                                           scratch);                                                          \
           })

LAYER_NORM(f32_f32, true, float, float)
LAYER_NORM(f32_f32_ragged, false, float, float)
LAYER_NORM(bf16_f32, true, bf16, float)
LAYER_NORM(bf16_f32_ragged, false, bf16, float)
LAYER_NORM(bf16_bf16, true, bf16, bf16)
LAYER_NORM(bf16_bf16_ragged, false, bf16, bf16)
