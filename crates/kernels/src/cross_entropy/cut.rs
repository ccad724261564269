//! The same over a vocabulary cut among ranks: each step works on the columns at hand, and the
//! ranks take the maximum, then the sums, of what the steps give.

mod cuda;

use super::cpu::{largest, narrow_in_place, sum_exp};
use super::{ELSEWHERE, IGNORE};
use crate::rows::rows_per_task;
use crate::simd::exp;
use device::{DType, Device, View, ViewMut};
use half::bf16;

/// Logits [M, V'] of a slice of the vocabulary, of whose columns `valid` are there, and what M
/// tokens should have said: a column, `ELSEWHERE` or `IGNORE`.
#[derive(Clone, Copy)]
pub struct Slice<'a> {
    /// [M]
    pub targets: &'a [u32],
    /// Columns that are not padding.
    pub valid: usize,
}

impl Slice<'_> {
    fn width(&self, logits: usize) -> usize {
        let v = logits / self.targets.len().max(1);
        assert!(v * self.targets.len() == logits && self.valid <= v, "logits");
        let fits = |t: &u32| *t == IGNORE || *t == ELSEWHERE || (*t as usize) < self.valid;
        debug_assert!(self.targets.iter().all(fits), "a target beyond {}", self.valid);
        v
    }
}

/// out [M] f32 = the largest logit of each row; minus infinity where there is none.
pub fn tops(logits: View<'_>, slice: Slice<'_>, out: ViewMut<'_>) {
    let v = slice.width(logits.len());
    let rows = rows_per_task(v);
    match logits.device() {
        Device::Cpu => {
            let logits = logits.f32();
            device::for_each_part((out.f32(), rows), (&mut [] as &mut [u8], 0), |i, out, _| {
                run_tops(&logits[i * rows * v..][..out.len() * v], slice.valid, out);
            });
        }
        Device::Cuda => cuda::tops(logits, slice.valid, out),
    }
}

/// out [M, 2] f32 = the sum of e^(x - top) of each row, and the target's x - top where it is here.
pub fn sums(logits: View<'_>, slice: Slice<'_>, tops: View<'_>, out: ViewMut<'_>) {
    let v = slice.width(logits.len());
    let rows = rows_per_task(v);
    match logits.device() {
        Device::Cpu => {
            let (logits, tops) = (logits.f32(), tops.f32());
            device::for_each_part((out.f32(), 2 * rows), (&mut [] as &mut [u8], 0), |i, out, _| {
                let logits = &logits[i * rows * v..][..out.len() / 2 * v];
                run_sums(logits, (&slice.targets[i * rows..], slice.valid), &tops[i * rows..], out);
            });
        }
        Device::Cuda => cuda::sums(logits, slice, tops, out),
    }
}

/// losses [M] f32 from the sums of whole rows.
pub fn losses(sums: View<'_>, targets: &[u32], out: ViewMut<'_>) {
    assert!(sums.len() == 2 * targets.len() && out.len() == targets.len(), "losses");
    if sums.device() == Device::Cuda {
        return cuda::losses(sums, targets, out);
    }
    let sums = sums.f32().chunks_exact(2);
    for ((loss, sums), target) in out.f32().iter_mut().zip(sums).zip(targets) {
        *loss = if *target == IGNORE { 0.0 } else { sums[0].ln() - sums[1] };
    }
}

/// Logits become their gradient `scale` * (softmax - one_hot(target)), laid out as
/// `forward_backward` does; `tops` and `sums` are those of whole rows. Padding becomes zero.
pub fn gradient(
    logits: ViewMut<'_>,
    slice: Slice<'_>,
    (tops, sums): (View<'_>, View<'_>),
    scale: f32,
    gradient: DType,
) {
    let v = slice.width(logits.len());
    let rows = rows_per_task(v);
    match logits.device() {
        Device::Cpu => {
            let (tops, sums) = (tops.f32(), sums.f32());
            let narrow = gradient == DType::Bf16;
            device::for_each_part((logits.f32(), rows * v), (&mut [] as &mut [u8], 0), |i, logits, _| {
                let stats = (&tops[i * rows..], &sums[2 * i * rows..]);
                run_gradient(logits, (&slice.targets[i * rows..], v, slice.valid), stats, scale, narrow);
            });
        }
        Device::Cuda => cuda::gradient(logits, slice, (tops, sums), (scale, gradient)),
    }
}

multiversion! {
    fn run_tops(logits: &[f32], valid: usize, out: &mut [f32]) {
        let v = logits.len() / out.len().max(1);
        for (x, top) in logits.chunks_exact(v).zip(out) {
            *top = largest(&x[..valid]);
        }
    }
}

multiversion! {
    fn run_sums(logits: &[f32], slice: (&[u32], usize), tops: &[f32], out: &mut [f32]) {
        let (targets, valid) = slice;
        let v = 2 * logits.len() / out.len().max(1);
        for (row, (x, out)) in logits.chunks_exact(v).zip(out.chunks_exact_mut(2)).enumerate() {
            let (target, top) = (targets[row], tops[row]);
            let here = target != IGNORE && target != ELSEWHERE;
            out[0] = sum_exp(&x[..valid], top);
            out[1] = if here { x[target as usize] - top } else { 0.0 };
        }
    }
}

multiversion! {
    fn run_gradient(
        logits: &mut [f32], slice: (&[u32], usize, usize), stats: (&[f32], &[f32]), scale: f32, narrow: bool,
    ) {
        let (targets, v, valid) = slice;
        for (row, x) in logits.chunks_exact_mut(v).enumerate() {
            let (target, top, sum) = (targets[row], stats.0[row], stats.1[2 * row]);
            if target == IGNORE {
                x.fill(0.0);
                continue;
            }
            x[valid..].fill(f32::NEG_INFINITY);
            let hit = (target != ELSEWHERE).then(|| scale * (exp(x[target as usize] - top) / sum - 1.0));
            let factor = scale / sum;
            if narrow {
                narrow_in_place(x, |x| factor * exp(x - top));
            } else {
                x.iter_mut().for_each(|x| *x = factor * exp(*x - top));
            }
            match hit {
                None => {}
                Some(hit) if narrow => {
                    let target = target as usize;
                    let (word, shift) = (&mut x[target / 2], target % 2 * 16);
                    let others = word.to_bits() & !(0xffff << shift);
                    *word = f32::from_bits(others | (bf16::from_f32(hit).to_bits() as u32) << shift);
                }
                Some(hit) => x[target as usize] = hit,
            }
        }
    }
}
