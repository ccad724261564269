//! Rotary positions and causal attention over packed q, k and v: in training over the batch
//! itself, in generation over a cache of keys and values.

use super::Op;
use crate::Fault;
use crate::tape::Grads;
use crate::{Tape, Tensor, Var};
use device::{DType, Device, View};
use kernels::attention::{Heads, Mask, Shape, backward, forward};
use kernels::gemm::{Mat, MatMut};
use kernels::rope::{self, RopeTable};
use std::sync::Arc;

pub use kernels::attention::WIDEST_ON_GPU;

/// What attention needs to know beside the values.
#[derive(Clone)]
pub struct AttentionShape {
    /// Rows of the batch; tokens per row are M / b.
    pub b: usize,
    /// Query heads.
    pub n: usize,
    /// Key and value heads.
    pub k: usize,
    /// Head dim.
    pub h: usize,
    /// Factor on the scores, usually 1/sqrt(H).
    pub scale: f32,
    /// A query sees at most this many keys, itself included.
    pub window: Option<usize>,
    /// Rotation angles, absent where positions are learnt.
    pub rope: Option<Arc<RopeTable>>,
    /// Position of each token in its document. [M]
    pub positions: Arc<[u32]>,
    /// Where each token's document begins within its row; absent: at 0. [M]
    pub starts: Option<Arc<[u32]>>,
}

impl AttentionShape {
    fn width(&self) -> usize {
        (self.n + 2 * self.k) * self.h
    }

    /// Heads of packed rows, from head `first_head` of q, k and v counted through.
    pub fn heads<'a>(&self, qkv: View<'a>, first_head: usize, rows_per_batch: usize) -> Heads<'a> {
        Heads { data: qkv, ld: self.width(), col: first_head * self.h, rows_per_batch }
    }

    /// Turns q and k of packed rows by their positions, or back.
    pub fn rotate(&self, qkv: &mut Tensor, inverse: bool) {
        if let Some(table) = &self.rope {
            let (ld, heads) = (self.width(), self.n + self.k);
            rope::apply(qkv.view_mut(), ld, heads, self.h, &self.positions, table, inverse);
        }
    }

    fn mask(&self) -> Mask<'_> {
        Mask { starts: self.starts.as_deref(), window: self.window }
    }
}

/// Keys and values of the tokens seen so far, for one layer.
pub struct KvCache {
    k: Tensor,
    v: Tensor,
    len: usize,
}

impl KvCache {
    /// Room for `capacity` tokens of one sequence with `width` = K * H.
    pub fn new(device: Device, dtype: DType, capacity: usize, width: usize) -> Result<KvCache, Fault> {
        let k = Tensor::zeros(device, dtype, &[capacity, width])?;
        let v = Tensor::zeros(device, dtype, &[capacity, width])?;
        Ok(KvCache { k, v, len: 0 })
    }

    /// Tokens held.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether nothing is held.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Forget every token from `len` on.
    pub fn truncate(&mut self, len: usize) {
        self.len = self.len.min(len);
    }

    fn append(&mut self, qkv: &Tensor, k_col: usize) {
        let (rows, width, ld) = (qkv.rows(), self.k.cols(), qkv.cols());
        for (cache, col) in [(&mut self.k, k_col), (&mut self.v, k_col + width)] {
            let from = Mat::new(qkv.view().narrow(col, qkv.len() - col), ld);
            let data = cache.view_mut().narrow(self.len * width, rows * width);
            kernels::block::copy(rows, width, from, MatMut { data, ld: width });
        }
        self.len += rows;
    }
}

pub(crate) struct Saved {
    /// After rotation. [M, (N+2K)H]
    qkv: Tensor,
    out: Tensor,
    lse: Tensor,
    shape: AttentionShape,
}

impl Saved {
    pub(crate) fn kept(&mut self) -> Vec<&mut Tensor> {
        vec![&mut self.qkv, &mut self.out]
    }
}

impl Tape<'_> {
    /// qkv [M, (N+2K)H] (q, then k, then v heads) -> [M, N*H]. Takes the value over, to rotate it
    /// in place.
    pub fn attention(&mut self, qkv: Var, shape: &AttentionShape) -> Result<Var, Fault> {
        self.moment("attention", &[])?;
        let Var { id, value: mut qkv } = qkv;
        if !qkv.is_unique() {
            qkv = qkv.duplicate()?;
        }
        shape.rotate(&mut qkv, false);
        let (m, t) = (qkv.rows(), qkv.rows() / shape.b);
        let mut out = Tensor::new(qkv.device(), qkv.dtype(), &[m, shape.n * shape.h])?;
        let mut lse = Tensor::new(qkv.device(), DType::F32, &[shape.b, shape.n, t])?;
        let sizes = Shape { b: shape.b, t, s: t, n: shape.n, k: shape.k, h: shape.h };
        let part = |head| shape.heads(qkv.view(), head, t);
        let (q, k, v) = (part(0), part(shape.n), part(shape.n + shape.k));
        forward(sizes, q, k, v, shape.mask(), shape.scale, out.view_mut(), lse.view_mut());
        let (kept, shape) = (out.clone(), shape.clone());
        Ok(self.push(&[id], out, || Op::Attention(Saved { qkv, out: kept, lse, shape })))
    }

    /// The same for new tokens of one sequence (b = 1) after those in the cache, which grows.
    /// Leaves no node. Panics when the cache is full: whoever schedules knows its capacity.
    pub fn attention_cached(
        &mut self,
        qkv: Var,
        shape: &AttentionShape,
        cache: &mut KvCache,
    ) -> Result<Var, Fault> {
        self.moment("attention", &[])?;
        let mut qkv = qkv.value;
        shape.rotate(&mut qkv, false);
        cache.append(&qkv, shape.n * shape.h);
        let (t, s, capacity) = (qkv.rows(), cache.len, cache.k.rows());
        let mut out = Tensor::new(qkv.device(), qkv.dtype(), &[t, shape.n * shape.h])?;
        let mut lse = Tensor::new(qkv.device(), DType::F32, &[1, shape.n, t])?;
        let sizes = Shape { b: 1, t, s, n: shape.n, k: shape.k, h: shape.h };
        let width = cache.k.cols();
        let cached = |data| Heads { data, ld: width, col: 0, rows_per_batch: capacity };
        let (q, k, v) = (shape.heads(qkv.view(), 0, t), cached(cache.k.view()), cached(cache.v.view()));
        forward(sizes, q, k, v, shape.mask(), shape.scale, out.view_mut(), lse.view_mut());
        Ok(self.input(out))
    }
}

impl Saved {
    pub(crate) fn backward(
        self,
        tape: &mut Tape<'_>,
        inputs: &[usize],
        dy: Tensor,
        grads: &mut Grads,
    ) -> Result<(), Fault> {
        tape.moment("attention", &[])?;
        let shape = &self.shape;
        let t = self.qkv.rows() / shape.b;
        let mut dqkv = Tensor::new(dy.device(), dy.dtype(), self.qkv.shape())?;
        let sizes = Shape { b: shape.b, t, s: t, n: shape.n, k: shape.k, h: shape.h };
        let part = |head| shape.heads(self.qkv.view(), head, t);
        let (q, k, v) = (part(0), part(shape.n), part(shape.n + shape.k));
        let (out, lse) = (self.out.view(), self.lse.view());
        backward(sizes, q, k, v, shape.mask(), shape.scale, out, lse, dy.view(), dqkv.view_mut());
        shape.rotate(&mut dqkv, true);
        grads.add(inputs[0], dqkv)
    }
}
