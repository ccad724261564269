//! Losses and gradients of logits: the GPU's e^x is another, and its sums have another order.

use crate::either::Either;
use crate::support::{Values, close, gpu, random, same};
use device::DType::{self, Bf16, F32};
use device::{Device, View};
use half::bf16;
use kernels::cross_entropy::cut::{self, Slice};
use kernels::cross_entropy::{ELSEWHERE, IGNORE, forward, forward_backward};

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

/// Tops, sums, losses and gradient [M, V] of a slice of `valid` columns, as if the others had been asked: the tops
/// and sums of whole rows are those here, raised.
fn run_cut(logits: &Values, slice: Slice<'_>, dtype: DType, device: Device, first: usize) -> [Values; 4] {
    let m = slice.targets.len();
    let of = |len| Either::new(&Values::new(F32, &vec![9.0; len]), device, first);
    let (mut tops, mut sums, mut losses) = (of(m), of(2 * m), of(m));
    let mut logits = Either::new(logits, device, first);
    cut::tops(logits.view(), slice, tops.view_mut());
    // No rank's are below, and where this one has none another has.
    let whole: Vec<f32> = tops.back().floats().iter().map(|top| top.max(-3.0) + 0.25).collect();
    let whole = Either::new(&Values::new(F32, &whole), device, first);
    cut::sums(logits.view(), slice, whole.view(), sums.view_mut());
    let shares: Vec<f32> =
        sums.back().floats().iter().enumerate().map(|(i, x)| if i % 2 == 0 { x + 1.5 } else { *x }).collect();
    let shares = Either::new(&Values::new(F32, &shares), device, first);
    cut::losses(shares.view(), slice.targets, losses.view_mut());
    cut::gradient(logits.view_mut(), slice, (whole.view(), shares.view()), 0.25, dtype);
    [tops.back(), sums.back(), losses.back(), gradient(logits.back().cpu(), m, dtype)]
}

#[test]
fn of_slices_of_a_vocabulary() {
    let _turn = gpu();
    let slices: [(usize, usize); 8] =
        [(1, 1), (4, 0), (33, 30), (132, 131), (1000, 1000), (1000, 996), (8192, 8000), (20_004, 20_001)];
    for (v, valid) in slices {
        let m = 8;
        let last = valid.saturating_sub(1) as u32;
        let own = [0, last, last / 2, last / 3];
        let others = [IGNORE, ELSEWHERE];
        let target = |row: usize| match valid {
            0 => others[row % 2],
            _ => [&own[..], &others].concat()[row % 6],
        };
        let targets: Vec<u32> = (0..m).map(target).collect();
        let slice = Slice { targets: &targets, valid };
        let values: Vec<f32> = random(m * v, v as u64).iter().map(|x| 9.0 * x).collect();
        let logits = Values::new(F32, &values);
        for dtype in [F32, Bf16] {
            let got = run_cut(&logits, slice, dtype, Device::Cuda, 0);
            let want = run_cut(&logits, slice, dtype, Device::Cpu, 0);
            let again = run_cut(&logits, slice, dtype, Device::Cuda, 1);
            same(&format!("tops of {valid} of {v}"), &got[0], &want[0]);
            for (i, most) in [(1, 2e-6), (2, 2e-6), (3, if dtype == F32 { 4e-6 } else { 3e-4 })] {
                let what = format!("result {i} of {valid} of {v} logits in {dtype}");
                close(&what, &got[i], &want[i], most);
                same(&format!("{what} elsewhere"), &got[i], &again[i]);
            }
        }
    }
    let nothing = Slice { targets: &[], valid: 0 };
    run_cut(&Values::zeros(F32, 0), nothing, Bf16, Device::Cuda, 0);
}
