//! Causal attention in blocks with an online softmax (Dao et al. 2022): grouped heads, packed
//! documents, sliding windows; a matrix of all scores never exists.

mod backward;
mod decode;
mod forward;
#[cfg(test)]
mod reference;
mod softmax;
#[cfg(test)]
mod tests;

use crate::gemm::Mat;
use device::{Device, View, ViewMut};

/// b rows of the batch, t queries and s keys a row, n query heads, k kv heads, h head dim.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Shape {
    /// Rows of the batch.
    pub b: usize,
    /// Queries a row.
    pub t: usize,
    /// Keys a row, at least `t`: the queries are the last ones.
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

/// Which keys a query sees, beside the causal rule (key <= query + s - t).
#[derive(Clone, Copy, Default)]
pub struct Mask<'a> {
    /// Index, in its row, of the first key of each query's document; non-decreasing. [b * t]
    pub starts: Option<&'a [u32]>,
    /// A query sees at most this many keys, itself included.
    pub window: Option<usize>,
}

impl Mask<'_> {
    /// Keys `[from, to)` seen by query `q` of row `row`.
    fn visible(&self, shape: &Shape, row: usize, q: usize) -> (usize, usize) {
        let to = q + shape.s - shape.t + 1;
        let document = self.starts.map_or(0, |starts| starts[row * shape.t + q] as usize);
        let window = self.window.map_or(0, |window| to.saturating_sub(window));
        (document.max(window).min(to), to)
    }
}

fn check(shape: &Shape, q: &Heads<'_>, k: &Heads<'_>, v: &Heads<'_>, mask: &Mask<'_>) {
    let Shape { b, t, s, n, k: kv, h } = *shape;
    assert!(kv > 0 && n.is_multiple_of(kv) && s >= t && h > 0, "{shape:?}");
    q.check("q", b, t, n * h);
    k.check("k", b, s, kv * h);
    v.check("v", b, s, kv * h);
    if let Some(starts) = mask.starts {
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
    check(&shape, &q, &k, &v, &mask);
    assert!(out.len() == shape.b * shape.t * shape.n * shape.h && lse.len() == shape.b * shape.n * shape.t);
    match out.device() {
        Device::Cpu if shape.t <= decode::QUERIES => decode::forward(shape, (q, k, v), mask, scale, out, lse),
        Device::Cpu => forward::forward(shape, (q, k, v), mask, scale, out, lse),
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
    check(&shape, &q, &k, &v, &mask);
    assert_eq!(shape.s, shape.t, "the way back needs every query");
    let tokens = shape.b * shape.t;
    assert!(out.len() == tokens * shape.n * shape.h && dout.len() == out.len());
    assert_eq!(dqkv.len(), tokens * (shape.n + 2 * shape.k) * shape.h, "dqkv");
    match dqkv.device() {
        Device::Cpu => backward::backward(shape, (q, k, v), mask, scale, (out, lse, dout), dqkv),
    }
}
