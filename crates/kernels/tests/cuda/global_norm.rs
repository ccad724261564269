//! Sums of squares: the bits of the CPU.

use crate::either::Either;
use crate::support::{Values, gpu};
use device::DType::{Bf16, F32};
use device::{Device, View};
use kernels::global_norm::{sum_of_squares, sums_of_squares};

const CHUNK: usize = 1 << 15;

#[test]
fn have_the_bits_of_the_cpu() {
    let _turn = gpu();
    let lens = [0, 1, 31, 32, 33, 1000, 1023, 1024, 1025, 5000, CHUNK - 1, CHUNK, CHUNK + 1, 3 * CHUNK + 77];
    for dtype in [F32, Bf16] {
        let values: Vec<Values> =
            lens.iter().map(|len| Values::random(dtype, *len, *len as u64 + 1)).collect();
        let there: Vec<Either> = values.iter().map(|values| Either::new(values, Device::Cuda, 1)).collect();
        let views: Vec<View<'_>> = there.iter().map(Either::view).collect();
        let want: Vec<f64> = values.iter().map(|values| sum_of_squares(values.cpu())).collect();
        let host: Vec<View<'_>> = values.iter().map(Values::cpu).collect();
        assert_eq!(sums_of_squares(&views), want);
        assert_eq!(sums_of_squares(&host), want);
        assert_eq!(views.iter().map(|view| sum_of_squares(*view)).collect::<Vec<_>>(), want);
    }
}

#[test]
fn of_more_chunks_than_the_cpu_holds_at_a_time() {
    let _turn = gpu();
    let values = Values::random(Bf16, 515 * CHUNK + 5, 1);
    assert_eq!(sum_of_squares(values.on_gpu().view()), sum_of_squares(values.cpu()));
}

#[test]
fn show_what_is_no_number() {
    let _turn = gpu();
    let mut values = vec![1f32; 5000];
    values[4999] = f32::NAN;
    let (broken, whole) = (Values::new(F32, &values).on_gpu(), Values::new(Bf16, &values[..4000]).on_gpu());
    let sums = sums_of_squares(&[whole.view(), broken.view()]);
    assert!(sums[0] == 4000.0 && sums[1].is_nan());
    assert!(sums_of_squares(&[]).is_empty());
}
