// Tiles of bf16 in shared memory and their products on tensor cores. A block is four warps; a warp has 16 MT
// rows of what the block sums up. Accumulators are [MT][columns / 8][4]: of 16 x 8, lane l holds columns
// 2 (l % 4) and the next one of row l / 4, then of row l / 4 + 8.

namespace attention {

constexpr u32 THREADS = 128;

// Element of run `run` (8 columns) of a row in a tile of HEAD columns. Runs change places so that those of
// one column of eight rows lie in different banks.
template <int HEAD> __device__ inline u32 turn(u32 row) { return HEAD % 64 == 0 ? row % 8 : row / 2 % 4; }
template <int HEAD> __device__ inline u32 element(u32 row, u32 run) {
    return row * HEAD + (run ^ turn<HEAD>(row)) * 8;
}

// Rows of h columns into a tile, meanwhile; rows from `rows` on and columns from h on are zeros.
template <int HEAD, int ROWS>
__device__ inline void load_tile(bf16* tile, const bf16* from, u64 ld, u32 rows, u32 h) {
    // Threads share out as many runs of a row as keep their turn in every row they come to.
    constexpr u32 RUNS = HEAD % 64 == 0 ? 8 : 4, STEP = THREADS / RUNS;
    u32 own = opaque(threadIdx.x), row = own / RUNS, run = own % RUNS;
    bf16* to = tile + element<HEAD>(row, run);
    from += row * ld + run * 8;
#pragma unroll
    for (u32 i = 0; i < ROWS / STEP; i++) {
#pragma unroll
        for (u32 column = 0; column < HEAD; column += RUNS * 8)
            copy_async_16(to + column, from + column, row < rows && run * 8 + column < h);
        row += STEP, to += STEP * HEAD, from += STEP * ld;
    }
}

// A lane's row and run in 16 rows of a left operand (or, transposed, of a right one), and in 16 rows of a
// right operand that lies as its transpose. They are not kept: accumulators need the registers.
struct Lane {
    u32 row, run;
};
__device__ inline Lane left_lane() {
    u32 at = opaque(threadIdx.x);
    return {at % 16, at / 16 % 2};
}
__device__ inline Lane right_lane() {
    u32 at = opaque(threadIdx.x);
    return {at / 16 % 2 * 8 + at % 8, at / 8 % 2};
}

// Address of the lane's row in the 16 x 16 that begin at `rows` (a multiple of 16) and `run` (even).
template <int HEAD> __device__ inline const bf16* lane_row(const bf16* tile, Lane lane, u32 rows, u32 run) {
    return tile + (rows + lane.row) * HEAD + ((lane.run ^ turn<HEAD>(lane.row)) ^ run) * 8;
}

template <int MT, int NT> __device__ inline void clear(float (&x)[MT][NT][4]) {
#pragma unroll
    for (int m = 0; m < MT; m++)
#pragma unroll
        for (int n = 0; n < NT; n++)
#pragma unroll
            for (int i = 0; i < 4; i++) x[m][n][i] = 0.0f;
}
template <int MT, int NT> __device__ inline void scale_by(float (&x)[MT][NT][4], float factor) {
#pragma unroll
    for (int m = 0; m < MT; m++)
#pragma unroll
        for (int n = 0; n < NT; n++)
#pragma unroll
            for (int i = 0; i < 4; i++) x[m][n][i] *= factor;
}

template <int MT, int NT>
__device__ inline void multiply(float (&sum)[MT][NT][4], int n, const u32 (&a)[MT][4], const u32 (&b)[4]) {
    const u32 first[2] = {b[0], b[1]}, second[2] = {b[2], b[3]};
#pragma unroll
    for (int m = 0; m < MT; m++) {
        mma_bf16(sum[m][n], a[m], first);
        mma_bf16(sum[m][n + 1], a[m], second);
    }
}

// sum [16 MT, 8 NT] = a b^T over the columns of rows of two tiles.
template <int HEAD, int MT, int NT>
__device__ inline void product(float (&sum)[MT][NT][4], const bf16* a, const bf16* b) {
    Lane left = left_lane(), right = right_lane();
    clear(sum);
    // All at once would keep more words of the tiles than there are registers.
#pragma unroll(HEAD / 32)
    for (int step = 0; step < HEAD / 16; step++) {
        u32 as[MT][4], bs[4];
#pragma unroll
        for (int m = 0; m < MT; m++) load_matrix_x4(as[m], lane_row<HEAD>(a, left, 16 * m, 2 * step));
#pragma unroll
        for (int n = 0; n < NT; n += 2) {
            load_matrix_x4(bs, lane_row<HEAD>(b, right, 8 * n, 2 * step));
            multiply(sum, n, as, bs);
        }
    }
}

// sum [16 MT, 8 NT] += a [16 MT, 16 KT] b, where b is 16 KT rows of a tile from column 8 `first_run` on.
template <int HEAD, int MT, int KT, int NT>
__device__ inline void add_product(float (&sum)[MT][NT][4], const u32 (&a)[KT][MT][4], const bf16* b,
                                   u32 first_run = 0) {
    Lane lane = left_lane();
#pragma unroll
    for (int step = 0; step < KT; step++) {
#pragma unroll
        for (int n = 0; n < NT; n += 2) {
            u32 bs[4];
            load_matrix_x4_transposed(bs, lane_row<HEAD>(b, lane, 16 * step, first_run + n));
            multiply(sum, n, a[step], bs);
        }
    }
}

// An accumulator as a left operand.
template <int MT, int NT>
__device__ inline void pack(const float (&x)[MT][NT][4], u32 (&packed)[NT / 2][MT][4]) {
#pragma unroll
    for (int m = 0; m < MT; m++)
#pragma unroll
        for (int n = 0; n < NT; n++)
#pragma unroll
            for (int half = 0; half < 2; half++)
                packed[n / 2][m][n % 2 * 2 + half] = pack_bf16_fast(x[m][n][2 * half], x[m][n][2 * half + 1]);
}

// A warp's [16 MT, 8 NT] to `rows` rows and `columns` columns in memory. `stage` is a tile of as many rows
// that nobody else uses.
template <int HEAD, int MT, int NT>
__device__ inline void store(const float (&x)[MT][NT][4], bf16* stage, const Target& to, u32 rows,
                             u32 columns) {
    u32 lane = threadIdx.x % 32, own_row = lane / 4, own_column = lane % 4 * 2;
    if (to.mode == WRITE_BF16) {
        bf16* data = static_cast<bf16*>(to.data) + to.at;
#pragma unroll
        for (int m = 0; m < MT; m++)
#pragma unroll
            for (int n = 0; n < NT; n++)
#pragma unroll
                for (int half = 0; half < 2; half++) {
                    bf16* pair = stage + element<HEAD>(16 * m + 8 * half + own_row, n) + own_column;
                    *reinterpret_cast<u32*>(pair) = pack_bf16_fast(x[m][n][2 * half], x[m][n][2 * half + 1]);
                }
        sync_warp();
        for (u32 i = lane; i < 16 * MT * NT; i += 32) {
            u32 row = i / NT, run = i % NT;
            if (row < rows && run * 8 < columns)
                *reinterpret_cast<uint4*>(data + u64(row) * to.ld + run * 8) =
                    *reinterpret_cast<const uint4*>(stage + element<HEAD>(row, run));
        }
        return;
    }
#pragma unroll
    for (int m = 0; m < MT; m++)
#pragma unroll
        for (int half = 0; half < 2; half++) {
            u32 row = 16 * m + 8 * half + own_row;
            float* own = static_cast<float*>(to.data) + to.at + u64(row) * to.ld + own_column;
            if (row < rows)
#pragma unroll
                for (int n = 0; n < NT; n++)
                    if (n * 8 < columns) {
                        float2* pair = reinterpret_cast<float2*>(own + n * 8);
                        float2 known = to.mode == ADD_F32 ? *pair : make_float2(0.0f, 0.0f);
                        *pair = make_float2(known.x + x[m][n][2 * half], known.y + x[m][n][2 * half + 1]);
                    }
        }
}

}  // namespace attention
