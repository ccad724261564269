// AdamW. The bits are those of the CPU: an update may run on either side.

namespace adamw {

struct Step {
    float beta1, beta2, eps, keep, rate, root, grad_scale;

    // The new weight; the moments are updated in place.
    __device__ inline float apply(float w, float g, float& m, float& v) const {
        g = g * grad_scale;
        m = beta1 * m + (1.0f - beta1) * g;
        v = beta2 * v + (1.0f - beta2) * g * g;
        return w * keep - rate * m / (sqrtf(v) * root + eps);
    }
};

// f32 weights.
struct Plain {
    float* w;

    template <int N> __device__ bool fits() const { return lies<N>(w); }
    template <class L> __device__ Run<float, L::N> load(L run, u64 at) const { return load_run(run, w + at); }
    template <int N> __device__ void store(u64 at, const Run<float, N>& x) const { store_run(w + at, x); }
};

// The bf16 weights the model computes with, and the 16 bits below them.
struct Split {
    bf16* high;
    u16* low;

    template <int N> __device__ bool fits() const { return lies<N>(high) && lies<N>(low); }

    template <class L> __device__ Run<float, L::N> load(L, u64 at) const {
        constexpr int N = L::N;
        auto above = *reinterpret_cast<const Run<bf16, N>*>(high + at);
        auto below = *reinterpret_cast<const Run<u16, N>*>(low + at);
        Run<float, N> x;
        // A low half of 0x8000 and more was rounded up: read as signed it takes the carry back.
        for (int i = 0; i < N; i++)
            x.at[i] = as_float((u32(above.at[i].bits) << 16) + u32(int(static_cast<short>(below.at[i]))));
        return x;
    }

    // The nearest bf16, ties away from zero.
    template <int N> __device__ void store(u64 at, const Run<float, N>& x) const {
        Run<bf16, N> above;
        Run<u16, N> below;
        for (int i = 0; i < N; i++) {
            u32 bits = as_bits(x.at[i]);
            above.at[i].bits = u16((bits + 0x8000u) >> 16);
            below.at[i] = u16(bits);
        }
        *reinterpret_cast<Run<bf16, N>*>(high + at) = above;
        *reinterpret_cast<Run<u16, N>*>(low + at) = below;
    }
};

constexpr int RUN = 4;

template <class Master, class G>
__device__ void update(Master master, const G* grad, float* m, float* v, u64 n, Step step) {
    bool fits = master.template fits<RUN>() && lies<RUN>(grad) && lies<RUN>(m) && lies<RUN>(v);
    for_each_run<RUN>(n, fits, [&](auto run, u64 at) {
        auto w = master.load(run, at), g = load_run(run, grad + at);
        auto first = load_run(run, m + at), second = load_run(run, v + at);
        for (int i = 0; i < run.N; i++) w.at[i] = step.apply(w.at[i], g.at[i], first.at[i], second.at[i]);
        master.store(at, w);
        store_run(m + at, first);
        store_run(v + at, second);
    });
}

}  // namespace adamw

#define ADAMW_STEP \
    float beta1, float beta2, float eps, float keep, float rate, float root, float grad_scale

#define ADAMW(NAME, G)                                                                             \
    KERNEL(adamw_plain_##NAME, 256, (float* w, const G* grad, float* m, float* v, u64 n, ADAMW_STEP), { \
        adamw::Step step = {beta1, beta2, eps, keep, rate, root, grad_scale};                      \
        adamw::update(adamw::Plain{w}, grad, m, v, n, step);                                       \
    })                                                                                             \
    KERNEL(adamw_split_##NAME, 256,                                                                \
           (bf16 * high, u16 * low, const G* grad, float* m, float* v, u64 n, ADAMW_STEP), {       \
               adamw::Step step = {beta1, beta2, eps, keep, rate, root, grad_scale};               \
               adamw::update(adamw::Split{high, low}, grad, m, v, n, step);                        \
           })

ADAMW(f32, float)
ADAMW(bf16, bf16)
