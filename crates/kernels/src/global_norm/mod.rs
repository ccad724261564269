//! Sum of squares over flat memory: the square of the gradient's global norm.

use crate::simd::{Float, Open, lane_sum};
use device::{Device, View};

/// Elements per partial sum; fixed, so that the bits depend on the data alone.
const CHUNK: usize = 1 << 15;

/// Sum of x^2 over any number of floats: f32 within a chunk, f64 across. NaN and infinity show.
pub fn sum_of_squares(x: View<'_>) -> f64 {
    match x.device() {
        Device::Cpu => cpu(x),
    }
}

fn cpu(x: View<'_>) -> f64 {
    let mut partial = vec![0f64; x.len().div_ceil(CHUNK)];
    by_dtype!(x, T => {
        let x = T::open(x);
        device::for_each_part((&mut partial, 1), (&mut [] as &mut [u8], 0), |i, sum, _| {
            sum[0] = squares(&x[i * CHUNK..((i + 1) * CHUNK).min(x.len())]) as f64;
        });
    });
    partial.iter().sum()
}

multiversion! {
    fn squares<T: Float>(x: &[T]) -> f32 {
        lane_sum(x.len(), |i| x[i].to_f32() * x[i].to_f32())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testkit::random;

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
