use super::IGNORE;
use crate::simd::{Float, LANES, Open, exp, lane_sum};
use device::{View, ViewMut};

pub(super) fn forward(logits: View<'_>, targets: &[u32], losses: ViewMut<'_>) {
    let v = logits.len() / targets.len().max(1);
    by_dtype!(logits, T => {
        let logits = T::open(logits);
        device::for_each_part((losses.f32(), 4), (&mut [] as &mut [u8], 0), |i, losses, _| {
            for (r, loss) in losses.iter_mut().enumerate() {
                let row = 4 * i + r;
                *loss = match targets[row] {
                    IGNORE => 0.0,
                    target => {
                        let x = &logits[row * v..][..v];
                        let top = largest(x);
                        sum_exp(x, top).ln() + top - x[target as usize].to_f32()
                    }
                };
            }
        });
    });
}

pub(super) fn forward_backward(logits: ViewMut<'_>, targets: &[u32], scale: f32, losses: ViewMut<'_>) {
    let v = logits.len() / targets.len().max(1);
    by_dtype!(logits, T => {
        device::for_each_part((losses.f32(), 4), (T::open_mut(logits), 4 * v), |i, losses, logits| {
            for ((r, loss), x) in losses.iter_mut().enumerate().zip(logits.chunks_exact_mut(v)) {
                let target = targets[4 * i + r];
                if target == IGNORE {
                    *loss = 0.0;
                    x.fill(T::from_f32(0.0));
                    continue;
                }
                let (target, top) = (target as usize, largest(x));
                let sum = sum_exp(x, top);
                let log_sum = sum.ln() + top;
                *loss = log_sum - x[target].to_f32();
                let hit = scale * (exp(x[target].to_f32() - top) / sum - 1.0);
                softmax(x, top, scale / sum);
                x[target] = T::from_f32(hit);
            }
        });
    });
}

multiversion! {
    fn largest<T: Float>(x: &[T]) -> f32 {
        let mut lanes = [f32::NEG_INFINITY; LANES];
        let mut poisoned = false;
        let (chunks, tail) = x.as_chunks::<LANES>();
        for chunk in chunks {
            for (lane, x) in lanes.iter_mut().zip(chunk) {
                let x = x.to_f32();
                *lane = if x > *lane { x } else { *lane };
                poisoned |= x.is_nan();
            }
        }
        for x in tail {
            let x = x.to_f32();
            lanes[0] = if x > lanes[0] { x } else { lanes[0] };
            poisoned |= x.is_nan();
        }
        // A NaN must reach the loss, where the guard of the training step sees it.
        if poisoned { f32::NAN } else { lanes.into_iter().fold(f32::NEG_INFINITY, f32::max) }
    }
}

multiversion! {
    fn sum_exp<T: Float>(x: &[T], top: f32) -> f32 {
        lane_sum(x.len(), |j| exp(x[j].to_f32() - top))
    }
}

multiversion! {
    fn softmax<T: Float>(x: &mut [T], top: f32, scale: f32) {
        for x in x.iter_mut() {
            *x = T::from_f32(scale * exp(x.to_f32() - top));
        }
    }
}
