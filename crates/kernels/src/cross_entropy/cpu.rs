use super::IGNORE;
use crate::rows::rows_per_task;
use crate::simd::{Float, LANES, exp, lane_sum_of};
use device::{DType, View, ViewMut};
use half::bf16;

pub(super) fn forward(logits: View<'_>, targets: &[u32], losses: ViewMut<'_>) {
    let v = logits.len() / targets.len().max(1);
    let rows = rows_per_task(v);
    let logits = logits.f32();
    device::for_each_part((losses.f32(), rows), (&mut [] as &mut [u8], 0), |i, losses, _| {
        let logits = &logits[i * rows * v..][..losses.len() * v];
        run(logits, &targets[i * rows..], losses);
    });
}

multiversion! {
    fn run(logits: &[f32], targets: &[u32], losses: &mut [f32]) {
        let v = logits.len() / losses.len().max(1);
        for ((loss, x), target) in losses.iter_mut().zip(logits.chunks_exact(v)).zip(targets) {
            *loss = match *target {
                IGNORE => 0.0,
                target => {
                    let top = largest(x);
                    sum_exp(x, top).ln() + top - x[target as usize]
                }
            };
        }
    }
}

pub(super) fn forward_backward(
    logits: ViewMut<'_>,
    targets: &[u32],
    scale: f32,
    losses: ViewMut<'_>,
    dtype: DType,
) {
    let v = logits.len() / targets.len().max(1);
    let rows = rows_per_task(v);
    device::for_each_part((losses.f32(), rows), (logits.f32(), rows * v), |i, losses, logits| {
        run_both(logits, &targets[i * rows..], scale, losses, dtype == DType::Bf16);
    });
}

multiversion! {
    fn run_both(logits: &mut [f32], targets: &[u32], scale: f32, losses: &mut [f32], narrow: bool) {
        let v = logits.len() / losses.len().max(1);
        for ((loss, x), target) in losses.iter_mut().zip(logits.chunks_exact_mut(v)).zip(targets) {
            if *target == IGNORE {
                *loss = 0.0;
                x.fill(0.0);
                continue;
            }
            let (target, top) = (*target as usize, largest(x));
            let sum = sum_exp(x, top);
            *loss = sum.ln() + top - x[target];
            // Before any rounding: 1 - p of a sure token would drown in it.
            let hit = scale * (exp(x[target] - top) / sum - 1.0);
            let factor = scale / sum;
            if narrow {
                narrow_in_place(x, |x| factor * exp(x - top));
                let (word, shift) = (&mut x[target / 2], target % 2 * 16);
                let others = word.to_bits() & !(0xffff << shift);
                *word = f32::from_bits(others | (bf16::from_f32(hit).to_bits() as u32) << shift);
            } else {
                x.iter_mut().for_each(|x| *x = factor * exp(*x - top));
                x[target] = hit;
            }
        }
    }
}

/// The first half of the bytes of `x` become `f` of its elements in bf16. A store never passes the
/// loads: element i moves from byte 4i to byte 2i.
#[inline(always)]
pub(super) fn narrow_in_place(x: &mut [f32], f: impl Fn(f32) -> f32) {
    let bits = |x: f32| <bf16 as Float>::from_f32(f(x)).to_bits() as u32;
    let pair = |low: f32, high: f32| f32::from_bits(bits(low) | bits(high) << 16);
    let whole = x.len() - x.len() % LANES;
    for at in (0..whole).step_by(LANES) {
        let from: [f32; LANES] = x[at..at + LANES].try_into().expect("a whole run");
        // A plain loop: what `from_fn` calls may be compiled apart, for no instruction set.
        let mut to = [0f32; LANES / 2];
        for (i, to) in to.iter_mut().enumerate() {
            *to = pair(from[2 * i], from[2 * i + 1]);
        }
        x[at / 2..at / 2 + LANES / 2].copy_from_slice(&to);
    }
    for at in (whole..x.len()).step_by(2) {
        let high = x.get(at + 1).map_or(0, |x| bits(*x));
        x[at / 2] = f32::from_bits(bits(x[at]) | high << 16);
    }
}

/// A NaN is passed over: `sum_exp` carries it to the loss, where the guard of the step sees it.
#[inline(always)]
pub(super) fn largest(x: &[f32]) -> f32 {
    let mut lanes = [f32::NEG_INFINITY; LANES];
    let (chunks, tail) = x.as_chunks::<LANES>();
    for x in chunks {
        for lane in 0..LANES {
            lanes[lane] = if x[lane] > lanes[lane] { x[lane] } else { lanes[lane] };
        }
    }
    let top = lanes.into_iter().fold(f32::NEG_INFINITY, f32::max);
    tail.iter().fold(top, |top, x| top.max(*x))
}

#[inline(always)]
pub(super) fn sum_exp(x: &[f32], top: f32) -> f32 {
    lane_sum_of(x, |x| exp(x - top))
}
