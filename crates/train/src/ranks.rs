//! What the ranks of a run tell each other outside of the model and its gradients (`shards`): scalars,
//! and what the first rank decides; and over which axes gradients are added up. Everything goes along
//! one axis at a time, so that a rank meets its own lines of the mesh only, and sums have one order.

use crate::learner;
use device::{Buffer, DType, Device, ViewMut};
use dist::{Axis, Communicator, Mesh};
use model::Spread;
use tensor::{Fault, Tensor};

/// Axes whose ranks see other rows of the batch, outermost first.
pub(crate) const ROWS: [Axis; 3] = [Axis::Dp, Axis::Fsdp, Axis::Ep];

/// Axes whose ranks see other tokens of the batch: gradients of what they hold copies of are
/// summands. In the order of sums.
const TOKENS: [Axis; 4] = [Axis::Fsdp, Axis::Dp, Axis::Ep, Axis::Cp];

/// Processes that the ranks of a mesh are.
pub(crate) fn processes(mesh: &Mesh) -> u64 {
    match mesh.communicator() {
        Communicator::Processes(_) | Communicator::Nccl(_) => mesh.world_size() as u64,
        _ => 1,
    }
}

/// Which of how many shares of the rows of a batch this rank has.
pub(crate) fn replica(mesh: &Mesh) -> (usize, usize) {
    ROWS.iter().fold((0, 1), |(at, count), axis| {
        (at * mesh.size(*axis) + mesh.coord(*axis), count * mesh.size(*axis))
    })
}

/// Axes over which the gradient of a parameter is added up, in that order: replicas first, so that
/// those that share the state scatter it before anybody else is asked.
pub(crate) fn axes_of_sums(mesh: &Mesh, spread: &Spread) -> Vec<Axis> {
    let copies = TOKENS.into_iter().filter(|axis| !spread.cut.contains(axis));
    let axes = copies.chain(spread.sums.iter().copied());
    axes.filter(|axis| mesh.size(*axis) > 1).collect()
}

/// Whether this rank is the first of those that hold the same piece of a parameter, wherever it is on
/// `axis`, whose ranks share that piece.
pub(crate) fn is_first_but(mesh: &Mesh, spread: &Spread, axis: Axis) -> bool {
    let mut axes = Axis::ALL.iter().filter(|other| **other != axis);
    axes.all(|axis| spread.cut.contains(axis) || mesh.coord(*axis) == 0)
}

/// `x` of every replica, in their order.
pub(crate) fn gather_replicas(mesh: &Mesh, x: f64) -> Result<Vec<f64>, Fault> {
    ROWS.iter().rev().try_fold(vec![x], |xs, axis| {
        let each: Vec<Vec<f64>> =
            xs.into_iter().map(|x| gather_over(mesh, *axis, x)).collect::<Result<_, Fault>>()?;
        // [inner][axis] to [axis][inner].
        Ok((0..mesh.size(*axis)).flat_map(|i| each.iter().map(move |xs| xs[i])).collect())
    })
}

/// `x` of every rank of an axis, in their order.
pub(crate) fn gather_over(mesh: &Mesh, axis: Axis, x: f64) -> Result<Vec<f64>, Fault> {
    gather_all(mesh, axis, &[x])
}

/// `xs` of every rank of an axis, one rank after the other.
pub(crate) fn gather_all(mesh: &Mesh, axis: Axis, xs: &[f64]) -> Result<Vec<f64>, Fault> {
    if mesh.size(axis) == 1 {
        return Ok(xs.to_vec());
    }
    let mut mine = Buffer::new(Device::Cpu, 8 * xs.len())?;
    let mut words = 4 * xs.len();
    let bytes = mine.view_mut(DType::U16, 0, words).bytes();
    bytes.as_chunks_mut().0.iter_mut().zip(xs).for_each(|(word, x)| *word = x.to_ne_bytes());
    let mut all = Buffer::new(Device::Cpu, 8 * xs.len() * mesh.size(axis))?;
    let mine = mine.view(DType::U16, 0, words);
    words *= mesh.size(axis);
    mesh.group(axis).all_gather(mine, all.view_mut(DType::U16, 0, words))?;
    let bytes = all.view(DType::U16, 0, words).bytes();
    Ok(bytes.as_chunks().0.iter().map(|word| f64::from_ne_bytes(*word)).collect())
}

/// Sum of `x` over the ranks of `axes`, the same bits on every one of them.
pub(crate) fn sum_over(mesh: &Mesh, axes: &[Axis], x: f64) -> Result<f64, Fault> {
    axes.iter().try_fold(x, |x, axis| Ok(gather_over(mesh, *axis, x)?.into_iter().sum()))
}

/// Sum of the losses of every row of a microbatch, of which this replica has `losses` [M]: taken in
/// the order of the rows, so that it does not depend on how many replicas there are.
pub(crate) fn sum_of_losses(mesh: &Mesh, losses: &Tensor) -> Result<f64, Fault> {
    let mut all = losses.clone();
    for axis in ROWS.into_iter().rev().filter(|axis| mesh.size(*axis) > 1) {
        let mut wider = Tensor::new(losses.device(), DType::F32, &[mesh.size(axis) * all.len()])?;
        mesh.group(axis).all_gather(all.view(), wider.view_mut())?;
        all = wider;
    }
    Ok(learner::sum(&all))
}

/// Numbers as the words that ranks send each other, the low ones first.
pub(crate) fn words_of(numbers: &[u64]) -> Vec<u16> {
    numbers.iter().flat_map(|number| (0..4).map(move |i| (number >> (16 * i)) as u16)).collect()
}

/// The numbers of `words_of`.
pub(crate) fn numbers_of(words: &[u16]) -> Vec<u64> {
    let number = |words: &[u16]| words.iter().rev().fold(0, |number, word| number << 16 | u64::from(*word));
    words.chunks(4).map(number).collect()
}

/// `words` become what they are on rank 0, on every rank.
pub(crate) fn first_says(mesh: &Mesh, words: &mut [u16]) -> Result<(), Fault> {
    for axis in Axis::ALL.into_iter().filter(|axis| mesh.size(*axis) > 1) {
        mesh.group(axis).broadcast(ViewMut::of_u16(words), 0)?;
    }
    Ok(())
}
