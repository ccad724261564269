//! Rows of a table and their gradients: the same bits.

use crate::support::{Values, gpu, same};
use device::DType;
use kernels::embedding::{ELSEWHERE, backward, forward};

#[test]
fn rows_are_looked_up_and_gradients_scattered() {
    let _gpu = gpu();
    for (d, first) in [(1, 0), (7, 0), (64, 0), (64, 1), (2600, 0), (300, 0)] {
        let v = 50;
        // One row for many tokens, rows for none, tokens without a row.
        let mixed = (0..90u32).map(|i| if i % 5 == 2 { ELSEWHERE } else { i * i * 7 % 49 });
        for ids in [mixed.chain([49; 21]).collect::<Vec<u32>>(), vec![ELSEWHERE], vec![3], vec![]] {
            for dtype in [DType::F32, DType::Bf16] {
                let what = format!("{dtype} {d} {first}, {} tokens", ids.len());
                let (rows, len) = (v * d, ids.len() * d);
                let (table, dout) =
                    (Values::random(dtype, first + rows, 1), Values::random(dtype, first + len, 2));
                let (there, dthere) = (table.on_gpu(), dout.on_gpu());
                let (mut want, mut got) = (dout.clone(), dout.on_gpu());
                for accumulate in [false, true, false] {
                    let (from, to) = (table.cpu().narrow(first, rows), want.cpu_mut().narrow(first, len));
                    forward(&ids, from, d, to, accumulate);
                    let (from, to) = (there.view().narrow(first, rows), got.view_mut().narrow(first, len));
                    forward(&ids, from, d, to, accumulate);
                    same(&what, &got.back(), &want);
                }
                let mut grad = Values::random(DType::F32, rows, 3);
                let mut there = grad.on_gpu();
                backward(&ids, dout.cpu().narrow(first, len), d, grad.cpu_mut());
                backward(&ids, dthere.view().narrow(first, len), d, there.view_mut());
                same(&format!("gradient, {what}"), &there.back(), &grad);
            }
        }
    }
}
