//! Sum over ranks block by block: a block of every term passes through a buffer in L1, so that
//! memory sees each element once on the way in and once on the way out.

use super::Part;
use crate::simd::{Float, Open};
use device::{View, ViewMut};

/// Elements of a block: 4 KiB of sums.
const BLOCK: usize = 1024;

pub(super) fn rank_sum<T>(parts: &mut [Part<'_>], len: usize)
where
    T: for<'a> Open<'a>,
{
    let mut sums = [0f32; BLOCK];
    for start in (0..len).step_by(BLOCK) {
        let sums = &mut sums[..BLOCK.min(len - start)];
        let mut first = true;
        for part in parts.iter() {
            let term: View<'_> = match part {
                Part::Term(view) => *view,
                Part::TermAndSum(view) => view.as_view(),
                Part::Sum(_) => continue,
            };
            let term = T::open(term.narrow(start, sums.len()));
            if first {
                widen(term, sums)
            } else {
                add(term, sums)
            }
            first = false;
        }
        for part in parts.iter_mut() {
            if let Part::TermAndSum(view) | Part::Sum(view) = part {
                let out: ViewMut<'_> = view.reborrow().narrow(start, sums.len());
                round(sums, T::open_mut(out));
            }
        }
    }
}

multiversion! {
    fn widen<T: Float>(x: &[T], sums: &mut [f32]) {
        for (sum, x) in sums.iter_mut().zip(x) {
            *sum = x.to_f32();
        }
    }
}

multiversion! {
    fn add<T: Float>(x: &[T], sums: &mut [f32]) {
        for (sum, x) in sums.iter_mut().zip(x) {
            *sum += x.to_f32();
        }
    }
}

multiversion! {
    fn round<T: Float>(sums: &[f32], out: &mut [T]) {
        for (out, sum) in out.iter_mut().zip(sums) {
            *out = T::from_f32(*sum);
        }
    }
}
