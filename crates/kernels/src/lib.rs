//! The math, one folder per op: `mod.rs` holds the shape contract and the one `match` on the
//! device, `reference.rs` the obvious version, `cpu.rs` the fast one, tested against each other; `cuda.cu`
//! and `cuda.rs` are its twin on a GPU.
//!
//! Kernels take views and shapes. This room never learns a tensor, a parameter or a rank.
//!
//! Shape letters: B batch, T query tokens, S key tokens, D model width, F ffn width, N query
//! heads, K kv heads, H head dim, V vocab; M rows of a matrix of tokens.

#[macro_use]
mod simd;
mod raw;
mod rows;
mod scratch;
#[cfg(test)]
mod testkit;

pub mod adamw;
pub mod adamw8;
pub mod attention;
pub mod block;
pub mod cross_entropy;
pub mod cuda;
pub mod cut_norm;
pub mod elementwise;
pub mod embedding;
pub mod experts;
pub mod gelu;
pub mod gemm;
pub mod global_norm;
pub mod head_norm;
pub mod layer_norm;
pub mod peak;
pub mod rank_sum;
pub mod rms_norm;
pub mod rope;
pub mod swiglu;
