//! A mixture of experts in four ops: route -> permute -> experts -> combine; the first is in
//! `route.rs`. Between permute and experts, and between experts and combine, rows stand ordered by
//! expert: that is where ranks that share experts exchange them. No token is dropped: every expert
//! takes as many as chose it.
//!
//! Letters: M tokens, E experts, k choices of a token, S = M k slots ordered by expert.

use crate::tape::{Tape, Var};
use crate::{Fault, ParamRef, Tensor};
use device::DType;
use kernels::gemm::{Epilogue, Mat, MatMut, gemm};
use std::sync::Arc;

/// Where every token goes.
#[derive(Clone, Debug, PartialEq)]
pub struct Order {
    /// Slot of each pair m k + j. [S]
    pub slot_of: Vec<u32>,
    /// Pair of each slot. [S]
    pub pair_of: Vec<u32>,
    /// Token of each slot. [S]
    pub token_of: Vec<u32>,
    /// First slot of each expert, and S. [E + 1]
    pub starts: Arc<[usize]>,
    /// Choices of a token, k.
    pub choices: usize,
}

impl Order {
    /// From the experts each token chose. [M, k]
    pub fn new(ids: &[u32], experts: usize, choices: usize) -> Order {
        let mut starts = vec![0; experts + 1];
        ids.iter().for_each(|id| starts[*id as usize + 1] += 1);
        (0..experts).for_each(|e| starts[e + 1] += starts[e]);
        let mut next = starts.clone();
        let (mut slot_of, mut pair_of) = (vec![0; ids.len()], vec![0; ids.len()]);
        for (pair, id) in ids.iter().enumerate() {
            let slot = next[*id as usize];
            next[*id as usize] += 1;
            (slot_of[pair], pair_of[slot]) = (slot as u32, pair as u32);
        }
        let token_of = pair_of.iter().map(|pair| pair / choices as u32).collect();
        Order { slot_of, pair_of, token_of, starts: starts.into(), choices }
    }

    /// Every token to one expert: a feed-forward part all tokens share.
    pub fn all(tokens: usize) -> Order {
        Order::new(&vec![0; tokens], 1, 1)
    }
}

impl Tape<'_> {
    /// Rows in the order of experts: x [M, D] -> [S, D].
    pub fn permute(&mut self, x: &Var, order: &Arc<Order>) -> Result<Var, Fault> {
        self.moment("permute", &[])?;
        let (m, d) = (x.value.rows(), x.value.cols());
        let (device, dtype) = (x.value.device(), x.value.dtype());
        let mut rows = Tensor::new(device, dtype, &[order.token_of.len(), d])?;
        kernels::embedding::forward(&order.token_of, x.value.view(), d, rows.view_mut(), false);
        let order = order.clone();
        Ok(self.outside(&[x], rows, move |tape, drows| {
            tape.moment("permute", &[])?;
            let mut dx = Tensor::new(device, dtype, &[m, d])?;
            kernels::experts::combine(drows.view(), d, &order.slot_of, None, None, dx.view_mut());
            Ok(vec![Some(dx)])
        }))
    }

    /// Each expert's SwiGLU on its run of rows: x [S, D], gate_up [E 2F, D] (an expert's gate, then
    /// its up), down [E D, F] -> [S, D]. `starts` [E + 1] are the first rows of the experts.
    pub fn experts(
        &mut self,
        x: &Var,
        starts: &Arc<[usize]>,
        (gate_up, down): (ParamRef, ParamRef),
    ) -> Result<Var, Fault> {
        self.moment("experts", &[gate_up, down])?;
        let (rows, d) = (x.value.rows(), x.value.cols());
        let f = self.params.spec(down).shape[1];
        let (device, dtype) = (x.value.device(), x.value.dtype());
        let mut inner = Tensor::new(device, dtype, &[rows, 2 * f])?;
        let w = self.params.weight(gate_up);
        for (e, first, m) in runs(starts) {
            let a = Mat::new(x.value.view().narrow(first * d, m * d), d);
            let b = Mat::new(w.narrow(e * 2 * f * d, 2 * f * d), d).t();
            let out = MatMut { data: inner.view_mut().narrow(first * 2 * f, m * 2 * f), ld: 2 * f };
            gemm(m, 2 * f, d, a, b, out, false, Epilogue::default());
        }
        let mut act = Tensor::new(device, dtype, &[rows, f])?;
        kernels::swiglu::forward(inner.view(), f, act.view_mut());
        let mut y = Tensor::new(device, dtype, &[rows, d])?;
        let w = self.params.weight(down);
        for (e, first, m) in runs(starts) {
            let a = Mat::new(act.view().narrow(first * f, m * f), f);
            let out = MatMut { data: y.view_mut().narrow(first * d, m * d), ld: d };
            gemm(m, d, f, a, Mat::new(w.narrow(e * d * f, d * f), f).t(), out, false, Epilogue::default());
        }
        let (kept, starts) = (vec![x.value.clone(), inner], starts.clone());
        Ok(self.outside_keeping(&[x], y, kept, move |tape, kept, dy| {
            tape.moment_back("experts", &[gate_up, down])?;
            let dx = experts_backward(tape, (kept[0].clone(), &kept[1]), starts, (gate_up, down), dy)?;
            Ok(vec![Some(dx)])
        }))
    }

    /// Rows back to their tokens: residual [M, D], where there is one, + the weighted [M, k] rows
    /// [S, D] of each.
    pub fn combine(
        &mut self,
        rows: &Var,
        weights: &Var,
        order: &Arc<Order>,
        residual: Option<&Var>,
    ) -> Result<Var, Fault> {
        self.moment("combine", &[])?;
        let d = rows.value.cols();
        let (device, dtype) = (rows.value.device(), rows.value.dtype());
        let mut y = Tensor::new(device, dtype, &[weights.value.rows(), d])?;
        let (w, base) = (weights.value.view(), residual.map(|residual| residual.value.view()));
        kernels::experts::combine(rows.value.view(), d, &order.slot_of, Some(w), base, y.view_mut());
        let (kept, w, order) = (vec![rows.value.clone()], weights.value.clone(), order.clone());
        let (inputs, added) = ([rows, weights, residual.unwrap_or(rows)], residual.is_some());
        Ok(self.outside_keeping(&inputs[..2 + usize::from(added)], y, kept, move |tape, kept, dy| {
            tape.moment("combine", &[])?;
            let rows = &kept[0];
            let mut drows = Tensor::new(device, dtype, rows.shape())?;
            let mut by_slot = Tensor::new(device, DType::F32, &[order.pair_of.len()])?;
            let (given, out) = ((w.view(), order.choices), (drows.view_mut(), by_slot.view_mut()));
            kernels::experts::combine_backward(
                dy.view(),
                d,
                &order.pair_of,
                given,
                rows.view(),
                out.0,
                out.1,
            );
            let by_slot = by_slot.to_f32();
            let by_pair: Vec<f32> = order.slot_of.iter().map(|slot| by_slot[*slot as usize]).collect();
            let dweights = Tensor::from_f32(&by_pair, DType::F32, w.shape())?.on(device)?;
            Ok(vec![Some(drows), Some(dweights), added.then_some(dy)])
        }))
    }
}

/// (expert, first row, rows) of every expert some token chose.
fn runs(starts: &[usize]) -> impl Iterator<Item = (usize, usize, usize)> + '_ {
    let runs = starts.windows(2).enumerate().map(|(e, run)| (e, run[0], run[1] - run[0]));
    runs.filter(|(_, _, rows)| *rows > 0)
}

fn experts_backward(
    tape: &mut Tape<'_>,
    (x, inner): (Tensor, &Tensor),
    starts: Arc<[usize]>,
    (gate_up, down): (ParamRef, ParamRef),
    dy: Tensor,
) -> Result<Tensor, Fault> {
    let (rows, d, f) = (x.rows(), x.cols(), inner.cols() / 2);
    let (device, dtype) = (dy.device(), dy.dtype());
    let mut dact = Tensor::new(device, dtype, &[rows, f])?;
    let w = tape.params.weight(down);
    for (e, first, m) in runs(&starts) {
        let a = Mat::new(dy.view().narrow(first * d, m * d), d);
        let out = MatMut { data: dact.view_mut().narrow(first * f, m * f), ld: f };
        gemm(m, f, d, a, Mat::new(w.narrow(e * d * f, d * f), f), out, false, Epilogue::default());
    }
    let mut act = Tensor::new(device, dtype, &[rows, f])?;
    let mut dinner = Tensor::new(device, dtype, inner.shape())?;
    kernels::swiglu::backward(inner.view(), f, dact.view(), dinner.view_mut(), Some(act.view_mut()));
    let mut dx = Tensor::new(device, dtype, &[rows, d])?;
    let w = tape.params.weight(gate_up);
    for (e, first, m) in runs(&starts) {
        let a = Mat::new(dinner.view().narrow(first * 2 * f, m * 2 * f), 2 * f);
        let out = MatMut { data: dx.view_mut().narrow(first * d, m * d), ld: d };
        gemm(
            m,
            d,
            2 * f,
            a,
            Mat::new(w.narrow(e * 2 * f * d, 2 * f * d), d),
            out,
            false,
            Epilogue::default(),
        );
    }
    tape.weight_gradient("experts", &[gate_up, down], move |tape| {
        add_weight_grads(tape, down, &starts, (&dy, &act));
        add_weight_grads(tape, gate_up, &starts, (&dinner, &x));
        Ok(())
    })?;
    Ok(dx)
}

/// grad of [E N, K] += dy [S, N]^T x [S, K], each expert on its own rows.
fn add_weight_grads(tape: &mut Tape<'_>, param: ParamRef, starts: &[usize], (dy, x): (&Tensor, &Tensor)) {
    let (n, k) = (dy.cols(), x.cols());
    // Experts nobody chose keep what they have: a stale gradient is cleared first.
    let mut grad = tape.params.added_grad(param);
    for (e, first, m) in runs(starts) {
        let out = MatMut { data: grad.reborrow().narrow(e * n * k, n * k), ld: k };
        let a = Mat::new(dy.view().narrow(first * n, m * n), n).t();
        let b = Mat::new(x.view().narrow(first * k, m * k), k);
        gemm(n, k, m, a, b, out, true, Epilogue::default());
    }
}
