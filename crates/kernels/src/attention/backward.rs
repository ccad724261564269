//! The way back, block by block: probabilities are computed again from the kept log-sums. A task
//! owns a kv head of a row, so dk and dv have one writer and one order of sums.

use super::forward::{KEYS, QUERIES, key_blocks, pack_values, tile_for};
use super::softmax::retreat;
use super::{Given, Operands, Seen, Shape};
use crate::gemm::Mat;
use crate::gemm::pack::Source;
use crate::gemm::tile::{Panels, Tile, block, columns_len, pack_columns, pack_rows, rows_len};
use crate::raw::RawFloats;
use crate::scratch::with_scratch;
use device::{View, ViewMut};

struct Job<'a> {
    shape: Shape,
    tile: Tile,
    qkv: Operands<'a>,
    seen: Seen<'a>,
    scale: f32,
    lse: &'a [f32],
    sums: &'a [f32],
    dout: View<'a>,
    dq: Target,
    dk: Target,
    dv: Target,
}

/// Where gradients of heads go: rows of a matrix, from a column on.
#[derive(Clone, Copy)]
struct Target {
    data: RawFloats,
    ld: usize,
    col: usize,
    /// Tokens of a row of the batch.
    tokens: usize,
    /// Whether they are added to what is there.
    adds: bool,
}

/// K and V of one head, packed every way the products want them.
struct PackedHead<'a> {
    /// K^T [h, s] for scores.
    keys_t: &'a [f32],
    /// V^T [h, s] for dP.
    values_t: &'a [f32],
    /// K [s, h] in key blocks for dQ.
    keys: &'a [f32],
}

/// Tiles of one pair of blocks.
struct Tiles<'a> {
    queries: &'a mut [f32],
    douts: &'a mut [f32],
    /// Q and dO [rows, h] as right operands.
    queries_b: &'a mut [f32],
    douts_b: &'a mut [f32],
    probs: &'a mut [f32],
    dprobs: &'a mut [f32],
    packed: &'a mut [f32],
    dq: &'a mut [f32],
}

/// Shape, operands, what is seen, factor on the scores.
pub(super) type Task<'a> = (Shape, Operands<'a>, Seen<'a>, f32);

/// dq | dk | dv side by side in one matrix.
pub(super) fn packed(task: Task<'_>, given: Given<'_>, dqkv: ViewMut<'_>) {
    let Shape { t, n, k, h, .. } = task.0;
    let data = RawFloats::of(dqkv);
    let target = |head| Target { data, ld: (n + 2 * k) * h, col: head * h, tokens: t, adds: false };
    run(task, given, [target(0), target(n), target(n + k)]);
}

/// Added to dq, and to dk | dv.
pub(super) fn parts(task: Task<'_>, given: Given<'_>, (dq, dkv): (ViewMut<'_>, ViewMut<'_>)) {
    let Shape { t, s, n, k, h, .. } = task.0;
    let (dq, dkv) = (RawFloats::of(dq), RawFloats::of(dkv));
    let dq = Target { data: dq, ld: n * h, col: 0, tokens: t, adds: true };
    let target = |head| Target { data: dkv, ld: 2 * k * h, col: head * h, tokens: s, adds: true };
    run(task, given, [dq, target(0), target(k)]);
}

fn run((shape, qkv, seen, scale): Task<'_>, given: Given<'_>, [dq, dk, dv]: [Target; 3]) {
    let tile = tile_for(qkv.0.data.dtype());
    let (lse, sums, dout) = (given.lse.f32(), given.sums.f32(), given.dout);
    let job = Job { shape, tile, qkv, seen, scale, lse, sums, dout, dq, dk, dv };
    device::for_each_index(shape.b * shape.k, |task| job.run(task / shape.k, task % shape.k));
}

fn take<'a>(rest: &mut &'a mut [f32], len: usize) -> &'a mut [f32] {
    let (head, tail) = std::mem::take(rest).split_at_mut(len);
    *rest = tail;
    head
}

impl Job<'_> {
    fn dout_head(&self, row: usize, head: usize, q0: usize) -> Mat<'_> {
        let Shape { t, n, h, .. } = self.shape;
        let start = ((row * t + q0) * n + head) * h;
        Mat::new(self.dout.narrow(start, self.dout.len() - start), n * h)
    }

    fn run(&self, row: usize, kv_head: usize) {
        let Shape { s, h, n, k, .. } = self.shape;
        let tile = self.tile;
        let keys_t_len = columns_len(tile, s, h);
        let blocks_len = s.div_ceil(KEYS) * columns_len(tile, h, KEYS);
        let (rows_a, rows_b) = (rows_len(tile, QUERIES, h), columns_len(tile, h, QUERIES));
        let pair = QUERIES * KEYS;
        // The widest packed operand: P or P^T of a whole pair of blocks.
        let packed = rows_len(tile, QUERIES, KEYS).max(rows_len(tile, KEYS, QUERIES));
        let tiles_len = 2 * rows_a + 2 * rows_b + 2 * pair + packed + QUERIES * h;
        with_scratch(2 * keys_t_len + blocks_len + tiles_len + 2 * s * h, |mut rest| {
            let keys_t = take(&mut rest, keys_t_len);
            let values_t = take(&mut rest, keys_t_len);
            let keys = take(&mut rest, blocks_len);
            let (k_heads, v_heads) = (self.qkv.1, self.qkv.2);
            let (key, value) = (k_heads.matrix(row, kv_head, h, 0), v_heads.matrix(row, kv_head, h, 0));
            pack_columns(tile, Source::columns(key.t()), (0, s), h, keys_t);
            pack_columns(tile, Source::columns(value.t()), (0, s), h, values_t);
            pack_values(tile, k_heads, (row, kv_head), s, h, keys);
            let packed_head = PackedHead { keys_t, values_t, keys };
            let (dk, dv) = (take(&mut rest, s * h), take(&mut rest, s * h));
            dk.fill(0.0);
            dv.fill(0.0);
            let mut tiles = Tiles {
                queries: take(&mut rest, rows_a),
                douts: take(&mut rest, rows_a),
                queries_b: take(&mut rest, rows_b),
                douts_b: take(&mut rest, rows_b),
                probs: take(&mut rest, pair),
                dprobs: take(&mut rest, pair),
                packed: take(&mut rest, packed),
                dq: take(&mut rest, QUERIES * h),
            };
            for head in kv_head * (n / k)..(kv_head + 1) * (n / k) {
                for q0 in (0..self.shape.t).step_by(QUERIES) {
                    self.queries((row, head, q0), &packed_head, &mut tiles, dk, dv);
                }
            }
            self.store(&self.dk, (row, kv_head, 0), dk);
            self.store(&self.dv, (row, kv_head, 0), dv);
        });
    }

    /// Rows [_, h] of a head to where they go, from token `first` of `row` on.
    fn store(&self, to: &Target, (row, head, first): (usize, usize, usize), rows: &[f32]) {
        let h = self.shape.h;
        for (r, values) in rows.chunks_exact(h).enumerate() {
            let start = (row * to.tokens + first + r) * to.ld + to.col + head * h;
            // SAFETY: this head of this row belongs to this task alone.
            unsafe { if to.adds { to.data.add(start, values) } else { to.data.write(start, values) } };
        }
    }

    fn queries(
        &self,
        (row, head, q0): (usize, usize, usize),
        kv: &PackedHead<'_>,
        tiles: &mut Tiles<'_>,
        dk: &mut [f32],
        dv: &mut [f32],
    ) {
        let Shape { t, h, .. } = self.shape;
        let tile = self.tile;
        let rows = QUERIES.min(t - q0);
        let (q, dout) = (self.qkv.0.matrix(row, head, h, q0), self.dout_head(row, head, q0));
        pack_rows(tile, Source::rows(q), (0, rows), h, tiles.queries);
        pack_rows(tile, Source::rows(dout), (0, rows), h, tiles.douts);
        pack_columns(tile, Source::columns(q), (0, h), rows, tiles.queries_b);
        pack_columns(tile, Source::columns(dout), (0, h), rows, tiles.douts_b);
        tiles.dq[..rows * h].fill(0.0);
        let (first, last) = key_blocks(&self.seen, row, q0, q0 + rows);
        for key_block in first..last {
            let (_, seen) = self.seen.visible(row, q0 + rows - 1);
            let keys = KEYS.min(seen - key_block * KEYS);
            self.scores((row, head, q0), (rows, keys, key_block), kv, tiles);
            self.products((rows, keys, key_block), kv, tiles, dk, dv);
        }
        self.store(&self.dq, (row, head, q0), &tiles.dq[..rows * h]);
    }

    /// probs = P, dprobs = dS of one pair of blocks.
    fn scores(
        &self,
        (row, head, q0): (usize, usize, usize),
        (rows, keys, key_block): (usize, usize, usize),
        kv: &PackedHead<'_>,
        tiles: &mut Tiles<'_>,
    ) {
        let Shape { t, n, h, .. } = self.shape;
        let (tile, k0) = (self.tile, key_block * KEYS);
        let panels = |data| Panels { data, kc: h };
        let sizes = (rows, keys, h);
        let keys_t = panels(&kv.keys_t[k0 * tile.steps(h)..]);
        block(tile, sizes, panels(tiles.queries), keys_t, (tiles.probs, KEYS), false);
        let values_t = panels(&kv.values_t[k0 * tile.steps(h)..]);
        block(tile, sizes, panels(tiles.douts), values_t, (tiles.dprobs, KEYS), false);
        for r in 0..rows {
            let (from, to) = self.seen.visible(row, q0 + r);
            let clip = |key: usize| key.clamp(k0, k0 + keys) - k0;
            let at = r * KEYS..r * KEYS + keys;
            let stat = (row * n + head) * t + q0 + r;
            let (lse, sum) = (self.lse[stat], self.sums[stat]);
            let (p, dp) = (&mut tiles.probs[at.clone()], &mut tiles.dprobs[at]);
            retreat(p, dp, clip(from), clip(to), (self.scale, lse, sum));
        }
    }

    /// dv += P^T dO, dk += dS^T Q, dq += dS K.
    fn products(
        &self,
        (rows, keys, key_block): (usize, usize, usize),
        kv: &PackedHead<'_>,
        tiles: &mut Tiles<'_>,
        dk: &mut [f32],
        dv: &mut [f32],
    ) {
        let Shape { s, h, .. } = self.shape;
        let (tile, k0) = (self.tile, key_block * KEYS);
        let probs = Mat::new(View::of_f32(tiles.probs), KEYS);
        let dprobs = Mat::new(View::of_f32(tiles.dprobs), KEYS);
        for (left, right, sum) in [(probs, &*tiles.douts_b, dv), (dprobs, &*tiles.queries_b, dk)] {
            pack_rows(tile, Source::rows(left.t()), (0, keys), rows, tiles.packed);
            let left = Panels { data: tiles.packed, kc: rows };
            let right = Panels { data: right, kc: rows };
            block(tile, (keys, h, rows), left, right, (&mut sum[k0 * h..(k0 + keys) * h], h), true);
        }
        pack_rows(tile, Source::rows(dprobs), (0, rows), keys, tiles.packed);
        let left = Panels { data: tiles.packed, kc: keys };
        let key = &kv.keys[key_block * columns_len(tile, h, KEYS)..];
        let right = Panels { data: key, kc: KEYS.min(s - k0) };
        block(tile, (rows, h, keys), left, right, (tiles.dq, h), true);
    }
}
