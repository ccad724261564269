use super::*;
use crate::testkit::*;
use device::DType;
use half::bf16;

fn reference(x: &[f64], v: usize, targets: &[u32]) -> Vec<f64> {
    let row = |(x, t): (&[f64], &u32)| match *t {
        IGNORE => 0.0,
        t => x.iter().map(|x| x.exp()).sum::<f64>().ln() - x[t as usize],
    };
    x.chunks(v).zip(targets).map(row).collect()
}

#[test]
fn losses_and_gradients_agree_with_the_reference_and_finite_differences() {
    for v in [2, 33, 131] {
        let targets = [1, IGNORE, 0, v as u32 - 1, 1];
        for dtype in [DType::F32, DType::Bf16] {
            let logits: Vec<f32> = random(5 * v, 1).iter().map(|x| 8.0 * x).collect();
            let (mut losses, mut again, mut grad) = (vec![9f32; 5], vec![9f32; 5], logits.clone());
            forward(View::of_f32(&logits), &targets, ViewMut::of_f32(&mut losses));
            let grad_view = ViewMut::of_f32(&mut grad);
            forward_backward(grad_view, &targets, 0.25, ViewMut::of_f32(&mut again), dtype);
            assert_eq!(losses, again);
            let x: Vec<f64> = logits.iter().map(|x| *x as f64).collect();
            let got: Vec<f64> = losses.iter().map(|x| *x as f64).collect();
            assert_close("loss", &got, &reference(&x, v, &targets), 1e-6);
            let want = numeric_gradient(&x, &[0.25; 5], |x| reference(x, v, &targets));
            assert_close("grad", &gradient(&grad, v, dtype), &want, tolerance(dtype).max(1e-5));
        }
    }
}

/// The gradient [M, V] as `forward_backward` leaves it in a buffer of logits.
fn gradient(buffer: &[f32], v: usize, dtype: DType) -> Vec<f64> {
    let row = |row: &[f32]| -> Vec<f64> {
        let halves = row.iter().flat_map(|x| [x.to_bits() as u16, (x.to_bits() >> 16) as u16]);
        match dtype {
            DType::Bf16 => halves.take(v).map(|bits| bf16::from_bits(bits).to_f64()).collect(),
            _ => row.iter().map(|x| *x as f64).collect(),
        }
    };
    buffer.chunks(v).flat_map(row).collect()
}

#[test]
fn a_nan_or_infinite_logit_shows_in_the_loss() {
    for bad in [f32::NAN, f32::INFINITY] {
        let mut logits = vec![0f32; 40];
        logits[17] = bad;
        let mut losses = vec![0f32; 1];
        forward(View::of_f32(&logits), &[3], ViewMut::of_f32(&mut losses));
        assert!(!losses[0].is_finite());
    }
}

/// The pieces of a vocabulary of 103: two whole ones and one that reaches past the end.
#[test]
fn a_cut_vocabulary_gives_the_losses_and_gradients_of_the_whole_one() {
    let (m, v, width) = (7, 103, 40);
    let logits: Vec<f32> = random(m * v, 1).iter().map(|x| 5.0 * x).collect();
    let targets: Vec<u32> = vec![0, 39, 40, 102, IGNORE, 81, 79];
    let pieces = || (0..3usize).map(|i| (i * width, width.min(v - i * width)));
    let slice_of = |first: usize, valid: usize| -> (Vec<f32>, Vec<u32>) {
        let column = |row: usize, j: usize| if j < valid { logits[row * v + first + j] } else { 77.0 };
        let local = |t: &u32| match *t {
            IGNORE => IGNORE,
            t if (first..first + valid).contains(&(t as usize)) => t - first as u32,
            _ => ELSEWHERE,
        };
        let values = (0..m * width).map(|i| column(i / width, i % width)).collect();
        (values, targets.iter().map(local).collect())
    };
    for dtype in [DType::F32, DType::Bf16] {
        let mut want = logits.clone();
        let mut want_losses = vec![0f32; m];
        let out = ViewMut::of_f32(&mut want_losses);
        forward_backward(ViewMut::of_f32(&mut want), &targets, 0.5, out, dtype);
        let (mut tops, mut sums) = (vec![f32::NEG_INFINITY; m], vec![0f32; 2 * m]);
        for (first, valid) in pieces() {
            let (x, targets) = slice_of(first, valid);
            let mut part = vec![0f32; m];
            cut::tops(View::of_f32(&x), cut::Slice { targets: &targets, valid }, ViewMut::of_f32(&mut part));
            tops.iter_mut().zip(part).for_each(|(top, part)| *top = top.max(part));
        }
        for (first, valid) in pieces() {
            let (x, targets) = slice_of(first, valid);
            let mut part = vec![0f32; 2 * m];
            let slice = cut::Slice { targets: &targets, valid };
            cut::sums(View::of_f32(&x), slice, View::of_f32(&tops), ViewMut::of_f32(&mut part));
            sums.iter_mut().zip(part).for_each(|(sum, part)| *sum += part);
        }
        let mut losses = vec![0f32; m];
        cut::losses(View::of_f32(&sums), &targets, ViewMut::of_f32(&mut losses));
        for (got, want) in losses.iter().zip(&want_losses) {
            assert!((got - want).abs() < 1e-5, "{got} for {want}");
        }
        let element = |x: &[f32], row: usize, ld: usize, j: usize| match dtype {
            DType::F32 => x[row * ld + j],
            _ => {
                let word = x[row * ld + j / 2].to_bits();
                f32::from_bits((word >> (j % 2 * 16) & 0xffff) << 16)
            }
        };
        for (first, valid) in pieces() {
            let (mut x, targets) = slice_of(first, valid);
            let slice = cut::Slice { targets: &targets, valid };
            let stats = (View::of_f32(&tops), View::of_f32(&sums));
            cut::gradient(ViewMut::of_f32(&mut x), slice, stats, 0.5, dtype);
            for (row, j) in (0..m * width).map(|i| (i / width, i % width)) {
                let want = if j < valid { element(&want, row, v, first + j) } else { 0.0 };
                let got = element(&x, row, width, j);
                assert!((got - want).abs() <= 1e-2 * want.abs() + 1e-7, "{row} {j}: {got} for {want}");
            }
        }
    }
}
