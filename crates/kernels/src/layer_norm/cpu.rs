use crate::simd::{Float, Open, lane_sum, reduce_rows, rows_per_task, widened};
use device::{View, ViewMut};

pub(super) fn forward(
    x: View<'_>,
    w: View<'_>,
    b: View<'_>,
    eps: f32,
    y: ViewMut<'_>,
    mean: ViewMut<'_>,
    inv_std: ViewMut<'_>,
) {
    let (w, b) = (&widened(w), &widened(b));
    let d = w.len();
    let rows = rows_per_task(d);
    let mut stats = vec![(0f32, 0f32); inv_std.len()];
    by_dtype!(x, T => {
        let (x, y) = (T::open(x), T::open_mut(y));
        device::for_each_part((y, rows * d), (&mut stats, rows), |i, y, stats| {
            let x = &x[i * rows * d..][..y.len()];
            for ((x, y), stats) in x.chunks_exact(d).zip(y.chunks_exact_mut(d)).zip(stats) {
                *stats = row(x, w, b, eps, y);
            }
        });
    });
    for (((m, inv), mean), inv_std) in stats.iter().zip(mean.f32()).zip(inv_std.f32()) {
        (*mean, *inv_std) = (*m, *inv);
    }
}

multiversion! {
    fn row<T: Float>(x: &[T], w: &[f32], b: &[f32], eps: f32, y: &mut [T]) -> (f32, f32) {
        let d = w.len();
        let (x, y, b) = (&x[..d], &mut y[..d], &b[..d]);
        let mean = lane_sum(d, |j| x[j].to_f32()) / d as f32;
        // Two passes: subtracting squares of large means would cancel.
        let var = lane_sum(d, |j| (x[j].to_f32() - mean) * (x[j].to_f32() - mean)) / d as f32;
        let inv = 1.0 / (var + eps).sqrt();
        for j in 0..d {
            y[j] = T::from_f32((x[j].to_f32() - mean) * inv * w[j] + b[j]);
        }
        (mean, inv)
    }
}

pub(super) fn backward(
    x: View<'_>,
    w: View<'_>,
    mean: View<'_>,
    inv_std: View<'_>,
    dy: View<'_>,
    carried: Option<View<'_>>,
    dx: ViewMut<'_>,
    dw: ViewMut<'_>,
    db: ViewMut<'_>,
) {
    let (w, mean, inv) = (&widened(w), mean.f32(), inv_std.f32());
    let d = w.len();
    let mut sums = vec![0f32; 2 * d];
    by_dtype!(x, T => {
        let (x, dy, carried, dx) = (T::open(x), T::open(dy), carried.map(T::open), T::open_mut(dx));
        let rows = rows_per_task(d);
        device::for_each_part((dx, rows * d), (&mut [] as &mut [u8], 0), |i, dx, _| {
            for (r, dx) in dx.chunks_exact_mut(d).enumerate() {
                let row = i * rows + r;
                let at = row * d..(row + 1) * d;
                let carried = carried.map(|c| &c[at.clone()]);
                row_back(&x[at.clone()], w, (mean[row], inv[row]), &dy[at], carried, dx);
            }
        });
        reduce_rows(inv.len(), 2 * d, &mut sums, |range, sums| {
            for row in range {
                let at = row * d..(row + 1) * d;
                add_weight_grads(&x[at.clone()], &dy[at], (mean[row], inv[row]), sums);
            }
        });
    });
    for (j, (dw, db)) in dw.f32().iter_mut().zip(db.f32()).enumerate() {
        *dw += sums[j];
        *db += sums[d + j];
    }
}

multiversion! {
    fn row_back<T: Float>(
        x: &[T], w: &[f32], stats: (f32, f32), dy: &[T], carried: Option<&[T]>, dx: &mut [T],
    ) {
        let d = w.len();
        let (x, dy, dx) = (&x[..d], &dy[..d], &mut dx[..d]);
        let (mean, inv) = stats;
        let sum = lane_sum(d, |j| dy[j].to_f32() * w[j]) / d as f32;
        let along = lane_sum(d, |j| dy[j].to_f32() * w[j] * (x[j].to_f32() - mean) * inv) / d as f32;
        let back = |j: usize| {
            let normed = (x[j].to_f32() - mean) * inv;
            (dy[j].to_f32() * w[j] - sum - normed * along) * inv
        };
        match carried {
            Some(carried) => {
                let carried = &carried[..d];
                for j in 0..d {
                    dx[j] = T::from_f32(carried[j].to_f32() + back(j));
                }
            }
            None => {
                for j in 0..d {
                    dx[j] = T::from_f32(back(j));
                }
            }
        }
    }
}

multiversion! {
    fn add_weight_grads<T: Float>(x: &[T], dy: &[T], stats: (f32, f32), sums: &mut [f32]) {
        let d = sums.len() / 2;
        let (x, dy) = (&x[..d], &dy[..d]);
        let (dw, db) = sums.split_at_mut(d);
        let db = &mut db[..d];
        for j in 0..d {
            dw[j] += dy[j].to_f32() * (x[j].to_f32() - stats.0) * stats.1;
            db[j] += dy[j].to_f32();
        }
    }
}
