//! The numbers of a model and of a step that cost depends on.

use super::volume::{Half, Product};
use crate::pipeline::balance_alike;

/// Sizes of a decoder, all layers alike.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ModelShape {
    /// Layers L.
    pub layers: usize,
    /// Width D.
    pub width: usize,
    /// Query heads N.
    pub heads: usize,
    /// Key and value heads K.
    pub kv_heads: usize,
    /// Head dim H.
    pub head_dim: usize,
    /// Feed-forward width F; with experts that of the part every token goes to, 0 without one.
    pub ffn: usize,
    /// Whether the feed-forward part has a gate beside its input (SwiGLU).
    pub gated: bool,
    /// Vocabulary V.
    pub vocab: usize,
    /// Whether the head is the embedding.
    pub tied: bool,
    /// The experts of every layer, where there are some.
    pub mixture: Option<MixtureShape>,
}

/// Experts beside, or in the place of, a feed-forward part all tokens share.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MixtureShape {
    /// Experts E of a layer.
    pub experts: usize,
    /// Experts a token goes to, k.
    pub choices: usize,
    /// Width of an expert, which has a gate.
    pub ffn: usize,
    /// Width of the expert every token goes to; 0 without one.
    pub shared_ffn: usize,
}

/// What one optimizer step is made of.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Batch {
    /// Rows of a step, all replicas and microbatches together.
    pub rows: usize,
    /// Tokens a row, T.
    pub context: usize,
}

/// Which pair of products of a layer.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Pair {
    /// q|k|v and out.
    Attention,
    /// Up (and gate) and down.
    Mlp,
}

impl ModelShape {
    /// Pairs whose products follow the scheme; experts follow `expert_products`.
    pub fn pairs(&self) -> &'static [Pair] {
        if self.ffn > 0 { &[Pair::Attention, Pair::Mlp] } else { &[Pair::Attention] }
    }

    /// The two products of a pair over `m` tokens.
    pub fn products(&self, pair: Pair, m: f64) -> [(Half, Product); 2] {
        let d = self.width as f64;
        let (out, back) = self.inner(pair);
        [(Half::Leave, Product { m, k: d, n: out }), (Half::Return, Product { m, k: back, n: d })]
    }

    /// The head: logits [M, V].
    pub fn head(&self, m: f64) -> Product {
        Product { m, k: self.width as f64, n: self.vocab as f64 }
    }

    /// Columns of q|k|v: (N + 2 K) H.
    pub fn qkv(&self) -> f64 {
        ((self.heads + 2 * self.kv_heads) * self.head_dim) as f64
    }

    /// Columns of what attention gives: N H.
    pub fn attended(&self) -> f64 {
        (self.heads * self.head_dim) as f64
    }

    /// Columns of the first feed-forward product: 2 F with a gate, F without.
    pub fn up(&self) -> f64 {
        (if self.gated { 2 * self.ffn } else { self.ffn }) as f64
    }

    /// Matrix parameters of a layer that follow the scheme: all but those of a mixture.
    pub fn plain_params(&self) -> f64 {
        self.pair_params(Pair::Attention) + self.pair_params(Pair::Mlp)
    }

    /// Those of one pair of products.
    pub(super) fn pair_params(&self, pair: Pair) -> f64 {
        let (out, back) = self.inner(pair);
        self.width as f64 * (out + back)
    }

    /// Columns of what a pair's first product gives and of what its second one takes.
    fn inner(&self, pair: Pair) -> (f64, f64) {
        match pair {
            Pair::Attention => (self.qkv(), self.attended()),
            Pair::Mlp => (self.up(), self.ffn as f64),
        }
    }

    /// Those of a layer's router, the gate of an expert for all tokens among them.
    pub fn router_params(&self) -> f64 {
        let outputs = |mixture: MixtureShape| mixture.experts + usize::from(mixture.shared_ffn > 0);
        (self.width * self.mixture.map_or(0, outputs)) as f64
    }

    /// Those of `experts` experts.
    fn expert_params(&self, experts: impl Fn(MixtureShape) -> usize) -> f64 {
        self.mixture.map_or(0.0, |mixture| (3 * self.width * mixture.ffn * experts(mixture)) as f64)
    }

    /// Matrix parameters of a layer.
    pub fn layer_params(&self) -> f64 {
        self.plain_params() + self.router_params() + self.expert_params(|mixture| mixture.experts)
    }

    /// Those of them that a token meets.
    pub fn active_params(&self) -> f64 {
        self.plain_params() + self.router_params() + self.expert_params(|mixture| mixture.choices)
    }

    /// Parameters of the embedding, and of the head where it is another matrix.
    pub fn table_params(&self) -> f64 {
        (self.vocab * self.width) as f64
    }

    /// Matrix parameters of the model; norms and biases, under a tenth of a percent, do not count.
    pub fn params(&self) -> f64 {
        let tables = if self.tied { 1.0 } else { 2.0 };
        self.layers as f64 * self.layer_params() + tables * self.table_params()
    }

    /// (layers of the longest slice, layers of the last) when the layers are cut into `slices` as training
    /// cuts them: by FLOPs, the head's among the last slice's. Rows have `t` tokens.
    pub fn slice_layers(&self, t: usize, slices: usize) -> (usize, usize) {
        let layer = 2.0 * self.active_params() + self.attention_flops(1.0, t);
        let head = 2.0 * self.table_params() / layer;
        // Fewer layers than slices are no plan: `Plan::check` says so.
        balance_alike(self.layers, head, slices).unwrap_or((1, 1))
    }

    /// FLOPs of attention for `m` tokens in rows of `t`, forward: scores and values, causal.
    pub fn attention_flops(&self, m: f64, t: usize) -> f64 {
        4.0 * self.attended() * m * (t as f64 + 1.0) / 2.0
    }

    /// FLOPs of a step that count as useful: forward once, backward twice.
    pub fn step_flops(&self, batch: Batch) -> f64 {
        let m = (batch.rows * batch.context) as f64;
        let matrices = self.layers as f64 * self.active_params() + self.table_params();
        6.0 * matrices * m + 3.0 * self.layers as f64 * self.attention_flops(m, batch.context)
    }
}
