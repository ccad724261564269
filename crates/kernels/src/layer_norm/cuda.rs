use crate::cuda::launch;
use crate::cuda::rows::{Sums, kernel};
use device::{View, ViewMut};

pub(super) fn forward(
    x: View<'_>,
    w: View<'_>,
    b: View<'_>,
    eps: f32,
    y: ViewMut<'_>,
    mean: ViewMut<'_>,
    inv_std: ViewMut<'_>,
) {
    let (rows, d) = (inv_std.len(), w.len());
    launch(&kernel("layer_norm_forward", d, &[x, y.as_view()], &[w, b]))
        .read(x)
        .read(w)
        .read(b)
        .write(&y)
        .write(&mean)
        .write(&inv_std)
        .over_teams(rows, d)
        .u32(rows)
        .u32(d)
        .f32(eps)
        .run();
}

pub(super) fn backward(
    x: View<'_>,
    w: View<'_>,
    mean: View<'_>,
    inv_std: View<'_>,
    dy: View<'_>,
    carried: Option<View<'_>>,
    dx: ViewMut<'_>,
    dw: ViewMut<'_>,
    db: ViewMut<'_>,
) {
    let (rows, d) = (inv_std.len(), w.len());
    if rows == 0 {
        return;
    }
    let sums = Sums::new(rows, d, 2);
    launch(&kernel("layer_norm_backward", d, &[x, dy, dx.as_view(), carried.unwrap_or(x)], &[w]))
        .read(x)
        .read(w)
        .read(mean)
        .read(inv_std)
        .read(dy)
        .optional(carried)
        .write(&dx)
        .summing(&sums)
        .u32(rows)
        .u32(d)
        .run();
    sums.add_to(&dw, Some(&db));
}
