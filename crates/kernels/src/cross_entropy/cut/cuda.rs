use super::Slice;
use crate::cuda::launch;
use device::{DType, View, ViewMut};

/// Threads of a row's block.
const THREADS: usize = 512;

pub(super) fn tops(logits: View<'_>, valid: usize, out: ViewMut<'_>) {
    let rows = out.len();
    launch("cross_entropy_cut_tops")
        .grid(rows)
        .threads(THREADS)
        .read(logits)
        .write(&out)
        .u32(logits.len() / rows.max(1))
        .u32(valid)
        .run();
}

pub(super) fn sums(logits: View<'_>, Slice { targets, valid }: Slice<'_>, tops: View<'_>, out: ViewMut<'_>) {
    launch("cross_entropy_cut_sums")
        .grid(targets.len())
        .threads(THREADS)
        .read(logits)
        .ids(targets)
        .read(tops)
        .write(&out)
        .u32(logits.len() / targets.len().max(1))
        .u32(valid)
        .run();
}

pub(super) fn losses(sums: View<'_>, targets: &[u32], out: ViewMut<'_>) {
    launch("cross_entropy_cut_losses").read(sums).ids(targets).write(&out).over(targets.len(), 1).run();
}

pub(super) fn gradient(
    logits: ViewMut<'_>,
    Slice { targets, valid }: Slice<'_>,
    (tops, sums): (View<'_>, View<'_>),
    (scale, gradient): (f32, DType),
) {
    launch("cross_entropy_cut_gradient")
        .grid(targets.len())
        .threads(THREADS)
        .write(&logits)
        .ids(targets)
        .read(tops)
        .read(sums)
        .u32(logits.len() / targets.len().max(1))
        .u32(valid)
        .f32(scale)
        .u32(usize::from(gradient == DType::Bf16))
        .run();
}
