// Rotary positions, in place. A block takes a row; of its heads the first 2 `half` values turn, in pairs that
// are `half` apart.

namespace rope {

template <int N, class T>
__device__ inline void turn(T* x, const float* cos, const float* sin, u32 heads, u32 h, u32 half, float sign) {
    u32 runs = half / N;
    for (u32 i = threadIdx.x; i < heads * runs; i += blockDim.x) {
        u32 head = i / runs, at = i % runs * N;
        T *first = x + head * h + at, *second = first + half;
        Length<N> run;
        auto p = load_run(run, first), q = load_run(run, second);
        auto c = load_run(run, cos + at), s = load_run(run, sin + at);
        auto a = p, b = q;
        for (int j = 0; j < N; j++) {
            float turned = s.at[j] * sign;
            a.at[j] = p.at[j] * c.at[j] - q.at[j] * turned;
            b.at[j] = q.at[j] * c.at[j] + p.at[j] * turned;
        }
        store_run(first, a);
        store_run(second, b);
    }
}

// Cosines and sines [positions, half].
template <class T>
__device__ void apply(T* x, const u32* positions, const float* cos, const float* sin, u32 ld, u32 heads, u32 h,
                      u32 half, float sign) {
    constexpr int N = run_of<T>();
    u64 angles = u64(positions[blockIdx.x]) * half;
    T* row = x + u64(blockIdx.x) * ld;
    bool fits = lies<N>(x) && lies<N>(cos) && lies<N>(sin) && ld % N == 0 && h % N == 0 && half % N == 0;
    if (fits) {
        turn<N>(row, cos + angles, sin + angles, heads, h, half, sign);
    } else {
        turn<1>(row, cos + angles, sin + angles, heads, h, half, sign);
    }
}

}  // namespace rope

#define ROPE(NAME, T)                                                                                         \
    KERNEL(rope_apply_##NAME, 256,                                                                            \
           (T * x, const u32* positions, const float* cos, const float* sin, u32 ld, u32 heads, u32 h, u32 half, \
            float sign),                                                                                      \
           { rope::apply(x, positions, cos, sin, ld, heads, h, half, sign); })

ROPE(f32, float)
ROPE(bf16, bf16)
