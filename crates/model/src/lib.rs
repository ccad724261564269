//! Layers, then families: config, forward, weight names.
//!
//! A model is handles and shapes; its bytes are in the `ParamStore`. Layers are written against a
//! mesh. This room never learns a tier, and of ranks only what the mesh says.
#![forbid(unsafe_code)]

mod config;
mod flops;
mod gpt2;
mod layers;
mod llama;
mod names;
mod stage;

pub use config::{Config, ConfigError};
pub use flops::Flops;
pub use gpt2::{Gpt2, Gpt2Config};
pub use layers::{Linear, Recompute, Tokens};
pub use llama::{Family, Llama, LlamaConfig, MoeConfig};
pub use names::{Builder, Spread, StoredWeight, fill};
pub use stage::{Slice, Stage};

use dist::{Axis, Flow, Mesh, Scheme, Table, ZigZag};
use std::sync::Arc;
use tensor::{Fault, KvCache, ParamList, ParamRef, Tape, Targets, Tensor, Var};

/// A target that asks for nothing.
const IGNORE: u32 = u32::MAX;

/// A model of any family, built for one mesh.
#[derive(Clone)]
pub enum Model {
    /// Llama 2/3, Mistral, Mixtral, Qwen2, Qwen3, their mixtures of experts, SmolLM2.
    Llama(Llama),
    /// GPT-2.
    Gpt2(Gpt2),
}

/// A model beside the parameters it needs and their names in files.
pub struct Built {
    /// The layers.
    pub model: Model,
    /// Parameters in the order of their handles.
    pub params: ParamList,
    /// Where each piece of each parameter lies in a Hugging Face folder.
    pub stored: Vec<StoredWeight>,
    /// How each parameter lies among the ranks, in the order of their handles.
    pub spreads: Vec<Spread>,
}

impl Model {
    /// Lay out a model for sequences of at most `context` tokens, on `mesh` as its axes suggest.
    pub fn build(config: &Config, context: usize, mesh: &Mesh) -> Result<Built, ConfigError> {
        Model::build_on(config, context, &Flow::new(mesh, Scheme::of(mesh.shape()))?)
    }

    /// The same with the scheme of `flow`. On a pipeline this rank builds its stage alone. Layouts that do
    /// not meet, and more slices than layers, are refused here.
    pub fn build_on(config: &Config, context: usize, flow: &Flow) -> Result<Built, ConfigError> {
        let ranks = flow.mesh.size(Axis::Ep);
        if ranks > 1 && config.experts() == 0 {
            return Err(ConfigError::NoExperts { family: config.family(), ranks });
        }
        let mut builder = Builder::new(flow, Stage::of(config, context, flow)?);
        let model = match config {
            Config::Llama(config) => Model::Llama(Llama::build(config, context, &mut builder)?),
            Config::Gpt2(config) => Model::Gpt2(Gpt2::build(config, context, &mut builder)?),
        };
        let Builder { params, stored, spreads, .. } = builder;
        Ok(Built { model, params, stored, spreads })
    }

    /// Final hidden states [M, D] of packed rows of tokens, ready for the head. Every rank of the
    /// tensor axes and of the context axis passes the same tokens and gets its piece.
    pub fn hidden(&self, tape: &mut Tape<'_>, tokens: &Tokens, recompute: Recompute) -> Result<Var, Fault> {
        self.slice(tape, self.stage().only(), None, tokens, recompute)
    }

    /// The part of the model this rank has.
    pub fn stage(&self) -> &Stage {
        match self {
            Model::Llama(model) => model.stage(),
            Model::Gpt2(model) => model.stage(),
        }
    }

    /// One slice of it: from the residual stream `x` [M, D], which the first slice has none of and embeds
    /// the tokens instead, to the residual stream, or behind the last slice to hidden states.
    pub fn slice(
        &self,
        tape: &mut Tape<'_>,
        slice: &Slice,
        x: Option<&Var>,
        tokens: &Tokens,
        recompute: Recompute,
    ) -> Result<Var, Fault> {
        assert_eq!(slice.first, x.is_none(), "the first slice embeds, the others are given a stream");
        match self {
            Model::Llama(model) => model.slice(tape, slice, x, tokens, recompute),
            Model::Gpt2(model) => model.slice(tape, slice, x, tokens, recompute),
        }
    }

    /// Shape of this rank's piece of the residual stream of `tokens`.
    pub fn stream_shape(&self, tokens: &Tokens) -> [usize; 2] {
        let (flow, width) = match self {
            Model::Llama(model) => model.stream(),
            Model::Gpt2(model) => model.stream(),
        };
        layers::stream_shape(flow, tokens, width)
    }

    /// The same for tokens that continue the sequence in `caches` (one per layer), which grow.
    pub fn hidden_cached(
        &self,
        tape: &mut Tape<'_>,
        ids: &[u32],
        caches: &mut [KvCache],
    ) -> Result<Var, Fault> {
        let first = caches.first().map_or(0, KvCache::len) as u32;
        let positions: Arc<[u32]> = (first..first + ids.len() as u32).collect();
        let tokens = Tokens { b: 1, ids: ids.into(), positions, starts: None };
        match self {
            Model::Llama(model) => model.hidden_cached(tape, &tokens, caches),
            Model::Gpt2(model) => model.hidden_cached(tape, &tokens, caches),
        }
    }

    /// Losses of every token in nats, 0 where ignored, from `hidden`: [M] f32, the same on every rank
    /// of the tensor axes and of the context axis, in the order of the tokens. On a recording tape this is
    /// also where the backward pass will begin.
    pub fn loss(
        &self,
        tape: &mut Tape<'_>,
        hidden: &Var,
        targets: Targets<'_>,
        b: usize,
    ) -> Result<Tensor, Fault> {
        let (flow, (head, table)) = (self.flow(), self.head_table());
        let (m, rows, cut) = (targets.ids.len(), layers::rows_of(flow, b), ZigZag::of(&flow.mesh));
        if rows == b && cut.ranks() == 1 && table.tokens().is_whole() {
            return dist::head_loss(tape, table, hidden, *head, targets);
        }
        let t = m / b.max(1);
        let mut ids = targets.ids.to_vec();
        ids.resize(t * rows, IGNORE);
        let ids = cut.take(&cut.pad(&ids, rows, IGNORE), rows);
        let ids = layers::part_of(flow, table.tokens(), &ids);
        let losses = dist::head_loss(tape, table, hidden, *head, Targets { ids, ..targets })?;
        Ok(dist::gather_context(&flow.mesh, &losses, rows, t)?.narrow_rows(0, m))
    }

    /// Whether some layer has experts, on this stage or on another one.
    pub fn has_experts(&self) -> bool {
        match self {
            Model::Llama(model) => model.has_experts(),
            Model::Gpt2(_) => false,
        }
    }

    /// The matrix [V, D] that turns hidden states into logits; on the last stage.
    pub fn head(&self) -> ParamRef {
        self.head_table().0
    }

    fn head_table(&self) -> &(ParamRef, Table) {
        match self {
            Model::Llama(model) => model.head(),
            Model::Gpt2(model) => model.head(),
        }
    }

    fn flow(&self) -> &Flow {
        match self {
            Model::Llama(model) => model.stream().0,
            Model::Gpt2(model) => model.stream().0,
        }
    }
}
