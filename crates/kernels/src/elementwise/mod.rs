//! Sums, copies and scalings of whole arrays, with conversion between float types.

mod cuda;

use crate::rows::sum_rows;
use crate::simd::{Float, Open};
use device::{Device, View, ViewMut};
use half::bf16;

const CHUNK: usize = 1 << 15;

/// y += x; either may be f32 or bf16.
pub fn add_assign(y: ViewMut<'_>, x: View<'_>) {
    assert_eq!(y.len(), x.len(), "lengths");
    match x.device() {
        Device::Cpu => by_dtype!(y, Y => by_dtype!(x, X => {
            zip(Y::open_mut(y), X::open(x), add_run::<Y, X>);
        })),
        Device::Cuda => cuda::add_assign(y, x),
    }
}

/// y = the larger of y and x, element by element; both f32. A NaN gives way to a number.
pub fn max_assign(y: ViewMut<'_>, x: View<'_>) {
    assert_eq!(y.len(), x.len(), "lengths");
    match x.device() {
        Device::Cpu => zip(y.f32(), x.f32(), max_run),
        Device::Cuda => cuda::max_assign(y, x),
    }
}

/// y = a + b; all three of one type.
pub fn add(a: View<'_>, b: View<'_>, y: ViewMut<'_>) {
    assert!(a.len() == b.len() && a.len() == y.len(), "lengths");
    match a.device() {
        Device::Cpu => by_dtype!(a, T => {
            let (a, b) = (T::open(a), T::open(b));
            device::for_each_part((T::open_mut(y), CHUNK), (&mut [] as &mut [u8], 0), |i, y, _| {
                let at = i * CHUNK..i * CHUNK + y.len();
                sum_run(&a[at.clone()], &b[at], y);
            });
        }),
        Device::Cuda => cuda::add(a, b, y),
    }
}

/// y = x, rounded or widened to y's type.
pub fn copy(y: ViewMut<'_>, x: View<'_>) {
    assert_eq!(y.len(), x.len(), "lengths");
    match x.device() {
        Device::Cpu => by_dtype!(y, Y => by_dtype!(x, X => {
            zip(Y::open_mut(y), X::open(x), copy_run::<Y, X>);
        })),
        Device::Cuda => cuda::copy(y, x),
    }
}

/// f32 rounded to the nearest bf16, ties to even, in place: the values of `copy` to bf16 and back.
pub fn round_to_bf16(y: ViewMut<'_>) {
    match y.device() {
        Device::Cpu => {
            device::for_each_part((y.f32(), CHUNK), (&mut [] as &mut [u8], 0), |_, y, _| round_run(y));
        }
        Device::Cuda => cuda::round_to_bf16(y),
    }
}

/// y *= factor.
pub fn scale(y: ViewMut<'_>, factor: f32) {
    match y.device() {
        Device::Cpu => by_dtype!(y, Y => {
            device::for_each_part((Y::open_mut(y), CHUNK), (&mut [] as &mut [u8], 0), |_, y, _| {
                scale_run(y, factor);
            });
        }),
        Device::Cuda => cuda::scale(y, factor),
    }
}

/// out [N] f32 += sums over the rows of x [M, N]; the same bits on any number of threads.
pub fn column_sums(x: View<'_>, n: usize, out: ViewMut<'_>) {
    assert!(out.len() == n && x.len().is_multiple_of(n.max(1)), "columns");
    match x.device() {
        Device::Cpu => by_dtype!(x, X => {
            let x = X::open(x);
            sum_rows(x.len() / n.max(1), out.f32(), |range, out| {
                add_rows(&x[range.start * n..range.end * n], out);
            });
        }),
        Device::Cuda => cuda::column_sums(x, n, out),
    }
}

fn zip<Y: Float, X: Float>(y: &mut [Y], x: &[X], run: fn(&mut [Y], &[X])) {
    device::for_each_part((y, CHUNK), (&mut [] as &mut [u8], 0), |i, y, _| {
        run(y, &x[i * CHUNK..][..y.len()]);
    });
}

multiversion! {
    fn add_run<Y: Float, X: Float>(y: &mut [Y], x: &[X]) {
        for (y, x) in y.iter_mut().zip(x) {
            *y = Y::from_f32(y.to_f32() + x.to_f32());
        }
    }
}

multiversion! {
    fn max_run(y: &mut [f32], x: &[f32]) {
        for (y, x) in y.iter_mut().zip(x) {
            *y = y.max(*x);
        }
    }
}

multiversion! {
    fn add_rows<X: Float>(x: &[X], out: &mut [f32]) {
        for x in x.chunks_exact(out.len()) {
            for (out, x) in out.iter_mut().zip(x) {
                *out += x.to_f32();
            }
        }
    }
}

multiversion! {
    fn sum_run<T: Float>(a: &[T], b: &[T], y: &mut [T]) {
        for ((y, a), b) in y.iter_mut().zip(a).zip(b) {
            *y = T::from_f32(a.to_f32() + b.to_f32());
        }
    }
}

multiversion! {
    fn copy_run<Y: Float, X: Float>(y: &mut [Y], x: &[X]) {
        for (y, x) in y.iter_mut().zip(x) {
            *y = Y::from_f32(x.to_f32());
        }
    }
}

multiversion! {
    fn round_run(y: &mut [f32]) {
        for y in y.iter_mut() {
            *y = bf16::from_f32(*y).to_f32();
        }
    }
}

multiversion! {
    fn scale_run<Y: Float>(y: &mut [Y], factor: f32) {
        for y in y.iter_mut() {
            *y = Y::from_f32(y.to_f32() * factor);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testkit::*;
    use device::DType;

    #[test]
    fn sums_copies_and_scalings_agree_with_f64_in_every_mix_of_types() {
        for (yt, xt) in [
            (DType::F32, DType::F32),
            (DType::F32, DType::Bf16),
            (DType::Bf16, DType::F32),
            (DType::Bf16, DType::Bf16),
        ] {
            let (y, x) = (Floats::new(&random(70_001, 1), yt), Floats::new(&random(70_001, 2), xt));
            let mut sum = y.clone();
            add_assign(sum.view_mut(), x.view());
            let want: Vec<f64> = y.to_f64().iter().zip(x.to_f64()).map(|(y, x)| y + x).collect();
            assert_close("sum", &sum.to_f64(), &want, tolerance(yt));
            let mut twice = x.clone();
            scale(twice.view_mut(), 2.0);
            assert_close(
                "scale",
                &twice.to_f64(),
                &x.to_f64().iter().map(|x| 2.0 * x).collect::<Vec<_>>(),
                1e-9,
            );
            copy(sum.view_mut(), x.view());
            assert_close("copy", &sum.to_f64(), &x.to_f64(), tolerance(yt));
        }
    }

    /// Rounded in place or copied to 16 bits: the same values, special ones too.
    #[test]
    fn rounding_in_place_is_a_copy_there_and_back() {
        let mut x = random(70_001, 1);
        let special = [0x3f80_8000, 0x3f81_8000, 0x3f80_8001, 0x7f7f_ffff, 0x7f80_0000, 0x8000_0001u32];
        x.iter_mut().zip(special).for_each(|(x, bits)| *x = f32::from_bits(bits));
        let mut short = vec![bf16::ZERO; x.len()];
        copy(ViewMut::of_bf16(&mut short), View::of_f32(&x));
        assert!(x.iter().zip(&short).all(|(x, short)| bf16::from_f32(*x) == *short));
        round_to_bf16(ViewMut::of_f32(&mut x));
        assert!(x.iter().zip(&short).all(|(x, short)| x.to_bits() == short.to_f32().to_bits()));
        assert_eq!(x[..5], [1.0, 1.015625, 1.0078125, f32::INFINITY, f32::INFINITY]);
        x[9] = f32::NAN;
        round_to_bf16(ViewMut::of_f32(&mut x));
        assert!(x[9].is_nan());
    }

    #[test]
    fn column_sums_agree_with_f64_and_do_not_depend_on_threads() {
        let (m, n) = (5003, 37);
        let x = random(m * n, 1);
        let on = |threads| {
            let mut out = vec![1f32; n];
            device::Threads::new(threads)
                .unwrap()
                .run(|| column_sums(View::of_f32(&x), n, ViewMut::of_f32(&mut out)));
            out
        };
        let want: Vec<f64> = (0..n).map(|j| 1.0 + (0..m).map(|i| x[i * n + j] as f64).sum::<f64>()).collect();
        assert_close("sums", &on(2).iter().map(|x| *x as f64).collect::<Vec<_>>(), &want, 1e-5);
        assert_eq!(on(1), on(3));
    }
}
