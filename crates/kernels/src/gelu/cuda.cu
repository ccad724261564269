// GELU of arrays, exact or by its tanh approximation.

namespace gelu {

constexpr float SQRT_2_OVER_PI = 0.7978846f, SQRT_HALF = 0.70710678118654752440f;

// The expressions of the CPU, but for e^x.
__device__ inline float tanh(float x) { return 1.0f - 2.0f / (expf(2.0f * x) + 1.0f); }

__device__ inline float erf(float x) {
    float z = fabsf(x), t = 1.0f / (1.0f + 0.5f * z);
    float p = 0.17087277f;
    p = p * t - 0.82215223f;
    p = p * t + 1.4885159f;
    p = p * t - 1.135204f;
    p = p * t + 0.27886807f;
    p = p * t - 0.18628806f;
    p = p * t + 0.09678418f;
    p = p * t + 0.37409196f;
    p = p * t + 1.0000237f;
    p = p * t - 1.2655122f;
    float erfc = t * expf(-z * z + p);
    return x < 0.0f ? erfc - 1.0f : 1.0f - erfc;
}

struct Tanh {
    static __device__ inline float inside(float x) { return tanh(SQRT_2_OVER_PI * (x + 0.044715f * x * x * x)); }
    static __device__ inline float value(float x) { return 0.5f * x * (1.0f + inside(x)); }
    static __device__ inline float slope(float x) {
        float t = inside(x), inner = SQRT_2_OVER_PI * (1.0f + 3.0f * 0.044715f * x * x);
        return 0.5f * (1.0f + t) + 0.5f * x * (1.0f - t * t) * inner;
    }
};

struct Erf {
    static __device__ inline float value(float x) { return 0.5f * x * (1.0f + erf(x * SQRT_HALF)); }
    static __device__ inline float slope(float x) {
        float density = 0.3989423f * expf(-0.5f * x * x);
        return 0.5f * (1.0f + erf(x * SQRT_HALF)) + x * density;
    }
};

template <class Kind, class T> __device__ void forward(Kind kind, const T* x, T* y, u64 n) {
    constexpr int N = run_of<T>();
    for_each_run<N>(n, lies<N>(x) && lies<N>(y), [&](auto run, u64 at) {
        auto values = load_run(run, x + at);
        for (int i = 0; i < run.N; i++) values.at[i] = kind.value(values.at[i]);
        store_run(y + at, values);
    });
}

template <class Kind, class T> __device__ void backward(Kind kind, const T* x, const T* dy, T* dx, u64 n) {
    constexpr int N = run_of<T>();
    for_each_run<N>(n, lies<N>(x) && lies<N>(dy) && lies<N>(dx), [&](auto run, u64 at) {
        auto values = load_run(run, x + at), d = load_run(run, dy + at);
        for (int i = 0; i < run.N; i++) d.at[i] = d.at[i] * kind.slope(values.at[i]);
        store_run(dx + at, d);
    });
}

}  // namespace gelu

#define GELU(NAMES, KIND, T)                                                                  \
    KERNEL(gelu_forward_##NAMES, 256, (const T* x, T* y, u64 n), { gelu::forward(KIND(), x, y, n); }) \
    KERNEL(gelu_backward_##NAMES, 256, (const T* x, const T* dy, T* dx, u64 n),               \
           { gelu::backward(KIND(), x, dy, dx, n); })

GELU(tanh_f32, gelu::Tanh, float)
GELU(tanh_bf16, gelu::Tanh, bf16)
GELU(erf_f32, gelu::Erf, float)
GELU(erf_bf16, gelu::Erf, bf16)
