use super::{GeluKind, gelu, slope};
use crate::simd::{Float, Open};
use device::{View, ViewMut};

const CHUNK: usize = 1 << 15;

pub(super) fn forward(kind: GeluKind, x: View<'_>, y: ViewMut<'_>) {
    by_dtype!(x, T => {
        let x = T::open(x);
        device::for_each_part((T::open_mut(y), CHUNK), (&mut [] as &mut [u8], 0), |i, y, _| {
            run(kind, &x[i * CHUNK..][..y.len()], y);
        });
    });
}

multiversion! {
    fn run<T: Float>(kind: GeluKind, x: &[T], y: &mut [T]) {
        // The kind is a constant inside each loop, which would not vectorise around a branch.
        match kind {
            GeluKind::Tanh => {
                for (y, x) in y.iter_mut().zip(x) {
                    *y = T::from_f32(gelu(GeluKind::Tanh, x.to_f32()));
                }
            }
            GeluKind::Erf => {
                for (y, x) in y.iter_mut().zip(x) {
                    *y = T::from_f32(gelu(GeluKind::Erf, x.to_f32()));
                }
            }
        }
    }
}

pub(super) fn backward(kind: GeluKind, x: View<'_>, dy: View<'_>, dx: ViewMut<'_>) {
    by_dtype!(x, T => {
        let (x, dy) = (T::open(x), T::open(dy));
        device::for_each_part((T::open_mut(dx), CHUNK), (&mut [] as &mut [u8], 0), |i, dx, _| {
            let at = i * CHUNK..i * CHUNK + dx.len();
            run_back(kind, &x[at.clone()], &dy[at], dx);
        });
    });
}

multiversion! {
    fn run_back<T: Float>(kind: GeluKind, x: &[T], dy: &[T], dx: &mut [T]) {
        match kind {
            GeluKind::Tanh => {
                for ((dx, x), dy) in dx.iter_mut().zip(x).zip(dy) {
                    *dx = T::from_f32(dy.to_f32() * slope(GeluKind::Tanh, x.to_f32()));
                }
            }
            GeluKind::Erf => {
                for ((dx, x), dy) in dx.iter_mut().zip(x).zip(dy) {
                    *dx = T::from_f32(dy.to_f32() * slope(GeluKind::Erf, x.to_f32()));
                }
            }
        }
    }
}
