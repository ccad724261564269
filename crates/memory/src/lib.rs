//! Memory that spans tiers: data lies in the fastest tier it fits in, decided from the real access
//! sequence of a training step.
//!
//! `trace` says what a step touches, `plan` (pure) decides what moves when, the pager executes it,
//! `disk` is the lowest tier. This room never learns what a layer is.

#![deny(unsafe_code)]

mod arrays;
pub mod disk;
pub mod pager;
pub mod plan;
mod stripes;
pub mod trace;

pub use arrays::{Arrays, Need, Update};
pub use stripes::Stripes;

use std::fmt;

/// Where bytes live, fastest first.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Tier {
    /// Memory of the GPU, or the arena that plays it.
    Hbm,
    /// Memory of the host.
    Dram,
    /// The drive.
    Nvme,
}

/// What a chunk holds. A chunk is a run of consecutive parameters of one class, moved as one.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Class {
    /// Weights in the compute type.
    Param,
    /// Gradients, as they are summed.
    Grad,
    /// Gradients of a whole step, rounded to 16 bits.
    Grad16,
    /// What the weights lack of their f32 masters.
    Master,
    /// First moments.
    M,
    /// Second moments.
    V,
    /// Values kept from forward to backward.
    Activation,
}

impl Class {
    /// Classes of the flat arrays of a model, in their order.
    pub const STATE: [Class; 6] =
        [Class::Param, Class::Grad, Class::Grad16, Class::Master, Class::M, Class::V];

    /// All of them. Arrays of the state are equally long; what is filed, the last, is as long as it is.
    pub(crate) const ALL: [Class; CLASSES] =
        [Class::Param, Class::Grad, Class::Grad16, Class::Master, Class::M, Class::V, Class::Activation];

    /// Whether it begins as nothing in every step and is nothing again once an update has used it.
    pub(crate) const fn is_grad(self) -> bool {
        matches!(self, Class::Grad | Class::Grad16)
    }
}

/// How many classes there are.
const CLASSES: usize = 7;

impl fmt::Display for Tier {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Tier::Hbm => "hbm",
            Tier::Dram => "dram",
            Tier::Nvme => "nvme",
        })
    }
}

impl fmt::Display for Class {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Class::Param => "param",
            Class::Grad => "grad",
            Class::Grad16 => "grad16",
            Class::Master => "master",
            Class::M => "m",
            Class::V => "v",
            Class::Activation => "activation",
        })
    }
}
