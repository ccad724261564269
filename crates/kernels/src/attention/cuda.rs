//! Attention on a GPU: on tensor cores where values are bf16 and lie in runs of 16 bytes, without them elsewhere.

use super::backward::Task;
use super::{Given, Heads, Operands, Places, Seen, Shape};
use crate::cuda::{Launch, launch, suffix, workspace};
use device::cuda::Address;
use device::{DType, View, ViewMut};

/// What the kernels on tensor cores take of heads that are padded to `head` columns; as in forward.cu and
/// backward.cu.
struct Tiles {
    head: usize,
    /// Queries a block, on the way there and on the way back to dq.
    queries: usize,
    /// Keys at a time on the way back to dq.
    keys_of_queries: usize,
    /// Keys a block, and blocks for the same keys, on the way back to dk and dv.
    keys: usize,
    shares: usize,
    /// Queries at a time on the way back to dk and dv.
    queries_of_keys: usize,
}

const TILES: [Tiles; 4] = [
    Tiles { head: 64, queries: 128, keys_of_queries: 64, keys: 128, shares: 1, queries_of_keys: 32 },
    Tiles { head: 96, queries: 128, keys_of_queries: 32, keys: 64, shares: 1, queries_of_keys: 64 },
    Tiles { head: 128, queries: 128, keys_of_queries: 32, keys: 64, shares: 1, queries_of_keys: 64 },
    Tiles { head: 256, queries: 64, keys_of_queries: 32, keys: 64, shares: 2, queries_of_keys: 32 },
];

/// Keys at a time on the way there.
const FORWARD_KEYS: usize = 64;
const RANGE_BYTES: usize = 8;
/// Of what the way back knows of a query.
const STAT_BYTES: usize = 16;
/// Queries and keys a block without tensor cores.
const SIDE: usize = 32;
/// Widest heads that a GPU attends with.
pub const MOST_COLUMNS: usize = 256;

/// How a task is cut into blocks and what each needs.
struct Cut {
    /// Kernels are `attention_{stem}_{suffix}`.
    names: (&'static str, String),
    threads: usize,
    /// Queries a block, and its shared memory, on the way there.
    forward: (usize, usize),
    /// The same for dq.
    queries: (usize, usize),
    /// Keys a block, blocks for the same keys, shared memory.
    keys: (usize, usize, usize),
}

impl Cut {
    /// `others` are arrays of rows of heads that are read or written, too.
    fn of(shape: &Shape, (q, k, v): &Operands<'_>, others: &[(DType, Address)]) -> Cut {
        let (h, dtype) = (shape.h, q.data.dtype());
        assert!(k.data.dtype() == dtype && v.data.dtype() == dtype, "q, k and v of one type");
        assert!(h <= MOST_COLUMNS, "heads of {h} columns, {MOST_COLUMNS} at most on a GPU");
        let lies = |heads: &Heads<'_>| start(heads).is_multiple_of(16) && heads.ld.is_multiple_of(8);
        let fits = dtype == DType::Bf16 && h.is_multiple_of(8) && lies(q) && lies(k) && lies(v);
        if fits && others.iter().all(|(dtype, at)| at.is_multiple_of(8 * dtype.size_bytes() as u64)) {
            TILES.iter().find(|tiles| h <= tiles.head).expect("a width for all that are allowed").cut()
        } else {
            Cut::plain(h, dtype)
        }
    }

    fn plain(h: usize, dtype: DType) -> Cut {
        let tile = SIDE * (h.div_ceil(4) | 1) * 4 * size_of::<f32>();
        let factors = SIDE * (SIDE + 1) * size_of::<f32>();
        let back = 4 * tile + 2 * factors + SIDE * STAT_BYTES;
        Cut {
            names: ("plain_", suffix(dtype).into()),
            threads: 256,
            forward: (SIDE, 2 * tile + factors),
            queries: (SIDE, back),
            keys: (SIDE, 1, back),
        }
    }

    fn kernel(&self, which: &str) -> String {
        format!("attention_{}{which}_{}", self.names.0, self.names.1)
    }
}

impl Tiles {
    fn cut(&self) -> Cut {
        let rows = |count: usize| count * self.head * size_of::<u16>();
        let forward = rows(self.queries + 2 * FORWARD_KEYS) + self.queries * RANGE_BYTES;
        let queries = rows(2 * self.queries + 4 * self.keys_of_queries) + self.queries * STAT_BYTES;
        let keys = rows(2 * self.keys + 4 * self.queries_of_keys) + 2 * self.queries_of_keys * STAT_BYTES;
        Cut {
            names: ("", self.head.to_string()),
            threads: 128,
            forward: (self.queries, forward),
            queries: (self.queries, queries),
            keys: (self.keys, self.shares, keys),
        }
    }
}

/// Address of the first head.
fn start(heads: &Heads<'_>) -> Address {
    heads.data.address() + (heads.col * heads.data.dtype().size_bytes()) as u64
}

/// What all kernels are given first.
fn give<'a>(to: Launch<'a>, shape: &Shape, (q, k, v): &Operands<'_>, scale: f32) -> Launch<'a> {
    let Shape { t, s, n, k: kv, h, .. } = *shape;
    let heads = |to: Launch<'a>, heads: &Heads<'_>| {
        to.address(start(heads)).u64(heads.rows_per_batch * heads.ld).u32(heads.ld)
    };
    heads(heads(heads(to, q), k), v).u32(t).u32(s).u32(n).u32(n / kv).u32(h).f32(scale)
}

fn seen_by<'a>(to: Launch<'a>, seen: &Seen<'_>) -> Launch<'a> {
    let to = match seen.mask.starts {
        Some(starts) => to.ids(starts),
        None => to.address(0),
    };
    let to = to.u32(seen.mask.window.map_or(u32::MAX as usize, |window| window.min(u32::MAX as usize)));
    let places = |to: Launch<'a>, places: Places| {
        places.both().into_iter().fold(to, |to, (first, len)| to.u32(first).u32(len))
    };
    places(places(to, seen.queries), seen.keys)
}

/// As the kernels call it.
fn mode(dtype: DType, adds: bool) -> usize {
    match (dtype, adds) {
        (DType::Bf16, false) => 0,
        (DType::F32, false) => 1,
        (DType::F32, true) => 2,
        _ => panic!("no attention writes {dtype}"),
    }
}

pub(super) fn forward(
    shape: Shape,
    qkv: Operands<'_>,
    seen: Seen<'_>,
    scale: f32,
    (out, lse): (ViewMut<'_>, ViewMut<'_>),
) {
    let cut = Cut::of(&shape, &qkv, &[(out.dtype(), out.address())]);
    let (queries, shared_bytes) = cut.forward;
    let name = cut.kernel("forward");
    let to = launch(&name).grid3(shape.t.div_ceil(queries), shape.n, shape.b);
    let to = give(to.threads(cut.threads).shared(shared_bytes), &shape, &qkv, scale);
    seen_by(to, &seen).write(&out).write(&lse).u32(mode(out.dtype(), false)).run();
}

/// Where gradients of heads go: the first element, and elements from one token to the next.
type Target = (Address, usize);

/// dq | dk | dv side by side in one matrix.
pub(super) fn packed(task: Task<'_>, [out, lse, dout]: [View<'_>; 3], dqkv: ViewMut<'_>) {
    let shape = task.0;
    let Shape { b, t, n, k, h, .. } = shape;
    let sums_bytes = b * n * t * size_of::<f32>();
    let stats_at = sums_bytes.next_multiple_of(STAT_BYTES);
    let sums = workspace(stats_at + b * n * t * STAT_BYTES);
    sum_rows(&shape, out, dout, sums);
    let target =
        |head: usize| (dqkv.address() + (head * h * dqkv.dtype().size_bytes()) as u64, (n + 2 * k) * h);
    let to = ([target(0), target(n), target(n + k)], dqkv.dtype(), false);
    gradients(task, (lse.address(), sums, dout), sums + stats_at as u64, to);
}

/// Added to dq, and to dk | dv.
pub(super) fn parts(task: Task<'_>, given: Given<'_>, (dq, dkv): (ViewMut<'_>, ViewMut<'_>)) {
    let Shape { b, t, n, k, h, .. } = task.0;
    let stats = workspace(b * n * t * STAT_BYTES);
    let dv = dkv.address() + (k * h * size_of::<f32>()) as u64;
    let targets = [(dq.address(), n * h), (dkv.address(), 2 * k * h), (dv, 2 * k * h)];
    let given = (given.lse.address(), given.sums.address(), given.dout);
    gradients(task, given, stats, (targets, DType::F32, true));
}

fn gradients(
    (shape, qkv, seen, scale): Task<'_>,
    (lse, sums, dout): (Address, Address, View<'_>),
    stats: Address,
    (targets, dtype, adds): ([Target; 3], DType, bool),
) {
    let Shape { b, t, s, n, k, .. } = shape;
    assert_eq!(dout.dtype(), qkv.0.data.dtype(), "the gradient is of the type of the values");
    let arrays = targets.map(|(at, _)| (dtype, at));
    let cut = Cut::of(&shape, &qkv, &[arrays[0], arrays[1], arrays[2], (dout.dtype(), dout.address())]);
    let count = b * n * t;
    let to = launch("attention_stats").grid(count.div_ceil(256)).threads(256);
    let to = to.address(lse).address(sums).address(stats).u32(n).u32(t).u64(count);
    seen_by(to, &seen).run();
    let [dq, dk, dv] = targets;
    let mode = mode(dtype, adds);
    let (keys, shares, shared_bytes) = cut.keys;
    let name = cut.kernel("backward_keys");
    let to = launch(&name).grid3(s.div_ceil(keys) * shares, k, b).threads(cut.threads).shared(shared_bytes);
    let to = give(to, &shape, &qkv, scale).read(dout).address(stats);
    to.address(dk.0).address(dv.0).u32(dk.1).u32(mode).run();
    let (queries, shared_bytes) = cut.queries;
    let name = cut.kernel("backward_queries");
    let to = launch(&name).grid3(t.div_ceil(queries), n, b).threads(cut.threads).shared(shared_bytes);
    let to = give(to, &shape, &qkv, scale).read(dout).address(stats);
    to.address(dq.0).u32(dq.1).u32(mode).run();
}

pub(super) fn row_sums(shape: &Shape, out: View<'_>, dout: View<'_>, sums: ViewMut<'_>) {
    sum_rows(shape, out, dout, sums.address());
}

/// A launch of a warp for each head of a token.
fn per_head<'a>(name: &'a str, shape: &Shape) -> Launch<'a> {
    launch(name).grid((shape.b * shape.t * shape.n).div_ceil(8)).threads(256)
}

/// Its last arguments.
fn run_per_head(to: Launch<'_>, shape: &Shape) {
    let Shape { b, t, n, h, .. } = *shape;
    to.u32(n).u32(t).u32(h).u64(b * t * n).run();
}

fn sum_rows(shape: &Shape, out: View<'_>, dout: View<'_>, sums: Address) {
    let name = format!("attention_row_sums_{}_{}", suffix(out.dtype()), suffix(dout.dtype()));
    run_per_head(per_head(&name, shape).read(out).read(dout).address(sums), shape);
}

pub(super) fn merge(
    shape: &Shape,
    (out, lse): (ViewMut<'_>, ViewMut<'_>),
    (part_out, part_lse): (View<'_>, View<'_>),
) {
    let to = per_head("attention_merge", shape).write(&out).write(&lse);
    run_per_head(to.read(part_out).read(part_lse), shape);
}
