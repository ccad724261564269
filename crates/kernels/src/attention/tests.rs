//! Blocks against the whole matrix, gradients against finite differences.

use super::*;
use crate::testkit::*;
use device::{DType, Threads};

fn run(shape: Shape, qkv: &Floats, mask: Mask<'_>, scale: f32) -> (Floats, Vec<f32>) {
    let Shape { b, t, s, n, k, h } = shape;
    let ld = (n + 2 * k) * h;
    let dtype = qkv.view().dtype();
    let mut out = Floats::new(&vec![7.0; b * t * n * h], dtype);
    let mut lse = vec![0f32; b * n * t];
    let part = |first: usize| Heads { data: qkv.view(), ld, col: first * h, rows_per_batch: s };
    // Queries are the last t tokens of each row: a window shifted by s - t tokens.
    let shifted = qkv.view().narrow((s - t) * ld, qkv.view().len() - (s - t) * ld);
    let mut padded = Vec::new();
    let q = if s == t {
        part(0)
    } else {
        assert_eq!(b, 1);
        padded.push(shifted);
        Heads { data: padded[0], ld, col: 0, rows_per_batch: t }
    };
    forward(shape, q, part(n), part(n + k), mask, scale, out.view_mut(), ViewMut::of_f32(&mut lse));
    (out, lse)
}

fn shapes() -> Vec<Shape> {
    vec![
        Shape { b: 2, t: 9, s: 9, n: 2, k: 1, h: 8 },
        Shape { b: 1, t: 97, s: 97, n: 4, k: 2, h: 16 },
        Shape { b: 2, t: 130, s: 130, n: 1, k: 1, h: 64 },
        Shape { b: 1, t: 300, s: 300, n: 4, k: 1, h: 20 },
        Shape { b: 1, t: 600, s: 600, n: 1, k: 1, h: 80 },
        Shape { b: 1, t: 3, s: 40, n: 4, k: 2, h: 128 },
        Shape { b: 1, t: 50, s: 333, n: 2, k: 2, h: 32 },
        Shape { b: 1, t: 1, s: 1, n: 1, k: 1, h: 2 },
    ]
}

/// Documents of uneven lengths in each row.
fn documents(b: usize, t: usize) -> Vec<u32> {
    let start = |q: usize| {
        if q < t / 5 {
            0
        } else if q < t / 2 {
            t / 5
        } else {
            t / 2
        }
    };
    (0..b * t).map(|i| start(i % t) as u32).collect()
}

#[test]
fn forward_agrees_with_the_whole_matrix() {
    for shape in shapes() {
        let Shape { b, t, s, n, k, h } = shape;
        for dtype in [DType::F32, DType::Bf16] {
            let qkv = random(b * s * (n + 2 * k) * h, 1).iter().map(|x| 3.0 * x).collect::<Vec<_>>();
            let qkv = Floats::new(&qkv, dtype);
            let starts = documents(b, t);
            for (starts, window) in
                [(None, None), (Some(&starts[..]), None), (None, Some(5)), (Some(&starts[..]), Some(70))]
            {
                if starts.is_some() && s != t {
                    continue;
                }
                let mask = Mask { starts, window };
                let scale = 1.0 / (h as f32).sqrt();
                let (out, lse) = run(shape, &qkv, mask, scale);
                let (want, want_lse) = reference::forward(&shape, &qkv.to_f64(), &mask, scale as f64);
                assert_close("out", &out.to_f64(), &want, tolerance(dtype).max(1e-5));
                let lse: Vec<f64> = lse.iter().map(|x| *x as f64).collect();
                assert_close("lse", &lse, &want_lse, 1e-5);
            }
        }
    }
}

fn gradients(shape: Shape, qkv: &Floats, dout: &Floats, mask: Mask<'_>, scale: f32) -> Floats {
    let (out, lse) = run(shape, qkv, mask, scale);
    let Shape { s, n, k, h, .. } = shape;
    let part =
        |first: usize| Heads { data: qkv.view(), ld: (n + 2 * k) * h, col: first * h, rows_per_batch: s };
    let mut dqkv = qkv.clone();
    let (q, k, v) = (part(0), part(n), part(n + k));
    let lse = View::of_f32(&lse);
    backward(shape, q, k, v, mask, scale, out.view(), lse, dout.view(), dqkv.view_mut());
    dqkv
}

#[test]
fn backward_agrees_with_finite_differences() {
    for shape in [
        Shape { b: 2, t: 7, s: 7, n: 2, k: 1, h: 4 },
        Shape { b: 1, t: 13, s: 13, n: 4, k: 2, h: 6 },
        Shape { b: 1, t: 110, s: 110, n: 1, k: 1, h: 2 },
    ] {
        let Shape { b, t, n, k, h, .. } = shape;
        let starts = documents(b, t);
        for (starts, window) in [(None, None), (Some(&starts[..]), None), (None, Some(3))] {
            let mask = Mask { starts, window };
            let scale = 0.7;
            let x: Vec<f32> = random(b * t * (n + 2 * k) * h, 1).iter().map(|x| 2.0 * x).collect();
            let dy = random(b * t * n * h, 2);
            let (qkv, dout) = (Floats::new(&x, DType::F32), Floats::new(&dy, DType::F32));
            let got = gradients(shape, &qkv, &dout, mask, scale);
            let f = |x: &[f64]| reference::forward(&shape, x, &mask, scale as f64).0;
            let want = numeric_gradient(&qkv.to_f64(), &dout.to_f64(), f);
            assert_close("dqkv", &got.to_f64(), &want, 2e-5);
        }
    }
}

#[test]
fn long_rows_agree_between_types_and_between_thread_counts() {
    // Several blocks of queries and keys, where finite differences would take too long: the f32
    // gradient, checked above on one block, is the measure of bf16's.
    let shape = Shape { b: 1, t: 530, s: 530, n: 2, k: 1, h: 32 };
    let starts = documents(1, 530);
    let mask = Mask { starts: Some(&starts), window: Some(300) };
    let x = random(530 * 4 * 32, 1);
    let dy = random(530 * 2 * 32, 2);
    let round = |x: &[f32]| {
        Floats::new(
            &Floats::new(x, DType::Bf16).to_f64().iter().map(|x| *x as f32).collect::<Vec<_>>(),
            DType::F32,
        )
    };
    let exact = gradients(shape, &round(&x), &round(&dy), mask, 0.2).to_f64();
    let on = |threads| {
        let (qkv, dout) = (Floats::new(&x, DType::Bf16), Floats::new(&dy, DType::Bf16));
        Threads::new(threads).unwrap().run(|| gradients(shape, &qkv, &dout, mask, 0.2).to_f64())
    };
    let one = on(1);
    assert!(one == on(2) && one == on(3));
    assert_close("bf16", &one, &exact, 2e-2);
}

#[test]
fn later_tokens_do_not_change_earlier_gradients_across_blocks() {
    // With a gradient on the first half of the queries alone, the second half's keys get none.
    let shape = Shape { b: 1, t: 400, s: 400, n: 1, k: 1, h: 8 };
    let qkv = Floats::new(&random(400 * 24, 1), DType::F32);
    let dout: Vec<f32> =
        random(400 * 8, 2).iter().enumerate().map(|(i, x)| if i < 200 * 8 { *x } else { 0.0 }).collect();
    let grad = gradients(shape, &qkv, &Floats::new(&dout, DType::F32), Mask::default(), 0.5).to_f64();
    assert!(grad[200 * 24..].iter().all(|x| *x == 0.0) && grad[..200 * 24].iter().any(|x| *x != 0.0));
    let short = Shape { t: 200, s: 200, ..shape };
    let first =
        Floats::new(&qkv.to_f64()[..200 * 24].iter().map(|x| *x as f32).collect::<Vec<_>>(), DType::F32);
    let alone = gradients(short, &first, &Floats::new(&dout[..200 * 8], DType::F32), Mask::default(), 0.5);
    assert_close("alone", &grad[..200 * 24], &alone.to_f64(), 1e-5);
}
