//! What a machine is made of: devices, buffers, instruction sets, worker threads.
//!
//! This room knows bytes and element types; it never learns a shape, a tensor or a parameter.
//! `unsafe` is allowed here and in `kernels` only.

mod dtype;

pub use dtype::DType;
