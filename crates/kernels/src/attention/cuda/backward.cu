// The way back on tensor cores in two kernels, so that each gradient has one writer and one order of sums:
// keys gather dk and dv from the queries that see them, queries gather dq from the keys they see. Both
// compute probabilities again from the kept log-sums.

namespace attention {

// Some of the queries that see `first` to `last` see some of the keys [k0, k0 + count); all see all of them.
__device__ inline bool some_seen(Range first, Range last, u32 k0, u32 count) {
    return first.from < k0 + count && last.to > k0;
}
__device__ inline bool all_seen(Range first, Range last, u32 k0, u32 count) {
    return last.from <= k0 && k0 + count <= first.to;
}

// COLUMNS of dk and dv of a block of keys. Scores are transposed, keys by queries: so probabilities, which
// stay in registers, are a left operand.
template <int HEAD, int COLUMNS, int MT, int QUERIES> struct Keys {
    static constexpr int KEYS = 64 * MT, QT = QUERIES / 8, NT = COLUMNS / 8;

    bf16 *keys, *values;
    // Two turns of QUERIES each.
    bf16 *queries, *douts;
    Stat* stats;
    // First key of the warp, among the block's.
    u32 first;
    float dk[MT][NT][4], dv[MT][NT][4];

    __device__ explicit Keys(bf16* shared)
        : keys(shared), values(keys + KEYS * HEAD), queries(values + KEYS * HEAD),
          douts(queries + 2 * QUERIES * HEAD), stats(reinterpret_cast<Stat*>(douts + 2 * QUERIES * HEAD)),
          first(threadIdx.x / 32 * (16 * MT)) {
        clear(dk);
        clear(dv);
    }

    // What is not seen becomes -inf. `key` is the lane's first one, `own` begins with the lane's first query.
    __device__ static void mask(float (&scores)[MT][QT][4], const Stat* own, u32 key) {
#pragma unroll
        for (int n = 0; n < QT; n++)
#pragma unroll
            for (int i = 0; i < 2; i++) {
                Range range = own[8 * n + i].range;
#pragma unroll
                for (int m = 0; m < MT; m++)
#pragma unroll
                    for (int half = 0; half < 2; half++)
                        if (!range.holds(key + 16 * m + 8 * half)) scores[m][n][2 * half + i] = -INFINITY;
            }
    }

    // `scale` is in powers of two.
    __device__ static void probabilities(float (&scores)[MT][QT][4], const Stat* own, float scale) {
#pragma unroll
        for (int n = 0; n < QT; n++)
#pragma unroll
            for (int i = 0; i < 2; i++) {
                float base = own[8 * n + i].lse * LOG2_E;
#pragma unroll
                for (int m = 0; m < MT; m++)
#pragma unroll
                    for (int j = i; j < 4; j += 2)
                        scores[m][n][j] = exp2_fast(fmaf(scores[m][n][j], scale, -base));
            }
    }

    // What queries add, of which some see some of the warp's keys, from k0 on, or `all`.
    __device__ void add(u32 turn, u32 k0, bool all, float scale, u32 first_run) {
        const Stat* own = stats + turn * QUERIES + threadIdx.x % 4 * 2;
        const bf16 *query = queries + turn * (QUERIES * HEAD), *dout = douts + turn * (QUERIES * HEAD);
        float scores[MT][QT][4], slopes[MT][QT][4];
        u32 packed[QT / 2][MT][4];
        product<HEAD>(scores, keys + first * HEAD, query);
        if (!all) mask(scores, own, k0 + threadIdx.x % 32 / 4);
        probabilities(scores, own, scale * LOG2_E);
        pack(scores, packed);
        add_product<HEAD>(dv, packed, dout, first_run);
        product<HEAD>(slopes, values + first * HEAD, dout);
#pragma unroll
        for (int n = 0; n < QT; n++)
#pragma unroll
            for (int i = 0; i < 2; i++) {
                float sum = own[8 * n + i].sum;
#pragma unroll
                for (int m = 0; m < MT; m++)
#pragma unroll
                    for (int j = i; j < 4; j += 2)
                        slopes[m][n][j] = scores[m][n][j] * (slopes[m][n][j] - sum);
            }
        pack(slopes, packed);
        add_product<HEAD>(dk, packed, query, first_run);
    }
};

// Head j of token p of a row of the batch goes to `(row * s + p) * ld + j * h` of dk and dv. Blocks are
// (keys, kv heads, rows of the batch), HEAD / COLUMNS blocks for the same keys.
template <int HEAD, int COLUMNS, int MT, int QUERIES>
__device__ inline void backward_keys(const Task<bf16>& task, Heads<bf16> dout, const Stat* stats, void* dk,
                                     void* dv, u32 ld, u32 mode) {
    using B = Keys<HEAD, COLUMNS, MT, QUERIES>;
    DYNAMIC_SHARED(bf16, shared);
    B b(shared);
    u32 k0 = blockIdx.x / (HEAD / COLUMNS) * B::KEYS, column = blockIdx.x % (HEAD / COLUMNS) * COLUMNS;
    u32 kv_head = blockIdx.y, row = blockIdx.z, head = kv_head * task.group, left = task.s - k0;
    stats += u64(row) * task.n * task.t;
    Range blocks = blocks_that_see(stats + u64(head) * task.t, task.t, QUERIES, k0, k0 + B::KEYS);
    auto load = [&](u32 head, u32 block, u32 turn) {
        u32 q0 = block * QUERIES, rows = task.t - q0, to = turn * QUERIES, own = threadIdx.x;
        const bf16 *query = task.q.at(row, q0, head * task.h), *slope = dout.at(row, q0, head * task.h);
        load_tile<HEAD, QUERIES>(b.queries + to * HEAD, query, task.q.ld, rows, task.h);
        load_tile<HEAD, QUERIES>(b.douts + to * HEAD, slope, dout.ld, rows, task.h);
        const Stat* from = stats + u64(head) * task.t + q0;
        if (own < QUERIES) copy_async_16(b.stats + to + own, from + own, own < rows);
        copy_async_commit();
    };
    load_tile<HEAD, B::KEYS>(b.keys, task.k.at(row, k0, kv_head * task.h), task.k.ld, left, task.h);
    load_tile<HEAD, B::KEYS>(b.values, task.v.at(row, k0, kv_head * task.h), task.v.ld, left, task.h);
    u32 block = blocks.from, turn = 0;
    bool more = block < blocks.to;
    if (more) load(head, block, turn);
    while (more) {
        u32 rows = min(u32(QUERIES), task.t - block * QUERIES);
        copy_async_wait<0>();
        sync();
        if (++block == blocks.to) block = blocks.from, head++;
        more = head < (kv_head + 1) * task.group;
        if (more) load(head, block, turn ^ 1);
        const Stat* own = b.stats + turn * QUERIES;
        Range first = own[0].range, last = own[rows - 1].range;
        u32 own_k0 = k0 + b.first;
        if (some_seen(first, last, own_k0, 16 * MT))
            b.add(turn, own_k0, all_seen(first, last, own_k0, 16 * MT), task.scale, column / 8);
        turn ^= 1;
    }
    copy_async_wait<0>();
    sync();
    scale_by(b.dk, task.scale);
    u64 at = (u64(row) * task.s + k0 + b.first) * ld + kv_head * task.h + column;
    u32 rows = left - min(left, b.first), columns = task.h - min(task.h, column);
    store<HEAD>(b.dk, b.keys + b.first * HEAD, Target{dk, at, ld, mode}, rows, columns);
    store<HEAD>(b.dv, b.values + b.first * HEAD, Target{dv, at, ld, mode}, rows, columns);
}

// Scores of a warp's queries from the first of `own` on become their gradients, but for their factor. `key`
// is the lane's first one.
template <int MT, int KT>
__device__ inline void gradients_of(float (&scores)[MT][KT][4], const float (&slopes)[MT][KT][4],
                                    const Stat* own, u32 key, bool all, float scale) {
#pragma unroll
    for (int m = 0; m < MT; m++)
#pragma unroll
        for (int half = 0; half < 2; half++) {
            Stat stat = own[16 * m + 8 * half + threadIdx.x % 32 / 4];
            float base = stat.lse * LOG2_E;
#pragma unroll
            for (int n = 0; n < KT; n++)
#pragma unroll
                for (int i = 0; i < 2; i++) {
                    float& score = scores[m][n][2 * half + i];
                    float p = exp2_fast(fmaf(score, scale * LOG2_E, -base));
                    if (!all && !stat.range.holds(key + 8 * n + i)) p = 0.0f;
                    score = p * (slopes[m][n][2 * half + i] - stat.sum);
                }
        }
}

// Head j of token p of a row of the batch goes to `(row * t + p) * ld + j * h` of dq. Blocks are (queries,
// heads, rows of the batch); there are two turns of KEYS keys in shared memory.
template <int HEAD, int MT, int KEYS>
__device__ inline void backward_queries(const Task<bf16>& task, Heads<bf16> dout, const Stat* stats, void* dq,
                                        u32 ld, u32 mode) {
    constexpr int ROWS = 64 * MT;
    DYNAMIC_SHARED(bf16, queries);
    bf16 *douts = queries + ROWS * HEAD, *keys = douts + ROWS * HEAD, *values = keys + 2 * KEYS * HEAD;
    Stat* own = reinterpret_cast<Stat*>(values + 2 * KEYS * HEAD);
    // Blocks with many keys go first.
    u32 q0 = (gridDim.x - 1 - blockIdx.x) * ROWS, head = blockIdx.y, row = blockIdx.z;
    u32 rows = min(u32(ROWS), task.t - q0), column = head / task.group * task.h;
    stats += (u64(row) * task.n + head) * task.t + q0;
    u32 tile = stats[0].range.from / KEYS, end = (stats[rows - 1].range.to + KEYS - 1) / KEYS;
    auto load = [&](u32 tile) {
        u32 k0 = tile * KEYS, left = task.s - k0, to = tile % 2 * (KEYS * HEAD);
        load_tile<HEAD, KEYS>(keys + to, task.k.at(row, k0, column), task.k.ld, left, task.h);
        load_tile<HEAD, KEYS>(values + to, task.v.at(row, k0, column), task.v.ld, left, task.h);
        copy_async_commit();
    };
    load_tile<HEAD, ROWS>(queries, task.q.at(row, q0, head * task.h), task.q.ld, rows, task.h);
    load_tile<HEAD, ROWS>(douts, dout.at(row, q0, head * task.h), dout.ld, rows, task.h);
    if (threadIdx.x < ROWS) own[threadIdx.x] = stats[min(threadIdx.x, rows - 1)];
    if (tile < end) load(tile);
    u32 first = threadIdx.x / 32 * (16 * MT);
    own += first;
    float sums[MT][HEAD / 8][4];
    clear(sums);
    for (; tile < end; tile++) {
        copy_async_wait<0>();
        sync();
        if (tile + 1 < end) load(tile + 1);
        u32 k0 = tile * KEYS, from = tile % 2 * (KEYS * HEAD);
        Range first_range = own[0].range, last_range = own[16 * MT - 1].range;
        if (!some_seen(first_range, last_range, k0, KEYS)) continue;
        float scores[MT][KEYS / 8][4], slopes[MT][KEYS / 8][4];
        product<HEAD>(scores, queries + first * HEAD, keys + from);
        product<HEAD>(slopes, douts + first * HEAD, values + from);
        bool all = all_seen(first_range, last_range, k0, KEYS);
        gradients_of(scores, slopes, own, k0 + threadIdx.x % 4 * 2, all, task.scale);
        u32 packed[KEYS / 16][MT][4];
        pack(scores, packed);
        add_product<HEAD>(sums, packed, keys + from);
    }
    copy_async_wait<0>();
    sync();
    scale_by(sums, task.scale);
    Target to = {dq, (u64(row) * task.t + q0 + first) * ld + head * task.h, ld, mode};
    store<HEAD>(sums, queries + first * HEAD, to, rows - min(rows, first), task.h);
}

}  // namespace attention

#define ATTENTION_BACKWARD_KEYS(HEAD, COLUMNS, MT, QUERIES)                                                   \
    KERNEL(attention_backward_keys_##HEAD, 128,                                                               \
           (ATTENTION_TASK(bf16), const bf16* dout, const attention::Stat* stats, void* dk, void* dv, u32 ld, \
            u32 mode),                                                                                        \
           {                                                                                                  \
               (attention::backward_keys<HEAD, COLUMNS, MT, QUERIES>(                                         \
                   ATTENTION_TASK_GIVEN(bf16), attention::whole(dout, t, n * h), stats, dk, dv, ld, mode));   \
           })

#define ATTENTION_BACKWARD_QUERIES(HEAD, MT, KEYS)                                                            \
    KERNEL(attention_backward_queries_##HEAD, 128,                                                            \
           (ATTENTION_TASK(bf16), const bf16* dout, const attention::Stat* stats, void* dq, u32 ld,           \
            u32 mode),                                                                                        \
           {                                                                                                  \
               (attention::backward_queries<HEAD, MT, KEYS>(                                                  \
                   ATTENTION_TASK_GIVEN(bf16), attention::whole(dout, t, n * h), stats, dq, ld, mode));       \
           })

ATTENTION_BACKWARD_KEYS(64, 64, 2, 32)
ATTENTION_BACKWARD_KEYS(96, 96, 1, 64)
ATTENTION_BACKWARD_KEYS(128, 128, 1, 64)
ATTENTION_BACKWARD_KEYS(256, 128, 1, 32)
ATTENTION_BACKWARD_QUERIES(64, 2, 64)
ATTENTION_BACKWARD_QUERIES(96, 2, 32)
ATTENTION_BACKWARD_QUERIES(128, 2, 32)
ATTENTION_BACKWARD_QUERIES(256, 1, 32)
