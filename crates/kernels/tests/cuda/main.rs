//! Every op on a GPU beside its twin on the CPU. The GPU is played by the CPU, which runs the same text of the
//! kernels; with `TRILITH_GPU=real` it is the machine's own.

mod activations;
mod adamw;
mod attention;
mod block;
mod cross_entropy;
mod cut_norm;
mod either;
mod elementwise;
mod embedding;
mod experts;
mod gemm;
mod global_norm;
mod norms;
mod rank_sum;
mod rope;
mod support;
