//! The router of a mixture of experts: scores, the choice of each token, and the load-balancing loss.
//!
//! Letters: M tokens, E experts, k choices of a token.

use crate::tape::{Phase, Tape, Var};
use crate::{Fault, ParamRef, Tensor};
use device::{DType, Device};
use kernels::gemm::{Epilogue, Mat, MatMut, gemm};
use std::ops::Range;
use std::sync::Arc;

/// How a router chooses.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Router {
    /// Experts E.
    pub experts: usize,
    /// Experts a token goes to, k.
    pub choices: usize,
    /// Whether the weights of a token's choices add up to 1.
    pub normalise: bool,
    /// Factor of this layer's load-balancing loss.
    pub balance: f32,
}

/// What fell on the experts of one layer in one forward pass, over all ranks that share the batch.
#[derive(Clone, Debug, PartialEq)]
pub struct Load {
    /// Which layer.
    pub layer: usize,
    /// Choices that fell on each expert. [E]
    pub choices: Vec<f64>,
    /// E times the sum over experts of (choices per token that fell on it) (its mean probability):
    /// k when loads are even.
    pub balance: f64,
    /// The part of the step's targets this pass has, as the tape was told.
    pub share: f32,
    /// Least difference on this rank between the probability of an expert a token went to and of one
    /// it did not: runs that differ by less choose alike.
    pub margin: f32,
}

/// Which rows of a value are tokens; the others are padding.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Real {
    /// Ascending, none empty, no two that touch.
    runs: Arc<[Range<usize>]>,
}

impl Real {
    /// The first `tokens` rows.
    pub fn first(tokens: usize) -> Real {
        Real::of(std::iter::once(0..tokens))
    }

    /// The rows of `runs`, which ascend.
    pub fn of(runs: impl IntoIterator<Item = Range<usize>>) -> Real {
        let mut merged: Vec<Range<usize>> = Vec::new();
        for run in runs.into_iter().filter(|run| !run.is_empty()) {
            match merged.last_mut() {
                Some(last) if last.end == run.start => last.end = run.end,
                _ => merged.push(run),
            }
        }
        Real { runs: merged.into() }
    }

    /// How many there are.
    pub fn count(&self) -> usize {
        self.rows().count()
    }

    fn rows(&self) -> impl Iterator<Item = usize> + '_ {
        self.runs.iter().cloned().flatten()
    }

    /// The other runs of `m` rows.
    fn padding(&self, m: usize) -> impl Iterator<Item = Range<usize>> + '_ {
        let starts = std::iter::once(0).chain(self.runs.iter().map(|run| run.end));
        starts.zip(self.runs.iter().map(|run| run.start).chain([m])).map(|(start, end)| start..end)
    }
}

/// Adds up over ranks what is given, f32: each expert's choices, the sums of its probabilities, and the
/// tokens. [2 E + 1]
pub type Pool<'a> = &'a dyn Fn(&mut Tensor) -> Result<(), Fault>;

impl Tape<'_> {
    /// x [M, D] weight [N, D]^T -> [M, N] f32.
    pub fn scores(&mut self, x: &Var, weight: ParamRef) -> Result<Var, Fault> {
        self.moment("scores", &[weight])?;
        let (m, d, n) = (x.value.rows(), x.value.cols(), self.params.spec(weight).shape[0]);
        let mut scores = Tensor::new(x.value.device(), DType::F32, &[m, n])?;
        let w = Mat::new(self.params.weight(weight), d);
        let out = MatMut { data: scores.view_mut(), ld: n };
        gemm(m, n, d, Mat::new(x.value.view(), d), w.t(), out, false, Epilogue::default());
        let kept = vec![x.value.clone()];
        Ok(self.outside_keeping(&[x], scores, kept, move |tape, mut kept, ds| {
            tape.moment_back("scores", &[weight])?;
            let kept = kept.swap_remove(0);
            let mut dx = Tensor::new(kept.device(), kept.dtype(), &[m, d])?;
            let w = Mat::new(tape.params.weight(weight), d);
            let out = MatMut { data: dx.view_mut(), ld: d };
            gemm(m, d, n, Mat::new(ds.view(), n), w, out, false, Epilogue::default());
            tape.weight_gradient("scores", &[weight], move |tape| {
                let (dw, add) = tape.params.grad_mut(weight);
                let (scores, out) = (Mat::new(ds.view(), n), MatMut { data: dw, ld: d });
                gemm(n, d, m, scores.t(), Mat::new(kept.view(), d), out, add, Epilogue::default());
                Ok(())
            })?;
            Ok(vec![Some(dx)])
        }))
    }

    /// Choose experts: scores [M, E] f32 -> weights [M, k] f32 of the chosen, and their ids [M, k].
    /// Softmax in f32 over all experts, then the k likeliest (Shazeer et al. 2017). With it comes the
    /// load-balancing loss of Switch Transformers (Fedus et al. 2021, eq. 4): E times the sum over
    /// experts of (choices per token that fell on it) (its mean probability), times `balance`; of the
    /// tokens in `real` and those of the other ranks that `pool` adds.
    pub fn route(
        &mut self,
        scores: &Var,
        router: Router,
        real: &Real,
        pool: Pool<'_>,
    ) -> Result<(Var, Vec<u32>), Fault> {
        let (m, e, k, normalise) = (scores.value.rows(), router.experts, router.choices, router.normalise);
        self.moment("route", &[])?;
        // A number for each token and expert: wherever ops compute, the choice is made on the host.
        let device = scores.value.device();
        let mut probabilities = scores.value.to_device(Device::Cpu)?;
        let mut weights = Tensor::new(Device::Cpu, DType::F32, &[m, k])?;
        let mut ids = vec![0; m * k];
        kernels::experts::route(probabilities.view_mut(), e, &mut ids, weights.view_mut(), normalise);
        let mut sums = sums(&probabilities, &ids, real)?;
        if self.learns() {
            pool(&mut sums)?;
        }
        let margin = margin(&probabilities, &ids, real);
        let pull = self.balance(sums.view().f32(), router, margin);
        let (chosen, real) = (ids.clone(), real.clone());
        let out = self.outside(&[scores], weights.on(device)?, move |tape, dweights| {
            tape.moment("route", &[])?;
            let dweights = dweights.on(Device::Cpu)?;
            let mut dlogits = Tensor::new(probabilities.device(), DType::F32, probabilities.shape())?;
            let (p, dw) = (probabilities.view(), dweights.view());
            kernels::experts::route_backward(p, &ids, dw, &pull, normalise, dlogits.view_mut());
            let all = dlogits.view_mut().f32();
            real.padding(m).for_each(|rows| all[rows.start * e..rows.end * e].fill(0.0));
            Ok(vec![Some(dlogits.on(device)?)])
        });
        Ok((out, chosen))
    }

    /// 1 / (1 + exp(-x)) of f32 values.
    pub fn sigmoid(&mut self, x: &Var) -> Result<Var, Fault> {
        self.moment("sigmoid", &[])?;
        let device = x.value.device();
        let mut y = x.value.to_device(Device::Cpu)?;
        y.view_mut().f32().iter_mut().for_each(|y| *y = 1.0 / (1.0 + (-*y).exp()));
        let saved = y.clone();
        Ok(self.outside(&[x], y.on(device)?, move |tape, dy| {
            tape.moment("sigmoid", &[])?;
            let dy = dy.on(Device::Cpu)?;
            let mut dx = Tensor::new(saved.device(), DType::F32, saved.shape())?;
            let each = saved.view().f32().iter().zip(dy.view().f32());
            dx.view_mut().f32().iter_mut().zip(each).for_each(|(dx, (y, dy))| *dx = dy * y * (1.0 - y));
            Ok(vec![Some(dx.on(device)?)])
        }))
    }

    /// Add the load-balancing loss to the tape's, from the sums over all ranks; its gradient by each
    /// expert's probability. [E]
    fn balance(&mut self, sums: &[f32], router: Router, margin: f32) -> Vec<f32> {
        let e = router.experts;
        let (choices, probabilities, m) = (&sums[..e], &sums[e..2 * e], sums[2 * e].max(1.0));
        let factor = router.balance * self.share() * e as f32 / (m * m);
        // Layers that run again have been counted.
        if self.phase() == Phase::Forward {
            let choices: Vec<f64> = choices.iter().map(|n| f64::from(*n)).collect();
            let both = choices.iter().zip(probabilities).map(|(n, p)| n * f64::from(*p)).sum::<f64>();
            let balance = both * e as f64 / f64::from(m).powi(2);
            let (layer, share) = (self.layer(), self.share());
            self.balance_loss += f64::from(router.balance * share) * balance;
            self.loads.push(Load { layer, choices, balance, share, margin });
        }
        choices.iter().map(|count| factor * count).collect()
    }
}

/// Least difference between the probabilities of a token's last choice and of the likeliest expert it
/// did not choose.
fn margin(probabilities: &Tensor, ids: &[u32], real: &Real) -> f32 {
    let (e, k) = (probabilities.cols(), ids.len() / probabilities.rows().max(1));
    let all = probabilities.view().f32();
    let gap = |token: usize| {
        let (row, ids) = (&all[token * e..][..e], &ids[token * k..][..k]);
        let others = (0..e).filter(|expert| !ids.contains(&(*expert as u32)));
        let next = others.map(|expert| row[expert]).fold(f32::NEG_INFINITY, f32::max);
        ids.last().map_or(f32::INFINITY, |last| row[*last as usize] - next)
    };
    real.rows().map(gap).fold(f32::INFINITY, f32::min)
}

/// Choices of the tokens that fell on each expert, the sums of its probabilities over them, and their
/// number. [2 E + 1] f32
fn sums(probabilities: &Tensor, ids: &[u32], real: &Real) -> Result<Tensor, Fault> {
    let (e, k) = (probabilities.cols(), ids.len() / probabilities.rows().max(1));
    let all = probabilities.view().f32();
    let mut wide = vec![0f64; 2 * e + 1];
    for token in real.rows() {
        ids[token * k..][..k].iter().for_each(|id| wide[*id as usize] += 1.0);
        wide[e..2 * e].iter_mut().zip(&all[token * e..][..e]).for_each(|(sum, p)| *sum += f64::from(*p));
        wide[2 * e] += 1.0;
    }
    let mut sums = Tensor::new(probabilities.device(), DType::F32, &[2 * e + 1])?;
    sums.view_mut().f32().iter_mut().zip(wide).for_each(|(sum, wide)| *sum = wide as f32);
    Ok(sums)
}
