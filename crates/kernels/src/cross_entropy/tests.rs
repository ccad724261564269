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
