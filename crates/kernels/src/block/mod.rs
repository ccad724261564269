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
        Device::Cpu => on_cpu((rows, cols), a, c, added, keep),
        Device::Cuda => cuda::walk((rows, cols), a, c, added, keep),
    }
}

/// c = a + what is added (+ c), in f32 until the end. What is asked for is found out before the rows: they
/// are short.
fn on_cpu(sizes: (usize, usize), a: Mat<'_>, c: MatMut<'_>, added: [Option<Mat<'_>>; 2], keep: bool) {
    if added.iter().all(Option::is_none) && !keep && a.data.dtype() == c.data.dtype() {
        let (size, from) = (a.data.dtype().size_bytes(), a.data.bytes());
        let row_bytes = |row| row_of(from, a.ld * size, sizes.1 * size, row);
        return each_row(sizes, c.data.bytes(), (c.ld, size), |row, out| out.copy_from_slice(row_bytes(row)));
    }
    by_dtype!(c.data, C => by_dtype!(a.data, A => {
        let (out, ld, a_ld, from) = (C::open_mut(c.data), c.ld, a.ld, A::open(a.data));
        let from = |row| row_of(from, a_ld, sizes.1, row);
        match added {
            [None, None] if keep => each_row(sizes, out, (ld, 1), |row, out| add_run(out, from(row))),
            [None, None] => each_row(sizes, out, (ld, 1), |row, out| copy_run(out, from(row))),
            [Some(one), None] | [None, Some(one)] => by_dtype!(one.data, B => {
                let (one, one_ld) = (B::open(one.data), one.ld);
                let one = |row| row_of(one, one_ld, sizes.1, row);
                each_row(sizes, out, (ld, 1), |row, out| sum_two(out, from(row), one(row)))
            }),
            [Some(bias), Some(residual)] => by_dtype!(bias.data, B => by_dtype!(residual.data, R => {
                let (bias, bias_ld, residual, ld_r) = (B::open(bias.data), bias.ld, R::open(residual.data), residual.ld);
                let more = |row| (row_of(bias, bias_ld, sizes.1, row), row_of(residual, ld_r, sizes.1, row));
                each_row(sizes, out, (ld, 1), |row, out| {
                    let (bias, residual) = more(row);
                    sum_three(out, (from(row), bias, residual));
                })
            })),
        }
    }))
}

/// The first `cols` elements of a row.
fn row_of<T>(all: &[T], ld: usize, cols: usize, row: usize) -> &[T] {
    &all[row * ld..row * ld + cols]
}

/// `body(row, its columns)` for all rows of a matrix whose elements are `size` items of `T`.
fn each_row<T: Send>(
    (rows, cols): (usize, usize),
    out: &mut [T],
    (ld, size): (usize, usize),
    body: impl Fn(usize, &mut [T]) + Sync + Send,
) {
    let (ld, cols) = (ld * size, cols * size);
    let out = &mut out[..(rows - 1) * ld + cols];
    device::for_each_part((out, ROWS * ld), (&mut [] as &mut [u8], 0), |i, out, _| {
        for (r, out) in out.chunks_mut(ld).enumerate() {
            body(i * ROWS + r, &mut out[..cols]);
        }
    });
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
