// What a product of the library leaves to do: operands of two types, and sums that it cannot finish.

namespace gemm {

// Columns of a row for each block.
constexpr u32 COLUMNS = 1024;

// An array of floats of a type that is known at run time.
__device__ inline float load(const u8* x, u32 is_f32, u64 i) {
    return is_f32 ? reinterpret_cast<const float*>(x)[i] : widen(reinterpret_cast<const bf16*>(x)[i]);
}

// Returns what a reader will find.
__device__ inline float store(u8* y, u32 is_f32, u64 i, float value) {
    if (is_f32) {
        reinterpret_cast<float*>(y)[i] = value;
        return value;
    }
    bf16 rounded = narrow<bf16>(value);
    reinterpret_cast<bf16*>(y)[i] = rounded;
    return widen(rounded);
}

// The row of a block and the columns [first, last) of it.
struct Part {
    u64 row;
    u32 first, last;
    __device__ explicit Part(u32 n) {
        u32 parts = (n + COLUMNS - 1) / COLUMNS;
        row = blockIdx.x / parts;
        first = blockIdx.x % parts * COLUMNS;
        last = n - first < COLUMNS ? n : first + COLUMNS;
    }
};

// y [rows, n] = x, rows of ldy and ldx.
__device__ void widen_rows(const bf16* x, u64 ldx, float* y, u64 ldy, u32 n) {
    Part part(n);
    for (u32 j = part.first + threadIdx.x; j < part.last; j += blockDim.x) {
        y[part.row * ldy + j] = widen(x[part.row * ldx + j]);
    }
}

// c [rows, n] = sums + c + bias + residual, or the GELU of that, which goes to pre [rows, n]. What is null is
// left out, but for c, which is added where `accumulate`.
__device__ void finish(const float* sums, u64 ld_sums, const u8* bias, u32 bias_f32, const u8* residual,
                       u32 residual_f32, u64 ld_residual, u8* pre, u32 pre_f32, u32 tanh_form, u8* c, u32 c_f32,
                       u64 ldc, u32 accumulate, u32 n) {
    Part part(n);
    for (u32 j = part.first + threadIdx.x; j < part.last; j += blockDim.x) {
        u64 at = part.row * ldc + j;
        float sum = sums ? sums[part.row * ld_sums + j] : 0.0f;
        if (accumulate) sum += load(c, c_f32, at);
        if (bias) sum += load(bias, bias_f32, j);
        if (residual) sum += load(residual, residual_f32, part.row * ld_residual + j);
        if (pre) {
            float x = store(pre, pre_f32, part.row * n + j, sum);
            sum = tanh_form ? gelu::Tanh::value(x) : gelu::Erf::value(x);
        }
        store(c, c_f32, at, sum);
    }
}

}  // namespace gemm

KERNEL(gemm_widen, 256, (const bf16* x, u64 ldx, float* y, u64 ldy, u32 n), { gemm::widen_rows(x, ldx, y, ldy, n); })
KERNEL(gemm_finish, 256,
       (const float* sums, u64 ld_sums, const u8* bias, u32 bias_f32, const u8* residual, u32 residual_f32,
        u64 ld_residual, u8* pre, u32 pre_f32, u32 tanh_form, u8* c, u32 c_f32, u64 ldc, u32 accumulate, u32 n),
       { gemm::finish(sums, ld_sums, bias, bias_f32, residual, residual_f32, ld_residual, pre, pre_f32, tanh_form, c,
                      c_f32, ldc, accumulate, n); })
