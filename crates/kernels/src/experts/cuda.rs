use crate::cuda::runs::run_of;
use crate::cuda::{launch, suffix};
use device::{View, ViewMut};

pub(super) fn combine(
    rows: View<'_>,
    d: usize,
    slot_of: &[u32],
    weights: Option<View<'_>>,
    residual: Option<View<'_>>,
    y: ViewMut<'_>,
) {
    let tokens = y.len() / d.max(1);
    launch(&format!("experts_combine_{}", suffix(rows.dtype())))
        .read(rows)
        .ids(slot_of)
        .optional(weights)
        .optional(residual)
        .write(&y)
        .u32(slot_of.len() / tokens.max(1))
        .over_rows(tokens, d, run_of(&[y.dtype()]))
        .run();
}

pub(super) fn combine_backward(
    dy: View<'_>,
    d: usize,
    pair_of: &[u32],
    (weights, choices): (View<'_>, usize),
    rows: View<'_>,
    drows: ViewMut<'_>,
    dweights: ViewMut<'_>,
) {
    launch(&format!("experts_combine_backward_{}", suffix(rows.dtype())))
        .grid(pair_of.len())
        .threads(d.div_ceil(run_of(&[rows.dtype()])).next_multiple_of(32).clamp(32, 256))
        .read(dy)
        .ids(pair_of)
        .read(weights)
        .read(rows)
        .write(&drows)
        .write(&dweights)
        .u32(choices)
        .u32(d)
        .run();
}
