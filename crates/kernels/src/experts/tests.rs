use super::*;
use crate::testkit::{Floats, assert_close, random};
use device::DType;

#[test]
fn routes_are_the_likeliest_and_their_gradients_the_slopes() {
    for (tokens, e, k) in [(1, 1, 1), (5, 4, 1), (33, 8, 2), (7, 60, 4), (3, 5, 5), (0, 4, 2)] {
        for normalise in [false, true] {
            let logits: Vec<f32> = random(tokens * e, 3).iter().map(|x| 3.0 * x).collect();
            let wide: Vec<f64> = logits.iter().map(|x| *x as f64).collect();
            let (p, want_ids, want) = reference::route(&wide, e, k, normalise);
            let (mut found, mut ids, mut weights) = (logits, vec![0u32; tokens * k], vec![0f32; tokens * k]);
            let out = ViewMut::of_f32(&mut weights);
            route(ViewMut::of_f32(&mut found), e, &mut ids, out, normalise);
            assert_eq!(ids, want_ids);
            let wide_of = |x: &[f32]| x.iter().map(|x| *x as f64).collect::<Vec<_>>();
            assert_close("probabilities", &wide_of(&found), &p, 1e-6);
            assert_close("weights", &wide_of(&weights), &want, 1e-6);

            let (dw, pull) = (random(tokens * k, 5), random(e, 6));
            let mut dlogits = vec![0f32; tokens * e];
            let (p_view, dw_view) = (View::of_f32(&found), View::of_f32(&dw));
            route_backward(p_view, &ids, dw_view, &pull, normalise, ViewMut::of_f32(&mut dlogits));
            let loss = |logits: &[f64]| -> f64 {
                let (p, _, w) = reference::route(logits, e, k, normalise);
                let chosen: f64 = w.iter().zip(&dw).map(|(w, dw)| w * *dw as f64).sum();
                chosen + p.iter().enumerate().map(|(i, p)| p * pull[i % e] as f64).sum::<f64>()
            };
            let slope = |i: usize| {
                let at = |step: f64| {
                    let mut moved = wide.clone();
                    moved[i] += step;
                    loss(&moved)
                };
                (at(1e-6) - at(-1e-6)) / 2e-6
            };
            let slopes: Vec<f64> = (0..tokens * e).map(slope).collect();
            assert_close("dlogits", &wide_of(&dlogits), &slopes, 1e-4);
        }
    }
}

#[test]
fn rows_come_back_weighted_and_so_do_gradients() {
    for dtype in [DType::F32, DType::Bf16] {
        for (tokens, k, d) in [(1, 1, 1), (9, 2, 37), (300, 3, 64)] {
            let slots = tokens * k;
            // Any permutation: slots in steps that share no factor with their number.
            let step = (7..).find(|step| (2..=*step).all(|f| step % f != 0 || slots % f != 0)).unwrap();
            let slot_of: Vec<u32> = (0..slots).map(|pair| (pair * step % slots) as u32).collect();
            let mut pair_of = vec![0u32; slots];
            slot_of.iter().zip(0..).for_each(|(slot, pair)| pair_of[*slot as usize] = pair);
            let floats = |len, seed| Floats::new(&random(len, seed), dtype);
            let (rows, residual, dy) = (floats(slots * d, 1), floats(tokens * d, 2), floats(tokens * d, 3));
            let weights = random(slots, 4);
            let mut y = floats(tokens * d, 5);
            let w = View::of_f32(&weights);
            combine(rows.view(), d, &slot_of, Some(w), Some(residual.view()), y.view_mut());
            let (r, base, g) = (rows.to_f64(), residual.to_f64(), dy.to_f64());
            let sum = |i: usize| {
                let (token, col) = (i / d, i % d);
                let pairs = token * k..(token + 1) * k;
                base[i] + pairs.map(|p| weights[p] as f64 * r[slot_of[p] as usize * d + col]).sum::<f64>()
            };
            let tol = if dtype == DType::F32 { 1e-6 } else { 5e-3 };
            assert_close("y", &y.to_f64(), &(0..tokens * d).map(sum).collect::<Vec<_>>(), tol);

            let (mut drows, mut dweights) = (floats(slots * d, 6), vec![0f32; slots]);
            let out = (drows.view_mut(), ViewMut::of_f32(&mut dweights));
            combine_backward(dy.view(), d, &pair_of, (w, k), rows.view(), out.0, out.1);
            let of = |i: usize| {
                let pair = pair_of[i / d] as usize;
                weights[pair] as f64 * g[pair / k * d + i % d]
            };
            assert_close("drows", &drows.to_f64(), &(0..slots * d).map(of).collect::<Vec<_>>(), tol);
            let dots = (0..slots).map(|slot| {
                let token = pair_of[slot] as usize / k;
                (0..d).map(|c| g[token * d + c] * r[slot * d + c]).sum::<f64>()
            });
            let found: Vec<f64> = dweights.iter().map(|x| *x as f64).collect();
            assert_close("dweights", &found, &dots.collect::<Vec<_>>(), 1e-5);
        }
    }
}
