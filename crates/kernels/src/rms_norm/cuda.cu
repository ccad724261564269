// RMSNorm of rows. `head_norm`, which follows, takes its rows from here.

namespace rms_norm {

// The row of a team; a team without one is not `active`.
template <bool WHOLE, class X, class W>
__device__ inline void forward_row(const Team& team, bool active, const X* x, const W* w, X* y, float* inv_rms,
                                   u32 d, float eps, float* scratch) {
    u32 end = active ? d : 0;
    float sum[1] = {0.0f};
    for (u32 at = team.lane * 8; at < end; at += team.threads * 8) {
        Run<X, 8> xs = load_eight<WHOLE>(x, at, d);
        for (int i = 0; i < 8; i++) sum[0] += widen(xs.at[i]) * widen(xs.at[i]);
    }
    team_sums(team, sum, scratch);
    float inv = 1.0f / sqrtf(sum[0] / float(d) + eps);
    if (active && team.lane == 0) *inv_rms = inv;
    for (u32 at = team.lane * 8; at < end; at += team.threads * 8) {
        Run<X, 8> xs = load_eight<WHOLE>(x, at, d), ys;
        Run<W, 8> ws = load_eight<WHOLE>(w, at, d);
        for (int i = 0; i < 8; i++) ys.at[i] = narrow<X>(widen(xs.at[i]) * inv * widen(ws.at[i]));
        store_eight<WHOLE>(y, at, d, ys);
    }
}

template <bool WHOLE, class X, class W>
__device__ void forward(const X* x, const W* w, X* y, float* inv_rms, u32 threads, u32 rows, u32 d, float eps,
                        float* scratch) {
    Team team(threads);
    u64 row = u64(blockIdx.x) * team.teams + team.index;
    forward_row<WHOLE>(team, row < rows, x + row * d, w, y + row * d, inv_rms + row, d, eps, scratch);
}

// dx of the row of a team, in the columns of the block's tile, and their weight gradients added to `sums`.
template <bool WHOLE, class X, class W>
__device__ inline void backward_row(const Team& team, bool active, const X* x, const W* w, const float* inv_rms,
                                    const X* dy, const X* carried, X* dx, u32 d, float (&sums)[8],
                                    float* scratch) {
    u32 own = own_column(team), end = active ? d : 0;
    Run<X, 8> kept = {};
    // Under way while the row is summed.
    if (own < end && carried != nullptr) kept = load_eight<WHOLE>(carried, own, d);
    float inv = active ? *inv_rms : 0.0f, along[1] = {0.0f};
#pragma unroll 1
    for (u32 at = team.lane * 8; at < end; at += team.threads * 8) {
        Run<X, 8> xs = load_eight<WHOLE>(x, at, d), dys = load_eight<WHOLE>(dy, at, d);
        Run<W, 8> ws = load_eight<WHOLE>(w, at, d);
        for (int i = 0; i < 8; i++) along[0] += widen(dys.at[i]) * widen(ws.at[i]) * widen(xs.at[i]);
    }
    team_sums(team, along, scratch);
    if (own >= end) return;
    float c = along[0] * inv * inv * inv / float(d);
    Run<X, 8> xs = load_eight<WHOLE>(x, own, d), dys = load_eight<WHOLE>(dy, own, d), dxs;
    Run<W, 8> ws = load_eight<WHOLE>(w, own, d);
    for (int i = 0; i < 8; i++) {
        float from = widen(xs.at[i]), gradient = widen(dys.at[i]);
        sums[i] += gradient * from * inv;
        float back = gradient * widen(ws.at[i]) * inv - from * c;
        dxs.at[i] = narrow<X>(carried == nullptr ? back : widen(kept.at[i]) + back);
    }
    store_eight<WHOLE>(dx, own, d, dxs);
}

// partial [blocks, d]: the weight gradients of the rows that each block takes.
template <bool WHOLE, class X, class W>
__device__ void backward(const X* x, const W* w, const float* inv_rms, const X* dy, const X* carried, X* dx,
                         float* partial, u32 threads, u32 rows, u32 d, float* scratch) {
    Team team(threads);
    float sums[1][8] = {};
    for (u64 first = u64(blockIdx.x) * team.teams; first < rows; first += u64(gridDim.x) * team.teams) {
        u64 row = first + team.index, from = row * d;
        backward_row<WHOLE>(team, row < rows, x + from, w, inv_rms + row, dy + from,
                            carried == nullptr ? nullptr : carried + from, dx + from, d, sums[0], scratch);
    }
    write_sums<WHOLE>(team, sums, partial, d, scratch);
}

}  // namespace rms_norm

#define RMS_NORM(NAMES, WHOLE, X, W)                                                                          \
    KERNEL(rms_norm_forward_##NAMES, 256,                                                                     \
           (const X* x, const W* w, X* y, float* inv_rms, u32 threads, u32 rows, u32 d, float eps), {         \
               __shared__ float scratch[TEAM_WARPS];                                                          \
               rms_norm::forward<WHOLE>(x, w, y, inv_rms, threads, rows, d, eps, scratch);                    \
           })                                                                                                 \
    KERNEL(rms_norm_backward_##NAMES, 512,                                                                    \
           (const X* x, const W* w, const float* inv_rms, const X* dy, const X* carried, X* dx,               \
            float* partial, u32 threads, u32 rows, u32 d), {                                                  \
               __shared__ float scratch[8 * HALF_BLOCK];                                                      \
               rms_norm::backward<WHOLE>(x, w, inv_rms, dy, carried, dx, partial, threads, rows, d, scratch); \
           })

RMS_NORM(f32_f32, true, float, float)
RMS_NORM(f32_f32_ragged, false, float, float)
RMS_NORM(bf16_f32, true, bf16, float)
RMS_NORM(bf16_f32_ragged, false, bf16, float)
RMS_NORM(bf16_bf16, true, bf16, bf16)
RMS_NORM(bf16_bf16_ragged, false, bf16, bf16)
