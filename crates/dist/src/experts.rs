//! A mixture of experts on a mesh.
//!
//! Ranks along `ep` have other tokens and other experts: rows go to the rank of their expert and come
//! back, their numbers first, then they. Rows stand ordered by expert, then by the rank they came from,
//! so that an expert sees the rows of a batch in their order. Ranks along the tensor axes that cut
//! widths have slices of every expert's neurons; those along axes that cut tokens have copies.

use crate::dim::merged;
use crate::matmul::finish;
use crate::moves::sum;
use crate::slices::Slices;
use crate::traffic::piece;
use crate::{Axis, Flow, Group, Layout, Mesh};
use std::ops::Range;
use std::sync::Arc;
use tensor::{DType, Fault, Order, ParamRef, Piece, Real, Router, Run, Tape, Tensor, Var};

/// Axes whose ranks see other tokens of a batch.
const TOKENS: [Axis; 4] = [Axis::Dp, Axis::Fsdp, Axis::Ep, Axis::Cp];

/// More ranks than experts.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error(
    "{experts} experts cannot be shared by mesh.ep = {ranks} ranks; set mesh.ep to at most {experts}, and mesh.dp for more replicas"
)]
pub struct FewExperts {
    /// Experts of a layer.
    pub experts: usize,
    /// Ranks along `ep`.
    pub ranks: usize,
}

/// How the experts of one layer lie on a mesh, and how tokens come to them.
#[derive(Clone, Debug)]
pub struct Experts {
    mesh: Mesh,
    /// The residual stream.
    outer: Layout,
    slices: Slices,
    count: usize,
}

/// What a mixture is made of: who chooses, and the parameters as `Experts` lays them out.
#[derive(Clone, Copy, Debug)]
pub struct Mixture {
    /// How tokens choose.
    pub router: Router,
    /// Weight of the router [E, D], its columns cut as those of the residual stream.
    pub route: ParamRef,
    /// Gate and up of every expert [E 2F, D], and down [E D, F].
    pub experts: (ParamRef, ParamRef),
}

impl Experts {
    /// `count` experts a layer.
    pub fn new(flow: &Flow, count: usize) -> Result<Experts, FewExperts> {
        let ranks = flow.mesh.size(Axis::Ep);
        if ranks > count {
            return Err(FewExperts { experts: count, ranks });
        }
        Ok(Experts { mesh: flow.mesh.clone(), outer: flow.outer, slices: Slices::new(flow), count })
    }

    /// The experts of member `index` of the ranks that share them.
    fn of(&self, index: usize) -> Range<usize> {
        piece(self.count, self.mesh.size(Axis::Ep), index)
    }

    /// Experts there is room for: as many on every rank, so that their arrays are equally long.
    fn room(&self) -> usize {
        self.count.div_ceil(self.mesh.size(Axis::Ep))
    }

    /// Columns of a row that was put together, padding included.
    fn width(&self, d: usize) -> usize {
        let pieces = self.outer.cols.pieces(&self.mesh);
        d.div_ceil(pieces) * pieces
    }

    /// Neurons of an expert this rank has: (first, how many, room).
    fn neurons(&self, f: usize) -> (usize, usize, usize) {
        let room = f.div_ceil(self.slices.cut.pieces(&self.mesh));
        let first = (self.slices.cut.index(&self.mesh) * room).min(f);
        (first, room.min(f - first), room)
    }

    /// What this rank holds of every expert's gate and up [E 2F, D], and the shape it is held in.
    pub fn gate_up(&self, d: usize, f: usize) -> (Piece, Vec<usize>) {
        let (first, len, room) = self.neurons(f);
        let here = self.of(self.mesh.coord(Axis::Ep)).enumerate();
        let halves = here.flat_map(|(slot, expert)| {
            [0, 1].map(|half| {
                let (at, from) = ((2 * slot + half) * room, (2 * expert + half) * f + first);
                Run { at, from, len }
            })
        });
        let cols = vec![Run { at: 0, from: 0, len: d }];
        let rows = merged(halves.filter(|run| run.len > 0).collect());
        (Piece { whole: [self.count * 2 * f, d], rows, cols }, vec![self.room() * 2 * room, self.width(d)])
    }

    /// The same of every expert's down [E D, F].
    pub fn down(&self, d: usize, f: usize) -> (Piece, Vec<usize>) {
        let (from, len, room) = self.neurons(f);
        let here = self.of(self.mesh.coord(Axis::Ep)).enumerate();
        let rows = here.map(|(slot, e)| Run { at: slot * self.width(d), from: e * d, len: d });
        let cols = if len > 0 { vec![Run { at: 0, from, len }] } else { Vec::new() };
        let rows = merged(rows.collect());
        (Piece { whole: [self.count * d, f], rows, cols }, vec![self.room() * self.width(d), room])
    }

    /// Axes along which ranks hold other parts of the experts.
    pub fn cut(&self) -> impl Iterator<Item = Axis> + use<> {
        let shared = (self.mesh.size(Axis::Ep) > 1).then_some(Axis::Ep);
        shared.into_iter().chain(self.slices.cut.axes())
    }

    /// Axes over which the experts' gradients are sums after the way back: those that cut tokens and
    /// leave copies.
    pub fn sums(&self) -> impl Iterator<Item = Axis> + use<> {
        let slices = self.slices.cut;
        self.outer.rows.axes().filter(move |axis| !slices.has(*axis))
    }

    /// residual + the weighted outputs of the experts each token chose; h and residual lie as the
    /// residual stream does. [M, D], of which the rows in `real` are no padding.
    pub fn forward(
        &self,
        tape: &mut Tape<'_>,
        (h, residual): (&Var, &Var),
        mixture: &Mixture,
        real: &Real,
    ) -> Result<Var, Fault> {
        let router = mixture.router;
        let scores = self.scores(tape, h, mixture.route)?;
        let (weights, ids) = tape.route(&scores, router, real, &|sums| self.pool(sums))?;
        let (weights, ids) = (self.enter_weights(tape, weights)?, self.enter_ids(ids)?);
        let x = self.enter(tape, h)?;
        let order = Arc::new(Order::new(&ids, router.experts, router.choices));
        let rows = tape.permute(&x, &order)?;
        drop(x);
        let rows = match self.mesh.size(Axis::Ep) {
            1 => tape.experts(&rows, &order.starts, mixture.experts)?,
            _ => {
                let way = Arc::new(Way::new(self, &order)?);
                let rows = way.go(tape, &rows)?;
                let rows = tape.experts(&rows, &way.starts, mixture.experts)?;
                way.come_back(tape, &rows)?
            }
        };
        if self.slices.cut.is_whole() {
            return tape.combine(&rows, &weights, &order, Some(residual));
        }
        let y = tape.combine(&rows, &weights, &order, None)?;
        self.leave(tape, y, residual)
    }

    /// sigmoid(h w): h [M, D] as the residual stream lies, weight [1, D] -> [M, 1] f32.
    pub fn gate(&self, tape: &mut Tape<'_>, h: &Var, weight: ParamRef) -> Result<Var, Fault> {
        let scores = self.scores(tape, h, weight)?;
        let gate = tape.sigmoid(&scores)?;
        let (mesh, cut) = (self.mesh.clone(), self.outer.cols);
        if cut.is_whole() {
            return Ok(gate);
        }
        // What a gate is multiplied with has its columns cut.
        Ok(tape.outside(&[&gate], gate.value.clone(), move |tape, dgate| {
            tape.moment("gate_cut", &[])?;
            Ok(vec![Some(sum(&mesh, cut, dgate)?)])
        }))
    }

    /// h weight^T [M, N] f32, equal on all ranks of a token.
    fn scores(&self, tape: &mut Tape<'_>, h: &Var, weight: ParamRef) -> Result<Var, Fault> {
        let scores = tape.scores(h, weight)?;
        if self.outer.cols.is_whole() {
            return Ok(scores);
        }
        tape.moment("scores_cut", &[])?;
        let whole = sum(&self.mesh, self.outer.cols, scores.value.clone())?;
        Ok(tape.outside(&[&scores], whole, |_, dscores| Ok(vec![Some(dscores)])))
    }

    /// Add up over all ranks that see other tokens of the batch.
    fn pool(&self, sums: &mut Tensor) -> Result<(), Fault> {
        let axes = TOKENS.into_iter().chain(self.outer.rows.axes());
        for axis in axes.filter(|axis| self.mesh.size(*axis) > 1) {
            self.mesh.group(axis).all_reduce_sum(sums.view_mut())?;
        }
        Ok(())
    }

    /// Weights [M, k] of the tokens this rank serves; each slice has a summand of their gradients.
    fn enter_weights(&self, tape: &mut Tape<'_>, weights: Var) -> Result<Var, Fault> {
        if self.slices.cut.is_whole() {
            return Ok(weights);
        }
        tape.moment("weights_cut", &[])?;
        let whole = match self.slices.cut_tokens() {
            true => self.slices.enter(&weights.value)?,
            false => weights.value.clone(),
        };
        let (mesh, slices) = (self.mesh.clone(), self.slices.clone());
        Ok(tape.outside(&[&weights], whole, move |tape, dweights| {
            tape.moment("weights_cut", &[])?;
            Ok(vec![Some(match slices.cut_tokens() {
                true => slices.leave(dweights)?,
                false => sum(&mesh, slices.cut, dweights)?,
            })])
        }))
    }

    /// Choices [M, k] of the tokens this rank serves.
    fn enter_ids(&self, ids: Vec<u32>) -> Result<Vec<u32>, Fault> {
        if !self.slices.cut_tokens() {
            return Ok(ids);
        }
        self.slices.cut.axes().rev().try_fold(ids, |ids, axis| {
            let mut all = words(self.mesh.size(axis) * ids.len())?;
            self.mesh.group(axis).all_gather(device::View::of_u32(&ids), all.view_mut())?;
            Ok(all.view().u32().to_vec())
        })
    }

    fn enter(&self, tape: &mut Tape<'_>, h: &Var) -> Result<Var, Fault> {
        if self.slices.cut.is_whole() {
            return Ok(h.clone());
        }
        tape.moment("experts_enter", &[])?;
        let slices = self.slices.clone();
        Ok(tape.outside(&[h], slices.enter(&h.value)?, move |tape, dx| {
            tape.moment("experts_enter", &[])?;
            Ok(vec![Some(slices.leave(dx)?)])
        }))
    }

    /// Summands of this rank's neurons [M, D], added up, + residual.
    fn leave(&self, tape: &mut Tape<'_>, y: Var, residual: &Var) -> Result<Var, Fault> {
        tape.moment("experts_leave", &[])?;
        let (slices, dtype) = (self.slices.clone(), y.value.dtype());
        let sum = slices.leave(y.value.clone())?;
        let out = finish(tape, sum, None, Some(&residual.value), dtype)?;
        Ok(tape.outside(&[&y, residual], out, move |tape, dy| {
            tape.moment("experts_leave", &[])?;
            Ok(vec![Some(slices.enter(&dy)?), Some(dy)])
        }))
    }
}

/// Where the rows of one rank go among those that share its experts, and what comes to it.
struct Way {
    group: Group,
    /// Rows for each member, and from each.
    send: Vec<usize>,
    receive: Vec<usize>,
    /// Among what arrives, member by member: the rows ordered by expert; and the way back.
    by_expert: Vec<u32>,
    by_member: Vec<u32>,
    /// First row of each expert held here, as many as there is room for, and all rows.
    starts: Arc<[usize]>,
}

impl Way {
    /// Tell each other how many rows come. Every member calls this at the same place.
    fn new(experts: &Experts, order: &Order) -> Result<Way, Fault> {
        let group = experts.mesh.group(Axis::Ep);
        let (ranks, here) = (group.size(), experts.of(group.index()).len());
        let counts: Vec<u32> = order.starts.windows(2).map(|run| (run[1] - run[0]) as u32).collect();
        let theirs: Vec<usize> = (0..ranks).map(|rank| experts.of(rank).len()).collect();
        let mut arriving = words(ranks * here)?;
        let sent = (device::View::of_u32(&counts), theirs.as_slice());
        group.all_to_all(sent, (arriving.view_mut(), &vec![here; ranks]))?;
        let arriving: Vec<usize> = arriving.view().u32().iter().map(|count| *count as usize).collect();
        let rows_for = |rank| experts.of(rank).map(|e| counts[e] as usize).sum();
        let receive: Vec<usize> = arriving.chunks(here).map(|counts| counts.iter().sum()).collect();
        let (starts, by_expert, by_member) = arrange(&arriving, here, experts.room());
        Ok(Way { send: (0..ranks).map(rows_for).collect(), group, receive, by_expert, by_member, starts })
    }

    /// Rows [S, D] ordered by expert to the ranks that have them: [S', D] ordered by expert.
    fn go(self: &Arc<Way>, tape: &mut Tape<'_>, rows: &Var) -> Result<Var, Fault> {
        tape.moment("to_experts", &[])?;
        let (there, way) = (self.there(&rows.value)?, self.clone());
        Ok(tape.outside(&[rows], there, move |tape, dy| {
            tape.moment("to_experts", &[])?;
            Ok(vec![Some(way.back(&dy)?)])
        }))
    }

    /// The opposite.
    fn come_back(self: &Arc<Way>, tape: &mut Tape<'_>, rows: &Var) -> Result<Var, Fault> {
        tape.moment("from_experts", &[])?;
        let (back, way) = (self.back(&rows.value)?, self.clone());
        Ok(tape.outside(&[rows], back, move |tape, dy| {
            tape.moment("from_experts", &[])?;
            Ok(vec![Some(way.there(&dy)?)])
        }))
    }

    fn there(&self, x: &Tensor) -> Result<Tensor, Fault> {
        let arrived = self.exchange(x, &self.send, &self.receive)?;
        ordered(&arrived, &self.by_expert)
    }

    fn back(&self, x: &Tensor) -> Result<Tensor, Fault> {
        let leaving = ordered(x, &self.by_member)?;
        self.exchange(&leaving, &self.receive, &self.send)
    }

    fn exchange(&self, x: &Tensor, send: &[usize], receive: &[usize]) -> Result<Tensor, Fault> {
        let d = x.cols();
        let elements = |rows: &[usize]| -> Vec<usize> { rows.iter().map(|rows| rows * d).collect() };
        let mut out = Tensor::new(x.device(), x.dtype(), &[receive.iter().sum(), d])?;
        let (send, receive) = (elements(send), elements(receive));
        self.group.all_to_all((x.view(), &send), (out.view_mut(), &receive))?;
        Ok(out)
    }
}

/// From the rows each member sends for each of `here` experts [ranks, here]: the first row of each
/// expert, the arrived row at each place ordered by expert, and the place of each arrived row.
fn arrange(counts: &[usize], here: usize, room: usize) -> (Arc<[usize]>, Vec<u32>, Vec<u32>) {
    let total = counts.iter().sum();
    let mut first = Vec::with_capacity(counts.len());
    counts.iter().fold(0, |at, count| {
        first.push(at);
        at + count
    });
    let (mut starts, mut by_expert) = (vec![0], Vec::with_capacity(total));
    for expert in 0..room {
        let runs = (expert..counts.len()).step_by(here).take(if expert < here { usize::MAX } else { 0 });
        runs.for_each(|run| by_expert.extend((first[run]..first[run] + counts[run]).map(|row| row as u32)));
        starts.push(by_expert.len());
    }
    let mut by_member = vec![0; total];
    by_expert.iter().zip(0..).for_each(|(row, place)| by_member[*row as usize] = place);
    (starts.into(), by_expert, by_member)
}

/// Row `rows[i]` of x at i.
fn ordered(x: &Tensor, rows: &[u32]) -> Result<Tensor, Fault> {
    let mut out = Tensor::new(x.device(), x.dtype(), x.shape())?;
    kernels::embedding::forward(rows, x.view(), x.cols(), out.view_mut(), false);
    Ok(out)
}

/// Zeros, which they stay where messages move nothing.
fn words(len: usize) -> Result<Tensor, Fault> {
    Ok(Tensor::zeros(device::Device::Cpu, DType::U32, &[len])?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rows_stand_by_expert_then_by_member() {
        // Three members send rows for two experts, where there is room for a third.
        let (starts, by_expert, by_member) = arrange(&[2, 1, 0, 2, 1, 0], 2, 3);
        assert_eq!(*starts, [0, 3, 6, 6]);
        assert_eq!(by_expert, [0, 1, 5, 2, 3, 4]);
        assert!((0..6).all(|row| by_expert[by_member[row] as usize] as usize == row));
    }
}
