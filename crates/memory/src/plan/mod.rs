//! The planner: trace, budgets and measured speeds in, moves out. Pure; never does IO.

mod types;

pub use types::{Budgets, DoesNotFit, LinkRate, LinkReport, Move, MoveKind, Plan, Rates};
