// Softmax cross-entropy, a block for each row of logits [M, V].

namespace cross_entropy {

constexpr u32 IGNORE = 0xffffffffu;

// A block goes over a row by stretches. Of each a thread takes this many elements, in runs of N that lie a
// block's runs apart; V is a multiple of N.
constexpr int EACH = 16;

template <int N> __device__ inline u32 place(u32 first, int run) {
    return first + (run * blockDim.x + threadIdx.x) * N;
}

// -infinity beyond the end. `fits`: the row lies for runs.
template <int N>
__device__ inline void read(const float* x, u32 first, u32 v, bool fits, Run<float, N> (&runs)[EACH / N]) {
#pragma unroll
    for (int r = 0; r < EACH / N; r++) {
        u32 at = place<N>(first, r);
        if (at < v && fits) {
            runs[r] = *reinterpret_cast<const Run<float, N>*>(x + at);
        } else {
            for (int i = 0; i < N; i++) runs[r].at[i] = at < v ? x[at + i] : -INFINITY;
        }
    }
}

template <int N, class T>
__device__ inline void write(T* y, u32 first, u32 v, bool fits, const Run<T, N> (&runs)[EACH / N]) {
#pragma unroll
    for (int r = 0; r < EACH / N; r++) {
        u32 at = place<N>(first, r);
        if (at < v && fits) {
            *reinterpret_cast<Run<T, N>*>(y + at) = runs[r];
        } else if (at < v) {
            for (int i = 0; i < N; i++) y[at + i] = runs[r].at[i];
        }
    }
}

struct Sum {
    // The largest logit, and the sum of e^(x - top).
    float top, sum;
};

// In one pass: a larger logit scales what was summed before. A NaN is passed over by `top` and carried to the
// loss by `sum`, where the guard of the step sees it; -infinity adds nothing.
template <int N> __device__ inline Sum sum_exp(const float* x, u32 v, bool fits, float* scratch) {
    constexpr float LEAST = -3.402823466e38f;
    float most = LEAST, sum = 0.0f;
    for (u32 first = 0; first < v; first += blockDim.x * EACH) {
        Run<float, N> runs[EACH / N];
        read<N>(x, first, v, fits, runs);
        float top = most;
        for (int i = 0; i < EACH; i++) top = fmaxf(top, runs[i / N].at[i % N]);
        if (top > most) sum *= expf(most - top);
        most = top;
        for (int i = 0; i < EACH; i++) sum += expf(runs[i / N].at[i % N] - top);
    }
    float top = block_max(most, scratch);
    return {top, block_sum(sum * expf(most - top), scratch)};
}

__device__ inline float loss_of(Sum all, float target) { return logf(all.sum) + all.top - target; }

template <int N>
__device__ void forward(const float* logits, const u32* targets, float* losses, u32 v, bool fits,
                        float* scratch) {
    u32 target = targets[blockIdx.x];
    const float* x = logits + u64(blockIdx.x) * v;
    float loss = 0.0f;
    if (target != IGNORE) loss = loss_of(sum_exp<N>(x, v, fits, scratch), x[target]);
    if (threadIdx.x == 0) losses[blockIdx.x] = loss;
}

// What a row's gradient is made of.
struct Gradient {
    float top, factor, hit;
    u32 target;
};

// A row becomes its gradient. In bf16 its element j lies over a half of logit j / 2: so a block has read a
// stretch before it writes its gradient, which lies over it (the first) or over stretches read before. Columns
// from `valid` on become zero.
template <int N, class T>
__device__ inline void overwrite(float* x, u32 v, u32 valid, bool fits, Gradient gradient) {
    for (u32 first = 0; first < v; first += blockDim.x * EACH) {
        Run<float, N> runs[EACH / N];
        Run<T, N> out[EACH / N];
        read<N>(x, first, valid, fits, runs);
        for (int i = 0; i < EACH; i++) {
            float value = gradient.factor * expf(runs[i / N].at[i % N] - gradient.top);
            bool hit = place<N>(first, i / N) + i % N == gradient.target;
            out[i / N].at[i % N] = narrow<T>(hit ? gradient.hit : value);
        }
        sync();
        write<N>(reinterpret_cast<T*>(x), first, v, fits, out);
    }
}

template <int N>
__device__ void forward_backward(float* logits, const u32* targets, float* losses, u32 v, float scale,
                                 bool narrow, bool fits, float* scratch) {
    u32 target = targets[blockIdx.x];
    float* x = logits + u64(blockIdx.x) * v;
    if (target == IGNORE) {
        if (threadIdx.x == 0) losses[blockIdx.x] = 0.0f;
        for (u32 at = threadIdx.x; at < v; at += blockDim.x) x[at] = 0.0f;
        return;
    }
    float hit = x[target];
    // All threads have read all logits when this returns.
    Sum all = sum_exp<N>(x, v, fits, scratch);
    if (threadIdx.x == 0) losses[blockIdx.x] = loss_of(all, hit);
    // Before any rounding: 1 - p of a sure token would drown in it.
    hit = scale * (expf(hit - all.top) / all.sum - 1.0f);
    Gradient gradient = {all.top, scale / all.sum, hit, target};
    if (narrow) {
        overwrite<N, bf16>(x, v, v, fits, gradient);
    } else {
        overwrite<N, float>(x, v, v, fits, gradient);
    }
}

}  // namespace cross_entropy

KERNEL(cross_entropy_forward, 512, (const float* logits, const u32* targets, float* losses, u32 v), {
    __shared__ float scratch[33];
    v % 4 == 0 ? cross_entropy::forward<4>(logits, targets, losses, v, lies<4>(logits), scratch)
               : cross_entropy::forward<1>(logits, targets, losses, v, true, scratch);
})
KERNEL(cross_entropy_forward_backward, 512,
       (float* logits, const u32* targets, float* losses, u32 v, float scale, u32 narrow), {
           __shared__ float scratch[33];
           v % 4 == 0 ? cross_entropy::forward_backward<4>(logits, targets, losses, v, scale, narrow != 0,
                                                           lies<4>(logits), scratch)
                      : cross_entropy::forward_backward<1>(logits, targets, losses, v, scale, narrow != 0, true,
                                                           scratch);
       })
