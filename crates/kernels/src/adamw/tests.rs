use super::*;
use crate::testkit::random;

#[test]
fn split_and_join_are_inverses_and_the_high_half_is_the_nearest_bf16() {
    for step in 0..2_000_000u32 {
        let x = f32::from_bits(step.wrapping_mul(2147));
        if !x.is_finite() || x.abs() > 3.38e38 {
            continue;
        }
        let (high, low) = split(x);
        assert_eq!(join(high, low).to_bits(), x.to_bits(), "{x:e}");
        let error = (high.to_f64() - x as f64).abs();
        assert!(error <= (bf16::from_f32(x).to_f64() - x as f64).abs(), "{x:e}");
    }
}

fn reference(w: &mut [f64], g: &[f32], m: &mut [f64], v: &mut [f64], h: &Hyper) {
    for i in 0..w.len() {
        let g = g[i] as f64 * h.grad_scale as f64;
        m[i] = h.beta1 as f64 * m[i] + (1.0 - h.beta1 as f64) * g;
        v[i] = h.beta2 as f64 * v[i] + (1.0 - h.beta2 as f64) * g * g;
        let mhat = m[i] / (1.0 - (h.beta1 as f64).powi(h.step as i32));
        let vhat = v[i] / (1.0 - (h.beta2 as f64).powi(h.step as i32));
        w[i] -= h.lr as f64 * (mhat / (vhat.sqrt() + h.eps as f64) + h.weight_decay as f64 * w[i]);
    }
}

#[test]
fn ten_steps_follow_the_reference_and_both_masters_walk_the_same_path() {
    let n = 20_011;
    let start = random(n, 1);
    let mut plain = start.clone();
    let (mut high, mut low): (Vec<_>, Vec<_>) = start.iter().map(|x| split(*x)).unzip();
    let mut want: Vec<f64> = start.iter().map(|x| *x as f64).collect();
    let (mut m, mut v) = (vec![0f32; n], vec![0f32; n]);
    let (mut ms, mut vs) = (m.clone(), v.clone());
    let (mut mw, mut vw) = (vec![0f64; n], vec![0f64; n]);
    for step in 1..=10 {
        let g = random(n, 100 + step as u32);
        let hyper =
            Hyper { lr: 1e-2, beta1: 0.9, beta2: 0.95, eps: 1e-8, weight_decay: 0.1, step, grad_scale: 0.5 };
        let (mv, vv) = (ViewMut::of_f32(&mut m), ViewMut::of_f32(&mut v));
        update(Master::F32(ViewMut::of_f32(&mut plain)), View::of_f32(&g), mv, vv, &hyper);
        let halves = Master::Split { high: ViewMut::of_bf16(&mut high), low: ViewMut::of_u16(&mut low) };
        let (mv, vv) = (ViewMut::of_f32(&mut ms), ViewMut::of_f32(&mut vs));
        update(halves, View::of_f32(&g), mv, vv, &hyper);
        reference(&mut want, &g, &mut mw, &mut vw, &hyper);
    }
    for i in 0..n {
        assert!((plain[i] as f64 - want[i]).abs() < 2e-6, "{i}: {} for {}", plain[i], want[i]);
        assert_eq!(join(high[i], low[i]).to_bits(), plain[i].to_bits());
        assert!(m[i].to_bits() == ms[i].to_bits() && v[i].to_bits() == vs[i].to_bits());
    }
}

/// A gradient in 16 bits is the update of the same values in 32, bit for bit.
#[test]
fn a_gradient_of_16_bits_is_the_same_as_its_values_in_32() {
    let n = 20_011;
    let mut rounded = random(n, 2);
    crate::elementwise::round_to_bf16(ViewMut::of_f32(&mut rounded));
    let short: Vec<bf16> = rounded.iter().map(|x| bf16::from_f32(*x)).collect();
    let hyper =
        Hyper { lr: 1e-2, beta1: 0.9, beta2: 0.95, eps: 1e-8, weight_decay: 0.1, step: 1, grad_scale: 0.3 };
    let run = |grad: View<'_>| {
        let (mut plain, mut m, mut v) = (random(n, 1), vec![0f32; n], vec![0f32; n]);
        let (mut high, mut low): (Vec<_>, Vec<_>) = plain.iter().map(|x| split(*x)).unzip();
        let (mv, vv) = (ViewMut::of_f32(&mut m), ViewMut::of_f32(&mut v));
        update(Master::F32(ViewMut::of_f32(&mut plain)), grad, mv, vv, &hyper);
        let halves = Master::Split { high: ViewMut::of_bf16(&mut high), low: ViewMut::of_u16(&mut low) };
        let (mv, vv) = (ViewMut::of_f32(&mut m), ViewMut::of_f32(&mut v));
        update(halves, grad, mv, vv, &hyper);
        let bits = |x: Vec<f32>| x.into_iter().map(f32::to_bits).collect::<Vec<_>>();
        (bits(plain), bits(m), bits(v), high, low)
    };
    assert!(run(View::of_f32(&rounded)) == run(View::of_bf16(&short)));
}
