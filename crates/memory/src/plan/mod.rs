//! The planner: trace, budgets and measured speeds in, moves out. Pure; never does IO.
//!
//! ```text
//! trace ─ build ─ level (fastest tier) ─ choose ─ schedule ─┐ what crosses the link is what
//!           │                                               │ the level below must hold
//!           └──── level (tier below)  ─ choose ─ schedule ──┘
//!         search: which course of `build` waits least; bound: how few bytes any course can move
//!         replay: believes none of it and checks; order: how short any step is
//! ```
//!
//! The words: a chunk has *events* (moments that need it) and *pauses* between them, in which it
//! *rests* in the tier or leaves it. See docs/memory.md.

mod bound;
mod build;
mod choose;
mod level;
mod order;
mod picture;
mod replay;
mod room;
mod schedule;
mod search;
mod transformer;
mod types;

pub use order::{Stretch, stretches};
pub use picture::{class_table, limit, link_table, picture};
pub use replay::{Broken, Replay, replay};
pub use search::{Aim, Ask, Rule, plan, plan_with};
pub use transformer::{StateLayout, Transformer, Updates};
pub use types::{Budgets, DoesNotFit, LinkRate, LinkReport, Move, MoveKind, Plan, Rates, Refusal};
