//! One way to spread a run over devices, and whether it can be.

use super::volume::{Grid, Laid, inner_cut};
use super::{Batch, ModelShape, Pair};
use crate::pipeline::{Pipeline, PipelineError, Schedule};
use crate::redistribute::expect_width;
use crate::scheme::lcm;
use crate::{Axis, Clash, Combination, FlowError, MeshShape, Parts, Scheme};
use std::fmt;

/// What the ranks of `fsdp` share: each stage what the one before does, and more (Rajbhandari et
/// al. 2019, arXiv:1910.02054).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Zero {
    /// Optimizer state.
    One,
    /// And gradients.
    Two,
    /// And weights.
    Three,
}

/// What waits in host memory.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Offload {
    /// Masters and moments; the host then runs the optimizer.
    pub optimizer: bool,
    /// Values kept from forward to backward.
    pub activations: bool,
}

/// One way to spread a run.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Plan {
    /// Ranks along each axis.
    pub mesh: MeshShape,
    /// How products are distributed.
    pub scheme: Scheme,
    /// Schemes of parts of a layer that have their own.
    pub parts: Parts,
    /// What `fsdp` shares.
    pub zero: Zero,
    /// Order of the pipeline.
    pub schedule: Schedule,
    /// Rows of a microbatch of one replica.
    pub microbatch_rows: usize,
    /// Whether layers keep only their input and run again on the way back.
    pub recompute: bool,
    /// What waits in host memory.
    pub offload: Offload,
}

/// A plan that cannot be run, whatever it costs.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
pub enum PlanError {
    /// More replicas than rows.
    #[error(
        "{replicas} replicas (dp x fsdp x ep) share {rows} rows; lower one of them, or take more rows a step"
    )]
    Rows {
        /// dp x fsdp x ep.
        replicas: usize,
        /// Rows of a step.
        rows: usize,
    },
    /// More slices than layers.
    #[error("{slices} pipeline slices (pp x chunks) of {layers} layers; lower pp or the chunks")]
    Layers {
        /// pp times chunks.
        slices: usize,
        /// Layers.
        layers: usize,
    },
    /// Heads cannot be cut.
    #[error("scheme {scheme} on this mesh cuts {heads} heads into {pieces}; lower that axis")]
    Heads {
        /// Scheme of attention.
        scheme: Scheme,
        /// Query heads.
        heads: usize,
        /// Pieces.
        pieces: usize,
    },
    /// Attention wants whole rows.
    #[error(
        "scheme {scheme} on this mesh cuts the {rows} rows of a microbatch into {pieces}; take larger microbatches or a smaller axis"
    )]
    Tokens {
        /// Scheme of attention.
        scheme: Scheme,
        /// Rows of a microbatch.
        rows: usize,
        /// Pieces.
        pieces: usize,
    },
    /// More ranks than experts.
    #[error("ep = {ep} ranks share the {experts} experts of a layer; lower ep, and take dp for replicas")]
    Experts {
        /// Ranks that share experts.
        ep: usize,
        /// Experts of a layer, 0 without a mixture.
        experts: usize,
    },
    /// A width the schemes of two parts cannot exchange.
    #[error(transparent)]
    Width(#[from] FlowError),
    /// Choices that do not go together.
    #[error(transparent)]
    Clash(#[from] Clash),
    /// A schedule that does not fit.
    #[error(transparent)]
    Pipeline(#[from] PipelineError),
}

impl MeshShape {
    /// The tensor axes.
    pub fn grid(&self) -> Grid {
        Grid { x: self.size(Axis::X), y: self.size(Axis::Y), z: self.size(Axis::Z) }
    }
}

impl Plan {
    /// Microbatches of a step, the last one perhaps padded.
    pub fn microbatches(&self, batch: Batch) -> usize {
        batch.rows.div_ceil(self.mesh.replicas()).div_ceil(self.microbatch_rows)
    }

    /// The pipeline of this plan.
    pub fn pipeline(&self, batch: Batch) -> Result<Pipeline, PipelineError> {
        Pipeline::new(self.mesh.size(Axis::Pp), self.microbatches(batch), self.schedule)
    }

    /// The scheme of a part.
    pub fn scheme_of(&self, part: Pair) -> Scheme {
        self.parts.of(part, self.scheme)
    }

    /// How the products of a part lie.
    pub(super) fn laid(&self, part: Pair) -> Laid {
        Laid::new(&self.mesh, self.scheme, self.scheme_of(part))
    }

    /// Pieces that some part or the stream cuts whole rows of tokens into.
    pub(super) fn token_cut(&self) -> usize {
        let stream = Laid::new(&self.mesh, self.scheme, self.scheme);
        let all = [stream, self.laid(Pair::Attention), self.laid(Pair::Mlp)];
        all.iter().map(|laid| inner_cut(laid.scheme, laid.grid).0).fold(1, lcm)
    }

    /// Whether it can be run at all; its pipeline.
    pub fn check(&self, model: &ModelShape, batch: Batch) -> Result<Pipeline, PlanError> {
        let (mesh, replicas, rows) = (&self.mesh, self.mesh.replicas(), batch.rows);
        if replicas > rows {
            return Err(PlanError::Rows { replicas, rows });
        }
        let (slices, layers) = (mesh.size(Axis::Pp) * self.schedule.chunks(), model.layers);
        if slices > layers {
            return Err(PlanError::Layers { slices, layers });
        }
        let Plan { mesh, scheme, parts, .. } = *self;
        Combination { mesh, scheme: Some(scheme), parts, context: batch.context }.check()?;
        let own = [Pair::Attention, Pair::Mlp].into_iter().filter(|part| self.scheme_of(*part) != scheme);
        for part in own {
            expect_width(&mesh, scheme, self.scheme_of(part), model.width)?;
        }
        let (heads, rows) = (model.heads, self.microbatch_rows);
        let attention = self.laid(Pair::Attention);
        let (_, head_cut) = inner_cut(attention.scheme, attention.grid);
        if head_cut > heads {
            return Err(PlanError::Heads { scheme: attention.scheme, heads, pieces: head_cut });
        }
        let token_cut = self.token_cut();
        if token_cut > rows {
            return Err(PlanError::Tokens { scheme, rows, pieces: token_cut });
        }
        let (ep, experts) = (mesh.size(Axis::Ep), model.mixture.map_or(0, |mixture| mixture.experts));
        if ep > experts.max(1) {
            return Err(PlanError::Experts { ep, experts });
        }
        Ok(self.pipeline(batch)?)
    }
}

impl fmt::Display for Zero {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Zero::One => "ZeRO 1",
            Zero::Two => "ZeRO 2",
            Zero::Three => "ZeRO 3",
        })
    }
}

impl fmt::Display for Offload {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match (self.optimizer, self.activations) {
            (false, false) => "nothing",
            (true, false) => "optimizer state",
            (false, true) => "activations",
            (true, true) => "optimizer state and activations",
        })
    }
}
