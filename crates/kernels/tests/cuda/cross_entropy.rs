//! Losses and gradients of logits: the GPU's e^x is another, and its sums have another order.

use crate::either::Either;
use crate::support::{Values, close, gpu, random, same};
use device::DType::{self, Bf16, F32};
use device::{Device, View};
use half::bf16;
use kernels::cross_entropy::{IGNORE, forward, forward_backward};

/// Losses, losses of the way back, and the gradient [M, V].
fn run(logits: &Values, targets: &[u32], dtype: DType, device: Device, first: usize) -> [Values; 3] {
    let m = targets.len();
    let empty = Values::new(F32, &vec![9.0; m]);
    let mut logits = Either::new(logits, device, first);
    let (mut losses, mut again) = (Either::new(&empty, device, 0), Either::new(&empty, device, 0));
    forward(logits.view(), targets, losses.view_mut());
    forward_backward(logits.view_mut(), targets, 0.25, again.view_mut(), dtype);
    [losses.back(), again.back(), gradient(logits.back().cpu(), m, dtype)]
}

/// As `forward_backward` leaves it: in bf16 in the first half of each row.
fn gradient(logits: View<'_>, m: usize, dtype: DType) -> Values {
    let v = logits.len() / m.max(1);
    if dtype == F32 || m == 0 {
        return Values::new(F32, logits.f32());
    }
    let of_row = |row: &[f32]| -> Vec<f32> {
        let halves = row.iter().flat_map(|x| [x.to_bits() as u16, (x.to_bits() >> 16) as u16]);
        halves.take(v).map(|bits| bf16::from_bits(bits).to_f32()).collect()
    };
    let rows: Vec<f32> = logits.f32().chunks(v).flat_map(of_row).collect();
    Values::new(Bf16, &rows)
}

/// Targets at both ends of a row, on both sides of runs and in between.
fn targets_of(v: usize, m: usize) -> Vec<u32> {
    let all = [0, v - 1, v / 2, IGNORE as usize, v / 3, 1 % v];
    (0..m).map(|row| all[row % all.len()] as u32).collect()
}

#[test]
fn of_vocabularies_with_tails() {
    let _turn = gpu();
    for v in [1, 2, 33, 131, 1000, 8192, 8193, 20_001, 40_004] {
        let m = if v < 5000 { 7 } else { 3 };
        let targets = targets_of(v, m);
        let values: Vec<f32> = random(m * v, v as u64).iter().map(|x| 9.0 * x).collect();
        let logits = Values::new(F32, &values);
        for dtype in [F32, Bf16] {
            let got = run(&logits, &targets, dtype, Device::Cuda, 0);
            let want = run(&logits, &targets, dtype, Device::Cpu, 0);
            let again = run(&logits, &targets, dtype, Device::Cuda, 1);
            for (i, most) in [2e-6, 2e-6, if dtype == F32 { 4e-6 } else { 3e-4 }].into_iter().enumerate() {
                let what = format!("result {i} of {v} logits in {dtype}");
                close(&what, &got[i], &want[i], most);
                same(&format!("{what} elsewhere"), &got[i], &again[i]);
            }
            same("losses", &got[0], &got[1]);
        }
    }
}

#[test]
fn sure_and_masked_and_broken_logits() {
    let _turn = gpu();
    let v = 5000;
    let row = |value: f32| {
        let mut row = random(v, 3);
        row[4321] = value;
        row
    };
    // Sure of it, masked with -infinity, never there, and no numbers.
    for (value, is_finite) in
        [(60.0, true), (f32::NEG_INFINITY, true), (-1e30, true), (f32::NAN, false), (f32::INFINITY, false)]
    {
        let logits = Values::new(F32, &row(value));
        let target = if value == 60.0 { 4321 } else { 17 };
        let got = run(&logits, &[target], F32, Device::Cuda, 0);
        let want = run(&logits, &[target], F32, Device::Cpu, 0);
        assert_eq!(got[0].floats()[0].is_finite(), is_finite, "{value}");
        if is_finite {
            close("loss", &got[0], &want[0], 4e-6);
            close("gradient", &got[2], &want[2], 4e-6);
        }
    }
}

#[test]
fn no_rows_are_no_work() {
    let _turn = gpu();
    run(&Values::zeros(F32, 0), &[], Bf16, Device::Cuda, 0);
}
