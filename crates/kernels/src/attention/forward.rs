//! Blocks of queries against blocks of keys. A task owns a kv head of a row (and a share of its
//! query blocks where heads are few): K and V are packed once and serve the whole group.

use super::softmax::{Running, advance, rescale};
use super::{Heads, Operands, Seen, Shape};
use crate::gemm::Mat;
use crate::gemm::pack::Source;
use crate::gemm::tile::{Panels, Tile, block, columns_len, pack_columns, pack_rows, rows_len};
use crate::raw::RawFloats;
use crate::scratch::with_scratch;
use device::{DType, Isa, View, ViewMut};

/// Queries a block: a multiple of every tile's rows but 14, for which it wastes a ninth of one.
pub(super) const QUERIES: usize = 96;
/// Keys a block: its scores (96 x 256 x 4 bytes) share a 512 KiB L2 with a block of V.
pub(super) const KEYS: usize = 256;
/// Tasks below which the queries of a head are shared out too.
const ENOUGH_TASKS: usize = 16;

struct Job<'a> {
    shape: Shape,
    tile: Tile,
    qkv: Operands<'a>,
    seen: Seen<'a>,
    scale: f32,
    out: RawFloats,
    lse: RawFloats,
}

pub(super) fn forward(
    shape: Shape,
    qkv: Operands<'_>,
    seen: Seen<'_>,
    scale: f32,
    out: ViewMut<'_>,
    lse: ViewMut<'_>,
) {
    let tile = tile_for(qkv.0.data.dtype());
    let job = Job { shape, tile, qkv, seen, scale, out: RawFloats::of(out), lse: RawFloats::of(lse) };
    let blocks = shape.t.div_ceil(QUERIES);
    let shares = ENOUGH_TASKS.div_ceil((shape.b * shape.k).max(1)).min(blocks.max(1));
    device::for_each_index(shape.b * shape.k * shares, |task| {
        let (head, share) = (task / shares, task % shares);
        job.run(head / shape.k, head % shape.k, share, shares);
    });
}

/// What attention multiplies with. Between bf16 values AMX pays for rounding probabilities to bf16
/// too, as flash attention on tensor cores does; sums and the softmax stay f32.
pub(super) fn tile_for(dtype: DType) -> Tile {
    let isa = Isa::active();
    match dtype {
        DType::Bf16 if Tile::bf16(isa).runs() => Tile::bf16(isa),
        _ => Tile::product_f32(isa),
    }
}

/// Key blocks `[first, last)` that some query of `[q0, q1)` sees.
pub(super) fn key_blocks(seen: &Seen<'_>, row: usize, q0: usize, q1: usize) -> (usize, usize) {
    let (from, _) = seen.visible(row, q0);
    let (_, to) = seen.visible(row, q1 - 1);
    (from / KEYS, to.div_ceil(KEYS))
}

impl Job<'_> {
    fn run(&self, row: usize, kv_head: usize, share: usize, shares: usize) {
        let Shape { s, h, .. } = self.shape;
        let tile = self.tile;
        let keys_len = columns_len(tile, s, h);
        let values_len = s.div_ceil(KEYS) * columns_len(tile, h, KEYS);
        let (query_len, score_len) = (rows_len(tile, QUERIES, h), QUERIES * KEYS);
        let prob_len = rows_len(tile, QUERIES, KEYS);
        let sizes = [keys_len, values_len, query_len, score_len, prob_len, QUERIES * h];
        with_scratch(sizes.iter().sum(), |scratch| {
            let (keys, rest) = scratch.split_at_mut(keys_len);
            let (values, rest) = rest.split_at_mut(values_len);
            let k = self.qkv.1.matrix(row, kv_head, h, 0);
            pack_columns(tile, Source::columns(k.t()), (0, s), h, keys);
            pack_values(tile, self.qkv.2, (row, kv_head), s, h, values);
            let group = self.shape.n / self.shape.k;
            let blocks = self.shape.t.div_ceil(QUERIES);
            for head in kv_head * group..(kv_head + 1) * group {
                // Interleaved, so that long and short causal rows are shared evenly.
                for q_block in (share..blocks).step_by(shares) {
                    self.queries(row, head, q_block * QUERIES, (keys, values), rest);
                }
            }
        });
    }

    fn queries(&self, row: usize, head: usize, q0: usize, packed: (&[f32], &[f32]), scratch: &mut [f32]) {
        let Shape { t, s, n, h, .. } = self.shape;
        let tile = self.tile;
        let rows = QUERIES.min(t - q0);
        let (queries, rest) = scratch.split_at_mut(rows_len(tile, QUERIES, h));
        let (scores, rest) = rest.split_at_mut(QUERIES * KEYS);
        let (probs, sums) = rest.split_at_mut(rows_len(tile, QUERIES, KEYS));
        let sums = &mut sums[..rows * h];
        sums.fill(0.0);
        let mut state = [Running::NEW; QUERIES];
        pack_rows(tile, Source::rows(self.qkv.0.matrix(row, head, h, q0)), (0, rows), h, queries);
        let (first, last) = key_blocks(&self.seen, row, q0, q0 + rows);
        for key_block in first..last {
            let k0 = key_block * KEYS;
            let (_, seen) = self.seen.visible(row, q0 + rows - 1);
            let keys = KEYS.min(s - k0).min(seen - k0);
            let query = Panels { data: queries, kc: h };
            let key = Panels { data: &packed.0[k0 * tile.steps(h)..], kc: h };
            block(tile, (rows, keys, h), query, key, (scores, KEYS), false);
            for (r, state) in state.iter_mut().enumerate().take(rows) {
                let (from, to) = self.seen.visible(row, q0 + r);
                let clip = |key: usize| key.clamp(k0, k0 + keys) - k0;
                let scores = &mut scores[r * KEYS..r * KEYS + keys];
                let (next, factor) = advance(scores, clip(from), clip(to), self.scale, *state);
                *state = next;
                if factor != 1.0 {
                    rescale(&mut sums[r * h..(r + 1) * h], factor);
                }
            }
            let scores = Mat::new(View::of_f32(scores), KEYS);
            pack_rows(tile, Source::rows(scores), (0, rows), keys, probs);
            let prob = Panels { data: probs, kc: keys };
            let value = &packed.1[key_block * columns_len(tile, h, KEYS)..];
            let value = Panels { data: value, kc: KEYS.min(s - k0) };
            block(tile, (rows, h, keys), prob, value, (sums, h), true);
        }
        for (r, state) in state.iter().enumerate().take(rows) {
            let sums = &mut sums[r * h..(r + 1) * h];
            rescale(sums, if state.sum > 0.0 { 1.0 / state.sum } else { 0.0 });
            // SAFETY: head `head` of query q0 + r of row `row` belongs to this task alone.
            unsafe {
                self.out.write(((row * t + q0 + r) * n + head) * h, sums);
                self.lse.write((row * n + head) * t + q0 + r, &[state.lse()]);
            }
        }
    }
}

/// V (or K) [s, h] of one head as panels of `nr` columns, one group of panels a key block.
pub(super) fn pack_values(
    tile: Tile,
    v: Heads<'_>,
    (row, head): (usize, usize),
    s: usize,
    h: usize,
    out: &mut [f32],
) {
    for (key_block, k0) in (0..s).step_by(KEYS).enumerate() {
        let keys = KEYS.min(s - k0);
        let out = &mut out[key_block * columns_len(tile, h, KEYS)..];
        pack_columns(tile, Source::columns(v.matrix(row, head, h, k0)), (0, h), keys, out);
    }
}
