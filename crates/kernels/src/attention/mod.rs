//! Causal attention in blocks with an online softmax (Dao et al. 2022): grouped heads, packed
//! documents, sliding windows; a matrix of all scores never exists.

mod backward;
mod cuda;
mod decode;
mod forward;
mod merge;
#[cfg(test)]
mod parts_tests;
mod places;
#[cfg(test)]
mod reference;
mod softmax;
#[cfg(test)]
mod tests;

pub use merge::{merge, row_sums};
pub use places::{Places, Seen};

pub use cuda::MOST_COLUMNS as WIDEST_ON_GPU;

use crate::gemm::Mat;
use device::{DType, Device, View, ViewMut};

/// b rows of the batch, t queries and s keys a row, n query heads, k kv heads, h head dim.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Shape {
    /// Rows of the batch.
    pub b: usize,
    /// Queries a row.
    pub t: usize,
    /// Keys a row: at least `t`, the queries being the last ones, where no places are given.
    pub s: usize,
    /// Query heads.
    pub n: usize,
    /// Key and value heads; divides `n`.
    pub k: usize,
    /// Head dim.
    pub h: usize,
}

/// Heads inside a token-major matrix: head j of token p of batch row i is the `h` elements from
/// `data[(i * rows_per_batch + p) * ld + col + j * h]` on.
#[derive(Clone, Copy)]
pub struct Heads<'a> {
    /// The elements.
    pub data: View<'a>,
    /// Elements from one token to the next.
    pub ld: usize,
    /// Column of the first head.
    pub col: usize,
    /// Tokens from one batch row to the next.
    pub rows_per_batch: usize,
}

impl<'a> Heads<'a> {
    /// One head of one batch row as a matrix [tokens, h], from token `first` on.
    fn matrix(&self, row: usize, head: usize, h: usize, first: usize) -> Mat<'a> {
        let start = (row * self.rows_per_batch + first) * self.ld + self.col + head * h;
        Mat::new(self.data.narrow(start, self.data.len() - start), self.ld)
    }

    fn check(&self, what: &str, b: usize, tokens: usize, width: usize) {
        assert!(self.col + width <= self.ld && tokens <= self.rows_per_batch, "{what}");
        let need = if b * tokens == 0 { 0 } else { ((b - 1) * self.rows_per_batch + tokens) * self.ld };
        assert!(need <= self.data.len(), "{what}: needs {need} elements of {}", self.data.len());
    }
}

/// Which keys a query sees, beside the causal rule (keys up to its own place).
#[derive(Clone, Copy, Default)]
pub struct Mask<'a> {
    /// Place, in its row, of the first key of each query's document; non-decreasing. [b * t]
    pub starts: Option<&'a [u32]>,
    /// A query sees at most this many keys, itself included.
    pub window: Option<usize>,
}

/// q, k and v.
pub type Operands<'a> = (Heads<'a>, Heads<'a>, Heads<'a>);

fn check(shape: &Shape, (q, k, v): &Operands<'_>, seen: &Seen<'_>) {
    let Shape { b, t, s, n, k: kv, h } = *shape;
    assert!(kv > 0 && n.is_multiple_of(kv) && h > 0, "{shape:?}");
    assert!(seen.queries.len() == t && seen.keys.len() == s, "places of {t} queries and {s} keys");
    q.check("q", b, t, n * h);
    k.check("k", b, s, kv * h);
    v.check("v", b, s, kv * h);
    if let Some(starts) = seen.mask.starts {
        assert_eq!(starts.len(), b * t, "starts");
    }
}

/// out [b*t, n*h] of q, k, v; lse [b, n, t] f32 is the log of the sum of exponentials of the
/// scaled scores, which the backward pass needs. A query that sees nothing gets zeros and -inf.
pub fn forward(
    shape: Shape,
    q: Heads<'_>,
    k: Heads<'_>,
    v: Heads<'_>,
    mask: Mask<'_>,
    scale: f32,
    out: ViewMut<'_>,
    lse: ViewMut<'_>,
) {
    forward_part(shape, (q, k, v), Seen::last(mask, shape.t, shape.s), scale, (out, lse));
}

/// The same where queries and keys stand anywhere in their rows: softmax and sums go over the keys
/// at hand, and `merge` joins the outcomes of several parts of a row's keys. `out` may be f32 where
/// the values are bf16, so that it is rounded once, after the last part.
pub fn forward_part(
    shape: Shape,
    qkv: Operands<'_>,
    seen: Seen<'_>,
    scale: f32,
    (out, lse): (ViewMut<'_>, ViewMut<'_>),
) {
    check(&shape, &qkv, &seen);
    assert!(out.len() == shape.b * shape.t * shape.n * shape.h && lse.len() == shape.b * shape.n * shape.t);
    match out.device() {
        Device::Cpu if shape.t <= decode::QUERIES => decode::forward(shape, qkv, seen, scale, out, lse),
        Device::Cpu => forward::forward(shape, qkv, seen, scale, out, lse),
        Device::Cuda => cuda::forward(shape, qkv, seen, scale, (out, lse)),
    }
}

/// Gradients into one packed matrix dqkv [b*t, (n+2k)*h]: dq | dk | dv. Needs s = t.
pub fn backward(
    shape: Shape,
    q: Heads<'_>,
    k: Heads<'_>,
    v: Heads<'_>,
    mask: Mask<'_>,
    scale: f32,
    out: View<'_>,
    lse: View<'_>,
    dout: View<'_>,
    dqkv: ViewMut<'_>,
) {
    let (seen, qkv) = (Seen::last(mask, shape.t, shape.s), (q, k, v));
    check(&shape, &qkv, &seen);
    assert_eq!(shape.s, shape.t, "the way back needs every query");
    let tokens = shape.b * shape.t;
    assert!(out.len() == tokens * shape.n * shape.h && dout.len() == out.len());
    assert_eq!(dqkv.len(), tokens * (shape.n + 2 * shape.k) * shape.h, "dqkv");
    let task = (shape, qkv, seen, scale);
    match dqkv.device() {
        Device::Cpu => {
            let mut sums = vec![0f32; shape.b * shape.n * shape.t];
            row_sums(&shape, out, dout, ViewMut::of_f32(&mut sums));
            backward::packed(task, Given { lse, sums: View::of_f32(&sums), dout }, dqkv);
        }
        Device::Cuda => cuda::packed(task, [out, lse, dout], dqkv),
    }
}

/// What the way back of a part is given beside the operands.
#[derive(Clone, Copy)]
pub struct Given<'a> {
    /// Over all keys of each query, f32. [b, n, t]
    pub lse: View<'a>,
    /// `row_sums` of the whole output and its gradient, f32. [b, n, t]
    pub sums: View<'a>,
    /// Gradient of the output. [b*t, n*h]
    pub dout: View<'a>,
}

/// Adds what a part of the keys contributes: dq f32 [b*t, n*h], and dkv f32 [b*s, 2k*h] (dk | dv)
/// of the part. Over all parts of a row's keys that is the gradient.
pub fn backward_part(
    shape: Shape,
    qkv: Operands<'_>,
    seen: Seen<'_>,
    scale: f32,
    given: Given<'_>,
    (dq, dkv): (ViewMut<'_>, ViewMut<'_>),
) {
    check(&shape, &qkv, &seen);
    let Shape { b, t, s, n, k, h } = shape;
    assert!(given.dout.len() == b * t * n * h && given.lse.len() == b * n * t);
    assert!(given.sums.len() == b * n * t, "row sums");
    assert!(dq.len() == b * t * n * h && dkv.len() == b * s * 2 * k * h, "dq, dkv");
    assert!(dq.dtype() == DType::F32 && dkv.dtype() == DType::F32, "parts are added up in f32");
    match dq.device() {
        Device::Cpu => backward::parts((shape, qkv, seen, scale), given, (dq, dkv)),
        Device::Cuda => cuda::parts((shape, qkv, seen, scale), given, (dq, dkv)),
    }
}
