use super::*;
use crate::testkit::*;
use device::{DType, Threads};

#[test]
fn rows_are_looked_up_and_gradients_scattered() {
    let (v, d) = (1500, 7);
    let ids: Vec<u32> = (0..400u32).map(|i| i * i % 1499).chain([1499, 0, 0, 7]).collect();
    for dtype in [DType::F32, DType::Bf16] {
        let table = Floats::new(&random(v * d, 1), dtype);
        let dout = Floats::new(&random(ids.len() * d, 2), dtype);
        let mut out = dout.clone();
        forward(&ids, table.view(), d, out.view_mut(), false);
        let (rows, outs) = (table.to_f64(), out.to_f64());
        let mut want = vec![0f64; v * d];
        for (token, id) in ids.iter().enumerate() {
            assert_eq!(outs[token * d..][..d], rows[*id as usize * d..][..d]);
            for j in 0..d {
                want[*id as usize * d + j] += dout.to_f64()[token * d + j];
            }
        }
        let on = |threads| {
            let mut grad = vec![0f32; v * d];
            Threads::new(threads).unwrap().run(|| {
                backward(&ids, dout.view(), d, ViewMut::of_f32(&mut grad));
            });
            grad
        };
        let grad = on(2);
        assert!(grad == on(1));
        assert_close("grad", &grad.iter().map(|x| *x as f64).collect::<Vec<_>>(), &want, 1e-6);
        forward(&ids, table.view(), d, out.view_mut(), true);
        let doubled: Vec<f64> = outs.iter().map(|x| 2.0 * x).collect();
        assert_close("sum", &out.to_f64(), &doubled, tolerance(dtype));
    }
}

#[test]
fn rows_that_lie_elsewhere_are_zeros_and_get_nothing() {
    let (table, dout) = (random(3 * 5, 1), random(4 * 5, 2));
    let ids = [2, ELSEWHERE, 0, ELSEWHERE];
    let (mut out, mut grad) = (vec![9f32; 20], vec![0f32; 15]);
    forward(&ids, View::of_f32(&table), 5, ViewMut::of_f32(&mut out), false);
    assert!(out[..5] == table[10..] && out[10..15] == table[..5]);
    assert!(out[5..10].iter().chain(&out[15..]).all(|x| *x == 0.0));
    backward(&ids, View::of_f32(&dout), 5, ViewMut::of_f32(&mut grad));
    assert!(grad[10..] == dout[..5] && grad[..5] == dout[10..15]);
    assert!(grad[5..10].iter().all(|x| *x == 0.0));
    forward(&ids, View::of_f32(&table), 5, ViewMut::of_f32(&mut out), true);
    assert!(out[5..10].iter().all(|x| *x == 0.0));
}
