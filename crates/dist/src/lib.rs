//! Mesh, layouts, communicators, the distributed matmul, pipeline schedules and
//! what all of it costs.
//!
//! A layer is written against a mesh and a layout; a serial layer is the parallel layer on a mesh
//! of one. This room never learns what a layer is for.
#![forbid(unsafe_code)]

mod bell;
mod beside;
mod call;
mod combination;
mod communicator;
mod context;
pub mod cost;
mod diagnosis;
mod dim;
mod error;
mod experts;
mod group;
mod launch;
mod layout;
mod matmul;
mod mesh;
mod moves;
mod nccl;
mod norm;
pub mod pipeline;
mod product;
mod redistribute;
mod scheme;
mod shape;
mod slices;
mod supervise;
mod table;
mod threads;
mod traffic;
mod wire;

pub use beside::{Array, Pending, Sending, Underway, start_beside};
pub use call::{Call, Members, Op};
pub use combination::{Clash, Combination};
pub use communicator::{Communicator, NullRank};
pub use context::{Context, ContextAttention, HeadShare, Moved, ZigZag, gather_context};
pub use dim::{Dim, Held, crossing};
pub use error::{CommError, LastSeen};
pub use experts::{Experts, FewExperts, Mixture};
pub use group::Group;
pub use launch::{Failure, Options, launch};
pub use layout::{Cut, Layout, LayoutError};
pub use matmul::{Weights, matmul};
pub use mesh::Mesh;
pub use nccl::Nccl;
pub use norm::{Width, norm};
pub use product::{Algorithm, Keep, Leave, Product, Side};
pub use redistribute::Redistribution;
pub use scheme::{Flow, FlowError, Parts, Scheme, Weighted};
pub use shape::{Axis, Coords, MeshError, MeshShape};
pub use supervise::{End, Ends, RunError, Start, Supervision, supervise};
pub use table::{Table, embed, head_loss};
pub use threads::Rank;
pub use traffic::{Counts, Peers, Traffic, piece};
pub use wire::Process;
