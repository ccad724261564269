use super::Heads;
use crate::cuda::rows::{Sums, kernel};
use crate::cuda::{Launch, launch};
use device::{View, ViewMut};

pub(super) fn forward(
    qkv: View<'_>,
    (wq, wk): (View<'_>, View<'_>),
    heads: Heads,
    eps: f32,
    out: ViewMut<'_>,
    inv_rms: ViewMut<'_>,
) {
    let rows = rows_of(qkv, heads);
    launch(&kernel("head_norm_forward", heads.h, &[qkv, out.as_view()], &[wq, wk]))
        .read(qkv)
        .read(wq)
        .read(wk)
        .write(&out)
        .write(&inv_rms)
        .over_teams(rows * (heads.n + 2 * heads.k), heads.h)
        .u32(rows)
        .heads(heads)
        .f32(eps)
        .run();
}

pub(super) fn backward(
    qkv: View<'_>,
    (wq, wk): (View<'_>, View<'_>),
    inv_rms: View<'_>,
    heads: Heads,
    dout: View<'_>,
    dqkv: ViewMut<'_>,
    (dwq, dwk): (ViewMut<'_>, ViewMut<'_>),
) {
    let rows = rows_of(qkv, heads);
    if rows == 0 {
        return;
    }
    let sums = Sums::new(rows * heads.n, heads.h, 2);
    launch(&kernel("head_norm_backward", heads.h, &[qkv, dout, dqkv.as_view()], &[wq, wk]))
        .read(qkv)
        .read(wq)
        .read(wk)
        .read(inv_rms)
        .read(dout)
        .write(&dqkv)
        .summing(&sums)
        .u32(rows)
        .heads(heads)
        .run();
    sums.add_to(&dwq, Some(&dwk));
}

/// Rows of a packed matrix, whose heads the kernels count in 32 bits.
fn rows_of(qkv: View<'_>, heads: Heads) -> usize {
    assert!(qkv.len() / heads.h <= 1 << 31, "{} heads", qkv.len() / heads.h);
    qkv.len() / heads.width()
}

impl Launch<'_> {
    fn heads(self, heads: Heads) -> Self {
        self.u32(heads.n).u32(heads.k).u32(heads.h)
    }
}
