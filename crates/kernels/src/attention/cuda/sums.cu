// What goes over outputs once: the sums that the way back subtracts, and the merging of parts. A warp has a
// head of a token.

namespace attention {

struct Token {
    // Of the head's first element, and of its log-sum.
    u64 at, stat;
    bool is_one;

    // The warp's one of b*t*n heads of tokens.
    __device__ Token(u32 n, u32 t, u32 h, u64 count) {
        u64 head = u64(blockIdx.x) * (blockDim.x / 32) + threadIdx.x / 32, token = head / n;
        is_one = head < count;
        at = head * h;
        stat = (token / t * n + head % n) * t + token % t;
    }
};

// Four columns of a row from column `at` on; those beyond h are zero. WHOLE: there are none beyond, and rows
// lie for runs.
template <bool WHOLE, class T> __device__ inline Run<float, 4> load_four(const T* row, u32 at, u32 h) {
    Run<float, 4> x;
    if constexpr (WHOLE) {
        x = load_run(Length<4>(), row + at);
    } else {
        for (u32 i = 0; i < 4; i++) x.at[i] = at + i < h ? widen(row[at + i]) : 0.0f;
    }
    return x;
}

template <bool WHOLE, class O, class D>
__device__ inline void row_sums(const O* out, const D* dout, float* sums, u32 n, u32 t, u32 h, u64 count) {
    Token token(n, t, h, count);
    if (!token.is_one) return;
    float sum = 0.0f;
    for (u32 at = threadIdx.x % 32 * 4; at < h; at += 128) {
        Run<float, 4> x = load_four<WHOLE>(out + token.at, at, h);
        Run<float, 4> y = load_four<WHOLE>(dout + token.at, at, h);
        for (u32 i = 0; i < 4; i++) sum = fmaf(x.at[i], y.at[i], sum);
    }
    sum = warp_sum(sum);
    if (threadIdx.x % 32 == 0) sums[token.stat] = sum;
}

// out, lse become what they are with a part added.
__device__ inline void merge(float* out, float* lse, const float* part, const float* part_lse, u32 n, u32 t,
                             u32 h, u64 count) {
    Token token(n, t, h, count);
    if (!token.is_one) return;
    float known = lse[token.stat], more = part_lse[token.stat];
    // All lanes have read what one of them overwrites.
    sync_warp();
    if (more == -INFINITY) return;
    float top = fmaxf(known, more), ours = expf(known - top), theirs = expf(more - top), sum = ours + theirs;
    ours = ours / sum, theirs = theirs / sum;
    for (u64 i = token.at + threadIdx.x % 32; i < token.at + h; i += 32)
        out[i] = out[i] * ours + part[i] * theirs;
    if (threadIdx.x % 32 == 0) lse[token.stat] = top + logf(sum);
}

// What the way back knows of each query; a thread has a query of a head. [b, n, t]
__device__ inline void fill_stats(const float* lse, const float* sums, Stat* stats, u32 n, u32 t, u64 count,
                                  const Seen& seen) {
    u64 i = u64(blockIdx.x) * blockDim.x + threadIdx.x;
    if (i >= count) return;
    stats[i] = Stat{lse[i] == -INFINITY ? 0.0f : lse[i], sums[i], seen.visible(i / t / n, t, i % t)};
}

}  // namespace attention

#define ATTENTION_ROW_SUMS(NAMES, O, D)                                                                       \
    KERNEL(attention_row_sums_##NAMES, 256,                                                                   \
           (const O* out, const D* dout, float* sums, u32 n, u32 t, u32 h, u64 count), {                      \
               h % 4 == 0 && lies<4>(out) && lies<4>(dout)                                                    \
                   ? attention::row_sums<true>(out, dout, sums, n, t, h, count)                               \
                   : attention::row_sums<false>(out, dout, sums, n, t, h, count);                             \
           })

ATTENTION_ROW_SUMS(f32_f32, float, float)
ATTENTION_ROW_SUMS(f32_bf16, float, bf16)
ATTENTION_ROW_SUMS(bf16_f32, bf16, float)
ATTENTION_ROW_SUMS(bf16_bf16, bf16, bf16)

KERNEL(attention_merge, 256,
       (float* out, float* lse, const float* part, const float* part_lse, u32 n, u32 t, u32 h, u64 count),
       { attention::merge(out, lse, part, part_lse, n, t, h, count); })

KERNEL(attention_stats, 256,
       (const float* lse, const float* sums, attention::Stat* stats, u32 n, u32 t, u64 count, ATTENTION_SEEN),
       { attention::fill_stats(lse, sums, stats, n, t, count, ATTENTION_SEEN_GIVEN); })
