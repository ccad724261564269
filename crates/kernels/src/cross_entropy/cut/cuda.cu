// The same over a slice of the vocabulary: of the v columns of a row `valid` are there. Comes behind
// `cross_entropy`, whose way over rows it takes.

namespace cross_entropy {

constexpr u32 ELSEWHERE = 0xfffffffeu;

template <int N> __device__ inline float top_of(const float* x, u32 valid, bool fits, float* scratch) {
    float top = -INFINITY;
    for (u32 first = 0; first < valid; first += blockDim.x * EACH) {
        Run<float, N> runs[EACH / N];
        read<N>(x, first, valid, fits, runs);
        for (int i = 0; i < EACH; i++) top = fmaxf(top, runs[i / N].at[i % N]);
    }
    return block_max(top, scratch);
}

template <int N>
__device__ inline float sum_from(const float* x, u32 valid, float top, bool fits, float* scratch) {
    float sum = 0.0f;
    for (u32 first = 0; first < valid; first += blockDim.x * EACH) {
        Run<float, N> runs[EACH / N];
        read<N>(x, first, valid, fits, runs);
        for (int i = 0; i < EACH; i++) {
            // What lies beyond the end adds nothing, even where nothing is above -infinity.
            bool there = place<N>(first, i / N) + i % N < valid;
            sum += there ? expf(runs[i / N].at[i % N] - top) : 0.0f;
        }
    }
    return block_sum(sum, scratch);
}

template <int N>
__device__ void cut_gradient(float* logits, const u32* targets, const float* tops, const float* sums, u32 v,
                             u32 valid, float scale, bool narrow, bool fits) {
    u32 target = targets[blockIdx.x];
    float* x = logits + u64(blockIdx.x) * v;
    if (target == IGNORE) {
        for (u32 at = threadIdx.x; at < v; at += blockDim.x) x[at] = 0.0f;
        return;
    }
    float top = tops[blockIdx.x], sum = sums[2 * blockIdx.x], hit = 0.0f;
    // Read by all threads before any of them writes: `overwrite` waits for them in between.
    if (target != ELSEWHERE) hit = scale * (expf(x[target] - top) / sum - 1.0f);
    Gradient gradient = {top, scale / sum, hit, target};
    if (narrow) {
        overwrite<N, bf16>(x, v, valid, fits, gradient);
    } else {
        overwrite<N, float>(x, v, valid, fits, gradient);
    }
}

}  // namespace cross_entropy

// Runs of four where all columns and those that are there come in fours.
KERNEL(cross_entropy_cut_tops, 512, (const float* logits, float* tops, u32 v, u32 valid), {
    __shared__ float scratch[33];
    const float* x = logits + u64(blockIdx.x) * v;
    float top = v % 4 == 0 && valid % 4 == 0 ? cross_entropy::top_of<4>(x, valid, lies<4>(logits), scratch)
                                             : cross_entropy::top_of<1>(x, valid, true, scratch);
    if (threadIdx.x == 0) tops[blockIdx.x] = top;
})
KERNEL(cross_entropy_cut_sums, 512,
       (const float* logits, const u32* targets, const float* tops, float* sums, u32 v, u32 valid), {
           __shared__ float scratch[33];
           const float* x = logits + u64(blockIdx.x) * v;
           float top = tops[blockIdx.x];
           float sum = v % 4 == 0 && valid % 4 == 0
                           ? cross_entropy::sum_from<4>(x, valid, top, lies<4>(logits), scratch)
                           : cross_entropy::sum_from<1>(x, valid, top, true, scratch);
           u32 target = targets[blockIdx.x];
           bool here = target != cross_entropy::IGNORE && target != cross_entropy::ELSEWHERE;
           if (threadIdx.x == 0) {
               sums[2 * blockIdx.x] = sum;
               sums[2 * blockIdx.x + 1] = here ? x[target] - top : 0.0f;
           }
       })
KERNEL(cross_entropy_cut_losses, 256, (const float* sums, const u32* targets, float* losses, u64 n), {
    u64 at = u64(blockIdx.x) * blockDim.x + threadIdx.x;
    if (at < n)
        losses[at] = targets[at] == cross_entropy::IGNORE ? 0.0f : logf(sums[2 * at]) - sums[2 * at + 1];
})
KERNEL(cross_entropy_cut_gradient, 512,
       (float* logits, const u32* targets, const float* tops, const float* sums, u32 v, u32 valid, float scale,
        u32 narrow), {
           v % 4 == 0 && valid % 4 == 0
               ? cross_entropy::cut_gradient<4>(logits, targets, tops, sums, v, valid, scale, narrow != 0,
                                                lies<4>(logits))
               : cross_entropy::cut_gradient<1>(logits, targets, tops, sums, v, valid, scale, narrow != 0, true);
       })
