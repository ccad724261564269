//! What families are made of. There is one `Linear`.

use crate::ConfigError;
use crate::names::{Builder, Place};
use dist::cost::Pair;
use dist::{Context, Cut, Dim, Flow, Held, Product, Redistribution, Weighted, Width, ZigZag};
use std::ops::Range;
use std::sync::Arc;
use tensor::{Fault, GeluKind, KvCache, Norm, ParamRef, Real, Tape, Var};

/// A batch of packed rows, flattened token by token.
#[derive(Clone, Debug)]
pub struct Tokens {
    /// Rows; tokens per row are `ids.len() / b`.
    pub b: usize,
    /// Token ids. [M]
    pub ids: Arc<[u32]>,
    /// Position of each token in its document. [M]
    pub positions: Arc<[u32]>,
    /// Where each token's document begins within its row; absent: at 0. [M]; of tokens that were cut
    /// among context ranks still of whole rows.
    pub starts: Option<Arc<[u32]>>,
}

impl Tokens {
    /// Rows added so that the residual stream and the inner values cut into equal runs of rows, and
    /// of each row the tokens of this context rank.
    pub(crate) fn padded(&self, flow: &Flow) -> Tokens {
        self.with_rows(flow).on_context(ZigZag::of(&flow.mesh))
    }

    /// Of each row the tokens of one rank. Tokens added behind a row's end are a document of their
    /// own, so nothing sees them.
    fn on_context(self, cut: ZigZag) -> Tokens {
        if cut.ranks() == 1 {
            return self;
        }
        let t = self.ids.len() / self.b.max(1);
        let part = |x: &Arc<[u32]>| -> Arc<[u32]> { cut.take(&cut.pad(x, self.b, 0), self.b).into() };
        Tokens {
            b: self.b,
            ids: part(&self.ids),
            positions: part(&self.positions),
            starts: self.starts.as_ref().map(|starts| cut.pad(starts, self.b, t as u32).into()),
        }
    }

    fn with_rows(&self, flow: &Flow) -> Tokens {
        let (t, rows) = (self.ids.len() / self.b.max(1), rows_of(flow, self.b));
        if rows == self.b {
            return self.clone();
        }
        let more = (rows - self.b) * t;
        let stretch = |x: &Arc<[u32]>| -> Arc<[u32]> {
            x.iter().copied().chain(std::iter::repeat_n(0, more)).collect()
        };
        Tokens {
            b: rows,
            ids: stretch(&self.ids),
            positions: stretch(&self.positions),
            starts: self.starts.as_ref().map(stretch),
        }
    }

    /// The rows a rank has of padded tokens that are cut over `cut`.
    pub(crate) fn local(&self, flow: &Flow, cut: Cut) -> Tokens {
        if cut.is_whole() {
            return self.clone();
        }
        let part = |x: &Arc<[u32]>| -> Arc<[u32]> { part_of(flow, cut, x).into() };
        Tokens {
            b: self.b / cut.pieces(&flow.mesh),
            ids: part(&self.ids),
            positions: part(&self.positions),
            starts: self.starts.as_ref().map(part),
        }
    }
}

/// `b` rows of a batch, padded to what every cut of the tokens divides.
pub(crate) fn rows_of(flow: &Flow, b: usize) -> usize {
    b.next_multiple_of(flow.row_pieces())
}

/// This rank's piece [M, D] of the residual stream of `tokens`, padding included.
pub(crate) fn stream_shape(flow: &Flow, tokens: &Tokens, width: usize) -> [usize; 2] {
    let rows = tokens.padded(flow).local(flow, flow.outer.rows).ids.len();
    [rows, Held::plainly(Dim::plain(width), flow.outer.cols).local_len(&flow.mesh)]
}

/// Which rows of this rank's piece of the residual stream are `tokens`; the others are padding: whole
/// rows of a batch, and the ends of rows that are cut among context ranks.
pub(crate) fn real_rows(flow: &Flow, tokens: &Tokens) -> Real {
    let (cut, context) = (flow.outer.rows, ZigZag::of(&flow.mesh));
    let t = tokens.ids.len() / tokens.b.max(1);
    let (rows, each) =
        (rows_of(flow, tokens.b) / cut.pieces(&flow.mesh), context.padded(t) / context.ranks());
    let here = tokens.b.saturating_sub(cut.index(&flow.mesh) * rows).min(rows);
    let runs = context.real(t);
    let run = |(row, run): (usize, &Range<usize>)| row * each + run.start..row * each + run.end;
    Real::of((0..here).flat_map(|row| runs.iter().map(move |run| (row, run))).map(run))
}

/// The tokens of padded ones that attention has on this rank.
pub(crate) fn attended(flow: &Flow, tokens: &Tokens) -> Tokens {
    tokens.local(flow, flow.part(Pair::Attention).inner.rows)
}

/// The run of `x` that is this rank's piece of `cut`.
pub(crate) fn part_of<'a>(flow: &Flow, cut: Cut, x: &'a [u32]) -> &'a [u32] {
    let each = x.len() / cut.pieces(&flow.mesh);
    &x[cut.index(&flow.mesh) * each..][..each]
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
    product: Product,
    weight: ParamRef,
    bias: Option<ParamRef>,
    /// Where its part of the layer does not lie as the residual stream does.
    way: Option<Way>,
}

/// From the residual stream into the layout of a part, or back.
#[derive(Clone, Debug)]
enum Way {
    In(Redistribution),
    Out(Redistribution),
}

/// What a `Linear` is before it has parameters.
pub(crate) struct LinearSpec {
    pub name: String,
    pub inputs: Dim,
    pub outputs: Dim,
    pub bias: bool,
    /// Standard deviation of the initial weights.
    pub std: f32,
    /// Hugging Face tensors that make up the weight, from the first output row on: (name, rows).
    pub parts: Vec<(String, usize)>,
    pub place: Place,
    /// Whose scheme it follows.
    pub pair: Pair,
}

impl Linear {
    /// From the residual stream into the inner width.
    pub(crate) fn opening(spec: &LinearSpec, builder: &mut Builder) -> Result<Linear, ConfigError> {
        let part = builder.flow.part(spec.pair);
        let weighted = part.opening(spec.outputs.clone(), spec.inputs.clone())?;
        let way = Redistribution::new(&builder.flow, &part, spec.inputs.len())?;
        Ok(Linear::with(spec, weighted, way.map(Way::In), builder))
    }

    /// From the inner width back into the residual stream.
    pub(crate) fn closing(spec: &LinearSpec, builder: &mut Builder) -> Result<Linear, ConfigError> {
        let part = builder.flow.part(spec.pair);
        let weighted = part.closing(spec.outputs.clone(), spec.inputs.clone())?;
        let way = Redistribution::new(&builder.flow, &part, spec.outputs.len())?;
        Ok(Linear::with(spec, weighted, way.map(Way::Out), builder))
    }

    fn with(spec: &LinearSpec, weighted: Weighted, way: Option<Way>, builder: &mut Builder) -> Linear {
        let weight = builder.matrix(spec, &weighted);
        let bias = spec.bias.then(|| builder.bias(spec, &weighted));
        Linear { product: weighted.product, weight, bias, way }
    }

    /// x [M, in] (+ residual [M, out]) -> [M, out].
    pub fn forward(&self, tape: &mut Tape<'_>, x: &Var, residual: Option<&Var>) -> Result<Var, Fault> {
        let multiply = |tape: &mut Tape<'_>, x: &Var, residual| {
            dist::matmul(tape, &self.product, x, (self.weight, self.bias), residual)
        };
        match &self.way {
            None => multiply(tape, x, residual),
            Some(Way::In(way)) => {
                let x = way.enter(tape, x)?;
                multiply(tape, &x, residual)
            }
            Some(Way::Out(way)) => {
                let y = multiply(tape, x, None)?;
                way.leave(tape, &y, residual)
            }
        }
    }

    fn is_local(&self) -> bool {
        self.product.is_local() && self.way.is_none()
    }

    /// gelu of x [M, in] -> [M, out].
    pub fn forward_gelu(&self, tape: &mut Tape<'_>, x: &Var, kind: GeluKind) -> Result<Var, Fault> {
        if self.is_local() {
            return tape.linear_gelu(x, self.weight, self.bias, kind);
        }
        let y = self.forward(tape, x, None)?;
        tape.gelu(&y, kind)
    }

    /// silu(gate) * up [M, in] of gate_up [M, 2 in], + residual [M, out] -> [M, out].
    pub fn forward_swiglu(&self, tape: &mut Tape<'_>, gate_up: &Var, residual: &Var) -> Result<Var, Fault> {
        if self.is_local() && self.bias.is_none() {
            return tape.swiglu_linear(gate_up, self.weight, residual);
        }
        let act = tape.swiglu(gate_up)?;
        self.forward(tape, &act, Some(residual))
    }
}

/// A norm over the residual stream, on any mesh.
#[derive(Clone, Debug)]
pub(crate) struct StreamNorm {
    norm: Norm,
    width: Width,
}

impl StreamNorm {
    pub fn new(norm: Norm, width: usize, flow: &Flow) -> StreamNorm {
        StreamNorm { norm, width: Width::new(&flow.mesh, flow.outer.cols, width) }
    }

    /// x [M, D] -> [M, D].
    pub fn forward(&self, tape: &mut Tape<'_>, x: &Var) -> Result<Var, Fault> {
        dist::norm(tape, &self.width, x, self.norm)
    }
}

/// Heads on one rank: whole groups of query heads with the kv head they share, padded to equal
/// numbers; a rank beyond the last group works on zeros.
pub(crate) fn local_heads(flow: &Flow, n: usize, k: usize) -> (usize, usize) {
    let inner = flow.part(Pair::Attention).inner;
    let groups = k.div_ceil(inner.cols.pieces(&flow.mesh));
    (groups * (n / k), groups)
}

/// The attention of one layer over a batch, or over a cache.
pub(crate) fn attend(
    tape: &mut Tape<'_>,
    qkv: Var,
    (context, shape): (&Context, &tensor::AttentionShape),
    cache: Option<&mut KvCache>,
) -> Result<Var, Fault> {
    match cache {
        None => context.attention(tape, qkv, shape),
        Some(cache) => tape.attention_cached(qkv, shape, cache),
    }
}
