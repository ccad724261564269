use super::IGNORE;
use crate::rows::rows_per_task;
use crate::simd::{Float, LANES, Open, exp, lane_sum_of};
use device::{View, ViewMut};

pub(super) fn forward(logits: View<'_>, targets: &[u32], losses: ViewMut<'_>) {
    let v = logits.len() / targets.len().max(1);
    let rows = rows_per_task(v);
    by_dtype!(logits, T => {
        let logits = T::open(logits);
        device::for_each_part((losses.f32(), rows), (&mut [] as &mut [u8], 0), |i, losses, _| {
            let logits = &logits[i * rows * v..][..losses.len() * v];
            run(logits, &targets[i * rows..], losses);
        });
    });
}

multiversion! {
    fn run<T: Float>(logits: &[T], targets: &[u32], losses: &mut [f32]) {
        let v = logits.len() / losses.len().max(1);
        for ((loss, x), target) in losses.iter_mut().zip(logits.chunks_exact(v)).zip(targets) {
            *loss = match *target {
                IGNORE => 0.0,
                target => {
                    let top = largest(x);
                    sum_exp(x, top).ln() + top - x[target as usize].to_f32()
                }
            };
        }
    }
}

pub(super) fn forward_backward(logits: ViewMut<'_>, targets: &[u32], scale: f32, losses: ViewMut<'_>) {
    let v = logits.len() / targets.len().max(1);
    let rows = rows_per_task(v);
    by_dtype!(logits, T => {
        let logits = T::open_mut(logits);
        device::for_each_part((losses.f32(), rows), (logits, rows * v), |i, losses, logits| {
            run_both(logits, &targets[i * rows..], scale, losses);
        });
    });
}

multiversion! {
    fn run_both<T: Float>(logits: &mut [T], targets: &[u32], scale: f32, losses: &mut [f32]) {
        let v = logits.len() / losses.len().max(1);
        for ((loss, x), target) in losses.iter_mut().zip(logits.chunks_exact_mut(v)).zip(targets) {
            if *target == IGNORE {
                *loss = 0.0;
                x.fill(T::from_f32(0.0));
                continue;
            }
            let (target, top) = (*target as usize, largest(x));
            let sum = sum_exp(x, top);
            *loss = sum.ln() + top - x[target].to_f32();
            // Before its rounding to T: 1 - p of a sure token would drown in it.
            let hit = scale * (exp(x[target].to_f32() - top) / sum - 1.0);
            let factor = scale / sum;
            for x in x.iter_mut() {
                *x = T::from_f32(factor * exp(x.to_f32() - top));
            }
            x[target] = T::from_f32(hit);
        }
    }
}

/// A NaN is passed over: `sum_exp` carries it to the loss, where the guard of the step sees it.
#[inline(always)]
fn largest<T: Float>(x: &[T]) -> f32 {
    let mut lanes = [f32::NEG_INFINITY; LANES];
    let (chunks, tail) = x.as_chunks::<LANES>();
    for x in chunks {
        for lane in 0..LANES {
            let x = x[lane].to_f32();
            lanes[lane] = if x > lanes[lane] { x } else { lanes[lane] };
        }
    }
    let top = lanes.into_iter().fold(f32::NEG_INFINITY, f32::max);
    tail.iter().fold(top, |top, x| top.max(x.to_f32()))
}

#[inline(always)]
fn sum_exp<T: Float>(x: &[T], top: f32) -> f32 {
    lane_sum_of(x, |x| exp(x - top))
}
