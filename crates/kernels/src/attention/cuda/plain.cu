// Attention without tensor cores, for f32 and for bf16 that does not lie in runs of 16 bytes: 32 queries by
// 32 keys at a time in 256 threads, all of it f32 in shared memory. Thread (x, y) of 16 x 16 has rows y and y
// + 16 of what is summed up, and columns x, x + 16, ...; h is 256 at most.

namespace attention {

constexpr u32 SIDE = 32, PLAIN_THREADS = 256, MOST_COLUMNS = 16;

__device__ inline u32 thread_x() { return threadIdx.x % 16; }
__device__ inline u32 thread_y() { return threadIdx.x / 16; }

// Rows lie an odd number of 16 bytes apart, so that eight of them lie in different banks.
__device__ inline u32 plain_ld(u32 h) { return ((h + 3) / 4 | 1) * 4; }

// h columns, padded with zeros; rows from `rows` on are zeros.
template <class T> __device__ inline void plain_load(float* tile, const T* from, u64 ld, u32 rows, u32 h) {
    u32 to_ld = plain_ld(h);
    for (u32 row = threadIdx.x / 32; row < SIDE; row += PLAIN_THREADS / 32)
        for (u32 i = threadIdx.x % 32; i < to_ld; i += 32)
            tile[row * to_ld + i] = row < rows && i < h ? widen(from[row * ld + i]) : 0.0f;
}

// sum = a b^T of two tiles.
__device__ inline void plain_product(float (&sum)[2][2], const float* a, const float* b, u32 h) {
    u32 ld = plain_ld(h);
    a += thread_y() * ld, b += thread_x() * ld;
    sum[0][0] = sum[0][1] = sum[1][0] = sum[1][1] = 0.0f;
#pragma unroll 2
    for (u32 at = 0; at < h; at += 4) {
        float4 as[2], bs[2];
#pragma unroll
        for (int i = 0; i < 2; i++) {
            as[i] = *reinterpret_cast<const float4*>(a + 16 * i * ld + at);
            bs[i] = *reinterpret_cast<const float4*>(b + 16 * i * ld + at);
        }
#pragma unroll
        for (int i = 0; i < 2; i++)
#pragma unroll
            for (int j = 0; j < 2; j++) {
                sum[i][j] = fmaf(as[i].x, bs[j].x, sum[i][j]);
                sum[i][j] = fmaf(as[i].y, bs[j].y, sum[i][j]);
                sum[i][j] = fmaf(as[i].z, bs[j].z, sum[i][j]);
                sum[i][j] = fmaf(as[i].w, bs[j].w, sum[i][j]);
            }
    }
}

// A square of factors in shared memory: rows of SIDE, one bank apart.
constexpr u32 FACTORS_LD = SIDE + 1, FACTORS = SIDE * FACTORS_LD;

// sum += a b, or a^T b, where a is a square and b a tile.
template <bool TRANSPOSED>
__device__ inline void plain_add(float (&sum)[2][MOST_COLUMNS], const float* a, const float* b, u32 h) {
    constexpr u32 NEXT_ROW = TRANSPOSED ? 1 : FACTORS_LD, NEXT = TRANSPOSED ? FACTORS_LD : 1;
    u32 ld = plain_ld(h);
    a += thread_y() * NEXT_ROW;
#pragma unroll 2
    for (u32 k = 0; k < SIDE; k++) {
        float first = a[k * NEXT], second = a[16 * NEXT_ROW + k * NEXT];
#pragma unroll
        for (u32 j = 0; j < MOST_COLUMNS; j++) {
            u32 column = thread_x() + 16 * j;
            if (16 * j >= h) break;
            float x = column < h ? b[k * ld + column] : 0.0f;
            sum[0][j] = fmaf(first, x, sum[0][j]);
            sum[1][j] = fmaf(second, x, sum[1][j]);
        }
    }
}

// Two rows of `sum`, each times its factor, to memory.
__device__ inline void plain_store(const float (&sum)[2][MOST_COLUMNS], const float (&factors)[2],
                                   const Target& to, u32 rows, u32 h) {
#pragma unroll
    for (int i = 0; i < 2; i++)
#pragma unroll
        for (u32 j = 0; j < MOST_COLUMNS; j++) {
            u32 row = thread_y() + 16 * i, column = thread_x() + 16 * j;
            if (row >= rows || column >= h) continue;
            u64 at = to.at + u64(row) * to.ld + column;
            float x = sum[i][j] * factors[i];
            if (to.mode == WRITE_BF16) {
                static_cast<bf16*>(to.data)[at] = to_bf16(x);
            } else {
                float* own = static_cast<float*>(to.data) + at;
                *own = to.mode == ADD_F32 ? *own + x : x;
            }
        }
}

// Over the threads of one y.
__device__ inline float plain_row_max(float x) {
    for (int mask = 8; mask > 0; mask /= 2) x = fmaxf(x, shuffle_xor(x, mask));
    return x;
}
__device__ inline float plain_row_sum(float x) {
    for (int mask = 8; mask > 0; mask /= 2) x += shuffle_xor(x, mask);
    return x;
}

template <class T>
__device__ void plain_forward(const Task<T>& task, const Seen& seen, void* out, float* lse, u32 mode) {
    DYNAMIC_SHARED(float, queries);
    u32 h = task.h, tile = SIDE * plain_ld(h);
    float *keys = queries + tile, *factors = keys + tile;
    u32 q0 = (gridDim.x - 1 - blockIdx.x) * SIDE, head = blockIdx.y, row = blockIdx.z;
    u32 rows = min(SIDE, task.t - q0), kv = head / task.group * h;
    Range ranges[2];
    for (u32 i = 0; i < 2; i++)
        ranges[i] = seen.visible(row, task.t, q0 + min(thread_y() + 16 * i, rows - 1));
    u32 k0 = seen.visible(row, task.t, q0).from / SIDE * SIDE;
    u32 end = seen.visible(row, task.t, q0 + rows - 1).to;
    plain_load(queries, task.q.at(row, q0, head * h), task.q.ld, rows, h);
    float sums[2][MOST_COLUMNS] = {}, top[2] = {-INFINITY, -INFINITY}, total[2] = {0.0f, 0.0f};
    for (; k0 < end; k0 += SIDE) {
        sync();
        plain_load(keys, task.k.at(row, k0, kv), task.k.ld, task.s - k0, h);
        sync();
        float scores[2][2];
        plain_product(scores, queries, keys, h);
#pragma unroll
        for (int i = 0; i < 2; i++) {
            float best = top[i], sum = 0.0f;
#pragma unroll
            for (int j = 0; j < 2; j++) {
                u32 key = k0 + thread_x() + 16 * j;
                scores[i][j] = ranges[i].holds(key) ? scores[i][j] * task.scale : -INFINITY;
                best = fmaxf(best, scores[i][j]);
            }
            best = plain_row_max(best);
            float base = best == -INFINITY ? 0.0f : best, factor = expf(top[i] - base);
#pragma unroll
            for (int j = 0; j < 2; j++) {
                float p = expf(scores[i][j] - base);
                factors[(thread_y() + 16 * i) * FACTORS_LD + thread_x() + 16 * j] = p;
                sum += p;
            }
            top[i] = best;
            total[i] = total[i] * factor + sum;
#pragma unroll
            for (u32 j = 0; j < MOST_COLUMNS; j++) sums[i][j] *= factor;
        }
        sync();
        plain_load(keys, task.v.at(row, k0, kv), task.v.ld, task.s - k0, h);
        sync();
        plain_add<false>(sums, factors, keys, h);
    }
    lse += (u64(row) * task.n + head) * task.t + q0;
    float inverse[2];
#pragma unroll
    for (u32 i = 0; i < 2; i++) {
        float sum = plain_row_sum(total[i]);
        inverse[i] = sum > 0.0f ? 1.0f / sum : 0.0f;
        u32 query = thread_y() + 16 * i;
        if (thread_x() == 0 && query < rows)
            lse[query] = sum > 0.0f ? top[i] + logf(sum) : -INFINITY;
    }
    u32 width = task.n * h;
    plain_store(sums, inverse, {out, (u64(row) * task.t + q0) * width + head * h, width, mode}, rows, h);
}

// Tiles of the way back in shared memory.
struct PlainTiles {
    float *queries, *douts, *keys, *values, *probabilities, *slopes;
    Stat* stats;

    __device__ PlainTiles(float* shared, u32 h) {
        u32 tile = SIDE * plain_ld(h);
        stats = reinterpret_cast<Stat*>(shared);
        queries = shared + SIDE * sizeof(Stat) / sizeof(float), douts = queries + tile;
        keys = douts + tile, values = keys + tile;
        probabilities = values + tile, slopes = probabilities + FACTORS;
    }

    // Of up to 32 queries.
    __device__ void load(const Stat* from, u32 rows) const {
        if (threadIdx.x < SIDE) stats[threadIdx.x] = threadIdx.x < rows ? from[threadIdx.x] : Stat{};
    }

    // Probabilities and gradients of scores, but for their scale, queries by keys; `k0` is the first key.
    __device__ void fill(u32 k0, float scale, u32 h) const {
        float scores[2][2], gradients[2][2];
        plain_product(scores, queries, keys, h);
        plain_product(gradients, douts, values, h);
#pragma unroll
        for (u32 i = 0; i < 2; i++) {
            Stat stat = stats[thread_y() + 16 * i];
#pragma unroll
            for (u32 j = 0; j < 2; j++) {
                u32 key = thread_x() + 16 * j, at = (thread_y() + 16 * i) * FACTORS_LD + key;
                float p = stat.range.holds(k0 + key) ? expf(fmaf(scores[i][j], scale, -stat.lse)) : 0.0f;
                probabilities[at] = p;
                slopes[at] = p * (gradients[i][j] - stat.sum);
            }
        }
    }
};

template <class T>
__device__ void plain_backward_keys(const Task<T>& task, Heads<T> dout, const Stat* stats, void* dk, void* dv,
                                    u32 ld, u32 mode) {
    DYNAMIC_SHARED(float, shared);
    u32 h = task.h, k0 = blockIdx.x * SIDE, kv_head = blockIdx.y, row = blockIdx.z, left = task.s - k0;
    PlainTiles tiles(shared, h);
    u32 head = kv_head * task.group;
    stats += (u64(row) * task.n + head) * task.t;
    Range blocks = blocks_that_see(stats, task.t, SIDE, k0, k0 + SIDE);
    plain_load(tiles.keys, task.k.at(row, k0, kv_head * h), task.k.ld, left, h);
    plain_load(tiles.values, task.v.at(row, k0, kv_head * h), task.v.ld, left, h);
    float dks[2][MOST_COLUMNS] = {}, dvs[2][MOST_COLUMNS] = {};
    for (; head < (kv_head + 1) * task.group; head++, stats += task.t)
        for (u32 q0 = blocks.from * SIDE; q0 < blocks.to * SIDE; q0 += SIDE) {
            u32 rows = task.t - q0;
            sync();
            plain_load(tiles.queries, task.q.at(row, q0, head * h), task.q.ld, rows, h);
            plain_load(tiles.douts, dout.at(row, q0, head * h), dout.ld, rows, h);
            tiles.load(stats + q0, rows);
            sync();
            tiles.fill(k0, task.scale, h);
            sync();
            plain_add<true>(dvs, tiles.probabilities, tiles.douts, h);
            plain_add<true>(dks, tiles.slopes, tiles.queries, h);
        }
    u64 at = (u64(row) * task.s + k0) * ld + kv_head * h;
    plain_store(dks, {task.scale, task.scale}, {dk, at, ld, mode}, left, h);
    plain_store(dvs, {1.0f, 1.0f}, {dv, at, ld, mode}, left, h);
}

template <class T>
__device__ void plain_backward_queries(const Task<T>& task, Heads<T> dout, const Stat* stats, void* dq,
                                       u32 ld, u32 mode) {
    DYNAMIC_SHARED(float, shared);
    u32 h = task.h, q0 = (gridDim.x - 1 - blockIdx.x) * SIDE, head = blockIdx.y, row = blockIdx.z;
    PlainTiles tiles(shared, h);
    u32 rows = min(SIDE, task.t - q0), kv = head / task.group * h;
    stats += (u64(row) * task.n + head) * task.t + q0;
    u32 k0 = stats[0].range.from / SIDE * SIDE, end = stats[rows - 1].range.to;
    plain_load(tiles.queries, task.q.at(row, q0, head * h), task.q.ld, rows, h);
    plain_load(tiles.douts, dout.at(row, q0, head * h), dout.ld, rows, h);
    tiles.load(stats, rows);
    float sums[2][MOST_COLUMNS] = {};
    for (; k0 < end; k0 += SIDE) {
        sync();
        plain_load(tiles.keys, task.k.at(row, k0, kv), task.k.ld, task.s - k0, h);
        plain_load(tiles.values, task.v.at(row, k0, kv), task.v.ld, task.s - k0, h);
        sync();
        tiles.fill(k0, task.scale, h);
        sync();
        plain_add<false>(sums, tiles.slopes, tiles.keys, h);
    }
    u64 at = (u64(row) * task.t + q0) * ld + head * h;
    plain_store(sums, {task.scale, task.scale}, {dq, at, ld, mode}, rows, h);
}

}  // namespace attention

#define ATTENTION_PLAIN(NAME, T)                                                                              \
    KERNEL(attention_plain_forward_##NAME, 256,                                                               \
           (ATTENTION_TASK(T), ATTENTION_SEEN, void* out, float* lse, u32 mode),                              \
           { attention::plain_forward(ATTENTION_TASK_GIVEN(T), ATTENTION_SEEN_GIVEN, out, lse, mode); })      \
    KERNEL(attention_plain_backward_keys_##NAME, 256,                                                         \
           (ATTENTION_TASK(T), const T* dout, const attention::Stat* stats, void* dk, void* dv, u32 ld,       \
            u32 mode),                                                                                        \
           {                                                                                                  \
               attention::plain_backward_keys(ATTENTION_TASK_GIVEN(T), attention::whole(dout, t, n * h),      \
                                              stats, dk, dv, ld, mode);                                       \
           })                                                                                                 \
    KERNEL(attention_plain_backward_queries_##NAME, 256,                                                      \
           (ATTENTION_TASK(T), const T* dout, const attention::Stat* stats, void* dq, u32 ld, u32 mode),      \
           {                                                                                                  \
               attention::plain_backward_queries(ATTENTION_TASK_GIVEN(T), attention::whole(dout, t, n * h),   \
                                                 stats, dq, ld, mode);                                        \
           })

ATTENTION_PLAIN(f32, float)
ATTENTION_PLAIN(bf16, bf16)
