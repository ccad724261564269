// What the lanes of a warp do together.

#pragma once

#include "launch.h"

namespace emulated {

// All lanes bring their operands, the last one finishes for all; then each fetches what is its own.
template <class Bring, class Finish> inline Exchange& exchange(u32 wait, Bring bring, Finish finish) {
    Machine& m = *machine;
    Fiber* self = m.now;
    u32 lane = self->thread % WARP, first = self->thread - lane;
    Warp& warp = m.warps[self->thread / WARP];
    if (warp.ended > 0 && wait != SYNC_WARP) {
        fail("%s, but %u lanes of its warp have ended or never were", word(wait), warp.ended);
    }
    if (warp.arrived > 0 && warp.wait != wait) {
        fail("%s, but %u lanes of its warp are in %s", word(wait), warp.arrived, word(warp.wait));
    }
    warp.wait = wait;
    Exchange& side = warp.sides[warp.turn % 2];
    bring(side, lane);
    if (++warp.arrived + warp.ended < WARP) {
        wait_as(wait);
        return side;
    }
    warp.arrived = 0;
    ++warp.turn;
    finish(side);
    u32 end = first + WARP < m.threads ? first + WARP : m.threads;
    for (u32 t = first; t < end; ++t) {
        if (m.waits[t] == wait) wake(m.fiber_of[t]);
    }
    return side;
}

inline void nothing(Exchange&) {}

template <class T> inline T shuffled(u32 wait, T x, u32 from) {
    static_assert(std::is_arithmetic<T>::value && (sizeof(T) == 4 || sizeof(T) == 8), "what can be shuffled");
    auto bring = [&](Exchange& side, u32 lane) { memcpy(side.words[lane], &x, sizeof x); };
    const Exchange& side = exchange(wait, bring, nothing);
    memcpy(&x, side.words[from], sizeof x);
    return x;
}

inline float low(u32 pair) {
    u32 bits = pair << 16;
    float x;
    memcpy(&x, &bits, 4);
    return x;
}
inline float high(u32 pair) { return low(pair >> 16); }

// product = d + a b, each sum in ascending order of k.
inline void multiply(Exchange& side) {
    typedef float Row __attribute__((vector_size(32), aligned(32)));
    float a[16][16];
    alignas(32) float b[16][8];
    for (u32 lane = 0; lane < WARP; ++lane) {
        const u32* w = side.words[lane];
        u32 g = lane / 4, t = lane % 4;
        for (u32 i = 0; i < 4; ++i) {
            float* at = &a[g + i % 2 * 8][2 * t + i / 2 * 8];
            at[0] = low(w[i]);
            at[1] = high(w[i]);
            memcpy(&side.product[g + i / 2 * 8][2 * t + i % 2], &w[6 + i], 4);
        }
        for (u32 i = 0; i < 2; ++i) {
            b[2 * t + i * 8][g] = low(w[4 + i]);
            b[2 * t + i * 8 + 1][g] = high(w[4 + i]);
        }
    }
    Row rows[16];
    memcpy(rows, b, sizeof rows);
    for (u32 i = 0; i < 16; ++i) {
        Row sum;
        memcpy(&sum, side.product[i], sizeof sum);
        for (u32 k = 0; k < 16; ++k) sum = sum + a[i][k] * rows[k];
        memcpy(side.product[i], &sum, sizeof sum);
    }
}

inline bool is_shared(const void* at, size_t bytes) {
    const u8* p = static_cast<const u8*>(at);
    Machine& m = *machine;
    return (p >= m.shared && p + bytes <= m.shared + m.shared_bytes) || !STATIC_SHARED_IS_KNOWN
        || (p >= static_shared() && p + bytes <= static_shared() + static_shared_bytes());
}

inline void check_row(const char* what, const void* at) {
    if (reinterpret_cast<uintptr_t>(at) % 16 != 0) fail("%s at %p, not a multiple of 16 bytes", what, at);
    if (!is_shared(at, 16)) fail("%s at %p, outside shared memory", what, at);
}

template <bool TRANSPOSED> inline void load_matrices(u32 (&r)[4], const void* row) {
    constexpr u32 wait = TRANSPOSED ? LOAD_TRANSPOSED : LOAD;
    check_row(word(wait), row);
    auto load = [](Exchange& side) {
        for (u32 lane = 0; lane < WARP; ++lane) {
            u32 g = lane / 4, t = lane % 4;
            for (u32 j = 0; j < 4; ++j) {
                if (!TRANSPOSED) {
                    memcpy(&side.loaded[lane][j], static_cast<const u8*>(side.rows[8 * j + g]) + 4 * t, 4);
                    continue;
                }
                u16 pair[2];
                for (u32 i = 0; i < 2; ++i) {
                    memcpy(&pair[i], static_cast<const u8*>(side.rows[8 * j + 2 * t + i]) + 2 * g, 2);
                }
                memcpy(&side.loaded[lane][j], pair, 4);
            }
        }
    };
    u32 me = 0;
    const Exchange& side = exchange(wait, [&](Exchange& s, u32 lane) { s.rows[me = lane] = row; }, load);
    memcpy(r, side.loaded[me], sizeof r);
}

}  // namespace emulated
