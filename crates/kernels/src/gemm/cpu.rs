//! The driver: A is packed whole, once, by all workers; then each task owns a strip of columns,
//! packs its B into L2 and runs the micro-kernel over the panels of A.

use super::micro::Tile;
use super::pack::{Source, pack_panel};
use super::{Epilogue, Mat, MatMut, gemv};
use crate::gelu::{GeluKind, gelu};
use crate::raw::RawFloats;
use crate::simd::Float;
use device::{Buffer, DType, Device, Isa, Slice, View};
use std::cell::RefCell;

/// Values of k per block: a panel of B (16 columns) then fills half of a 32 KiB L1.
const KC: usize = 256;
/// Rows of A a task walks before the next strip of columns: bounds the f32 scratch of a task.
const ROWS_PER_TASK: usize = 1536;
/// Rows of A that stay in L2 while the columns of the strip pass over them.
const A_ROWS: usize = 72;
/// Products of at most this many rows (decoding) read B once and pack nothing.
const GEMV_ROWS: usize = 8;

thread_local! {
    static SCRATCH: RefCell<Vec<f32>> = const { RefCell::new(Vec::new()) };
}

#[derive(Clone, Copy)]
struct Out(*mut f32);
// SAFETY: tasks write disjoint tiles of one matrix.
unsafe impl Send for Out {}
// SAFETY: as above.
unsafe impl Sync for Out {}

impl Out {
    fn get(self) -> *mut f32 {
        self.0
    }
}

/// The operands and the cut of one product.
struct Plan<'a> {
    tile: Tile,
    sizes: (usize, usize, usize),
    b: Source<'a>,
    /// Packed A: for each K block, panels of `mr` rows.
    a: &'a [f32],
    panels: usize,
    columns: usize,
}

pub(super) fn gemm(
    isa: Isa,
    (m, n, k): (usize, usize, usize),
    a: Mat<'_>,
    b: Mat<'_>,
    c: MatMut<'_>,
    accumulate: bool,
    epilogue: Epilogue<'_>,
) {
    if m == 0 || n == 0 {
        return;
    }
    let finish = Finish::new((m, n), c, accumulate, epilogue);
    if m <= GEMV_ROWS && b.transposed {
        return gemv::gemv((m, n, k), a, b, &finish);
    }
    let both_bf16 = a.data.dtype() == DType::Bf16 && b.data.dtype() == DType::Bf16;
    let tile = if both_bf16 { Tile::bf16(isa) } else { Tile::f32(isa) };
    let panels = m.div_ceil(tile.mr);
    let steps: usize = blocks(k).map(|(_, kc)| tile.steps(kc)).sum();
    let mut packed = match Buffer::new(Device::Cpu, (panels * tile.mr * steps).max(1) * 4) {
        Ok(buffer) => buffer,
        // A product has no way to fail; the system is out of memory for its scratch.
        Err(refused) => panic!("{refused}"),
    };
    let len = panels * tile.mr * steps;
    pack_all_rows(tile, (m, k), Source::rows(a), packed.view_mut(DType::F32, 0, len).f32());
    let a = packed.view(DType::F32, 0, len).f32();
    let columns = columns_per_task(tile, m, n);
    let plan = Plan { tile, sizes: (m, n, k), b: Source::columns(b), a, panels, columns };
    let rows = ROWS_PER_TASK / tile.mr;
    let (row_tasks, column_tasks) = (panels.div_ceil(rows), n.div_ceil(columns));
    device::for_each_index(row_tasks * column_tasks, |task| {
        let first_panel = task / column_tasks * rows;
        let panels = first_panel..(first_panel + rows).min(plan.panels);
        plan.run(panels, task % column_tasks * columns, &finish);
    });
}

fn blocks(k: usize) -> impl Iterator<Item = (usize, usize)> {
    // Equal blocks: a short last one would waste the tile's store on few products.
    let count = k.div_ceil(KC).max(1);
    let size = k.div_ceil(count).next_multiple_of(8).max(8);
    (0..k).step_by(size).map(move |k0| (k0, size.min(k - k0)))
}

/// Columns per task: a strip of B that stays in L2 beside a panel of A, and enough strips to
/// share among workers. No sum depends on where a strip ends.
fn columns_per_task(tile: Tile, m: usize, n: usize) -> usize {
    const WIDEST: usize = 128;
    // Equal shares: the strips of one run of rows are a multiple of the workers where they can be.
    let workers = if m > ROWS_PER_TASK { 1 } else { device::num_threads() };
    let rounds = n.div_ceil(workers * WIDEST).max(1);
    n.div_ceil(workers * rounds).next_multiple_of(tile.nr)
}

fn pack_all_rows(tile: Tile, (m, k): (usize, usize), src: Source<'_>, out: &mut [f32]) {
    let panels = m.div_ceil(tile.mr);
    let base = Out(out.as_mut_ptr());
    const PANELS_PER_TASK: usize = 16;
    device::for_each_chunk(panels, PANELS_PER_TASK, |range| {
        let mut offset = 0;
        for (k0, kc) in blocks(k) {
            let len = tile.steps(kc) * tile.mr;
            for panel in range.clone() {
                // SAFETY: panel `panel` of this block is `len` floats that no other task writes.
                let out =
                    unsafe { std::slice::from_raw_parts_mut(base.get().add(offset + panel * len), len) };
                let lanes = tile.mr.min(m - panel * tile.mr);
                pack_panel(tile, src, (panel * tile.mr, lanes, tile.mr), (k0, kc), out);
            }
            offset += panels * len;
        }
    });
}

impl Plan<'_> {
    /// One strip of columns from `j0` for the rows of `panels`.
    fn run(&self, panels: std::ops::Range<usize>, j0: usize, finish: &Finish<'_>) {
        let (m, n, k) = self.sizes;
        let (tile, columns) = (self.tile, self.columns.min(n - j0));
        let (row0, row1) = (panels.start * tile.mr, (panels.end * tile.mr).min(m));
        let strip = columns.div_ceil(tile.nr) * tile.nr;
        let direct = finish.direct();
        let tile_len = if direct.is_some() { 0 } else { (row1 - row0) * columns };
        SCRATCH.with_borrow_mut(|scratch| {
            let need = KC.next_multiple_of(8) * strip + tile_len;
            if scratch.len() < need {
                scratch.resize(need, 0.0);
            }
            let (b, sums) = scratch.split_at_mut(KC.next_multiple_of(8) * strip);
            let (c, ldc, add_first) = match direct {
                // SAFETY: row0 and j0 lie inside C.
                Some((c, ldc, add)) => (unsafe { c.add(row0 * ldc + j0) }, ldc, add),
                None => (sums.as_mut_ptr(), columns, false),
            };
            if k == 0 && !add_first {
                for i in 0..row1 - row0 {
                    // SAFETY: a row of our own tile.
                    unsafe { std::slice::from_raw_parts_mut(c.add(i * ldc), columns).fill(0.0) };
                }
            }
            let mut offset = 0;
            for (k0, kc) in blocks(k) {
                let steps = tile.steps(kc);
                for (jp, out) in b.chunks_exact_mut(steps * tile.nr).enumerate().take(strip / tile.nr) {
                    let lanes = tile.nr.min(columns - jp * tile.nr);
                    pack_panel(tile, self.b, (j0 + jp * tile.nr, lanes, tile.nr), (k0, kc), out);
                }
                let a = &self.a[offset..offset + self.panels * tile.mr * steps];
                // SAFETY: rows row0..row1 and our columns of C (or the scratch) are ours alone.
                unsafe { self.block(panels.clone(), steps, a, b, (c, ldc, columns), add_first || k0 > 0) };
                offset += self.panels * tile.mr * steps;
            }
            if direct.is_none() {
                finish.rows(row0..row1, j0, columns, sums);
            }
        });
    }

    /// # Safety
    /// `c` is writable over the rows of `panels` and `columns` columns with leading dimension `ldc`.
    unsafe fn block(
        &self,
        panels: std::ops::Range<usize>,
        steps: usize,
        a: &[f32],
        b: &[f32],
        (c, ldc, columns): (*mut f32, usize, usize),
        add: bool,
    ) {
        let tile = self.tile;
        let first = panels.start;
        for group in panels.clone().step_by(A_ROWS / tile.mr) {
            let group = group..(group + A_ROWS / tile.mr).min(panels.end);
            for (jp, j) in (0..columns).step_by(tile.nr).enumerate() {
                let b = &b[jp * tile.nr * steps..][..tile.nr * steps];
                let cols = tile.nr.min(columns - j);
                for panel in group.clone() {
                    let a = &a[panel * tile.mr * steps..][..tile.mr * steps];
                    let rows = tile.mr.min(self.sizes.0 - panel * tile.mr);
                    // SAFETY: panels are whole; the tile lies inside our part of C.
                    unsafe {
                        let c = c.add((panel - first) * tile.mr * ldc + j);
                        tile.run(steps, a.as_ptr(), b.as_ptr(), c, ldc, (rows, cols), add);
                    }
                }
            }
        }
    }
}

/// Where sums go: straight into C, or through the epilogue.
pub(super) struct Finish<'a> {
    c: RawFloats,
    ldc: usize,
    n: usize,
    accumulate: bool,
    plain: bool,
    bias: Option<View<'a>>,
    residual: Option<(View<'a>, usize)>,
    gelu: Option<(GeluKind, RawFloats)>,
}

multiversion! {
    fn add<T: Float>(sums: &mut [f32], x: &[T]) {
        for (sum, x) in sums.iter_mut().zip(x) {
            *sum += x.to_f32();
        }
    }
}

multiversion! {
    fn activate(kind: GeluKind, sums: &mut [f32]) {
        for sum in sums.iter_mut() {
            *sum = gelu(kind, *sum);
        }
    }
}

fn add_view(sums: &mut [f32], x: View<'_>) {
    match x.floats() {
        Slice::F32(x) => add(sums, x),
        Slice::Bf16(x) => add(sums, x),
    }
}

impl<'a> Finish<'a> {
    fn new((_, n): (usize, usize), c: MatMut<'a>, accumulate: bool, epilogue: Epilogue<'a>) -> Finish<'a> {
        let plain = epilogue.is_empty();
        Finish {
            ldc: c.ld,
            c: RawFloats::of(c.data),
            n,
            accumulate,
            plain,
            bias: epilogue.bias,
            residual: epilogue.residual.map(|r| (r.data, r.ld)),
            gelu: epilogue.gelu.map(|(kind, pre)| (kind, RawFloats::of(pre))),
        }
    }

    /// C itself, when sums may go there as they are: (c, ldc, whether the first block adds).
    fn direct(&self) -> Option<(*mut f32, usize, bool)> {
        match self.c {
            RawFloats::F32(c) if self.plain => Some((c, self.ldc, self.accumulate)),
            _ => None,
        }
    }

    /// Take `sums` [rows, columns] through the epilogue into C.
    pub(super) fn rows(&self, rows: std::ops::Range<usize>, j0: usize, columns: usize, sums: &mut [f32]) {
        let mut old = [0f32; 256];
        for (row, sums) in rows.zip(sums.chunks_exact_mut(columns)) {
            if self.accumulate {
                for (part, sums) in sums.chunks_mut(old.len()).enumerate() {
                    let old = &mut old[..sums.len()];
                    // SAFETY: inside our strip of row `row`.
                    unsafe { self.c.read(row * self.ldc + j0 + part * 256, old) };
                    add(sums, old);
                }
            }
            if let Some(bias) = self.bias {
                add_view(sums, bias.narrow(j0, columns));
            }
            if let Some((residual, ld)) = self.residual {
                add_view(sums, residual.narrow(row * ld + j0, columns));
            }
            if let Some((kind, pre)) = self.gelu {
                // SAFETY: our strip of row `row` of the pre-activation [m, n].
                unsafe { pre.write(row * self.n + j0, sums) };
                activate(kind, sums);
            }
            // SAFETY: our strip of row `row`.
            unsafe { self.c.write(row * self.ldc + j0, sums) };
        }
    }
}
