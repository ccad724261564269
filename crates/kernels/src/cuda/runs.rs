//! Grids for kernels that go over arrays in runs; see `runs.cuh`.

use super::Launch;
use device::DType;

/// Threads of a block at most.
const THREADS: usize = 256;

/// Elements of a thread for arrays of these types.
pub(crate) fn run_of(dtypes: &[DType]) -> usize {
    if dtypes.iter().any(|dtype| dtype.size_bytes() == 2) { 8 } else { 4 }
}

impl Launch<'_> {
    /// A thread for every run of `run` elements of n, and n as the next argument.
    pub fn over(self, n: usize, run: usize) -> Self {
        self.grid(n.div_ceil(THREADS * run)).threads(THREADS).u64(n)
    }

    /// A thread for every run of `run` columns of rows of `width`; the width and the blocks of a row are the
    /// next arguments.
    pub fn over_rows(self, rows: usize, width: usize, run: usize) -> Self {
        let threads = width.div_ceil(run).next_multiple_of(32).clamp(32, THREADS);
        let tiles = width.div_ceil(threads * run);
        self.grid(rows * tiles).threads(threads).u32(width).u32(tiles)
    }
}
