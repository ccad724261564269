// What the kernels of attention are given, as mod.rs and places.rs say it. Kernels take numbers and pointers
// alone: the macros spell out a parameter list, and make structures of it.
//
// b rows of the batch, t queries and s keys a row, n query heads, `group` of them to a kv head, head dim h.

namespace attention {

// Heads of tokens: head j of token p of a row of the batch is at `data[row * row_stride + p * ld + j * h]`.
template <class T> struct Heads {
    const T* data;
    u64 row_stride;
    u32 ld;

    __device__ const T* at(u32 row, u32 token, u32 column) const {
        return data + row * row_stride + u64(token) * ld + column;
    }
};

// Tokens of every row of the batch, one after the other, heads side by side.
template <class T> __device__ inline Heads<T> whole(const T* data, u32 tokens, u32 width) {
    return {data, u64(tokens) * width, width};
}

template <class T> struct Task {
    Heads<T> q, k, v;
    u32 t, s, n, group, h;
    // Factor on the scores.
    float scale;
};

// Keys [from, to) of those at hand.
struct Range {
    u32 from, to;

    __device__ bool holds(u32 key) const { return key - from < to - from; }
};

// Two runs of tokens of a row: the place of the first token of each, and how many it has.
struct Places {
    u32 early, early_len, late, late_len;

    __device__ u32 at(u32 i) const { return i < early_len ? early + i : late + (i - early_len); }
    __device__ u32 before(u32 place) const {
        return min(place - min(place, early), early_len) + min(place - min(place, late), late_len);
    }
};

struct Seen {
    // First place of each query's document, or null. [b * t]
    const u32* starts;
    u32 window;
    Places queries, keys;

    // Both ends ascend with q.
    __device__ Range visible(u32 row, u32 t, u32 q) const {
        u32 end = queries.at(q) + 1, document = starts == nullptr ? 0 : starts[u64(row) * t + q];
        u32 to = keys.before(end);
        return {min(keys.before(max(document, end - min(end, window))), to), to};
    }
};

// What the way back knows of a query of a head.
struct __align__(16) Stat {
    // Log of the sum of exponentials; 0 where nothing is seen.
    float lse;
    // Sum of out * dout.
    float sum;
    Range range;
};

enum Mode : u32 { WRITE_BF16, WRITE_F32, ADD_F32 };

// Where rows of a head go.
struct Target {
    void* data;
    // Of the first element; elements from one row to the next.
    u64 at;
    u32 ld, mode;
};

constexpr float LOG2_E = 1.44269504f;

// The first index of [from, to) for which `holds`, as it does for all that follow.
template <class Test> __device__ inline u32 first_where(u32 from, u32 to, Test holds) {
    while (from < to) {
        u32 middle = from + (to - from) / 2;
        if (holds(middle)) {
            to = middle;
        } else {
            from = middle + 1;
        }
    }
    return from;
}

// Blocks of `each` queries [first, end) of which some see keys of [k0, k_end).
__device__ inline Range blocks_that_see(const Stat* stats, u32 t, u32 each, u32 k0, u32 k_end) {
    u32 blocks = (t + each - 1) / each;
    auto reaches = [&](u32 i) { return stats[min((i + 1) * each, t) - 1].range.to > k0; };
    auto has_left = [&](u32 i) { return stats[i * each].range.from >= k_end; };
    u32 first = first_where(0, blocks, reaches);
    return {first, first_where(first, blocks, has_left)};
}

}  // namespace attention

#define ATTENTION_TASK(T)                                                                                     \
    const T *q, u64 q_row, u32 q_ld, const T *k, u64 k_row, u32 k_ld, const T *v, u64 v_row, u32 v_ld, u32 t, \
        u32 s, u32 n, u32 group, u32 h, float scale
#define ATTENTION_TASK_GIVEN(T)                                                                               \
    (attention::Task<T>{{q, q_row, q_ld}, {k, k_row, k_ld}, {v, v_row, v_ld}, t, s, n, group, h, scale})

#define ATTENTION_SEEN                                                                                        \
    const u32 *starts, u32 window, u32 q_early, u32 q_early_len, u32 q_late, u32 q_late_len, u32 k_early,     \
        u32 k_early_len, u32 k_late, u32 k_late_len
#define ATTENTION_SEEN_GIVEN                                                                                  \
    (attention::Seen{starts, window, {q_early, q_early_len, q_late, q_late_len},                              \
                     {k_early, k_early_len, k_late, k_late_len}})
