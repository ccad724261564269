//! Mesh, layouts, communicators, the distributed matmul and pipeline schedules.
//!
//! A layer is written against a mesh and a layout; a serial layer is the parallel layer on a mesh
//! of one. This room never learns what a layer is for.
#![forbid(unsafe_code)]

mod layout;
mod matmul;
mod mesh;
pub mod pipeline;

pub use layout::{Layout, LayoutError, Placement, product};
pub use matmul::matmul;
pub use mesh::{Axis, Communicator, Mesh};
