//! Rectangles inside matrices: what travels between ranks is cut out and put back here.

mod cuda;
#[cfg(test)]
mod tests;

use crate::gemm::{Mat, MatMut};
use crate::simd::{Float, Open};
use device::{Device, View};

/// Rows a task takes.
const ROWS: usize = 64;

/// c [rows, cols] = a, rounded or widened to c's type. Neither may be transposed.
pub fn copy(rows: usize, cols: usize, a: Mat<'_>, c: MatMut<'_>) {
    walk((rows, cols), a, c, [None, None], false);
}

/// c [rows, cols] += a.
pub fn add(rows: usize, cols: usize, a: Mat<'_>, c: MatMut<'_>) {
    walk((rows, cols), a, c, [None, None], true);
}

/// c [rows, cols] = a + bias [cols] + residual [rows, cols], each where there is one: what follows a
/// product whose sum was taken elsewhere.
pub fn finish(
    rows: usize,
    cols: usize,
    a: Mat<'_>,
    bias: Option<View<'_>>,
    residual: Option<Mat<'_>>,
    c: MatMut<'_>,
) {
    if let Some(bias) = &bias {
        assert_eq!(bias.len(), cols, "bias");
    }
    walk((rows, cols), a, c, [bias.map(|data| Mat::new(data, 0)), residual], false);
}

fn walk((rows, cols): (usize, usize), a: Mat<'_>, c: MatMut<'_>, added: [Option<Mat<'_>>; 2], keep: bool) {
    if rows == 0 || cols == 0 {
        return;
    }
    let fits = |m: &Mat<'_>| !m.transposed && (rows - 1) * m.ld + cols <= m.data.len();
    assert!(fits(&a) && added.iter().flatten().all(fits), "a block of [{rows}, {cols}]");
    let need = (rows - 1) * c.ld + cols;
    assert!(cols <= c.ld && need <= c.data.len(), "c [{rows}, {cols}] in rows of {}", c.ld);
    match a.data.device() {
        Device::Cpu => by_dtype!(c.data, C => by_dtype!(a.data, A => {
            let out = &mut C::open_mut(c.data)[..need];
            let from = A::open(a.data);
            device::for_each_part((out, ROWS * c.ld), (&mut [] as &mut [u8], 0), |i, out, _| {
                for (r, out) in out.chunks_mut(c.ld).enumerate() {
                    let row = i * ROWS + r;
                    let (out, from) = (&mut out[..cols], &from[row * a.ld..row * a.ld + cols]);
                    if keep { add_run(out, from) } else { add_both((out, from), added, row) }
                }
            });
        })),
        Device::Cuda => cuda::walk((rows, cols), a, c, added, keep),
    }
}

/// out = from + what is added in this row, in f32 until the end.
fn add_both<C: Float, A: Float>((out, from): (&mut [C], &[A]), added: [Option<Mat<'_>>; 2], row: usize) {
    let n = out.len();
    match added.map(|added| added.map(|m| m.data.narrow(row * m.ld, n))) {
        [None, None] => copy_run(out, from),
        [Some(one), None] | [None, Some(one)] => by_dtype!(one, B => sum_two(out, from, B::open(one))),
        [Some(bias), Some(residual)] => by_dtype!(bias, B => by_dtype!(residual, R => {
            sum_three(out, (from, B::open(bias), R::open(residual)));
        })),
    }
}

multiversion! {
    fn copy_run<C: Float, A: Float>(c: &mut [C], a: &[A]) {
        for (c, a) in c.iter_mut().zip(a) {
            *c = C::from_f32(a.to_f32());
        }
    }
}

multiversion! {
    fn add_run<C: Float, A: Float>(c: &mut [C], a: &[A]) {
        for (c, a) in c.iter_mut().zip(a) {
            *c = C::from_f32(c.to_f32() + a.to_f32());
        }
    }
}

multiversion! {
    fn sum_two<C: Float, A: Float, B: Float>(c: &mut [C], a: &[A], b: &[B]) {
        for ((c, a), b) in c.iter_mut().zip(a).zip(b) {
            *c = C::from_f32(a.to_f32() + b.to_f32());
        }
    }
}

multiversion! {
    fn sum_three<C: Float, A: Float, B: Float, R: Float>(c: &mut [C], from: (&[A], &[B], &[R])) {
        for (((c, a), b), r) in c.iter_mut().zip(from.0).zip(from.1).zip(from.2) {
            *c = C::from_f32(a.to_f32() + b.to_f32() + r.to_f32());
        }
    }
}
