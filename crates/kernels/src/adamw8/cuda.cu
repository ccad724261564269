// AdamW with moments of 8 bits. The bits are those of the CPU; see `code.rs` for the codes.

namespace adamw8 {

constexpr u32 CUT = 20;
constexpr int TOP = 255, TOP_SIGNED = 127;

__device__ inline u32 exponent(u32 largest) { return (largest + (1u << CUT)) >> 23 & 0xff; }

__device__ inline int base(u32 exponent, int top) { return int(exponent) * 8 + 7 - top; }

__device__ inline float value(int code, int base) {
    int bits = code + base > 0 ? code + base : 0;
    return as_float(code == 0 ? 0 : u32(bits) << CUT);
}

__device__ inline float decode(u32 code, u32 exponent) { return value(int(code), base(exponent, TOP)); }

__device__ inline float decode_signed(u32 code, u32 exponent) {
    float magnitude = value(int(code & 0x7f), base(exponent, TOP_SIGNED));
    return as_float(as_bits(magnitude) | (code & 0x80) << 24);
}

__device__ inline int clamp(int x, int least, int most) { return x < least ? least : x > most ? most : x; }

__device__ inline u8 encode(float x, u32 exponent, u32 chance) {
    u32 bits = as_bits(x);
    int code = int((bits + (chance << 4)) >> CUT) - base(exponent, TOP);
    return bits == 0 ? 0 : u8(clamp(code, 1, TOP));
}

__device__ inline u8 encode_signed(float x, u32 exponent, u32 chance) {
    int from = base(exponent, TOP_SIGNED);
    float magnitude = fabsf(x), least = value(1, from);
    u32 bits = as_bits(magnitude);
    int code = int((bits + (chance << 4)) >> CUT) - from;
    bool raised = magnitude * 65536.0f >= least * float(65536 - chance);
    code = magnitude < least ? int(raised && bits != 0) : clamp(code, 0, TOP_SIGNED);
    return u8(u32(code) | (as_bits(x) >> 24 & 0x80));
}

__device__ inline u32 seed(u64 step, u64 run) {
    u64 x = step * 0x9e3779b97f4a7c15ull ^ run;
    x = (x ^ x >> 30) * 0xbf58476d1ce4e5b9ull;
    x = (x ^ x >> 27) * 0x94d049bb133111ebull;
    return u32(x ^ x >> 31);
}

// Two chances of 16 bits for moment `lane` of a run: the first moment's, the second's.
struct Chances {
    u32 m, v;

    __device__ Chances(u32 seed, u32 lane) {
        u32 x = seed + lane * 0x9e3779b9u;
        x = (x ^ x >> 16) * 0x7feb352du;
        x = (x ^ x >> 15) * 0x846ca68bu;
        x ^= x >> 16;
        m = x >> 16;
        v = x & 0xffff;
    }
};

__device__ inline u32 warp_most(u32 x) {
    for (int mask = 16; mask > 0; mask /= 2) {
        u32 other = shuffle_xor(x, mask);
        x = x > other ? x : other;
    }
    return x;
}

// Moments of a run share an exponent. A warp takes a run, a lane four of its elements.
constexpr u32 RUN = 128;
constexpr int EACH = 4;

// What a lane has of a run.
struct Lane {
    Run<float, EACH> w, g;
    Run<u8, EACH> m, v;
};

// Updates what the lanes have, and the exponents.
__device__ inline void one_run(Lane& mine, u8* m_exponent, u8* v_exponent, u64 step_number, u64 run, adamw::Step step) {
    u32 lane = threadIdx.x % 32, m_old = *m_exponent, v_old = *v_exponent;
    float m[EACH], v[EACH];
    u32 m_most = 0, v_most = 0;
    for (int i = 0; i < EACH; i++) {
        m[i] = decode_signed(mine.m.at[i], m_old);
        v[i] = decode(mine.v.at[i], v_old);
        mine.w.at[i] = step.apply(mine.w.at[i], mine.g.at[i], m[i], v[i]);
        // As bits: for floats that are not negative the order is that of integers.
        m_most = max(m_most, as_bits(fabsf(m[i])));
        v_most = max(v_most, as_bits(v[i]));
    }
    // All lanes have read the old exponents when these are known.
    u32 m_new = exponent(warp_most(m_most)), v_new = exponent(warp_most(v_most));
    if (lane == 0) {
        *m_exponent = u8(m_new);
        *v_exponent = u8(v_new);
    }
    u32 salt = seed(step_number, run);
    for (int i = 0; i < EACH; i++) {
        Chances chances(salt, lane * EACH + i);
        mine.m.at[i] = encode_signed(m[i], m_new, chances.m);
        mine.v.at[i] = encode(v[i], v_new, chances.v);
    }
}

// `first` is the number of the first run, which with the step decides how moments are rounded.
template <class Master, class G>
__device__ void update(Master master, const G* grad, u8* m, u8* m_exponents, u8* v, u8* v_exponents, u64 n,
                       u64 step_number, u64 first, adamw::Step step) {
    u64 run = (u64(blockIdx.x) * blockDim.x + threadIdx.x) / 32, at = run * RUN + threadIdx.x % 32 * EACH;
    if (run * RUN >= n) return;
    Lane mine = {};
    bool fits = master.template fits<EACH>() && lies<EACH>(grad) && lies<EACH>(m) && lies<EACH>(v);
    bool whole = fits && at + EACH <= n;
    if (whole) {
        Length<EACH> length;
        mine.w = master.load(length, at);
        mine.g = load_run(length, grad + at);
        mine.m = *reinterpret_cast<const Run<u8, EACH>*>(m + at);
        mine.v = *reinterpret_cast<const Run<u8, EACH>*>(v + at);
    } else {
        for (int i = 0; i < EACH && at + i < n; i++) {
            mine.w.at[i] = master.load(Length<1>(), at + i).at[0];
            mine.g.at[i] = widen(grad[at + i]);
            mine.m.at[i] = m[at + i];
            mine.v.at[i] = v[at + i];
        }
    }
    one_run(mine, m_exponents + run, v_exponents + run, step_number, first + run, step);
    if (whole) {
        master.store(at, mine.w);
        *reinterpret_cast<Run<u8, EACH>*>(m + at) = mine.m;
        *reinterpret_cast<Run<u8, EACH>*>(v + at) = mine.v;
    } else {
        for (int i = 0; i < EACH && at + i < n; i++) {
            master.store(at + i, Run<float, 1>{{mine.w.at[i]}});
            m[at + i] = mine.m.at[i];
            v[at + i] = mine.v.at[i];
        }
    }
}

}  // namespace adamw8

#define ADAMW8(NAME, G)                                                                                          \
    KERNEL(adamw8_plain_##NAME, 256,                                                                             \
           (float* w, const G* grad, u8* m, u8* m_exponents, u8* v, u8* v_exponents, u64 n, u64 number, u64 first, \
            ADAMW_STEP), {                                                                                       \
               adamw::Step step = {beta1, beta2, eps, keep, rate, root, grad_scale};                             \
               adamw8::update(adamw::Plain{w}, grad, m, m_exponents, v, v_exponents, n, number, first, step);    \
           })                                                                                                    \
    KERNEL(adamw8_split_##NAME, 256,                                                                             \
           (bf16 * high, u16 * low, const G* grad, u8* m, u8* m_exponents, u8* v, u8* v_exponents, u64 n,        \
            u64 number, u64 first, ADAMW_STEP), {                                                                \
               adamw::Step step = {beta1, beta2, eps, keep, rate, root, grad_scale};                             \
               adamw8::update(adamw::Split{high, low}, grad, m, m_exponents, v, v_exponents, n, number, first,   \
                              step);                                                                             \
           })

ADAMW8(f32, float)
ADAMW8(bf16, bf16)
