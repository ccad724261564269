//! Norms of rows cut among ranks: sums are made in another order than on the CPU, the rest is not.

use crate::either::Either;
use crate::support::{Values, close, gpu, same};
use device::DType::{self, Bf16, F32};
use device::Device;
use kernels::cut_norm::{Rows, Sum, apply, backward, backward_sums, invert, sums};

/// Types of rows and of weights.
const DTYPES: [(DType, DType); 3] = [(F32, F32), (Bf16, F32), (Bf16, Bf16)];

/// Rows, columns, and how many of them are there: whole runs and ragged ones, nothing at all, several tiles.
const SHAPES: [(usize, usize, usize); 12] = [
    (1, 8, 8),
    (70, 8, 3),
    (3, 64, 64),
    (600, 64, 41),
    (70, 100, 100),
    (5, 7, 6),
    (4, 16, 0),
    (70, 768, 700),
    (530, 768, 768),
    (3, 4100, 4099),
    (20, 8200, 8200),
    (2, 1, 1),
];

#[derive(Clone, Copy, Debug)]
struct Case {
    rows: usize,
    d: usize,
    valid: usize,
    dtypes: (DType, DType),
    /// LayerNorm, with means and biases.
    layer: bool,
    carried: bool,
    /// Elements before every array.
    first: usize,
}

impl Case {
    fn array(&self, dtype: DType, len: usize, seed: u64, device: Device) -> Either {
        Either::new(&Values::random(dtype, len, seed), device, self.first)
    }
}

/// Sums of values, squares and deviations, inverse roots; y, sums on the way back, dx, dw, db.
fn run(case: Case, device: Device) -> Vec<Values> {
    let Case { rows, d, valid, dtypes: (rows_type, weights_type), layer, carried, .. } = case;
    let of_rows = |seed| case.array(rows_type, rows * d, seed, device);
    let of_weights = |seed| case.array(weights_type, d, seed, device);
    let floats = |len, seed| case.array(F32, len, seed, device);
    let (x, w, b) = (of_rows(1), of_weights(2), of_weights(3));
    let (dy, before, mean) = (of_rows(4), of_rows(5), floats(rows, 6));
    let [mut values, mut squares, mut deviations] = [7, 7, 7].map(|seed| floats(rows, seed));
    sums(x.view(), Sum::Values, valid, values.view_mut());
    sums(x.view(), Sum::Squares, valid, squares.view_mut());
    sums(x.view(), Sum::Deviations(mean.view()), valid, deviations.view_mut());
    // As positive as means of squares are, and the same on both devices.
    let positive: Vec<f32> = floats(rows, 8).back().floats().iter().map(|x| x * x + 0.1).collect();
    let mut inv = Either::new(&Values::new(F32, &positive), device, case.first);
    invert(inv.view_mut(), 1e-5);
    let (mut y, mut dx) = (of_rows(9), of_rows(9));
    let (mut dw, mut db, mut both) = (floats(d, 10), floats(d, 11), floats(2 * rows, 12));
    let whole = floats(2 * rows, 13);
    let mean = layer.then(|| mean.view());
    let given = Rows { x: x.view(), w: w.view(), mean, inv: inv.view(), valid };
    apply(given, layer.then(|| b.view()), y.view_mut());
    backward_sums(given, dy.view(), both.view_mut());
    let (carried, db_out) = (carried.then(|| before.view()), layer.then(|| db.view_mut()));
    backward(given, whole.view(), dy.view(), carried, dx.view_mut(), dw.view_mut(), db_out);
    [values, squares, deviations, both, dw, db, inv, y, dx].iter().map(Either::back).collect()
}

#[test]
fn of_rows_cut_among_ranks() {
    let _turn = gpu();
    for (i, (rows, d, valid)) in SHAPES.into_iter().enumerate() {
        for (j, dtypes) in DTYPES.into_iter().enumerate() {
            let (layer, carried) = ((i + j) % 2 == 0, (i / 2 + j) % 2 == 0);
            let case = Case { rows, d, valid, dtypes, layer, carried, first: 0 };
            let (got, want) = (run(case, Device::Cuda), run(case, Device::Cpu));
            let again = run(Case { first: 3, ..case }, Device::Cuda);
            for (which, ((got, want), again)) in got.iter().zip(&want).zip(&again).enumerate() {
                let what = format!("result {which} of {case:?}");
                // What sums over nothing has its bits.
                match which < 6 {
                    true => close(&what, got, want, 4e-6),
                    false => same(&what, got, want),
                }
                same(&format!("{what} elsewhere"), got, again);
            }
        }
    }
}

#[test]
fn no_rows_change_nothing() {
    let _turn = gpu();
    let case = Case { rows: 0, d: 16, valid: 16, dtypes: (F32, F32), layer: true, carried: false, first: 0 };
    for (got, want) in run(case, Device::Cuda).iter().zip(run(case, Device::Cpu)) {
        same("nothing", got, &want);
    }
}
