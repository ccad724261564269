//! What ranks time one by one, all of them busy at once.

use super::RUNS;
use device::{Buffer, DType, Device, Region};
use dist::Axis;
use dist::cost::Turn;
use dist::{CommError, Group, Mesh};
use kernels::block;
use kernels::gemm::{Epilogue, Mat, MatMut, gemm};
use memory::Stripes;
use std::time::Instant;
use tensor::Fault;

/// Times a collective is.
const CALLS: usize = 12;
/// Passes over all costs of a fit: far more than two or three costs need.
const SWEEPS: usize = 10_000;
/// Bytes of operands between two uses of one, at least where there are enough.
const COLD: usize = 16 << 20;
/// Bytes of a copy.
const COPIED: usize = 8 << 20;
/// Bytes of memory that come and go at once: more than the system keeps at hand for a core.
const FRESH: usize = 16 << 20;
/// Bytes of the whole array in collectives.
const SIZES: [usize; 2] = [64 << 10, 4 << 20];

/// Seconds as a sum of costs: amounts, and what they took together.
pub(super) type Sample<const N: usize> = ([f64; N], f64);

/// x [M, K], w [N, K], y [M, N] and the gradient of w.
pub(super) struct Operands {
    sizes: (usize, usize, usize),
    dtype: DType,
    x: Buffer,
    w: Buffer,
    y: Buffer,
    dw: Buffer,
}

impl Operands {
    /// As many as a run uses each once, or as caches do not hold: a step finds little of what it left there.
    pub(super) fn cold(dtype: DType, sizes: (usize, usize, usize)) -> Result<Vec<Operands>, Fault> {
        let (m, k, n) = sizes;
        let bytes = (m * k + n * k + m * n) * dtype.size_bytes() + n * k * DType::F32.size_bytes();
        (0..(COLD / bytes).clamp(1, RUNS + 1)).map(|_| Operands::new(dtype, sizes)).collect()
    }

    fn new(dtype: DType, (m, k, n): (usize, usize, usize)) -> Result<Operands, Fault> {
        let (x, w, y) = (zeros(dtype, m * k)?, zeros(dtype, n * k)?, zeros(dtype, m * n)?);
        Ok(Operands { sizes: (m, k, n), dtype, x, w, y, dw: zeros(DType::F32, n * k)? })
    }

    pub(super) fn multiply(&mut self, turn: Turn) {
        let (dtype, (m, k, n), none) = (self.dtype, self.sizes, Epilogue::default());
        let Operands { x, w, y, dw, .. } = self;
        match turn {
            Turn::Forward => {
                let (x, w) = (Mat::new(x.view(dtype, 0, m * k), k), Mat::new(w.view(dtype, 0, n * k), k));
                let data = y.view_mut(dtype, 0, m * n);
                gemm(m, n, k, x, w.t(), MatMut { data, ld: n }, false, none);
            }
            Turn::Input => {
                let (dy, w) = (Mat::new(y.view(dtype, 0, m * n), n), Mat::new(w.view(dtype, 0, n * k), k));
                let data = x.view_mut(dtype, 0, m * k);
                gemm(m, k, n, dy, w, MatMut { data, ld: k }, false, none);
            }
            Turn::Weight => {
                let (dy, x) = (Mat::new(y.view(dtype, 0, m * n), n), Mat::new(x.view(dtype, 0, m * k), k));
                let data = dw.view_mut(DType::F32, 0, n * k);
                gemm(n, k, m, dy.t(), x, MatMut { data, ld: k }, true, none);
            }
        }
    }
}

pub(super) fn zeros(dtype: DType, len: usize) -> Result<Buffer, Fault> {
    let mut buffer = Buffer::new(Device::Cpu, len * dtype.size_bytes())?;
    buffer.view_mut(dtype, 0, len).bytes().fill(0);
    Ok(buffer)
}

/// Collectives of gradients and of activations over groups of every size that ranks divide into, all groups
/// of a size at once.
pub(super) fn messages(mesh: &Mesh, dtype: DType) -> Result<Vec<Sample<3>>, Fault> {
    let (ranks, rank) = (mesh.world_size(), mesh.rank());
    let all = mesh.group(Axis::X);
    let types = if dtype == DType::F32 { vec![dtype] } else { vec![DType::F32, dtype] };
    let mut samples = Vec::new();
    for n in (2..=ranks).filter(|n| ranks.is_multiple_of(*n)) {
        let first = rank / n * n;
        let group = mesh.group_of(&format!("probe of {n}"), &(first..first + n).collect::<Vec<_>>());
        for (size, dtype) in SIZES.into_iter().flat_map(|size| types.iter().map(move |dtype| (size, *dtype)))
        {
            all.barrier()?;
            exchange(&group, size, dtype, &mut samples)?;
        }
    }
    Ok(samples)
}

/// Of `size` bytes in the whole array. A sum on all ranks counts as two calls: it is priced as one to scatter
/// the sums and one to gather them.
fn exchange(group: &Group, size: usize, dtype: DType, samples: &mut Vec<Sample<3>>) -> Result<(), Fault> {
    let (n, len) = (group.size(), size / dtype.size_bytes() / group.size());
    let bytes = (len * (n - 1) * dtype.size_bytes()) as f64;
    let (mut whole, mut part) = (zeros(dtype, n * len)?, zeros(dtype, len)?);
    let mut add = |[calls, sums]: [f64; 2], seconds: f64| {
        samples.push(([calls, calls * bytes, sums * bytes], seconds));
    };
    add([2.0, 1.0], calls(group, || group.all_reduce_sum(whole.view_mut(dtype, 0, n * len)))?);
    add(
        [1.0, 0.0],
        calls(group, || group.all_gather(part.view(dtype, 0, len), whole.view_mut(dtype, 0, n * len)))?,
    );
    let scatter = || group.reduce_scatter_sum(whole.view(dtype, 0, n * len), part.view_mut(dtype, 0, len));
    add([1.0, 1.0], calls(group, scatter)?);
    add([1.0, 0.0], calls(group, || group.broadcast(whole.view_mut(dtype, 0, n * len), 0))?);
    Ok(())
}

fn calls(group: &Group, mut call: impl FnMut() -> Result<(), CommError>) -> Result<f64, Fault> {
    call()?;
    group.barrier()?;
    mean(CALLS, || Ok(call()?))
}

/// Seconds a byte that is read or written where rows of `cols` are copied out of rows twice as long, more of
/// them than caches hold.
pub(super) fn copies(group: &Group, dtype: DType, cols: usize) -> Result<f64, Fault> {
    let rows = (COPIED / (cols * dtype.size_bytes())).max(1);
    let (from, mut to) = (zeros(dtype, rows * 2 * cols)?, zeros(dtype, rows * cols)?);
    let mut copy = || {
        let from = Mat::new(from.view(dtype, 0, rows * 2 * cols), 2 * cols);
        block::copy(rows, cols, from, MatMut { data: to.view_mut(dtype, 0, rows * cols), ld: cols });
        Ok(())
    };
    group.barrier()?;
    copy()?;
    Ok(mean(RUNS, copy)? / (2 * rows * cols * dtype.size_bytes()) as f64)
}

/// Seconds a byte of memory that comes and goes, in the granules in which ranks share `params` weights.
pub(super) fn pages(group: &Group, dtype: DType, params: usize) -> Result<f64, Fault> {
    let granule = Stripes::new(params, group.size(), 0).granule * dtype.size_bytes();
    let count = (FRESH / granule).max(1);
    let mut region = Region::reserve(Device::Cpu, count * granule, granule)?;
    let mut turn = || {
        (0..count).for_each(|i| region.bring(i));
        (0..count).for_each(|i| region.send_away(i));
        Ok(())
    };
    group.barrier()?;
    turn()?;
    Ok(mean(RUNS, turn)? / (count * granule) as f64)
}

/// Mean seconds of a run: where ranks share cores, single runs are long or short by whose turn it is.
pub(super) fn mean(runs: usize, mut run: impl FnMut() -> Result<(), Fault>) -> Result<f64, Fault> {
    let started = Instant::now();
    for _ in 0..runs {
        run()?;
    }
    Ok(started.elapsed().as_secs_f64() / runs as f64)
}

/// The costs of one of each amount that leave the least relative error, none below zero.
pub(super) fn fit<const N: usize>(samples: &[Sample<N>]) -> [f64; N] {
    let (mut squares, mut ones) = ([[0.0; N]; N], [0.0; N]);
    for (amounts, seconds) in samples.iter().filter(|(_, seconds)| *seconds > 0.0) {
        let row = amounts.map(|amount| amount / seconds);
        for i in 0..N {
            ones[i] += row[i];
            (0..N).for_each(|j| squares[i][j] += row[i] * row[j]);
        }
    }
    // One cost after the other, the others as they are, until none moves.
    let mut costs = [0.0; N];
    for i in (0..N).cycle().take(SWEEPS * N).filter(|i| squares[*i][*i] > 0.0) {
        let others: f64 = (0..N).filter(|j| *j != i).map(|j| squares[i][j] * costs[j]).sum();
        costs[i] = ((ones[i] - others) / squares[i][i]).max(0.0);
    }
    costs
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn costs_are_found_again_and_never_below_zero() {
        let samples: Vec<Sample<3>> = [[1.0, 5.0, 0.0], [2.0, 3.0, 9.0], [7.0, 1.0, 2.0], [1.0, 1.0, 1.0]]
            .map(|[x, y, z]| ([x, y, z], 3.0 * x + 0.5 * y + 0.25 * z))
            .to_vec();
        let costs = fit(&samples);
        assert!(costs.iter().zip([3.0, 0.5, 0.25]).all(|(a, b)| (a - b).abs() < 1e-6), "{costs:?}");
        // The larger takes less: all of it is the first cost.
        assert_eq!(fit(&[([1.0, 1.0], 1.0), ([1.0, 2.0], 0.5)])[1], 0.0);
        assert_eq!(fit::<2>(&[]), [0.0, 0.0]);
    }
}
