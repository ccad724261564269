//! The driver: A is packed whole, once, by all workers; then each task owns a strip of columns,
//! packs its B into L2 and runs the micro-kernel over the panels of A.

use super::micro::{RUN, Tile};
use super::pack::{Side, Source, pack_panel};
use super::{Epilogue, Mat, MatMut, gemv};
use crate::gelu::{GeluKind, gelu};
use crate::raw::RawFloats;
use crate::scratch::with_scratch;
use crate::simd::Float;
use device::{Buffer, DType, Device, Isa, Slice, View};
use half::bf16;
use std::ops::Range;

/// Rows of A a task walks before the next strip of columns: bounds the f32 scratch of a task.
const ROWS_PER_TASK: usize = 1536;
/// Products of at most this many rows (decoding) read B once and pack nothing.
const GEMV_ROWS: usize = 8;

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
    if k == 0 {
        (0..m).for_each(|i| finish.rows(i..i + 1, 0, n, &mut vec![0.0; n]));
        return;
    }
    if m <= GEMV_ROWS && b.transposed {
        return gemv::gemv((m, n, k), a, b, &finish);
    }
    let both_bf16 = a.data.dtype() == DType::Bf16 && b.data.dtype() == DType::Bf16;
    let tile = if both_bf16 { Tile::bf16(isa) } else { Tile::product_f32(isa) };
    let panels = m.div_ceil(tile.mr);
    let steps: usize = blocks(tile, k).map(|(_, kc)| tile.steps(kc)).sum();
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

fn blocks(tile: Tile, k: usize) -> impl Iterator<Item = (usize, usize)> {
    // Equal blocks: a short last one would waste the tile's store on few products.
    let count = k.div_ceil(tile.kc).max(1);
    let multiple = if tile.runs() { 2 * RUN } else { 8 };
    let size = k.div_ceil(count).next_multiple_of(multiple);
    (0..k).step_by(size).map(move |k0| (k0, size.min(k - k0)))
}

/// Columns per task: a strip of B that stays in L2 beside a panel of A, and enough strips to
/// share among workers. No sum depends on where a strip ends.
fn columns_per_task(tile: Tile, m: usize, n: usize) -> usize {
    // Equal shares: the strips of one run of rows are a multiple of the workers where they can be.
    let (workers, strip) = match device::num_threads() {
        workers if workers > 1 && m <= ROWS_PER_TASK => (workers, tile.shared_strip()),
        _ => (1, tile.strip),
    };
    let rounds = n.div_ceil(workers * strip).max(1);
    n.div_ceil(workers * rounds).next_multiple_of(tile.nr)
}

fn pack_all_rows(tile: Tile, (m, k): (usize, usize), src: Source<'_>, out: &mut [f32]) {
    let panels = m.div_ceil(tile.mr);
    let base = Out(out.as_mut_ptr());
    const PANELS_PER_TASK: usize = 16;
    device::for_each_chunk(panels, PANELS_PER_TASK, |range| {
        let mut offset = 0;
        for (k0, kc) in blocks(tile, k) {
            let len = tile.steps(kc) * tile.mr;
            for panel in range.clone() {
                // SAFETY: panel `panel` of this block is `len` floats that no other task writes.
                let out =
                    unsafe { std::slice::from_raw_parts_mut(base.get().add(offset + panel * len), len) };
                let lanes = tile.mr.min(m - panel * tile.mr);
                pack_panel((tile, Side::A), src, (panel * tile.mr, lanes, tile.mr), (k0, kc), out);
            }
            offset += panels * len;
        }
    });
}

impl Plan<'_> {
    /// One strip of columns from `j0` for the rows of `panels`.
    fn run(&self, panels: Range<usize>, j0: usize, finish: &Finish<'_>) {
        let k = self.sizes.2;
        let (tile, columns) = (self.tile, self.columns.min(self.sizes.1 - j0));
        let width = columns.next_multiple_of(tile.nr);
        let rows_of = |panel: usize| panel * tile.mr..((panel + 1) * tile.mr).min(self.sizes.0);
        let one_block = k <= tile.kc;
        // Sums wait for the epilogue in scratch: of a whole strip while blocks of k still add to
        // them, else of one panel at a time.
        let kept = if one_block { 1 } else { panels.len() };
        let (b_len, sums_len) = (tile.steps(tile.kc) * width, kept * tile.mr * columns);
        with_scratch(b_len + sums_len, |scratch| {
            let (b, sums) = scratch.split_at_mut(b_len);
            let mut offset = 0;
            for (k0, kc) in blocks(tile, k) {
                let steps = tile.steps(kc);
                for (jp, out) in b.chunks_exact_mut(steps * tile.nr).enumerate().take(width / tile.nr) {
                    let lanes = tile.nr.min(columns - jp * tile.nr);
                    pack_panel((tile, Side::B), self.b, (j0 + jp * tile.nr, lanes, tile.nr), (k0, kc), out);
                }
                let a = &self.a[offset..offset + self.panels * tile.mr * steps];
                for (at, panel) in panels.clone().enumerate() {
                    let a = &a[panel * tile.mr * steps..][..tile.mr * steps];
                    let rows = rows_of(panel);
                    if let Some((c, ldc, add)) = finish.direct() {
                        // SAFETY: these rows and columns of C belong to this task alone.
                        unsafe {
                            let c = c.add(rows.start * ldc + j0);
                            self.panel(steps, a, b, (c, ldc), (rows.len(), columns), add || k0 > 0);
                        }
                        continue;
                    }
                    let at = if one_block { 0 } else { at };
                    let sums = &mut sums[at * tile.mr * columns..][..rows.len() * columns];
                    let c = (sums.as_mut_ptr(), columns);
                    // SAFETY: `sums` is rows x columns.
                    unsafe { self.panel(steps, a, b, c, (rows.len(), columns), k0 > 0) };
                    if k0 + kc == k {
                        finish.rows(rows, j0, columns, sums);
                    }
                }
                offset += self.panels * tile.mr * steps;
            }
        });
    }

    /// One panel of A, which stays in L1, times every panel of B of the strip, which come from L2.
    ///
    /// # Safety
    /// `c` is writable over rows x columns with leading dimension `ldc`.
    unsafe fn panel(
        &self,
        steps: usize,
        a: &[f32],
        b: &[f32],
        (c, ldc): (*mut f32, usize),
        (rows, columns): (usize, usize),
        add: bool,
    ) {
        let tile = self.tile;
        for (b, j) in b.chunks_exact(tile.nr * steps).zip((0..columns).step_by(tile.nr)) {
            let cols = tile.nr.min(columns - j);
            // SAFETY: panels are whole; the tile lies inside rows x columns.
            unsafe { tile.run(steps, a.as_ptr(), b.as_ptr(), c.add(j), ldc, (rows, cols), add) };
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
    fn activate<T: Float>(kind: GeluKind, sums: &mut [f32]) {
        for sum in sums.iter_mut() {
            *sum = gelu(kind, T::from_f32(*sum).to_f32());
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
    pub(super) fn rows(&self, rows: Range<usize>, j0: usize, columns: usize, sums: &mut [f32]) {
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
                // GELU of what is stored: the same bits where the activation is an op of its own.
                match pre {
                    RawFloats::F32(_) => activate::<f32>(kind, sums),
                    RawFloats::Bf16(_) => activate::<bf16>(kind, sums),
                }
            }
            // SAFETY: our strip of row `row`.
            unsafe { self.c.write(row * self.ldc + j0, sums) };
        }
    }
}
