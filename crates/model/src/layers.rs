//! What families are made of. There is one `Linear`.

use crate::ConfigError;
use crate::names::{Builder, Place};
use dist::{Layout, Mesh};
use std::sync::Arc;
use tensor::{Fault, Init, KvCache, ParamRef, ParamSpec, Tape, Var};

/// A batch of packed rows, flattened token by token.
#[derive(Clone, Debug)]
pub struct Tokens {
    /// Rows; tokens per row are `ids.len() / b`.
    pub b: usize,
    /// Token ids. [M]
    pub ids: Arc<[u32]>,
    /// Position of each token in its document. [M]
    pub positions: Arc<[u32]>,
    /// Where each token's document begins within its row; absent: at 0. [M]
    pub starts: Option<Arc<[u32]>>,
}

/// Which layers keep only their input and run again on the way back.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Recompute {
    /// None: every value is kept.
    Never,
    /// The first this many layers.
    First(usize),
    /// Every layer.
    Always,
}

impl Recompute {
    /// Whether layer `i` runs again.
    pub fn applies_to(self, layer: usize) -> bool {
        match self {
            Recompute::Never => false,
            Recompute::First(count) => layer < count,
            Recompute::Always => true,
        }
    }
}

/// y = x W^T + b, on any mesh.
#[derive(Clone, Debug)]
pub struct Linear {
    mesh: Mesh,
    weight: ParamRef,
    bias: Option<ParamRef>,
}

/// What a `Linear` is before it has parameters.
pub(crate) struct LinearSpec<'a> {
    pub name: String,
    pub inputs: usize,
    pub outputs: usize,
    pub bias: bool,
    /// Standard deviation of the initial weights.
    pub std: f32,
    /// Hugging Face tensors that make up the weight, from the first output row on: (name, rows).
    pub parts: &'a [(String, usize)],
    pub place: Place,
}

impl Linear {
    pub(crate) fn build(
        spec: &LinearSpec<'_>,
        mesh: &Mesh,
        builder: &mut Builder,
    ) -> Result<Linear, ConfigError> {
        // On a mesh of one every layout is the replicated one; the check is where a wrong pair
        // of a larger mesh will be refused.
        dist::product(&Layout::REPLICATED, &Layout::REPLICATED)?;
        let weight = builder.matrix(spec);
        let bias = spec.bias.then(|| builder.bias(spec));
        Ok(Linear { mesh: mesh.clone(), weight, bias })
    }

    /// x [M, in] (+ residual [M, out]) -> [M, out].
    pub fn forward(&self, tape: &mut Tape<'_>, x: &Var, residual: Option<&Var>) -> Result<Var, Fault> {
        dist::matmul(tape, &self.mesh, x, (self.weight, self.bias), residual)
    }

    /// The weight [out, in].
    pub fn weight(&self) -> ParamRef {
        self.weight
    }

    /// The bias [out].
    pub fn bias(&self) -> Option<ParamRef> {
        self.bias
    }
}

/// The attention of one layer over a batch, or over a cache.
pub(crate) fn attend(
    tape: &mut Tape<'_>,
    qkv: Var,
    shape: &tensor::AttentionShape,
    cache: Option<&mut KvCache>,
) -> Result<Var, Fault> {
    match cache {
        None => tape.attention(qkv, shape),
        Some(cache) => tape.attention_cached(qkv, shape, cache),
    }
}

/// A vector parameter [width] without weight decay, stored under `stored` in files.
pub(crate) fn vector(
    builder: &mut Builder,
    name: String,
    stored: String,
    width: usize,
    init: Init,
) -> ParamRef {
    builder.whole(ParamSpec { name, shape: vec![width], init, decay: false }, stored, vec![width])
}
