// Rows of experts back to their tokens, and the gradients of that.

namespace experts {

// y = residual + the sum over j < choices of weights[row, j] rows[slot_of[row, j]].
template <class T>
__device__ void combine(const T* rows, const u32* slot_of, const float* weights, const T* residual, T* y,
                        u32 choices, u32 d, u32 tiles) {
    constexpr int N = run_of<T>();
    bool fits = d % N == 0 && lies<N>(rows) && lies<N>(residual) && lies<N>(y);
    for_each_run_of_row<N>(d, tiles, fits, [&](auto run, u64 row, u32 column) {
        Run<float, run.N> sum = {};
        if (residual != nullptr) sum = load_run(run, residual + row * d + column);
        for (u64 pair = row * choices; pair < (row + 1) * choices; pair++) {
            float weight = weights == nullptr ? 1.0f : weights[pair];
            auto x = load_run(run, rows + u64(slot_of[pair]) * d + column);
            for (int i = 0; i < run.N; i++) sum.at[i] += weight * x.at[i];
        }
        store_run(y + row * d + column, sum);
    });
}

// A slot a block: its row of drows, and the gradient of its weight.
template <class T>
__device__ void combine_backward(const T* dy, const u32* pair_of, const float* weights, const T* rows, T* drows,
                                 float* dweights, u32 choices, u32 d, float* scratch) {
    constexpr int N = run_of<T>();
    u64 slot = blockIdx.x, from = slot * d;
    u32 pair = pair_of[slot];
    u64 token = u64(pair / choices) * d;
    bool fits = d % N == 0 && lies<N>(dy) && lies<N>(rows) && lies<N>(drows);
    float weight = weights[pair], sum = 0.0f;
    for (u64 first = 0; first < d; first += blockDim.x * N) {
        for_each_run<N>(first, d, fits, [&](auto run, u64 column) {
            auto gradient = load_run(run, dy + token + column), x = load_run(run, rows + from + column);
            for (int i = 0; i < run.N; i++) {
                sum += gradient.at[i] * x.at[i];
                gradient.at[i] = weight * gradient.at[i];
            }
            store_run(drows + from + column, gradient);
        });
    }
    sum = block_sum(sum, scratch);
    if (threadIdx.x == 0) dweights[slot] = sum;
}

}  // namespace experts

#define EXPERTS(NAME, T)                                                                                  \
    KERNEL(experts_combine_##NAME, 256,                                                                   \
           (const T* rows, const u32* slot_of, const float* weights, const T* residual, T* y, u32 choices, \
            u32 d, u32 tiles),                                                                            \
           { experts::combine(rows, slot_of, weights, residual, y, choices, d, tiles); })                 \
    KERNEL(experts_combine_backward_##NAME, 256,                                                          \
           (const T* dy, const u32* pair_of, const float* weights, const T* rows, T* drows, float* dweights, \
            u32 choices, u32 d), {                                                                        \
               __shared__ float scratch[33];                                                              \
               experts::combine_backward(dy, pair_of, weights, rows, drows, dweights, choices, d, scratch); \
           })

EXPERTS(f32, float)
EXPERTS(bf16, bf16)
