use super::*;
use crate::testkit::*;
use device::DType;

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
            let logits = Floats::new(&logits, dtype);
            let (mut losses, mut again, mut grad) = (vec![9f32; 5], vec![9f32; 5], logits.clone());
            forward(logits.view(), &targets, ViewMut::of_f32(&mut losses));
            forward_backward(grad.view_mut(), &targets, 0.25, ViewMut::of_f32(&mut again));
            assert_eq!(losses, again);
            let x = logits.to_f64();
            let got: Vec<f64> = losses.iter().map(|x| *x as f64).collect();
            assert_close("loss", &got, &reference(&x, v, &targets), 1e-6);
            let want = numeric_gradient(&x, &[0.25; 5], |x| reference(x, v, &targets));
            assert_close("grad", &grad.to_f64(), &want, tolerance(dtype).max(1e-5));
        }
    }
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
