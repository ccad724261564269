// Rows of a table, and the scatter of their gradients.

namespace embedding {

constexpr u32 ELSEWHERE = 0xffffffffu;

template <class T>
__device__ void forward(const u32* ids, const T* table, T* out, u32 accumulate, u32 d, u32 tiles) {
    constexpr int N = run_of<T>();
    bool fits = d % N == 0 && lies<N>(table) && lies<N>(out);
    for_each_run_of_row<N>(d, tiles, fits, [&](auto run, u64 row, u32 column) {
        u32 id = ids[row];
        T* to = out + row * d + column;
        if (id == ELSEWHERE && accumulate != 0) return;
        Run<float, run.N> x = {};
        if (id != ELSEWHERE) x = load_run(run, table + u64(id) * d + column);
        if (accumulate != 0) {
            auto sum = load_run(run, to);
            for (int i = 0; i < run.N; i++) x.at[i] = sum.at[i] + x.at[i];
        }
        store_run(to, x);
    });
}

// A row of the table a block: the gradients of the tokens [starts[i], starts[i + 1]) that name it, in order.
template <class T>
__device__ void backward(const u32* rows, const u32* starts, const u32* tokens, const T* dout, float* dtable, u32 d,
                         u32 tiles) {
    constexpr int N = run_of<T>();
    constexpr u32 AHEAD = 8;
    bool fits = d % N == 0 && lies<N>(dout) && lies<N>(dtable);
    for_each_run_of_row<N>(d, tiles, fits, [&](auto run, u64 i, u32 column) {
        float* to = dtable + u64(rows[i]) * d + column;
        auto sum = load_run(run, to);
        u32 token = starts[i], end = starts[i + 1];
        // A few under way at a time.
        for (; token + AHEAD <= end; token += AHEAD) {
            Run<float, run.N> terms[AHEAD];
            for (u32 j = 0; j < AHEAD; j++) terms[j] = load_run(run, dout + u64(tokens[token + j]) * d + column);
            for (u32 j = 0; j < AHEAD; j++)
                for (int k = 0; k < run.N; k++) sum.at[k] += terms[j].at[k];
        }
        for (; token < end; token++) {
            auto term = load_run(run, dout + u64(tokens[token]) * d + column);
            for (int k = 0; k < run.N; k++) sum.at[k] += term.at[k];
        }
        store_run(to, sum);
    });
}

}  // namespace embedding

#define EMBEDDING(NAME, T)                                                                                  \
    KERNEL(embedding_forward_##NAME, 256,                                                                   \
           (const u32* ids, const T* table, T* out, u32 accumulate, u32 d, u32 tiles),                      \
           { embedding::forward(ids, table, out, accumulate, d, tiles); })                                  \
    KERNEL(embedding_backward_##NAME, 256,                                                                  \
           (const u32* rows, const u32* starts, const u32* tokens, const T* dout, float* dtable, u32 d, u32 tiles), \
           { embedding::backward(rows, starts, tokens, dout, dtable, d, tiles); })

EMBEDDING(f32, float)
EMBEDDING(bf16, bf16)
