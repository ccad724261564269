use crate::rows::{Parts, Widened, rows_per_task, with_sums};
use crate::simd::{Float, Open, lane_sum_of, lane_sums_of};
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
    let (w, b): (&[f32], &[f32]) = (&Widened::new(w), &Widened::new(b));
    let d = w.len();
    let rows = rows_per_task(d);
    let inv_std = Parts::new(inv_std.f32());
    by_dtype!(x, T => {
        let x = T::open(x);
        device::for_each_part((T::open_mut(y), rows * d), (mean.f32(), rows), |i, y, mean| {
            // SAFETY: each task takes the rows of its own part.
            let inv_std = unsafe { inv_std.part(i * rows..i * rows + mean.len()) };
            run(&x[i * rows * d..][..y.len()], w, b, eps, y, (mean, inv_std));
        });
    });
}

multiversion! {
    fn run<T: Float>(
        x: &[T], w: &[f32], b: &[f32], eps: f32, y: &mut [T], stats: (&mut [f32], &mut [f32]),
    ) {
        let d = w.len();
        let stats = stats.0.iter_mut().zip(stats.1);
        for ((x, y), (mean_out, inv_out)) in x.chunks_exact(d).zip(y.chunks_exact_mut(d)).zip(stats) {
            let mean = lane_sum_of(x, |x| x) / d as f32;
            // Two passes: subtracting squares of large means would cancel.
            let var = lane_sum_of(x, |x| (x - mean) * (x - mean)) / d as f32;
            let inv = 1.0 / (var + eps).sqrt();
            for (((y, x), w), b) in y.iter_mut().zip(x).zip(w).zip(b) {
                *y = T::from_f32((x.to_f32() - mean) * inv * w + b);
            }
            (*mean_out, *inv_out) = (mean, inv);
        }
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
    let (w, mean, inv): (&[f32], _, _) = (&Widened::new(w), mean.f32(), inv_std.f32());
    let d = w.len();
    by_dtype!(x, T => {
        let (x, dy, carried) = (T::open(x), T::open(dy), carried.map(T::open));
        with_sums((T::open_mut(dx), d), [dw.f32(), db.f32()], |first, dx, sums| {
            let at = first * d..first * d + dx.len();
            let carried = carried.map(|carried| &carried[at.clone()]);
            let stats = (&mean[first..], &inv[first..]);
            run_back(&x[at.clone()], w, stats, &dy[at], carried, dx, sums);
        });
    });
}

multiversion! {
    fn run_back<T: Float>(
        x: &[T], w: &[f32], stats: (&[f32], &[f32]), dy: &[T], carried: Option<&[T]>, dx: &mut [T],
        sums: &mut [f32],
    ) {
        let d = w.len();
        let (dw, db) = sums.split_at_mut(d);
        for (row, dx) in dx.chunks_exact_mut(d).enumerate() {
            let (at, mean, inv) = (row * d..(row + 1) * d, stats.0[row], stats.1[row]);
            let (x, dy, dw, db) = (&x[at.clone()], &dy[at.clone()], &mut dw[..d], &mut db[..d]);
            let (sum, along) =
                lane_sums_of((x, dy, w), |x, dy, w| (dy * w, dy * w * ((x - mean) * inv)));
            let (sum, along) = (sum / d as f32, along / d as f32);
            let mut back = |j: usize| {
                let (normed, dy) = ((x[j].to_f32() - mean) * inv, dy[j].to_f32());
                dw[j] += dy * normed;
                db[j] += dy;
                (dy * w[j] - sum - normed * along) * inv
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
