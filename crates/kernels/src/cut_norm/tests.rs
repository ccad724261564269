use super::*;
use crate::testkit::{Floats, assert_close, random};
use crate::{layer_norm, rms_norm};
use device::DType;

const M: usize = 9;
/// Columns of each piece, and how many of them are there: the last piece reaches past the end.
const PIECES: [(usize, usize); 3] = [(40, 40), (40, 40), (40, 17)];
const D: usize = 97;

/// Columns [first, first + width) of x [M, D]; past the end zeros.
fn columns(x: &[f32], first: usize, width: usize) -> Vec<f32> {
    let at = |i: usize| (i / width, first + i % width);
    let value = |(row, col)| if col < D { x[row * D + col] } else { 0.0 };
    (0..x.len() / D * width).map(|i| value(at(i))).collect()
}

struct Outcome {
    y: Vec<f64>,
    dx: Vec<f64>,
    dw: Vec<f64>,
    db: Vec<f64>,
}

/// The norm piece by piece, sums added up between the halves.
fn in_pieces(x: &[f32], w: &[f32], b: Option<&[f32]>, dy: &[f32], carried: &[f32], eps: f32) -> Outcome {
    let total = |sum: Sum<'_>| {
        let mut total = vec![0f32; M];
        for (i, (width, valid)) in PIECES.into_iter().enumerate() {
            let mut part = vec![0f32; M];
            let x = columns(x, 40 * i, width);
            sums(View::of_f32(&x), sum, valid, ViewMut::of_f32(&mut part));
            total.iter_mut().zip(part).for_each(|(t, p)| *t += p);
        }
        total
    };
    let mean: Option<Vec<f32>> = b.map(|_| total(Sum::Values).iter().map(|s| s / D as f32).collect());
    let square = match &mean {
        Some(mean) => total(Sum::Deviations(View::of_f32(mean))),
        None => total(Sum::Squares),
    };
    let inv: Vec<f32> = square.iter().map(|s| 1.0 / (s / D as f32 + eps).sqrt()).collect();
    let piece = |i: usize, x: &[f32]| columns(x, 40 * i, 40);
    let mut back = vec![0f32; 2 * M];
    let mut out = Outcome { y: vec![0.0; M * D], dx: vec![0.0; M * D], dw: vec![], db: vec![] };
    for step in 0..2 {
        for (i, (width, valid)) in PIECES.into_iter().enumerate() {
            let (x, w, dy, carried) = (piece(i, x), piece(i, w), piece(i, dy), piece(i, carried));
            let mean = mean.as_deref().map(View::of_f32);
            let (x, w, inv) = (View::of_f32(&x), View::of_f32(&w), View::of_f32(&inv));
            let rows = Rows { x, w, mean, inv, valid };
            if step == 0 {
                let mut part = vec![0f32; 2 * M];
                backward_sums(rows, View::of_f32(&dy), ViewMut::of_f32(&mut part));
                back.iter_mut().zip(part).for_each(|(t, p)| *t += p / D as f32);
                continue;
            }
            let b = b.map(|b| piece(i, b));
            let (mut y, mut dx) = (vec![9f32; M * width], vec![9f32; M * width]);
            apply(rows, b.as_deref().map(View::of_f32), ViewMut::of_f32(&mut y));
            let (mut dw, mut db) = (vec![0f32; width], vec![0f32; width]);
            let (sums, dy, carried) = (View::of_f32(&back), View::of_f32(&dy), Some(View::of_f32(&carried)));
            let (dx_out, dw_out) = (ViewMut::of_f32(&mut dx), ViewMut::of_f32(&mut dw));
            backward(rows, sums, dy, carried, dx_out, dw_out, Some(ViewMut::of_f32(&mut db)));
            for (at, (y, dx)) in y.iter().zip(&dx).enumerate() {
                let (row, col) = (at / width, at % width);
                if col < valid {
                    out.y[row * D + 40 * i + col] = *y as f64;
                    out.dx[row * D + 40 * i + col] = *dx as f64;
                } else {
                    assert_eq!((*y, *dx), (0.0, 0.0), "padding");
                }
            }
            out.dw.extend(dw[..valid].iter().map(|x| *x as f64));
            out.db.extend(db[..valid].iter().map(|x| *x as f64));
        }
    }
    out
}

#[test]
fn a_norm_in_pieces_is_the_norm_of_whole_rows() {
    let [x, dy, carried] = [1, 2, 3].map(|seed| Floats::new(&random(M * D, seed), DType::F32));
    let [w, b] = [4, 5].map(|seed| random(D, seed));
    let values = |x: &Floats| x.to_f64().iter().map(|x| *x as f32).collect::<Vec<_>>();
    let (xs, dys, cs) = (values(&x), values(&dy), values(&carried));
    let wide = |x: &[f32]| x.iter().map(|x| *x as f64).collect::<Vec<_>>();
    for layer in [false, true] {
        let (mut y, mut dx) = (vec![0f32; M * D], vec![0f32; M * D]);
        let (mut mean, mut inv) = (vec![0f32; M], vec![0f32; M]);
        let (mut dw, mut db) = (vec![0f32; D], vec![0f32; D]);
        let (wv, bv) = (View::of_f32(&w), View::of_f32(&b));
        if layer {
            let (m, i) = (ViewMut::of_f32(&mut mean), ViewMut::of_f32(&mut inv));
            layer_norm::forward(x.view(), wv, bv, 1e-5, ViewMut::of_f32(&mut y), m, i);
            let (m, i) = (View::of_f32(&mean), View::of_f32(&inv));
            let (dw, db) = (ViewMut::of_f32(&mut dw), ViewMut::of_f32(&mut db));
            let carried = Some(carried.view());
            layer_norm::backward(x.view(), wv, m, i, dy.view(), carried, ViewMut::of_f32(&mut dx), dw, db);
        } else {
            let i = ViewMut::of_f32(&mut inv);
            rms_norm::forward(x.view(), wv, 1e-5, ViewMut::of_f32(&mut y), i);
            let (i, dw, carried) = (View::of_f32(&inv), ViewMut::of_f32(&mut dw), Some(carried.view()));
            rms_norm::backward(x.view(), wv, i, dy.view(), carried, ViewMut::of_f32(&mut dx), dw);
        }
        let got = in_pieces(&xs, &w, layer.then_some(b.as_slice()), &dys, &cs, 1e-5);
        assert_close("y", &got.y, &wide(&y), 1e-6);
        assert_close("dx", &got.dx, &wide(&dx), 2e-6);
        assert_close("dw", &got.dw, &wide(&dw), 2e-6);
        if layer {
            assert_close("db", &got.db, &wide(&db), 2e-6);
        }
    }
}
