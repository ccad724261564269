//! One non-generic `Tensor`, the parameters as handles, and the tape.
//!
//! Ops are few and fused. Each op is a *moment*: whoever watches the tape is told of it before it
//! runs, forward and backward. This room never learns a rank or a layer's meaning.
//!
//! Shape letters as in `kernels`; M is a count of tokens (B times T).
#![forbid(unsafe_code)]

mod fault;
mod filed;
mod grads;
mod init;
mod ops;
mod params;
mod piece;
mod rounded;
mod state;
mod stretch;
mod tape;
mod value;

pub use device::{DType, Device, OutOfMemory};
pub use fault::Fault;
pub use init::{Init, normal};
pub use kernels::attention::Mask;
pub use kernels::gelu::GeluKind;
pub use kernels::rope::{RopeScaling, RopeTable};
pub use ops::{
    AttentionShape, KvCache, Load, Norm, Order, Pool, Real, Router, Targets, WIDEST_ON_GPU, loss_slice_tokens,
};
pub use params::{BLOCK, ParamList, ParamRef, ParamSpec, ParamStore};
pub use piece::{Piece, Run};
pub use stretch::{Later, Recorded};
pub use tape::{Moment, Phase, Tape, Var, Watch};
pub use value::Tensor;
