use crate::rows::{Widened, rows_per_task, with_sums};
use crate::simd::{Float, Open, lane_sum_of, lane_sums_of};
use device::{View, ViewMut};

pub(super) fn forward(x: View<'_>, w: View<'_>, eps: f32, y: ViewMut<'_>, inv_rms: ViewMut<'_>) {
    let w: &[f32] = &Widened::new(w);
    let d = w.len();
    let rows = rows_per_task(d);
    by_dtype!(x, T => {
        let x = T::open(x);
        device::for_each_part((T::open_mut(y), rows * d), (inv_rms.f32(), rows), |i, y, inv| {
            run(&x[i * rows * d..][..y.len()], w, eps, y, inv);
        });
    });
}

multiversion! {
    fn run<T: Float>(x: &[T], w: &[f32], eps: f32, y: &mut [T], inv_rms: &mut [f32]) {
        let d = w.len();
        for ((x, y), inv) in x.chunks_exact(d).zip(y.chunks_exact_mut(d)).zip(inv_rms) {
            *inv = 1.0 / (lane_sum_of(x, |x| x * x) / d as f32 + eps).sqrt();
            for ((y, x), w) in y.iter_mut().zip(x).zip(w) {
                *y = T::from_f32(x.to_f32() * *inv * w);
            }
        }
    }
}

pub(super) fn backward(
    x: View<'_>,
    w: View<'_>,
    inv_rms: View<'_>,
    dy: View<'_>,
    carried: Option<View<'_>>,
    dx: ViewMut<'_>,
    dw: ViewMut<'_>,
) {
    let (w, inv): (&[f32], _) = (&Widened::new(w), inv_rms.f32());
    let d = w.len();
    by_dtype!(x, T => {
        let (x, dy, carried) = (T::open(x), T::open(dy), carried.map(T::open));
        with_sums((T::open_mut(dx), d), [dw.f32()], |first, dx, dw| {
            let at = first * d..first * d + dx.len();
            let carried = carried.map(|carried| &carried[at.clone()]);
            run_back(&x[at.clone()], w, &inv[first..], &dy[at], carried, dx, dw);
        });
    });
}

multiversion! {
    fn run_back<T: Float>(
        x: &[T], w: &[f32], inv_rms: &[f32], dy: &[T], carried: Option<&[T]>, dx: &mut [T], dw: &mut [f32],
    ) {
        let d = w.len();
        for (row, dx) in dx.chunks_exact_mut(d).enumerate() {
            let (at, inv) = (row * d..(row + 1) * d, inv_rms[row]);
            let (x, dy, dw) = (&x[at.clone()], &dy[at.clone()], &mut dw[..d]);
            let (along, _) = lane_sums_of((x, dy, w), |x, dy, w| (dy * w * x, 0.0));
            let c = along * inv * inv * inv / d as f32;
            let mut back = |j: usize| {
                let (x, dy) = (x[j].to_f32(), dy[j].to_f32());
                dw[j] += dy * x * inv;
                dy * w[j] * inv - x * c
            };
            match carried {
                Some(carried) => {
                    let carried = &carried[at];
                    for (j, (dx, carried)) in dx.iter_mut().zip(carried).enumerate() {
                        *dx = T::from_f32(carried.to_f32() + back(j));
                    }
                }
                None => {
                    for (j, dx) in dx.iter_mut().enumerate() {
                        *dx = T::from_f32(back(j));
                    }
                }
            }
        }
    }
}
