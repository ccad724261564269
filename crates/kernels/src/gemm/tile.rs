//! Small products from packed panels on one worker: what attention is made of.

pub(crate) use super::micro::Tile;
use super::pack::{Side, Source, pack_panel};

/// Rows of `a` [rows, kc] as whole panels of `mr` lanes. Floats needed: `rows_len`.
pub(crate) fn pack_rows(
    tile: Tile,
    src: Source<'_>,
    (first, rows): (usize, usize),
    kc: usize,
    out: &mut [f32],
) {
    pack((tile, Side::A), src, (first, rows, tile.mr), kc, out);
}

/// Columns of `b` [kc, columns] as whole panels of `nr` lanes. Floats needed: `columns_len`.
pub(crate) fn pack_columns(
    tile: Tile,
    src: Source<'_>,
    (first, columns): (usize, usize),
    kc: usize,
    out: &mut [f32],
) {
    pack((tile, Side::B), src, (first, columns, tile.nr), kc, out);
}

fn pack(
    (tile, side): (Tile, Side),
    src: Source<'_>,
    (first, lanes, width): (usize, usize, usize),
    kc: usize,
    out: &mut [f32],
) {
    for (panel, out) in out.chunks_exact_mut(tile.steps(kc) * width).enumerate().take(lanes.div_ceil(width)) {
        let taken = panel * width;
        pack_panel((tile, side), src, (first + taken, width.min(lanes - taken), width), (0, kc), out);
    }
}

/// Floats of `rows` rows of A packed in whole panels.
pub(crate) fn rows_len(tile: Tile, rows: usize, kc: usize) -> usize {
    rows.next_multiple_of(tile.mr) * tile.steps(kc)
}

/// Floats of `columns` columns of B packed in whole panels.
pub(crate) fn columns_len(tile: Tile, columns: usize, kc: usize) -> usize {
    columns.next_multiple_of(tile.nr) * tile.steps(kc)
}

/// Packed panels, and the steps of k each was packed with (of which a product may use fewer).
#[derive(Clone, Copy)]
pub(crate) struct Panels<'a> {
    pub(crate) data: &'a [f32],
    pub(crate) kc: usize,
}

/// c [m, n] (+)= packed a times packed b over the first `kc` steps; c has leading dimension `ldc`.
pub(crate) fn block(
    tile: Tile,
    (m, n, kc): (usize, usize, usize),
    a: Panels<'_>,
    b: Panels<'_>,
    (c, ldc): (&mut [f32], usize),
    add: bool,
) {
    // Where steps hold several values of k, one operand must end at `kc`: its zeros hide the rest.
    assert!(kc <= a.kc && kc <= b.kc && (!tile.pairs || kc == a.kc || kc == b.kc));
    assert!(a.data.len() >= rows_len(tile, m, a.kc) && b.data.len() >= columns_len(tile, n, b.kc));
    assert!(n <= ldc && (m == 0 || (m - 1) * ldc + n <= c.len()));
    for (ip, i) in (0..m).step_by(tile.mr).enumerate() {
        for (jp, j) in (0..n).step_by(tile.nr).enumerate() {
            let (rows, cols) = (tile.mr.min(m - i), tile.nr.min(n - j));
            // SAFETY: whole panels and a tile inside c, asserted above.
            unsafe {
                let a = a.data.as_ptr().add(ip * tile.mr * tile.steps(a.kc));
                let b = b.data.as_ptr().add(jp * tile.nr * tile.steps(b.kc));
                tile.run(tile.steps(kc), a, b, c.as_mut_ptr().add(i * ldc + j), ldc, (rows, cols), add);
            }
        }
    }
}
