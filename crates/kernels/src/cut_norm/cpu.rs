use super::{Rows, Sum};
use crate::rows::{Widened, rows_per_task, with_sums};
use crate::simd::{Float, Open, lane_sum_of, lane_sums_of};
use device::{View, ViewMut};

pub(super) fn sums(x: View<'_>, sum: Sum<'_>, valid: usize, out: ViewMut<'_>) {
    let d = x.len() / out.len().max(1);
    let rows = rows_per_task(d);
    by_dtype!(x, T => {
        let x = T::open(x);
        device::for_each_part((out.f32(), rows), (&mut [] as &mut [u8], 0), |i, out, _| {
            let x = &x[i * rows * d..][..out.len() * d];
            match sum {
                Sum::Values => run_values(x, valid, out),
                Sum::Squares => run_deviations(x, None, valid, out),
                Sum::Deviations(mean) => run_deviations(x, Some(&mean.f32()[i * rows..]), valid, out),
            }
        });
    });
}

multiversion! {
    fn run_values<T: Float>(x: &[T], valid: usize, out: &mut [f32]) {
        let d = x.len() / out.len().max(1);
        for (x, out) in x.chunks_exact(d).zip(out) {
            *out = lane_sum_of(&x[..valid], |x| x);
        }
    }
}

multiversion! {
    fn run_deviations<T: Float>(x: &[T], mean: Option<&[f32]>, valid: usize, out: &mut [f32]) {
        let d = x.len() / out.len().max(1);
        for (row, (x, out)) in x.chunks_exact(d).zip(out).enumerate() {
            let mean = mean.map_or(0.0, |mean| mean[row]);
            *out = lane_sum_of(&x[..valid], |x| (x - mean) * (x - mean));
        }
    }
}

pub(super) fn apply(rows: Rows<'_>, b: Option<View<'_>>, y: ViewMut<'_>) {
    let w: &[f32] = &Widened::new(rows.w);
    let d = w.len();
    let b = b.map(Widened::new);
    let b = b.as_deref();
    let each = rows_per_task(d);
    let (mean, inv) = (rows.mean.map(|mean| mean.f32()), rows.inv.f32());
    by_dtype!(rows.x, T => {
        let x = T::open(rows.x);
        device::for_each_part((T::open_mut(y), each * d), (&mut [] as &mut [u8], 0), |i, y, _| {
            let (x, mean) = (&x[i * each * d..][..y.len()], mean.map(|mean| &mean[i * each..]));
            run(x, (w, b), (mean, &inv[i * each..]), rows.valid, y);
        });
    });
}

multiversion! {
    fn run<T: Float>(
        x: &[T], params: (&[f32], Option<&[f32]>), stats: (Option<&[f32]>, &[f32]), valid: usize, y: &mut [T],
    ) {
        let (w, b) = params;
        let d = w.len();
        for (row, (x, y)) in x.chunks_exact(d).zip(y.chunks_exact_mut(d)).enumerate() {
            let (mean, inv) = (stats.0.map_or(0.0, |mean| mean[row]), stats.1[row]);
            let (y, padding) = y.split_at_mut(valid);
            padding.fill(T::from_f32(0.0));
            match b {
                Some(b) => {
                    for (((y, x), w), b) in y.iter_mut().zip(x).zip(w).zip(b) {
                        *y = T::from_f32((x.to_f32() - mean) * inv * w + b);
                    }
                }
                None => {
                    for ((y, x), w) in y.iter_mut().zip(x).zip(w) {
                        *y = T::from_f32((x.to_f32() - mean) * inv * w);
                    }
                }
            }
        }
    }
}

pub(super) fn backward_sums(rows: Rows<'_>, dy: View<'_>, out: ViewMut<'_>) {
    let w: &[f32] = &Widened::new(rows.w);
    let d = w.len();
    let each = rows_per_task(d);
    let (mean, inv) = (rows.mean.map(|mean| mean.f32()), rows.inv.f32());
    by_dtype!(rows.x, T => {
        let (x, dy) = (T::open(rows.x), T::open(dy));
        device::for_each_part((out.f32(), 2 * each), (&mut [] as &mut [u8], 0), |i, out, _| {
            let at = i * each * d..i * each * d + out.len() / 2 * d;
            let stats = (mean.map(|mean| &mean[i * each..]), &inv[i * each..]);
            run_sums((&x[at.clone()], &dy[at]), w, stats, rows.valid, out);
        });
    });
}

multiversion! {
    fn run_sums<T: Float>(
        values: (&[T], &[T]), w: &[f32], stats: (Option<&[f32]>, &[f32]), valid: usize, out: &mut [f32],
    ) {
        let d = w.len();
        for (row, out) in out.chunks_exact_mut(2).enumerate() {
            let (mean, inv) = (stats.0.map_or(0.0, |mean| mean[row]), stats.1[row]);
            let at = row * d..row * d + valid;
            let columns = (&values.0[at.clone()], &values.1[at], &w[..valid]);
            let (sum, along) = lane_sums_of(columns, |x, dy, w| (dy * w, dy * w * ((x - mean) * inv)));
            out.copy_from_slice(&[sum, along]);
        }
    }
}

pub(super) fn backward(
    rows: Rows<'_>,
    sums: View<'_>,
    (dy, carried): (View<'_>, Option<View<'_>>),
    dx: ViewMut<'_>,
    dw: ViewMut<'_>,
    db: Option<ViewMut<'_>>,
) {
    let w: &[f32] = &Widened::new(rows.w);
    let d = w.len();
    let (mean, inv, sums) = (rows.mean.map(|mean| mean.f32()), rows.inv.f32(), sums.f32());
    let mut none = crate::rows::scratch(device::DType::F32, d);
    let db = db.unwrap_or_else(|| none.view_mut(device::DType::F32, 0, d)).f32();
    by_dtype!(rows.x, T => {
        let (x, dy, carried) = (T::open(rows.x), T::open(dy), carried.map(T::open));
        with_sums((T::open_mut(dx), d), [dw.f32(), db], |first, dx, totals| {
            let at = first * d..first * d + dx.len();
            let carried = carried.map(|carried| &carried[at.clone()]);
            let stats = (mean.map(|mean| &mean[first..]), &inv[first..], &sums[2 * first..]);
            run_back((&x[at.clone()], &dy[at], carried), w, stats, rows.valid, dx, totals);
        });
    });
}

multiversion! {
    fn run_back<T: Float>(
        values: (&[T], &[T], Option<&[T]>), w: &[f32], stats: (Option<&[f32]>, &[f32], &[f32]), valid: usize,
        dx: &mut [T], totals: &mut [f32],
    ) {
        let d = w.len();
        let (dw, db) = totals.split_at_mut(d);
        for (row, dx) in dx.chunks_exact_mut(d).enumerate() {
            let (at, inv) = (row * d..row * d + valid, stats.1[row]);
            let (mean, sum) = stats.0.map_or((0.0, 0.0), |mean| (mean[row], stats.2[2 * row]));
            let along = stats.2[2 * row + 1];
            let (x, dy, w) = (&values.0[at.clone()], &values.1[at.clone()], &w[..valid]);
            let (dx, padding) = dx.split_at_mut(valid);
            let (dw, db) = (&mut dw[..valid], &mut db[..valid]);
            padding.fill(T::from_f32(0.0));
            let mut back = |j: usize| {
                let (normed, dy) = ((x[j].to_f32() - mean) * inv, dy[j].to_f32());
                dw[j] += dy * normed;
                db[j] += dy;
                (dy * w[j] - sum - normed * along) * inv
            };
            match values.2 {
                Some(carried) => {
                    for (j, (dx, carried)) in dx.iter_mut().zip(&carried[at]).enumerate() {
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
