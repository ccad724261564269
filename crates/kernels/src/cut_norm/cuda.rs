use super::{Rows, Sum};
use crate::cuda::rows::{self, Sums};
use crate::cuda::runs::run_of;
use crate::cuda::{launch, suffix};
use device::{DType, View, ViewMut};

pub(super) fn sums(x: View<'_>, sum: Sum<'_>, valid: usize, out: ViewMut<'_>) {
    let (rows, d) = (out.len(), x.len() / out.len().max(1));
    let (means, squares) = match sum {
        Sum::Values => (None, false),
        Sum::Squares => (None, true),
        Sum::Deviations(means) => (Some(means), true),
    };
    let ragged = if rows::lie_whole(d, &[x]) { "" } else { "_ragged" };
    launch(&format!("cut_norm_sums_{}{ragged}", suffix(x.dtype())))
        .read(x)
        .optional(means)
        .write(&out)
        .over_teams(rows, d)
        .u32(rows)
        .u32(d)
        .u32(valid)
        .u32(usize::from(squares))
        .run();
}

pub(super) fn invert(x: ViewMut<'_>, eps: f32) {
    assert_eq!(x.dtype(), DType::F32, "means");
    launch("cut_norm_invert").write(&x).over(x.len(), run_of(&[x.dtype()])).f32(eps).run();
}

pub(super) fn apply(Rows { x, w, mean, inv, valid }: Rows<'_>, b: Option<View<'_>>, y: ViewMut<'_>) {
    let (rows, d) = (inv.len(), w.len());
    launch(&rows::kernel("cut_norm_apply", d, &[x, y.as_view()], &[w, b.unwrap_or(w)]))
        .read(x)
        .read(w)
        .optional(b)
        .optional(mean)
        .read(inv)
        .write(&y)
        .over_teams(rows, d)
        .u32(rows)
        .u32(d)
        .u32(valid)
        .run();
}

pub(super) fn backward_sums(Rows { x, w, mean, inv, valid }: Rows<'_>, dy: View<'_>, out: ViewMut<'_>) {
    let (rows, d) = (inv.len(), w.len());
    launch(&rows::kernel("cut_norm_backward_sums", d, &[x, dy], &[w]))
        .read(x)
        .read(w)
        .optional(mean)
        .read(inv)
        .read(dy)
        .write(&out)
        .over_teams(rows, d)
        .u32(rows)
        .u32(d)
        .u32(valid)
        .run();
}

pub(super) fn backward(
    Rows { x, w, mean, inv, valid }: Rows<'_>,
    sums: View<'_>,
    (dy, carried): (View<'_>, Option<View<'_>>),
    dx: ViewMut<'_>,
    dw: ViewMut<'_>,
    db: Option<ViewMut<'_>>,
) {
    let (rows, d) = (inv.len(), w.len());
    if rows == 0 {
        return;
    }
    let totals = Sums::new(rows, d, 2);
    launch(&rows::kernel("cut_norm_backward", d, &[x, dy, dx.as_view(), carried.unwrap_or(x)], &[w]))
        .read(x)
        .read(w)
        .optional(mean)
        .read(inv)
        .read(sums)
        .read(dy)
        .optional(carried)
        .write(&dx)
        .summing(&totals)
        .u32(rows)
        .u32(d)
        .u32(valid)
        .run();
    totals.add_to(&dw, db.as_ref());
}
