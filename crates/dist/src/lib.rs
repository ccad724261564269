//! Mesh, layouts, communicators, the distributed matmul, pipeline schedules and
//! what all of it costs.
//!
//! A layer is written against a mesh and a layout; a serial layer is the parallel layer on a mesh
//! of one. This room never learns what a layer is for.
#![forbid(unsafe_code)]

mod bell;
mod beside;
mod call;
mod communicator;
pub mod cost;
mod diagnosis;
mod error;
mod group;
mod launch;
mod layout;
mod matmul;
mod mesh;
pub mod pipeline;
mod shape;
mod supervise;
mod threads;
mod traffic;
mod wire;

pub use beside::{Array, Pending};
pub use call::{Call, Members, Op};
pub use communicator::{Communicator, NullRank};
pub use error::{CommError, LastSeen};
pub use group::Group;
pub use launch::{Failure, Options, launch};
pub use layout::{Layout, LayoutError, Placement, product};
pub use matmul::matmul;
pub use mesh::Mesh;
pub use shape::{Axis, Coords, MeshError, MeshShape};
pub use supervise::{RunError, Start, Supervision, supervise};
pub use threads::Rank;
pub use traffic::{Counts, Peers, Traffic, piece};
pub use wire::Process;
