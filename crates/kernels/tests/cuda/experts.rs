//! Rows of experts back to their tokens: the same bits, but for the gradients of weights.

use crate::support::{Values, close, gpu, same};
use device::DType;
use kernels::experts::{combine, combine_backward};

#[test]
fn rows_come_back_weighted_and_so_do_gradients() {
    let _gpu = gpu();
    for dtype in [DType::F32, DType::Bf16] {
        for (tokens, k, d) in [(1, 1, 1), (9, 2, 37), (30, 3, 64), (4, 8, 2600), (6, 1, 300), (0, 2, 8)] {
            let slots = tokens * k;
            // Any permutation: slots in steps that share no factor with their number.
            let step = [7, 11, 13].into_iter().find(|step| slots % step != 0).unwrap_or(1);
            let slot_of: Vec<u32> = (0..slots).map(|pair| (pair * step % slots) as u32).collect();
            let mut pair_of = vec![0u32; slots];
            slot_of.iter().zip(0..).for_each(|(slot, pair)| pair_of[*slot as usize] = pair);
            let [rows, residual, dy] =
                [slots, tokens, tokens].map(|n| Values::random(dtype, n * d, 1 + n as u64));
            let weights = Values::random(DType::F32, slots, 4);
            let (grows, gresidual, gdy, gweights) =
                (rows.on_gpu(), residual.on_gpu(), dy.on_gpu(), weights.on_gpu());
            let (mut want, mut got) = (residual.clone(), residual.on_gpu());
            for (weighted, added) in [(true, true), (false, false), (true, false)] {
                let (w, r) = (weighted.then(|| weights.cpu()), added.then(|| residual.cpu()));
                combine(rows.cpu(), d, &slot_of, w, r, want.cpu_mut());
                let (w, r) = (weighted.then(|| gweights.view()), added.then(|| gresidual.view()));
                combine(grows.view(), d, &slot_of, w, r, got.view_mut());
                same(&format!("y {dtype} {tokens} {k} {d}"), &got.back(), &want);
            }
            let (mut drows, mut dweights) = (rows.clone(), weights.clone());
            let (mut gdrows, mut gdweights) = (rows.on_gpu(), weights.on_gpu());
            let given = (weights.cpu(), k);
            combine_backward(dy.cpu(), d, &pair_of, given, rows.cpu(), drows.cpu_mut(), dweights.cpu_mut());
            let out = (gdrows.view_mut(), gdweights.view_mut());
            combine_backward(gdy.view(), d, &pair_of, (gweights.view(), k), grows.view(), out.0, out.1);
            same(&format!("drows {dtype} {tokens} {k} {d}"), &gdrows.back(), &drows);
            close(&format!("dweights {dtype} {tokens} {k} {d}"), &gdweights.back(), &dweights, 1e-6);
        }
    }
}
