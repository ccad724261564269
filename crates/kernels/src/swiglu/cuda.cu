// SwiGLU: silu(gate) * up; a row of gate_up is F gates, then as many ups.

namespace swiglu {

__device__ inline float sigmoid(float x) { return 1.0f / (1.0f + expf(-x)); }

template <class T> __device__ void forward(const T* gate_up, T* out, u32 f, u32 tiles) {
    constexpr int N = run_of<T>();
    bool fits = f % N == 0 && lies<N>(gate_up) && lies<N>(out);
    for_each_run_of_row<N>(f, tiles, fits, [&](auto run, u64 row, u32 column) {
        const T* from = gate_up + row * 2 * f + column;
        auto gate = load_run(run, from), up = load_run(run, from + f);
        for (int i = 0; i < run.N; i++) gate.at[i] = gate.at[i] * sigmoid(gate.at[i]) * up.at[i];
        store_run(out + row * f + column, gate);
    });
}

// `act`, where there is one, becomes the output again.
template <class T>
__device__ void backward(const T* gate_up, const T* dout, T* dgate_up, T* act, u32 f, u32 tiles) {
    constexpr int N = run_of<T>();
    bool fits = f % N == 0 && lies<N>(gate_up) && lies<N>(dout) && lies<N>(dgate_up) && lies<N>(act);
    for_each_run_of_row<N>(f, tiles, fits, [&](auto run, u64 row, u32 column) {
        u64 from = row * 2 * f + column, to = row * f + column;
        auto gate = load_run(run, gate_up + from), up = load_run(run, gate_up + from + f);
        auto d = load_run(run, dout + to), y = d;
        for (int i = 0; i < run.N; i++) {
            float s = sigmoid(gate.at[i]), silu = gate.at[i] * s;
            y.at[i] = silu * up.at[i];
            gate.at[i] = d.at[i] * (up.at[i] * (s + silu * (1.0f - s)));
            up.at[i] = d.at[i] * silu;
        }
        store_run(dgate_up + from, gate);
        store_run(dgate_up + from + f, up);
        if (act != nullptr) store_run(act + to, y);
    });
}

}  // namespace swiglu

#define SWIGLU(NAME, T)                                                                  \
    KERNEL(swiglu_forward_##NAME, 256, (const T* gate_up, T* out, u32 f, u32 tiles),     \
           { swiglu::forward(gate_up, out, f, tiles); })                                 \
    KERNEL(swiglu_backward_##NAME, 256,                                                  \
           (const T* gate_up, const T* dout, T* dgate_up, T* act, u32 f, u32 tiles),     \
           { swiglu::backward(gate_up, dout, dgate_up, act, f, tiles); })

SWIGLU(f32, float)
SWIGLU(bf16, bf16)
