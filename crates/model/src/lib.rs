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

pub use config::{Config, ConfigError};
pub use flops::Flops;
pub use gpt2::{Gpt2, Gpt2Config};
pub use layers::{Linear, Recompute, Tokens};
pub use llama::{Family, Llama, LlamaConfig, MoeConfig};
pub use names::{Builder, StoredWeight, fill};

use dist::Mesh;
use std::sync::Arc;
use tensor::{Fault, KvCache, ParamList, ParamRef, Tape, Var};

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
}

impl Model {
    /// Lay out a model for sequences of at most `context` tokens.
    pub fn build(config: &Config, context: usize, mesh: &Mesh) -> Result<Built, ConfigError> {
        let mut builder = Builder::default();
        let model = match config {
            Config::Llama(config) => Model::Llama(Llama::build(config, context, mesh, &mut builder)?),
            Config::Gpt2(config) => Model::Gpt2(Gpt2::build(config, context, mesh, &mut builder)?),
        };
        Ok(Built { model, params: builder.params, stored: builder.stored })
    }

    /// Final hidden states [M, D] of packed rows of tokens, ready for the head.
    pub fn hidden(&self, tape: &mut Tape<'_>, tokens: &Tokens, recompute: Recompute) -> Result<Var, Fault> {
        match self {
            Model::Llama(model) => model.hidden(tape, tokens, recompute),
            Model::Gpt2(model) => model.hidden(tape, tokens, recompute),
        }
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

    /// The matrix [V, D] that turns hidden states into logits.
    pub fn head(&self) -> ParamRef {
        match self {
            Model::Llama(model) => model.head(),
            Model::Gpt2(model) => model.head(),
        }
    }
}
