use crate::cuda::launch;
use device::{DType, View, ViewMut};

/// Threads of a row's block.
const THREADS: usize = 512;

pub(super) fn forward(logits: View<'_>, targets: &[u32], losses: ViewMut<'_>) {
    if targets.is_empty() {
        return;
    }
    launch("cross_entropy_forward")
        .grid(targets.len())
        .threads(THREADS)
        .read(logits)
        .ids(targets)
        .write(&losses)
        .u32(logits.len() / targets.len())
        .run();
}

pub(super) fn forward_backward(
    logits: ViewMut<'_>,
    targets: &[u32],
    scale: f32,
    losses: ViewMut<'_>,
    gradient: DType,
) {
    if targets.is_empty() {
        return;
    }
    launch("cross_entropy_forward_backward")
        .grid(targets.len())
        .threads(THREADS)
        .write(&logits)
        .ids(targets)
        .write(&losses)
        .u32(logits.len() / targets.len())
        .f32(scale)
        .u32(usize::from(gradient == DType::Bf16))
        .run();
}
