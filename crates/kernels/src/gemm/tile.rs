//! Small products from packed panels on one worker: what attention is made of.

pub(crate) use super::micro::Tile;
use super::pack::{Source, pack_panel};

/// Rows of `a` [rows, kc] as whole panels of `mr` lanes. Floats needed: `packed_len`.
pub(crate) fn pack_rows(
    tile: Tile,
    src: Source<'_>,
    (first, rows): (usize, usize),
    kc: usize,
    out: &mut [f32],
) {
    pack(tile, src, (first, rows, tile.mr), kc, out);
}

/// Columns of `b` [kc, columns] as whole panels of `nr` lanes.
pub(crate) fn pack_columns(
    tile: Tile,
    src: Source<'_>,
    (first, columns): (usize, usize),
    kc: usize,
    out: &mut [f32],
) {
    pack(tile, src, (first, columns, tile.nr), kc, out);
}

fn pack(
    tile: Tile,
    src: Source<'_>,
    (first, lanes, width): (usize, usize, usize),
    kc: usize,
    out: &mut [f32],
) {
    for (panel, out) in out.chunks_exact_mut(tile.steps(kc) * width).enumerate().take(lanes.div_ceil(width)) {
        let taken = panel * width;
        pack_panel(tile, src, (first + taken, width.min(lanes - taken), width), (0, kc), out);
    }
}

/// Floats of `lanes` lanes packed in panels of `width`.
pub(crate) fn packed_len(lanes: usize, width: usize, kc: usize) -> usize {
    lanes.next_multiple_of(width) * kc
}

/// c [m, n] (+)= packed a times packed b over `kc`; c has leading dimension `ldc`.
pub(crate) fn block(
    tile: Tile,
    (m, n, kc): (usize, usize, usize),
    a: &[f32],
    b: &[f32],
    (c, ldc): (&mut [f32], usize),
    add: bool,
) {
    let steps = tile.steps(kc);
    assert!(a.len() >= m.next_multiple_of(tile.mr) * steps && b.len() >= n.next_multiple_of(tile.nr) * steps);
    assert!(n <= ldc && (m == 0 || (m - 1) * ldc + n <= c.len()));
    for (ip, i) in (0..m).step_by(tile.mr).enumerate() {
        for (jp, j) in (0..n).step_by(tile.nr).enumerate() {
            let (rows, cols) = (tile.mr.min(m - i), tile.nr.min(n - j));
            // SAFETY: whole panels and a tile inside c, asserted above.
            unsafe {
                let a = a.as_ptr().add(ip * tile.mr * steps);
                let b = b.as_ptr().add(jp * tile.nr * steps);
                tile.run(steps, a, b, c.as_mut_ptr().add(i * ldc + j), ldc, (rows, cols), add);
            }
        }
    }
}
