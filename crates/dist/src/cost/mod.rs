//! What a run would cost, from shapes alone: bytes, calls and peers of every rank, memory, seconds.
//! Pure and predicted; `docs/cost-model.md` derives every formula.
//!
//! Letters: a product is y [M, N] = x [M, K] w [K, N]; M tokens, D width, F ffn width, V vocab,
//! T tokens a row; E experts, k of a token; x, y, z sizes of the tensor axes.

mod changed;
mod choices;
mod cluster;
mod every;
mod experts;
mod family;
mod memory;
mod model_shape;
mod picture;
mod plan;
mod price;
mod search;
mod seconds;
mod volume;

pub use cluster::{Cluster, Link, Pace};
pub use every::every;
pub use experts::{ExpertFlow, ExpertFlows, expert_flows, expert_products, pool_flows};
pub use family::Family;
pub use memory::{Memory, STATE_BYTES, StateBytes};
pub use model_shape::{Batch, MixtureShape, ModelShape, Pair};
pub use picture::{layer_flows, mixed_flows, pure_grids, svg, table, title};
pub use plan::{Offload, Plan, PlanError, Zero};
pub use price::{AxisTraffic, Price, price};
pub use search::{Contender, Decision, NoFit, Space, Variation, fewer, search};
pub use seconds::{Seconds, Turn, Work};
pub use volume::{
    Flow, Grid, Half, Product, Volume, one_d, peers, summa, three_d, two_point_five_d, volume,
    weight_stationary,
};

#[cfg(test)]
mod mixture_tests;
#[cfg(test)]
mod tests;
