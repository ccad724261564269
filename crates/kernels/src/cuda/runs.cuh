// Arrays in runs of N elements a thread: 16 bytes or more at once where arrays lie so, element by element where
// they do not, and at their ends.

template <class T, int N> struct alignas(sizeof(T) * N) Run { T at[N]; };

// How many elements a body is called for.
template <int COUNT> struct Length { static constexpr int N = COUNT; };

// Elements of a run of arrays of these types: 16 bytes of the narrowest.
template <class... T> __device__ constexpr int run_of() {
    return ((sizeof(T) == 2) || ...) ? 8 : 4;
}

template <int N, class T> __device__ inline bool lies(const T* array) {
    return reinterpret_cast<u64>(array) % (sizeof(T) * N) == 0;
}

template <class L, class T> __device__ inline Run<float, L::N> load_run(L, const T* at) {
    Run<T, L::N> narrow = *reinterpret_cast<const Run<T, L::N>*>(at);
    Run<float, L::N> x;
    for (int i = 0; i < L::N; i++) x.at[i] = widen(narrow.at[i]);
    return x;
}

template <class T, int N> __device__ inline void store_run(T* at, const Run<float, N>& x) {
    Run<T, N> y;
    for (int i = 0; i < N; i++) y.at[i] = narrow<T>(x.at[i]);
    *reinterpret_cast<Run<T, N>*>(at) = y;
}

// body(Length, element) for this thread's part of what a block takes of [0, end): N elements a thread from
// `first` on. `fits`: all arrays lie for runs.
template <int N, class Body> __device__ inline void for_each_run(u64 first, u64 end, bool fits, Body body) {
    if (fits) {
        u64 at = first + threadIdx.x * N;
        if (at + N <= end) {
            body(Length<N>(), at);
        } else {
            for (; at < end; at++) body(Length<1>(), at);
        }
        return;
    }
    u64 at = first + threadIdx.x;
    for (int i = 0; i < N && at < end; i++, at += blockDim.x) body(Length<1>(), at);
}

// The same for an array of n elements and a grid in one dimension.
template <int N, class Body> __device__ inline void for_each_run(u64 n, bool fits, Body body) {
    for_each_run<N>(u64(blockIdx.x) * blockDim.x * N, n, fits, body);
}

// body(Length, row, column) in rows of `width` columns, `tiles` blocks a row.
template <int N, class Body>
__device__ inline void for_each_run_of_row(u32 width, u32 tiles, bool fits, Body body) {
    u64 row = blockIdx.x / tiles, first = u64(blockIdx.x % tiles) * blockDim.x * N;
    for_each_run<N>(first, width, fits, [&](auto run, u64 column) { body(run, row, u32(column)); });
}
