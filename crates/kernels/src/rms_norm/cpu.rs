use crate::simd::{Float, Open, lane_sum, reduce_rows, rows_per_task, widened};
use device::{View, ViewMut};

pub(super) fn forward(x: View<'_>, w: View<'_>, eps: f32, y: ViewMut<'_>, inv_rms: ViewMut<'_>) {
    let w = &widened(w);
    by_dtype!(x, T => {
        let (x, y, d) = (T::open(x), T::open_mut(y), w.len());
        let rows = rows_per_task(d);
        device::for_each_part((y, rows * d), (inv_rms.f32(), rows), |i, y, inv| {
            let x = &x[i * rows * d..][..y.len()];
            for ((x, y), inv) in x.chunks_exact(d).zip(y.chunks_exact_mut(d)).zip(inv) {
                *inv = row(x, w, eps, y);
            }
        });
    });
}

multiversion! {
    fn row<T: Float>(x: &[T], w: &[f32], eps: f32, y: &mut [T]) -> f32 {
        let d = w.len();
        let (x, y) = (&x[..d], &mut y[..d]);
        let squares = lane_sum(d, |j| x[j].to_f32() * x[j].to_f32());
        let inv = 1.0 / (squares / d as f32 + eps).sqrt();
        for j in 0..d {
            y[j] = T::from_f32(x[j].to_f32() * inv * w[j]);
        }
        inv
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
    let (w, inv) = (&widened(w), inv_rms.f32());
    let d = w.len();
    by_dtype!(x, T => {
        let (x, dy, carried, dx) = (T::open(x), T::open(dy), carried.map(T::open), T::open_mut(dx));
        let rows = rows_per_task(d);
        device::for_each_part((dx, rows * d), (&mut [] as &mut [u8], 0), |i, dx, _| {
            for (r, dx) in dx.chunks_exact_mut(d).enumerate() {
                let row = i * rows + r;
                let at = row * d..(row + 1) * d;
                let carried = carried.map(|c| &c[at.clone()]);
                row_back(&x[at.clone()], w, inv[row], &dy[at], carried, dx);
            }
        });
        reduce_rows(inv.len(), d, dw.f32(), |range, dw| {
            for row in range {
                add_weight_grad(&x[row * d..][..d], &dy[row * d..][..d], inv[row], dw);
            }
        });
    });
}

multiversion! {
    fn row_back<T: Float>(
        x: &[T], w: &[f32], inv: f32, dy: &[T], carried: Option<&[T]>, dx: &mut [T],
    ) {
        let d = w.len();
        let (x, dy, dx) = (&x[..d], &dy[..d], &mut dx[..d]);
        let along = lane_sum(d, |j| dy[j].to_f32() * w[j] * x[j].to_f32());
        let c = along * inv * inv * inv / d as f32;
        match carried {
            Some(carried) => {
                let carried = &carried[..d];
                for j in 0..d {
                    let back = dy[j].to_f32() * w[j] * inv - x[j].to_f32() * c;
                    dx[j] = T::from_f32(carried[j].to_f32() + back);
                }
            }
            None => {
                for j in 0..d {
                    dx[j] = T::from_f32(dy[j].to_f32() * w[j] * inv - x[j].to_f32() * c);
                }
            }
        }
    }
}

multiversion! {
    fn add_weight_grad<T: Float>(x: &[T], dy: &[T], inv: f32, dw: &mut [f32]) {
        let d = dw.len();
        let (x, dy) = (&x[..d], &dy[..d]);
        for j in 0..d {
            dw[j] += dy[j].to_f32() * x[j].to_f32() * inv;
        }
    }
}
