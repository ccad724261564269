use super::Heads;
use crate::simd::{Float, Open, lane_sum, reduce_rows, rows_per_task, widened};
use device::{View, ViewMut};

pub(super) fn forward(
    qkv: View<'_>,
    (wq, wk): (View<'_>, View<'_>),
    heads: Heads,
    eps: f32,
    out: ViewMut<'_>,
    inv_rms: ViewMut<'_>,
) {
    let (wq, wk) = (&widened(wq), &widened(wk));
    let (width, normed) = (heads.width(), heads.n + heads.k);
    let rows = rows_per_task(width);
    by_dtype!(qkv, T => {
        let qkv = T::open(qkv);
        device::for_each_part((T::open_mut(out), rows * width), (inv_rms.f32(), rows * normed), |i, out, inv| {
            for (r, out) in out.chunks_exact_mut(width).enumerate() {
                let x = &qkv[(i * rows + r) * width..][..width];
                for head in 0..normed {
                    let at = head * heads.h..(head + 1) * heads.h;
                    let w = if head < heads.n { wq } else { wk };
                    inv[r * normed + head] = norm(&x[at.clone()], w, eps, &mut out[at]);
                }
                out[normed * heads.h..].copy_from_slice(&x[normed * heads.h..]);
            }
        });
    });
}

multiversion! {
    fn norm<T: Float>(x: &[T], w: &[f32], eps: f32, out: &mut [T]) -> f32 {
        let h = w.len();
        let (x, out) = (&x[..h], &mut out[..h]);
        let inv = 1.0 / (lane_sum(h, |j| x[j].to_f32() * x[j].to_f32()) / h as f32 + eps).sqrt();
        for j in 0..h {
            out[j] = T::from_f32(x[j].to_f32() * inv * w[j]);
        }
        inv
    }
}

pub(super) fn backward(
    qkv: View<'_>,
    (wq, wk): (View<'_>, View<'_>),
    inv_rms: View<'_>,
    heads: Heads,
    dout: View<'_>,
    dqkv: ViewMut<'_>,
    (dwq, dwk): (ViewMut<'_>, ViewMut<'_>),
) {
    let (wq, wk, inv, h) = (&widened(wq), &widened(wk), inv_rms.f32(), heads.h);
    let (width, normed) = (heads.width(), heads.n + heads.k);
    let rows = rows_per_task(width);
    let mut sums = vec![0f32; 2 * h];
    by_dtype!(qkv, T => {
        let (x, dy) = (T::open(qkv), T::open(dout));
        device::for_each_part((T::open_mut(dqkv), rows * width), (&mut [] as &mut [u8], 0), |i, dx, _| {
            for (r, dx) in dx.chunks_exact_mut(width).enumerate() {
                let row = i * rows + r;
                let (x, dy) = (&x[row * width..][..width], &dy[row * width..][..width]);
                for head in 0..normed {
                    let at = head * h..(head + 1) * h;
                    let w = if head < heads.n { wq } else { wk };
                    let inv = inv[row * normed + head];
                    norm_back(&x[at.clone()], w, inv, &dy[at.clone()], &mut dx[at]);
                }
                dx[normed * h..].copy_from_slice(&dy[normed * h..]);
            }
        });
        reduce_rows(x.len() / width, 2 * h, &mut sums, |range, sums| {
            for (row, head) in range.flat_map(|row| (0..normed).map(move |head| (row, head))) {
                let at = row * width + head * h;
                let part = if head < heads.n { 0 } else { h };
                let inv = inv[row * normed + head];
                add_weight_grad(&x[at..at + h], &dy[at..at + h], inv, &mut sums[part..part + h]);
            }
        });
    });
    for (j, (dwq, dwk)) in dwq.f32().iter_mut().zip(dwk.f32()).enumerate() {
        *dwq += sums[j];
        *dwk += sums[h + j];
    }
}

multiversion! {
    fn norm_back<T: Float>(x: &[T], w: &[f32], inv: f32, dy: &[T], dx: &mut [T]) {
        let h = w.len();
        let (x, dy, dx) = (&x[..h], &dy[..h], &mut dx[..h]);
        let along = lane_sum(h, |j| dy[j].to_f32() * w[j] * x[j].to_f32());
        let c = along * inv * inv * inv / h as f32;
        for j in 0..h {
            dx[j] = T::from_f32(dy[j].to_f32() * w[j] * inv - x[j].to_f32() * c);
        }
    }
}

multiversion! {
    fn add_weight_grad<T: Float>(x: &[T], dy: &[T], inv: f32, dw: &mut [f32]) {
        for ((dw, x), dy) in dw.iter_mut().zip(x).zip(dy) {
            *dw += dy.to_f32() * x.to_f32() * inv;
        }
    }
}
