//! Norms of rows, of layers and of heads, and their gradients: sums are made in another order than on the CPU.

use crate::either::Either;
use crate::support::{Values, close, gpu, same};
use device::DType::{self, Bf16, F32};
use device::Device;
use kernels::head_norm::Heads;
use kernels::{head_norm, layer_norm, rms_norm};

/// Types of rows and of weights.
const DTYPES: [(DType, DType); 3] = [(F32, F32), (Bf16, F32), (Bf16, Bf16)];

/// Rows and columns: teams of 8 threads to whole blocks, whole runs and ragged ones, rows that a block takes one
/// after the other, and more columns than a block sums.
const SHAPES: [(usize, usize); 15] = [
    (1, 8),
    (70, 8),
    (3, 64),
    (600, 64),
    (3, 100),
    (70, 100),
    (5, 7),
    (70, 768),
    (3, 1000),
    (1060, 1000),
    (1, 4096),
    (530, 4096),
    (2, 1),
    (3, 4100),
    (135, 8200),
];

/// What one call is about.
#[derive(Clone, Copy, Debug)]
struct Case {
    rows: usize,
    d: usize,
    dtypes: (DType, DType),
    carried: bool,
    /// Elements before every array.
    first: usize,
}

impl Case {
    fn of_rows(&self, seed: u64, device: Device) -> Either {
        let values = Values::random(self.dtypes.0, self.rows * self.d, seed);
        Either::new(&values, device, self.first)
    }

    fn of_weights(&self, seed: u64, device: Device) -> Either {
        Either::new(&Values::random(self.dtypes.1, self.d, seed), device, self.first)
    }

    fn floats(&self, len: usize, device: Device) -> Either {
        Either::new(&Values::new(F32, &vec![0.5; len]), device, self.first)
    }
}

/// y, inv_rms, dx, dw.
fn rms(case: Case, device: Device) -> Vec<Values> {
    let (x, w) = (case.of_rows(1, device), case.of_weights(2, device));
    let (dy, carried) = (case.of_rows(3, device), case.of_rows(4, device));
    let (mut y, mut dx) = (case.of_rows(5, device), case.of_rows(5, device));
    let (mut inv_rms, mut dw) = (case.floats(case.rows, device), case.floats(case.d, device));
    rms_norm::forward(x.view(), w.view(), 1e-5, y.view_mut(), inv_rms.view_mut());
    let carried = case.carried.then(|| carried.view());
    let (dx_out, dw_out) = (dx.view_mut(), dw.view_mut());
    rms_norm::backward(x.view(), w.view(), inv_rms.view(), dy.view(), carried, dx_out, dw_out);
    [y, inv_rms, dx, dw].iter().map(Either::back).collect()
}

/// y, mean, inv_std, dx, dw, db.
fn layer(case: Case, device: Device) -> Vec<Values> {
    let (x, w, b) = (case.of_rows(1, device), case.of_weights(2, device), case.of_weights(3, device));
    let (dy, carried) = (case.of_rows(4, device), case.of_rows(5, device));
    let (mut y, mut dx) = (case.of_rows(6, device), case.of_rows(6, device));
    let (mut mean, mut inv_std) = (case.floats(case.rows, device), case.floats(case.rows, device));
    let (mut dw, mut db) = (case.floats(case.d, device), case.floats(case.d, device));
    let (mean_out, inv_out) = (mean.view_mut(), inv_std.view_mut());
    layer_norm::forward(x.view(), w.view(), b.view(), 1e-5, y.view_mut(), mean_out, inv_out);
    let carried = case.carried.then(|| carried.view());
    let (mean_in, inv_in) = (mean.view(), inv_std.view());
    let (dx_out, dw_out, db_out) = (dx.view_mut(), dw.view_mut(), db.view_mut());
    layer_norm::backward(x.view(), w.view(), mean_in, inv_in, dy.view(), carried, dx_out, dw_out, db_out);
    [y, mean, inv_std, dx, dw, db].iter().map(Either::back).collect()
}

/// out, inv_rms, dqkv, dwq, dwk.
fn heads(case: Case, heads: Heads, device: Device) -> Vec<Values> {
    let Heads { n, k, h } = heads;
    let packed = Case { d: (n + 2 * k) * h, ..case };
    let weights = Case { d: h, ..case };
    let (qkv, dout) = (packed.of_rows(1, device), packed.of_rows(2, device));
    let (wq, wk) = (weights.of_weights(3, device), weights.of_weights(4, device));
    let (mut out, mut dqkv) = (packed.of_rows(5, device), packed.of_rows(5, device));
    let mut inv_rms = case.floats(case.rows * (n + k), device);
    let (mut dwq, mut dwk) = (case.floats(h, device), case.floats(h, device));
    let (out_view, inv_out) = (out.view_mut(), inv_rms.view_mut());
    head_norm::forward(qkv.view(), wq.view(), wk.view(), heads, 1e-6, out_view, inv_out);
    let (dq_out, dwq_out, dwk_out) = (dqkv.view_mut(), dwq.view_mut(), dwk.view_mut());
    let (wq, wk, inv_rms_in) = (wq.view(), wk.view(), inv_rms.view());
    head_norm::backward(qkv.view(), wq, wk, inv_rms_in, heads, dout.view(), dq_out, dwq_out, dwk_out);
    [out, inv_rms, dqkv, dwq, dwk].iter().map(Either::back).collect()
}

/// The GPU's results are the CPU's but for the order of sums; and they are the same bits again, elsewhere in
/// memory.
fn check(case: Case, run: impl Fn(Case, Device) -> Vec<Values>) {
    let got = run(case, Device::Cuda);
    for (i, (got, want)) in got.iter().zip(run(case, Device::Cpu)).enumerate() {
        // What is rounded to bf16 falls to the other side now and then.
        let most = if want.cpu().dtype() == F32 { 4e-6 } else { 2e-4 };
        close(&format!("result {i} of {case:?}"), got, &want, most);
    }
    for (i, (got, again)) in
        got.iter().zip(run(Case { first: case.first + 3, ..case }, Device::Cuda)).enumerate()
    {
        same(&format!("result {i} of {case:?} again"), got, &again);
    }
}

fn cases() -> impl Iterator<Item = Case> {
    let shapes = SHAPES.into_iter().enumerate();
    shapes.flat_map(|(i, (rows, d))| {
        // Large shapes in one type each.
        let all = if rows * d < 60_000 { 0..3 } else { i % 3..i % 3 + 1 };
        all.map(move |which| Case { rows, d, dtypes: DTYPES[which], carried: (i + which) % 2 == 0, first: 0 })
    })
}

#[test]
fn of_rows() {
    let _turn = gpu();
    cases().for_each(|case| check(case, rms));
}

#[test]
fn of_layers() {
    let _turn = gpu();
    cases().for_each(|case| check(case, layer));
}

#[test]
fn of_heads() {
    let _turn = gpu();
    let shapes =
        [(1, 1, 1, 64), (3, 4, 2, 128), (70, 8, 2, 64), (5, 3, 1, 20), (2, 2, 2, 7), (3000, 7, 1, 8)];
    for (rows, n, k, h) in shapes {
        for dtypes in DTYPES {
            let case = Case { rows, d: h, dtypes, carried: false, first: 0 };
            check(case, |case, device| heads(case, Heads { n, k, h }, device));
        }
    }
}

#[test]
fn no_rows_change_nothing() {
    let _turn = gpu();
    let case = Case { rows: 0, d: 16, dtypes: (F32, F32), carried: true, first: 0 };
    check(case, rms);
    check(case, layer);
    check(case, |case, device| heads(case, Heads { n: 2, k: 1, h: 16 }, device));
}
