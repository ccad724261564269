//! Routing tokens to experts and bringing them back: softmax and top-k of the router, and sums of
//! weighted rows. The experts' own products are `gemm` on runs of rows.
//!
//! Letters: M tokens, E experts, k experts a token goes to, S = M k slots: pairs (token, choice)
//! ordered by expert, by token among equals. Pair m k + j is token m's j-th choice.

mod cpu;
mod cuda;
#[cfg(test)]
mod reference;
#[cfg(test)]
mod tests;

use device::{Device, View, ViewMut};

/// Logits [M, E] f32 become probabilities in place; `ids` [M, k] are the k likeliest experts of each
/// token, likeliest first (of equals the first expert), `weights` [M, k] f32 their probabilities, or
/// their shares of the chosen probability when `normalise`.
pub fn route(logits: ViewMut<'_>, experts: usize, ids: &mut [u32], weights: ViewMut<'_>, normalise: bool) {
    assert!(ids.len() == weights.len() && experts > 0, "choices");
    let tokens = logits.len() / experts;
    assert!(ids.is_empty() || ids.len() / tokens <= experts, "more choices than experts");
    match logits.device() {
        Device::Cpu => cpu::route(logits.f32(), experts, ids, weights.f32(), normalise),
        Device::Cuda => unreachable!("experts are chosen on the host"),
    }
}

/// dlogits [M, E] f32 from dweights [M, k] f32, the probabilities [M, E] and `pull` [E], the
/// gradient of a loss with respect to every token's probability of each expert.
pub fn route_backward(
    probabilities: View<'_>,
    ids: &[u32],
    dweights: View<'_>,
    pull: &[f32],
    normalise: bool,
    dlogits: ViewMut<'_>,
) {
    assert!(ids.len() == dweights.len() && probabilities.len() == dlogits.len(), "gradients");
    match dlogits.device() {
        Device::Cpu => {
            cpu::route_backward(probabilities.f32(), ids, dweights.f32(), pull, normalise, dlogits.f32())
        }
        Device::Cuda => unreachable!("experts are chosen on the host"),
    }
}

/// y [M, D] = residual [M, D] + sum over j of weights[m, j] rows[slot_of[m, j]], for rows [S, D];
/// without weights they are 1, without residual 0.
pub fn combine(
    rows: View<'_>,
    d: usize,
    slot_of: &[u32],
    weights: Option<View<'_>>,
    residual: Option<View<'_>>,
    y: ViewMut<'_>,
) {
    let tokens = y.len() / d.max(1);
    assert!(tokens == 0 || slot_of.len().is_multiple_of(tokens), "choices");
    let top = slot_of.iter().copied().max().map_or(0, |slot| slot as usize + 1);
    assert!(top * d <= rows.len(), "slot {top} of {} rows", rows.len() / d.max(1));
    assert!(weights.is_none_or(|w| w.len() == slot_of.len()), "weights");
    assert!(residual.is_none_or(|r| r.len() == y.len()), "residual");
    match y.device() {
        Device::Cpu => cpu::combine(rows, d, slot_of, weights.map(|w| w.f32()), residual, y),
        Device::Cuda => cuda::combine(rows, d, slot_of, weights, residual, y),
    }
}

/// Gradients of `combine`: drows [S, D] and, by slot, dweights [S] f32, from dy [M, D].
pub fn combine_backward(
    dy: View<'_>,
    d: usize,
    pair_of: &[u32],
    (weights, choices): (View<'_>, usize),
    rows: View<'_>,
    drows: ViewMut<'_>,
    dweights: ViewMut<'_>,
) {
    assert!(rows.len() == drows.len() && rows.len() == pair_of.len() * d, "rows");
    assert!(dweights.len() == pair_of.len() && weights.len() == pair_of.len(), "weights");
    match dy.device() {
        Device::Cpu => {
            cpu::combine_backward(dy, d, pair_of, (weights.f32(), choices), rows, drows, dweights.f32())
        }
        Device::Cuda => cuda::combine_backward(dy, d, pair_of, (weights, choices), rows, drows, dweights),
    }
}
