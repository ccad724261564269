// RMSNorm of the heads of q and k inside q|k|v, each head a row of `rms_norm`; v is copied.

namespace head_norm {

// Query heads, key heads, head dim. Heads of all rows are counted in 32 bits.
struct Heads {
    u32 n, k, h;
    __device__ Heads(u32 n, u32 k, u32 h) : n(n), k(k), h(h) {}
    __device__ u64 width() const { return u64(n + 2 * k) * h; }
};

template <bool WHOLE, class X, class W>
__device__ void forward(const X* qkv, const W* wq, const W* wk, X* out, float* inv_rms, u32 threads, u32 rows,
                        Heads heads, float eps, float* scratch) {
    Team team(threads);
    u32 all = heads.n + 2 * heads.k, normed = heads.n + heads.k;
    u32 item = blockIdx.x * team.teams + team.index, row = item / all, head = item % all;
    u64 from = u64(item) * heads.h;
    bool active = row < rows;
    const W* w = head < heads.n ? wq : wk;
    rms_norm::forward_row<WHOLE>(team, active && head < normed, qkv + from, w, out + from,
                                 inv_rms + u64(row) * normed + head, heads.h, eps, scratch);
    if (!active || head < normed) return;
    for (u32 at = team.lane * 8; at < heads.h; at += team.threads * 8)
        store_eight<WHOLE>(out + from, at, heads.h, load_eight<WHOLE>(qkv + from, at, heads.h));
}

// The part of a block of `count` heads from head `first` on of each row.
template <bool WHOLE, class X, class W>
__device__ inline void backward_heads(const Team& team, u32 first, u32 count, const X* qkv, const W* w,
                                      const float* inv_rms, const X* dout, X* dqkv, u32 rows, Heads heads,
                                      float (&sums)[8], float* scratch) {
    u32 items = rows * count, step = gridDim.x * team.teams;
    for (u32 begin = blockIdx.x * team.teams; begin < items; begin += step) {
        u32 item = begin + team.index, head = first + item % count;
        u64 row = item / count, from = row * heads.width() + u64(head) * heads.h;
        const X* carried = nullptr;
        const float* inv = inv_rms + row * (heads.n + heads.k) + head;
        rms_norm::backward_row<WHOLE>(team, item < items, qkv + from, w, inv, dout + from, carried, dqkv + from,
                                      heads.h, sums, scratch);
    }
}

// partial [2, blocks, H]: gradients of the weights of q and of k.
template <bool WHOLE, class X, class W>
__device__ void backward(const X* qkv, const W* wq, const W* wk, const float* inv_rms, const X* dout, X* dqkv,
                         float* partial, u32 threads, u32 rows, Heads heads, float* scratch) {
    Team team(threads);
    float sums[2][8] = {};
    backward_heads<WHOLE>(team, 0, heads.n, qkv, wq, inv_rms, dout, dqkv, rows, heads, sums[0], scratch);
    backward_heads<WHOLE>(team, heads.n, heads.k, qkv, wk, inv_rms, dout, dqkv, rows, heads, sums[1], scratch);
    write_sums<WHOLE>(team, sums, partial, heads.h, scratch);
    u32 items = rows * heads.k, step = gridDim.x * team.teams;
    u32 own = own_column(team);
    if (own >= heads.h) return;
    for (u32 item = blockIdx.x * team.teams + team.index; item < items; item += step) {
        u32 head = heads.n + heads.k + item % heads.k;
        u64 from = item / heads.k * heads.width() + u64(head) * heads.h;
        store_eight<WHOLE>(dqkv + from, own, heads.h, load_eight<WHOLE>(dout + from, own, heads.h));
    }
}

}  // namespace head_norm

#define HEAD_NORM(NAMES, WHOLE, X, W)                                                                      \
    KERNEL(head_norm_forward_##NAMES, 256,                                                                 \
           (const X* qkv, const W* wq, const W* wk, X* out, float* inv_rms, u32 threads, u32 rows, u32 n,  \
            u32 k, u32 h, float eps), {                                                                    \
               __shared__ float scratch[TEAM_WARPS];                                                       \
               head_norm::Heads heads(n, k, h);                                                            \
               head_norm::forward<WHOLE>(qkv, wq, wk, out, inv_rms, threads, rows, heads, eps, scratch);   \
           })                                                                                              \
    KERNEL(head_norm_backward_##NAMES, 512,                                                                \
           (const X* qkv, const W* wq, const W* wk, const float* inv_rms, const X* dout, X* dqkv,          \
            float* partial, u32 threads, u32 rows, u32 n, u32 k, u32 h), {                                 \
               __shared__ float scratch[16 * HALF_BLOCK];                                                  \
               head_norm::Heads heads(n, k, h);                                                            \
               head_norm::backward<WHOLE>(qkv, wq, wk, inv_rms, dout, dqkv, partial, threads, rows, heads, \
                                          scratch);                                                        \
           })

HEAD_NORM(f32_f32, true, float, float)
HEAD_NORM(f32_f32_ragged, false, float, float)
HEAD_NORM(bf16_f32, true, bf16, float)
HEAD_NORM(bf16_f32_ragged, false, bf16, float)
HEAD_NORM(bf16_bf16, true, bf16, bf16)
HEAD_NORM(bf16_bf16_ragged, false, bf16, bf16)
