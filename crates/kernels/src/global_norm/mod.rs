//! Sum of squares over flat memory: the square of the gradient's global norm.

mod cuda;

use crate::simd::{Float, Open, lane_sum_of};
use device::{Device, View};

/// Elements per partial sum; fixed, so that the bits depend on the data alone.
const CHUNK: usize = 1 << 15;

/// Sum of x^2 over any number of floats: f32 within a chunk, f64 across. NaN and infinity show,
/// and so does, as infinity, a value above 1.8e19, whose square f32 cannot hold.
pub fn sum_of_squares(x: View<'_>) -> f64 {
    match x.device() {
        Device::Cpu => cpu(x),
        Device::Cuda => cuda::sums_of_squares(&[x])[0],
    }
}

/// The same of many arrays of one device, which is waited for once.
pub fn sums_of_squares(views: &[View<'_>]) -> Vec<f64> {
    match views.first().map(View::device) {
        Some(Device::Cuda) => cuda::sums_of_squares(views),
        _ => views.iter().map(|x| sum_of_squares(*x)).collect(),
    }
}

/// Partial sums held at a time, on the stack.
const PARTIALS: usize = 512;

fn cpu(x: View<'_>) -> f64 {
    by_dtype!(x, T => {
        let sum_of = |x: &[T]| {
            let mut partial = [0f32; PARTIALS];
            let partial = &mut partial[..x.len().div_ceil(CHUNK)];
            device::for_each_part((&mut *partial, 1), (&mut [] as &mut [u8], 0), |i, sum, _| {
                sum[0] = squares(&x[i * CHUNK..((i + 1) * CHUNK).min(x.len())]);
            });
            total(partial)
        };
        T::open(x).chunks(PARTIALS * CHUNK).map(sum_of).sum()
    })
}

/// Of the partial sums of an array, as many at a time as the CPU holds.
fn total(partial: &[f32]) -> f64 {
    partial.chunks(PARTIALS).map(|sums| sums.iter().map(|sum| f64::from(*sum)).sum::<f64>()).sum()
}

multiversion! {
    fn squares<T: Float>(x: &[T]) -> f32 {
        lane_sum_of(x, |x| x * x)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testkit::random;

    #[test]
    fn sixteen_bits_have_the_sum_of_their_values_in_32() {
        let mut x = random(100_001, 1);
        crate::elementwise::round_to_bf16(device::ViewMut::of_f32(&mut x));
        let short: Vec<half::bf16> = x.iter().map(|x| half::bf16::from_f32(*x)).collect();
        assert_eq!(sum_of_squares(View::of_bf16(&short)), sum_of_squares(View::of_f32(&x)));
    }

    #[test]
    fn the_sum_agrees_with_f64_and_shows_a_nan() {
        let mut x = random(100_001, 1);
        let want: f64 = x.iter().map(|x| (*x as f64).powi(2)).sum();
        let one = device::Threads::new(1).unwrap().run(|| sum_of_squares(View::of_f32(&x)));
        let two = device::Threads::new(2).unwrap().run(|| sum_of_squares(View::of_f32(&x)));
        assert!((one / want - 1.0).abs() < 1e-6 && one == two);
        x[77_777] = f32::NAN;
        assert!(sum_of_squares(View::of_f32(&x)).is_nan());
        assert_eq!(sum_of_squares(View::of_f32(&[])), 0.0);
    }
}
