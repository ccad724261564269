//! Context parallelism: the tokens of every row are cut among the ranks of the axis `cp`. Attention
//! alone looks at other tokens, so attention alone communicates: keys and values travel around a
//! ring (Liu et al. 2023), or heads are exchanged against tokens (Jacobs et al. 2023, Ulysses).
//! `docs/parallelism.md` has the counts of both.

mod exchange;
mod moved;
mod ring;
mod zigzag;

pub use moved::{HeadShare, Moved};
pub use zigzag::ZigZag;

use crate::{Axis, Group, Mesh};
use tensor::{AttentionShape, DType, Fault, Tape, Tensor, Var};

/// How attention sees the tokens of other context ranks.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum ContextAttention {
    /// All-to-all where the heads divide and it moves less, else the ring.
    #[default]
    Auto,
    /// Keys and values travel around the ranks, beside the computation.
    Ring,
    /// Each rank attends whole rows for its share of the heads.
    AllToAll,
}

impl ContextAttention {
    /// All of them.
    pub const ALL: [ContextAttention; 3] =
        [ContextAttention::Auto, ContextAttention::Ring, ContextAttention::AllToAll];

    /// Name as recipes write it.
    pub const fn name(self) -> &'static str {
        match self {
            ContextAttention::Auto => "auto",
            ContextAttention::Ring => "ring",
            ContextAttention::AllToAll => "all-to-all",
        }
    }

    /// What a name stands for.
    pub fn from_name(name: &str) -> Option<ContextAttention> {
        ContextAttention::ALL.into_iter().find(|method| method.name() == name)
    }

    /// The ring or the exchange, for the heads of one tensor rank.
    pub fn resolved(self, ranks: usize, (n, k): (usize, usize)) -> ContextAttention {
        match self {
            ContextAttention::Auto => Moved::auto(ranks, (n, k)),
            pinned => pinned,
        }
    }
}

/// The context axis as the attention of a layer sees it. Cheap to clone.
#[derive(Clone, Debug)]
pub struct Context {
    group: Group,
    cut: ZigZag,
    method: ContextAttention,
}

impl Context {
    /// The ranks of `mesh` along the context axis.
    pub fn new(mesh: &Mesh, method: ContextAttention) -> Context {
        Context { group: mesh.group(Axis::Cp), cut: ZigZag::of(mesh), method }
    }

    /// Causal attention over whole rows of which every rank has its run of tokens: qkv
    /// [M, (N+2K)H] -> [M, N*H]. Positions are of the tokens here, `shape.starts` of all tokens of
    /// the rows, as long as they were padded to. On one rank that is the plain op.
    pub fn attention(&self, tape: &mut Tape<'_>, qkv: Var, shape: &AttentionShape) -> Result<Var, Fault> {
        if self.group.size() == 1 {
            return tape.attention(qkv, shape);
        }
        match self.method.resolved(self.group.size(), (shape.n, shape.k)) {
            ContextAttention::AllToAll => {
                let qkv = rotated(tape, exchange::MOMENT, qkv, shape)?;
                exchange::attention(tape, self, qkv, shape)
            }
            _ => {
                let qkv = rotated(tape, ring::MOMENT, qkv, shape)?;
                ring::attention(tape, self, qkv, shape)
            }
        }
    }
}

/// Tell the moment and rotate queries and keys of a value that is then ours alone.
fn rotated(
    tape: &mut Tape<'_>,
    moment: &'static str,
    mut qkv: Var,
    shape: &AttentionShape,
) -> Result<Var, Fault> {
    tape.moment(moment, &[])?;
    if !qkv.value.is_unique() {
        qkv.value = qkv.value.duplicate()?;
    }
    shape.rotate(&mut qkv.value, false);
    Ok(qkv)
}

/// One f32 number a token, of `b` rows of `tokens` tokens, from what each context rank has of them: in
/// the order of the tokens, the same on every rank. [b * tokens, 1]
pub fn gather_context(mesh: &Mesh, x: &Tensor, b: usize, tokens: usize) -> Result<Tensor, Fault> {
    let cut = ZigZag::of(mesh);
    if cut.ranks() == 1 {
        return Ok(x.clone());
    }
    let mut all = Tensor::new(x.device(), DType::F32, &[cut.ranks() * x.len()])?;
    mesh.group(Axis::Cp).all_gather(x.view(), all.view_mut())?;
    let whole = cut.whole(&all.to_f32(), b, tokens);
    Ok(Tensor::from_f32(&whole, DType::F32, &[b * tokens, 1])?.on(x.device())?)
}
