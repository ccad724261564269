//! Softmax cross-entropy on a slice of logits, turned into its own gradient in place.

mod cpu;
mod cuda;
pub mod cut;
#[cfg(test)]
mod tests;

use device::{DType, Device, View, ViewMut};

/// A target that asks for nothing: its loss and gradient are zero.
pub const IGNORE: u32 = u32::MAX;

/// A target that lies in another rank's part of the vocabulary; `cut` knows it.
pub const ELSEWHERE: u32 = u32::MAX - 1;

/// losses [M] f32, in nats, of f32 logits [M, V] against targets [M].
pub fn forward(logits: View<'_>, targets: &[u32], losses: ViewMut<'_>) {
    check(logits.len(), targets, losses.len());
    match logits.device() {
        Device::Cpu => cpu::forward(logits, targets, losses),
        Device::Cuda => cuda::forward(logits, targets, losses),
    }
}

/// The same, and logits become their gradient `scale` * (softmax - one_hot(target)). In bf16 each
/// row of it fills the first half of the row's bytes: a bf16 matrix with leading dimension 2V.
pub fn forward_backward(
    logits: ViewMut<'_>,
    targets: &[u32],
    scale: f32,
    losses: ViewMut<'_>,
    gradient: DType,
) {
    check(logits.len(), targets, losses.len());
    match logits.device() {
        Device::Cpu => cpu::forward_backward(logits, targets, scale, losses, gradient),
        Device::Cuda => cuda::forward_backward(logits, targets, scale, losses, gradient),
    }
}

fn check(logits: usize, targets: &[u32], losses: usize) {
    assert_eq!(targets.len(), losses, "losses");
    let v = logits / targets.len().max(1);
    assert_eq!(v * targets.len(), logits, "logits");
    let worst = targets.iter().copied().filter(|t| *t != IGNORE).max().unwrap_or(0);
    assert!((worst as usize) < v.max(1), "target {worst} of a vocabulary of {v}");
}
