use crate::cuda::launch;
use crate::cuda::rows::{Sums, kernel};
use device::{View, ViewMut};

pub(super) fn forward(x: View<'_>, w: View<'_>, eps: f32, y: ViewMut<'_>, inv_rms: ViewMut<'_>) {
    let (rows, d) = (inv_rms.len(), w.len());
    launch(&kernel("rms_norm_forward", d, &[x, y.as_view()], &[w]))
        .read(x)
        .read(w)
        .write(&y)
        .write(&inv_rms)
        .over_teams(rows, d)
        .u32(rows)
        .u32(d)
        .f32(eps)
        .run();
}

pub(super) fn backward(
    x: View<'_>,
    w: View<'_>,
    inv_rms: View<'_>,
    dy: View<'_>,
    carried: Option<View<'_>>,
    dx: ViewMut<'_>,
    dw: ViewMut<'_>,
) {
    let (rows, d) = (inv_rms.len(), w.len());
    if rows == 0 {
        return;
    }
    let sums = Sums::new(rows, d, 1);
    launch(&kernel("rms_norm_backward", d, &[x, dy, dx.as_view(), carried.unwrap_or(x)], &[w]))
        .read(x)
        .read(w)
        .read(inv_rms)
        .read(dy)
        .optional(carried)
        .write(&dx)
        .summing(&sums)
        .u32(rows)
        .u32(d)
        .run();
    sums.add_to(&dw, None);
}
