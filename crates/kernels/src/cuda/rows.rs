//! Grids for kernels that go over rows in teams; see `rows.cuh`.

use super::{Launch, launch, suffix, workspace};
use device::cuda::Address;
use device::{View, ViewMut};

/// Columns of a thread at a time.
const COLUMNS: usize = 8;

/// Threads of a block that writes rows, and of one that also sums over them.
const THREADS: usize = 256;
const SUM_THREADS: usize = 512;

/// Blocks that sum over rows at most: what a large GPU runs at a time. On every GPU, for the same bits.
const SUM_BLOCKS: usize = 264;

/// Threads of a team that takes a row of d columns.
fn team_of(d: usize, most: usize) -> usize {
    d.div_ceil(COLUMNS).next_power_of_two().clamp(8, most)
}

/// Name of the kernel of an op on rows of d columns in arrays of one type and weights of another: where rows
/// lie for 16 bytes at once, or where they do not.
pub(crate) fn kernel(op: &str, d: usize, rows: &[View<'_>], weights: &[View<'_>]) -> String {
    let type_of = |views: &[View<'_>]| {
        assert!(views.iter().all(|view| view.dtype() == views[0].dtype()), "{op}: arrays of one type");
        suffix(views[0].dtype())
    };
    let whole = lie_whole(d, rows) && lie_whole(d, weights);
    format!("{op}_{}_{}{}", type_of(rows), type_of(weights), if whole { "" } else { "_ragged" })
}

/// Whether rows of d columns lie for 16 bytes at once.
pub(crate) fn lie_whole(d: usize, rows: &[View<'_>]) -> bool {
    let lies = |view: &View<'_>| view.address().is_multiple_of((COLUMNS * view.dtype().size_bytes()) as u64);
    d.is_multiple_of(COLUMNS) && rows.iter().all(lies)
}

/// Sums of columns over rows, in two steps: blocks sum over rows of their own, then these sums are added.
pub(crate) struct Sums {
    blocks: usize,
    tiles: usize,
    team: usize,
    d: usize,
    partial: Address,
}

impl Sums {
    /// `count` sums of d columns each over `rows`, with the whole workspace.
    pub fn new(rows: usize, d: usize, count: usize) -> Sums {
        let team = team_of(d, SUM_THREADS);
        let tiles = d.div_ceil(team * COLUMNS);
        let blocks = (SUM_BLOCKS / tiles.max(1)).clamp(1, rows.div_ceil(SUM_THREADS / team).max(1));
        let partial = workspace(count * blocks * d * size_of::<f32>());
        Sums { blocks, tiles, team, d, partial }
    }

    /// total += what the blocks have summed.
    pub fn add_to(&self, total: &ViewMut<'_>, second: Option<&ViewMut<'_>>) {
        launch("rows_add_partials")
            .grid3(self.d.div_ceil(32), 1 + usize::from(second.is_some()), 1)
            .threads(256)
            .address(self.partial)
            .write(total)
            .optional_write(second)
            .u32(self.blocks)
            .u32(self.d)
            .run();
    }
}

impl Launch<'_> {
    /// A team for each row of d columns; its threads are the next argument.
    pub fn over_teams(self, rows: usize, d: usize) -> Self {
        let team = team_of(d, THREADS);
        self.grid(rows.div_ceil(THREADS / team)).threads(THREADS).u32(team)
    }

    /// Blocks that sum over rows; where to, and the threads of a team, are the next arguments.
    pub fn summing(self, sums: &Sums) -> Self {
        self.grid3(sums.blocks, sums.tiles, 1).threads(SUM_THREADS).address(sums.partial).u32(sums.team)
    }
}
