// bf16 attention on tensor cores: a block takes queries of a head and walks over the keys they see with an
// online softmax (Dao 2023). While scores are summed V of the keys is on its way, and K of the next keys
// while probabilities meet V.

namespace attention {

// Over the lanes that share rows of an accumulator.
__device__ inline float row_max(float x) {
    x = fmaxf(x, shuffle_xor(x, 1));
    return fmaxf(x, shuffle_xor(x, 2));
}
__device__ inline float row_sum(float x) {
    x += shuffle_xor(x, 1);
    return x + shuffle_xor(x, 2);
}

template <int HEAD, int MT> struct Forward {
    static constexpr int ROWS = 64 * MT, KEYS = 64, KT = KEYS / 8, NT = HEAD / 8;

    bf16 *queries, *keys, *values;
    // Of the block's queries. [ROWS]
    Range* ranges;
    // Of the warp: its first query among the block's, and its rows.
    u32 first;
    float sums[MT][NT][4];
    // Per row: largest score, and this lane's part of the sum of exponentials relative to it.
    float top[MT][2], total[MT][2];

    __device__ explicit Forward(bf16* shared)
        : queries(shared), keys(queries + ROWS * HEAD), values(keys + KEYS * HEAD),
          ranges(reinterpret_cast<Range*>(values + KEYS * HEAD)), first(threadIdx.x / 32 * (16 * MT)) {
        clear(sums);
#pragma unroll
        for (int m = 0; m < MT; m++)
#pragma unroll
            for (int half = 0; half < 2; half++) top[m][half] = -INFINITY, total[m][half] = 0.0f;
    }

    // Rows of an accumulator that a lane has.
    __device__ Range range(int m, int half) const {
        return ranges[first + 16 * m + 8 * half + threadIdx.x % 32 / 4];
    }

    // Some query of the warp sees some of the keys from k0 on.
    __device__ bool sees(u32 k0) const {
        return ranges[first].from < k0 + KEYS && ranges[first + 16 * MT - 1].to > k0;
    }

    // What is not seen becomes -inf.
    __device__ void mask(float (&scores)[MT][KT][4], u32 k0) const {
        if (ranges[first + 16 * MT - 1].from <= k0 && k0 + KEYS <= ranges[first].to) return;
        u32 own = k0 + threadIdx.x % 4 * 2;
#pragma unroll
        for (int m = 0; m < MT; m++)
#pragma unroll
            for (int half = 0; half < 2; half++) {
                Range seen = range(m, half);
#pragma unroll
                for (int n = 0; n < KT; n++)
#pragma unroll
                    for (int i = 0; i < 2; i++)
                        if (!seen.holds(own + 8 * n + i)) scores[m][n][2 * half + i] = -INFINITY;
            }
    }

    // Scores become exponentials relative to the largest so far, `factors` what makes sums so far relative to
    // it; `scale` is in powers of two.
    __device__ void advance(float (&scores)[MT][KT][4], float scale, float (&factors)[MT][2]) {
#pragma unroll
        for (int m = 0; m < MT; m++)
#pragma unroll
            for (int half = 0; half < 2; half++) {
                float best = top[m][half], sum = 0.0f;
#pragma unroll
                for (int n = 0; n < KT; n++)
#pragma unroll
                    for (int i = 0; i < 2; i++) best = fmaxf(best, scores[m][n][2 * half + i]);
                best = row_max(best);
                // Where nothing was seen so far, every exponential is 0.
                float base = best == -INFINITY ? 0.0f : best * scale;
                float factor = exp2_fast(fmaf(top[m][half], scale, -base));
#pragma unroll
                for (int n = 0; n < KT; n++)
#pragma unroll
                    for (int i = 0; i < 2; i++) {
                        float p = exp2_fast(fmaf(scores[m][n][2 * half + i], scale, -base));
                        scores[m][n][2 * half + i] = p;
                        sum += p;
                    }
                top[m][half] = best;
                total[m][half] = fmaf(total[m][half], factor, sum);
                factors[m][half] = factor;
            }
    }

    __device__ void rescale(const float (&factors)[MT][2]) {
#pragma unroll
        for (int m = 0; m < MT; m++)
#pragma unroll
            for (int half = 0; half < 2; half++)
#pragma unroll
                for (int n = 0; n < NT; n++)
#pragma unroll
                    for (int i = 0; i < 2; i++) sums[m][n][2 * half + i] *= factors[m][half];
    }

    // Rows are divided by their sums; lse [rows].
    __device__ void finish(float* lse, u32 rows, float scale) {
#pragma unroll
        for (int m = 0; m < MT; m++)
#pragma unroll
            for (int half = 0; half < 2; half++) {
                float sum = row_sum(total[m][half]), inverse = sum > 0.0f ? 1.0f / sum : 0.0f;
#pragma unroll
                for (int n = 0; n < NT; n++)
#pragma unroll
                    for (int i = 0; i < 2; i++) sums[m][n][2 * half + i] *= inverse;
                u32 row = first + 16 * m + 8 * half + threadIdx.x % 32 / 4;
                if (threadIdx.x % 4 == 0 && row < rows)
                    lse[row] = sum > 0.0f ? fmaf(top[m][half], scale, logf(sum)) : -INFINITY;
            }
    }
};

// out [b*t, n*h], lse [b, n, t]. Blocks are (queries, heads, rows of the batch).
template <int HEAD, int MT>
__device__ inline void forward(const Task<bf16>& task, const Seen& seen, void* out, float* lse, u32 mode) {
    using F = Forward<HEAD, MT>;
    DYNAMIC_SHARED(bf16, shared);
    F f(shared);
    // Blocks with many keys go first.
    u32 q0 = (gridDim.x - 1 - blockIdx.x) * F::ROWS, head = blockIdx.y, row = blockIdx.z;
    u32 rows = min(u32(F::ROWS), task.t - q0), column = head / task.group * task.h;
    u32 tile = seen.visible(row, task.t, q0).from / F::KEYS;
    u32 end = (seen.visible(row, task.t, q0 + rows - 1).to + F::KEYS - 1) / F::KEYS;
    if (threadIdx.x < F::ROWS)
        f.ranges[threadIdx.x] = seen.visible(row, task.t, q0 + min(threadIdx.x, rows - 1));
    auto load = [&](bf16* to, const Heads<bf16>& heads, u32 tile) {
        u32 k0 = tile * F::KEYS;
        load_tile<HEAD, F::KEYS>(to, heads.at(row, k0, column), heads.ld, task.s - k0, task.h);
        copy_async_commit();
    };
    load_tile<HEAD, F::ROWS>(f.queries, task.q.at(row, q0, head * task.h), task.q.ld, rows, task.h);
    if (tile < end) load(f.keys, task.k, tile);
    for (; tile < end; tile++) {
        u32 k0 = tile * F::KEYS;
        copy_async_wait<0>();
        sync();
        load(f.values, task.v, tile);
        bool sees = f.sees(k0);
        float scores[MT][F::KT][4], factors[MT][2];
        if (sees) product<HEAD>(scores, f.queries + f.first * HEAD, f.keys);
        copy_async_wait<0>();
        sync();
        if (tile + 1 < end) load(f.keys, task.k, tile + 1);
        if (!sees) continue;
        f.mask(scores, k0);
        f.advance(scores, task.scale * LOG2_E, factors);
        u32 packed[F::KT / 2][MT][4];
        pack(scores, packed);
        f.rescale(factors);
        add_product<HEAD>(f.sums, packed, f.values);
    }
    copy_async_wait<0>();
    sync();
    f.finish(lse + (u64(row) * task.n + head) * task.t + q0, rows, task.scale);
    u32 width = task.n * task.h;
    Target to = {out, (u64(row) * task.t + q0 + f.first) * width + head * task.h, width, mode};
    store<HEAD>(f.sums, f.queries + f.first * HEAD, to, rows - min(rows, f.first), task.h);
}

}  // namespace attention

#define ATTENTION_FORWARD(HEAD, MT)                                                                           \
    KERNEL(attention_forward_##HEAD, 128,                                                                     \
           (ATTENTION_TASK(bf16), ATTENTION_SEEN, void* out, float* lse, u32 mode),                           \
           {                                                                                                  \
               (attention::forward<HEAD, MT>(ATTENTION_TASK_GIVEN(bf16), ATTENTION_SEEN_GIVEN, out, lse,      \
                                             mode));                                                          \
           })

ATTENTION_FORWARD(64, 2)
ATTENTION_FORWARD(96, 2)
ATTENTION_FORWARD(128, 2)
ATTENTION_FORWARD(256, 1)
