use super::Heads;
use crate::rows::{Widened, rows_per_task, with_sums};
use crate::simd::{Float, Open, lane_sum_of, lane_sums_of};
use device::{View, ViewMut};

pub(super) fn forward(
    qkv: View<'_>,
    (wq, wk): (View<'_>, View<'_>),
    heads: Heads,
    eps: f32,
    out: ViewMut<'_>,
    inv_rms: ViewMut<'_>,
) {
    let w: (&[f32], &[f32]) = (&Widened::new(wq), &Widened::new(wk));
    let (width, normed) = (heads.width(), heads.n + heads.k);
    let rows = rows_per_task(width);
    by_dtype!(qkv, T => {
        let qkv = T::open(qkv);
        device::for_each_part((T::open_mut(out), rows * width), (inv_rms.f32(), rows * normed), |i, out, inv| {
            run(&qkv[i * rows * width..][..out.len()], w, heads, eps, out, inv);
        });
    });
}

multiversion! {
    fn run<T: Float>(
        x: &[T], w: (&[f32], &[f32]), heads: Heads, eps: f32, out: &mut [T], inv_rms: &mut [f32],
    ) {
        let (h, width, normed) = (heads.h, heads.width(), heads.n + heads.k);
        let rows = x.chunks_exact(width).zip(out.chunks_exact_mut(width));
        for ((x, out), inv_rms) in rows.zip(inv_rms.chunks_exact_mut(normed)) {
            let each = x.chunks_exact(h).zip(out.chunks_exact_mut(h)).zip(inv_rms);
            for (head, ((x, out), inv)) in each.enumerate() {
                let w = if head < heads.n { w.0 } else { w.1 };
                *inv = 1.0 / (lane_sum_of(x, |x| x * x) / h as f32 + eps).sqrt();
                for ((out, x), w) in out.iter_mut().zip(x).zip(w) {
                    *out = T::from_f32(x.to_f32() * *inv * w);
                }
            }
            out[normed * h..].copy_from_slice(&x[normed * h..]);
        }
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
    let w: (&[f32], &[f32]) = (&Widened::new(wq), &Widened::new(wk));
    let (inv, width, normed) = (inv_rms.f32(), heads.width(), heads.n + heads.k);
    by_dtype!(qkv, T => {
        let (x, dy) = (T::open(qkv), T::open(dout));
        with_sums((T::open_mut(dqkv), width), [dwq.f32(), dwk.f32()], |first, dx, sums| {
            let at = first * width..first * width + dx.len();
            run_back(&x[at.clone()], w, &inv[first * normed..], heads, &dy[at], dx, sums);
        });
    });
}

multiversion! {
    fn run_back<T: Float>(
        x: &[T], w: (&[f32], &[f32]), inv_rms: &[f32], heads: Heads, dy: &[T], dx: &mut [T],
        sums: &mut [f32],
    ) {
        let (h, width, normed) = (heads.h, heads.width(), heads.n + heads.k);
        let (dwq, dwk) = sums.split_at_mut(h);
        for (row, dx) in dx.chunks_exact_mut(width).enumerate() {
            let (x, dy) = (&x[row * width..][..width], &dy[row * width..][..width]);
            let inv_rms = &inv_rms[row * normed..][..normed];
            for (head, (dx, inv)) in dx.chunks_exact_mut(h).zip(inv_rms).enumerate() {
                let (x, dy) = (&x[head * h..][..h], &dy[head * h..][..h]);
                let (w, dw) = if head < heads.n { (w.0, &mut *dwq) } else { (w.1, &mut *dwk) };
                let (along, _) = lane_sums_of((x, dy, w), |x, dy, w| (dy * w * x, 0.0));
                let c = along * inv * inv * inv / h as f32;
                for ((((dx, x), dy), w), dw) in dx.iter_mut().zip(x).zip(dy).zip(w).zip(dw) {
                    let (x, dy) = (x.to_f32(), dy.to_f32());
                    *dw += dy * x * inv;
                    *dx = T::from_f32(dy * w * inv - x * c);
                }
            }
            dx[normed * h..].copy_from_slice(&dy[normed * h..]);
        }
    }
}
