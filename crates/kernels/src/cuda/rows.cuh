// Rows by teams: a power of two of threads, up to a whole block, takes a row, eight columns a thread at a
// time. Which thread takes which column depends on the width alone, not on where arrays lie: so do the bits.

struct Team {
    u32 threads, index, lane, teams;

    __device__ explicit Team(u32 size)
        : threads(size), index(threadIdx.x / size), lane(threadIdx.x % size), teams(blockDim.x / size) {}
};

// Eight columns of a row of d from column `at` on; those beyond it are zero. WHOLE: there are none beyond,
// and rows lie for runs.
template <bool WHOLE, class T> __device__ inline Run<T, 8> load_eight(const T* row, u32 at, u32 d) {
    Run<T, 8> x;
    if constexpr (WHOLE) {
        x = *reinterpret_cast<const Run<T, 8>*>(row + at);
    } else {
        for (int i = 0; i < 8; i++) x.at[i] = at + i < d ? row[at + i] : T{};
    }
    return x;
}

template <bool WHOLE, class T> __device__ inline void store_eight(T* row, u32 at, u32 d, const Run<T, 8>& x) {
    if constexpr (WHOLE) {
        *reinterpret_cast<Run<T, 8>*>(row + at) = x;
    } else {
        for (int i = 0; i < 8; i++)
            if (at + i < d) row[at + i] = x.at[i];
    }
}

// Most warps of a block that works in teams.
constexpr u32 TEAM_WARPS = 16;

// Each x summed over the threads of a team; all of them get it. All threads of a block must come.
// `scratch` is shared memory of N TEAM_WARPS floats.
template <int N> __device__ inline void team_sums(const Team& team, float (&x)[N], float* scratch) {
    for (u32 mask = min(team.threads, 32u) / 2; mask > 0; mask /= 2)
        for (int i = 0; i < N; i++) x[i] += shuffle_xor(x[i], mask);
    if (team.threads <= 32) return;
    sync();
    if (threadIdx.x % 32 == 0)
        for (int i = 0; i < N; i++) scratch[i * TEAM_WARPS + threadIdx.x / 32] = x[i];
    sync();
    u32 warps = team.threads / 32;
    for (int i = 0; i < N; i++) {
        const float* part = scratch + i * TEAM_WARPS + team.index * warps;
        x[i] = 0.0f;
        for (u32 warp = 0; warp < warps; warp++) x[i] += part[warp];
    }
}

// Sums over rows: a block of 512 keeps N sums of each of the eight columns a thread has of a tile of columns,
// one tile for each blockIdx.y.
constexpr u32 HALF_BLOCK = 256;
__device__ inline u32 own_column(const Team& team) { return (blockIdx.y * team.threads + team.lane) * 8; }

// Those of all teams of a block, to its row of partial [N, gridDim.x, d]. `scratch` is shared memory of
// 8 N HALF_BLOCK floats.
template <bool WHOLE, int N>
__device__ inline void write_sums(const Team& team, float (&sums)[N][8], float* partial, u32 d,
                                  float* scratch) {
    for (u32 half = team.teams / 2; half > 0; half /= 2) {
        float* own = scratch + team.index % half * team.threads + team.lane;
        sync();
        if (team.index >= half && team.index < 2 * half)
            for (int i = 0; i < 8 * N; i++) own[i * HALF_BLOCK] = sums[i / 8][i % 8];
        sync();
        if (team.index < half)
            for (int i = 0; i < 8 * N; i++) sums[i / 8][i % 8] += own[i * HALF_BLOCK];
    }
    u32 own = own_column(team);
    if (team.index > 0 || own >= d) return;
    for (int n = 0; n < N; n++) {
        Run<float, 8> out;
        for (int i = 0; i < 8; i++) out.at[i] = sums[n][i];
        store_eight<WHOLE>(partial + (u64(n) * gridDim.x + blockIdx.x) * d, own, d, out);
    }
}

// first, second [d] += the sums over the rows of partial [2, count, d], where gridDim.y is 2. 32 columns a
// block, every eighth row a warp.
__device__ inline void add_partial_rows(const float* partial, float* first, float* second, u32 count, u32 d) {
    __shared__ float sums[8][32];
    u32 lane = threadIdx.x % 32, warp = threadIdx.x / 32, column = blockIdx.x * 32 + lane;
    const float* from = partial + u64(blockIdx.y) * count * d + column;
    float sum = 0.0f;
    if (column < d) {
#pragma unroll 8
        for (u32 row = warp; row < count; row += 8) sum += from[u64(row) * d];
    }
    sums[warp][lane] = sum;
    sync();
    if (warp > 0 || column >= d) return;
    float total = 0.0f;
    for (int i = 0; i < 8; i++) total += sums[i][lane];
    (blockIdx.y == 0 ? first : second)[column] += total;
}

KERNEL(rows_add_partials, 256, (const float* partial, float* first, float* second, u32 count, u32 d),
       { add_partial_rows(partial, first, second, count, d); })
