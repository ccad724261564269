//! Mesh, layouts, communicators, the distributed matmul, pipeline schedules and
//! what all of it costs.
//!
//! A layer is written against a mesh and a layout; a serial layer is the parallel layer on a mesh
//! of one. This room never learns what a layer is for.
#![forbid(unsafe_code)]

pub mod cost;
mod layout;
mod matmul;
mod mesh;
pub mod pipeline;

pub use layout::{Layout, LayoutError, Placement, product};
pub use matmul::matmul;
pub use mesh::{Axis, Communicator, Mesh};
