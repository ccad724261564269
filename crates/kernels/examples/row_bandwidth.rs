//! How close each op that is not a product comes to the memory: GB/s it moves, every array counted
//! once a read and once a write, and as a share of a parallel copy measured in the same round.
//! `cargo run --release -p kernels --example row_bandwidth [rows] [threads]`

use device::{Buffer, DType, Device, Threads, View, ViewMut};
use kernels::adamw::{Hyper, Master};
use kernels::adamw8::{BLOCK, Packed};
use kernels::gelu::GeluKind;
use kernels::head_norm::Heads;
use kernels::rope::{RopeScaling, RopeTable};
use kernels::*;
use std::time::Instant;

/// Width of a matrix; also the heads' (8 + 2 * 2) * 64.
const D: usize = 768;
const HEADS: Heads = Heads { n: 8, k: 2, h: 64 };
const ROUNDS: usize = 11;
const EPS: f32 = 1e-5;

struct Array {
    buffer: Buffer,
    dtype: DType,
    len: usize,
}

impl Array {
    fn new(dtype: DType, len: usize) -> Array {
        let mut buffer = Buffer::zeroed(Device::Cpu, len * dtype.size_bytes()).expect("memory");
        if dtype != DType::U16 {
            let values: Vec<f32> = (0..len).map(|i| ((i * 37 % 1009) as f32 - 504.0) / 300.0).collect();
            elementwise::copy(buffer.view_mut(dtype, 0, len), View::of_f32(&values));
        }
        Array { buffer, dtype, len }
    }

    fn v(&self) -> View<'_> {
        self.buffer.view(self.dtype, 0, self.len)
    }

    fn m(&mut self) -> ViewMut<'_> {
        self.buffer.view_mut(self.dtype, 0, self.len)
    }
}

/// Everything any op reads or writes; matrices are [rows, D] of the type measured.
struct Room {
    x: Array,
    dy: Array,
    carried: Array,
    y: Array,
    wide: Array,
    dwide: Array,
    grad: Array,
    moments: [Array; 2],
    /// Codes and exponents of 8-bit moments, two of each.
    packed: [Array; 4],
    master: Array,
    low: Array,
    stats: [Array; 2],
    head_stats: Array,
    w: Array,
    dw: [Array; 2],
    hw: Array,
    dhw: [Array; 2],
    ids: Vec<u32>,
    positions: Vec<u32>,
    table: RopeTable,
    losses: Array,
}

impl Room {
    fn new(rows: usize, dtype: DType) -> Room {
        let (big, f32s) = (|| Array::new(dtype, rows * D), |len| Array::new(DType::F32, len));
        let positive = |len| {
            let mut array = f32s(len);
            array.m().f32().fill(0.5);
            array
        };
        Room {
            x: big(),
            dy: big(),
            carried: big(),
            y: big(),
            wide: Array::new(dtype, 2 * rows * D),
            dwide: Array::new(dtype, 2 * rows * D),
            grad: f32s(rows * D),
            moments: [f32s(rows * D), positive(rows * D)],
            packed: [2, 2 * BLOCK, 2, 2 * BLOCK].map(|share| Array::new(DType::U16, rows * D / share)),
            master: f32s(rows * D),
            low: Array::new(DType::U16, rows * D),
            stats: [f32s(rows), f32s(rows)],
            head_stats: f32s(rows * (HEADS.n + HEADS.k)),
            w: f32s(D),
            dw: [f32s(D), f32s(D)],
            hw: f32s(HEADS.h),
            dhw: [f32s(HEADS.h), f32s(HEADS.h)],
            ids: (0..rows).map(|i| (i * 7919 % rows) as u32).collect(),
            positions: (0..rows as u32).map(|i| i % 1024).collect(),
            table: RopeTable::new(HEADS.h, 1e4, &RopeScaling::None, 1024),
            losses: f32s(rows / 32),
        }
    }
}

const HYPER: Hyper =
    Hyper { lr: 1e-5, beta1: 0.9, beta2: 0.95, eps: 1e-8, weight_decay: 0.1, step: 10, grad_scale: 1.0 };

/// Name, matrices of the measured type it moves, f32 matrices it moves beside them, the call.
type Case = (&'static str, f64, f64, fn(&mut Room));

fn norms() -> Vec<Case> {
    vec![
        ("rms_norm forward", 2.0, 0.0, |r| {
            rms_norm::forward(r.x.v(), r.w.v(), EPS, r.y.m(), r.stats[0].m());
        }),
        ("rms_norm backward", 4.0, 0.0, |r| {
            let (inv, carried) = (r.stats[0].v(), Some(r.carried.v()));
            rms_norm::backward(r.x.v(), r.w.v(), inv, r.dy.v(), carried, r.y.m(), r.dw[0].m());
        }),
        ("layer_norm forward", 2.0, 0.0, |r| {
            let [mean, inv] = &mut r.stats;
            layer_norm::forward(r.x.v(), r.w.v(), r.w.v(), EPS, r.y.m(), mean.m(), inv.m());
        }),
        ("layer_norm backward", 4.0, 0.0, |r| {
            let (stats, [dw, db], carried) = (&r.stats, &mut r.dw, Some(r.carried.v()));
            let (mean, inv) = (stats[0].v(), stats[1].v());
            layer_norm::backward(r.x.v(), r.w.v(), mean, inv, r.dy.v(), carried, r.y.m(), dw.m(), db.m());
        }),
        ("head_norm forward", 2.0, 0.0, |r| {
            head_norm::forward(r.x.v(), r.hw.v(), r.hw.v(), HEADS, EPS, r.y.m(), r.head_stats.m());
        }),
        ("head_norm backward", 3.0, 0.0, |r| {
            let ([dwq, dwk], inv, w) = (&mut r.dhw, r.head_stats.v(), r.hw.v());
            head_norm::backward(r.x.v(), w, w, inv, HEADS, r.dy.v(), r.y.m(), dwq.m(), dwk.m());
        }),
    ]
}

fn activations() -> Vec<Case> {
    vec![
        ("rope", 2.0 * 10.0 / 12.0, 0.0, |r| {
            rope::apply(r.y.m(), D, HEADS.n + HEADS.k, HEADS.h, &r.positions, &r.table, false);
        }),
        ("swiglu forward", 3.0, 0.0, |r| swiglu::forward(r.wide.v(), D, r.y.m())),
        ("swiglu backward", 6.0, 0.0, |r| {
            swiglu::backward(r.wide.v(), D, r.dy.v(), r.dwide.m(), Some(r.y.m()));
        }),
        ("gelu tanh forward", 2.0, 0.0, |r| gelu::forward(GeluKind::Tanh, r.x.v(), r.y.m())),
        ("gelu tanh backward", 3.0, 0.0, |r| gelu::backward(GeluKind::Tanh, r.x.v(), r.dy.v(), r.y.m())),
        ("gelu erf forward", 2.0, 0.0, |r| gelu::forward(GeluKind::Erf, r.x.v(), r.y.m())),
    ]
}

/// Of f32 logits only, as the head makes them.
fn losses() -> Vec<Case> {
    vec![
        ("cross_entropy forward", 1.0, 0.0, |r| {
            let m = r.losses.len;
            cross_entropy::forward(r.x.v(), &r.positions[..m], r.losses.m());
        }),
        ("cross_entropy both", 2.0, 0.0, |r| {
            let m = r.losses.len;
            elementwise::copy(r.y.m().narrow(0, 1), r.x.v().narrow(0, 1));
            cross_entropy::forward_backward(r.y.m(), &r.positions[..m], 1.0, r.losses.m(), DType::F32);
        }),
    ]
}

fn sums() -> Vec<Case> {
    vec![
        ("embedding forward", 2.0, 0.0, |r| embedding::forward(&r.ids, r.x.v(), D, r.y.m(), false)),
        ("embedding backward", 1.0, 2.0, |r| embedding::backward(&r.ids, r.dy.v(), D, r.grad.m())),
        ("adamw f32", 0.0, 7.0, |r| {
            let [m, v] = &mut r.moments;
            adamw::update(Master::F32(r.master.m()), r.grad.v(), m.m(), v.m(), &HYPER);
        }),
        ("adamw 8 bits", 0.0, 4.0 + 1.0 / BLOCK as f64, |r| {
            let [mc, me, vc, ve] = &mut r.packed;
            let m = Packed { codes: mc.m(), exponents: me.m() };
            let v = Packed { codes: vc.m(), exponents: ve.m() };
            adamw8::update(Master::F32(r.master.m()), r.grad.v(), m, v, 0, &HYPER);
        }),
        ("global_norm", 1.0, 0.0, |r| {
            std::hint::black_box(global_norm::sum_of_squares(r.x.v()));
        }),
        ("add_assign", 3.0, 0.0, |r| elementwise::add_assign(r.y.m(), r.x.v())),
        ("add", 3.0, 0.0, |r| elementwise::add(r.x.v(), r.dy.v(), r.y.m())),
        ("copy to f32", 1.0, 1.0, |r| elementwise::copy(r.grad.m(), r.x.v())),
        ("column_sums", 1.0, 0.0, |r| elementwise::column_sums(r.x.v(), D, r.dw[0].m())),
    ]
}

fn split() -> Case {
    // bf16 high, u16 low, two f32 moments read and written; the f32 gradient read.
    ("adamw split", 4.0, 5.0, |r| {
        let [m, v] = &mut r.moments;
        let master = Master::Split { high: r.y.m(), low: r.low.m() };
        adamw::update(master, r.grad.v(), m.m(), v.m(), &HYPER);
    })
}

fn seconds(body: impl FnOnce()) -> f64 {
    let start = Instant::now();
    body();
    start.elapsed().as_secs_f64()
}

fn report(room: &mut Room, dtype: DType, case: &Case) {
    let (name, own, f32s, call) = case;
    let matrix = room.x.len as f64;
    let bytes = own * matrix * dtype.size_bytes() as f64 + f32s * matrix * 4.0;
    let copied = 2.0 * matrix * 4.0;
    call(room);
    let mut rates: Vec<(f64, f64)> = (0..ROUNDS)
        .map(|_| {
            let copy = seconds(|| elementwise::copy(room.master.m(), room.grad.v()));
            (bytes / seconds(|| call(room)) / 1e9, copied / copy / 1e9)
        })
        .collect();
    rates.sort_by(|a, b| (a.0 / a.1).total_cmp(&(b.0 / b.1)));
    let (rate, copy) = rates[ROUNDS / 2];
    println!("{:>5} {name:<22} {rate:>6.1} GB/s  {:>4.0} % of a copy", dtype.name(), 100.0 * rate / copy);
}

fn main() {
    let mut args = std::env::args().skip(1).map(|arg| arg.parse().expect("a number"));
    let (rows, threads) = (args.next().unwrap_or(8192), args.next().unwrap_or(2));
    println!("{rows} rows of {D}, {threads} threads, {}", device::Isa::active().name());
    Threads::new(threads).expect("threads").run(|| {
        for dtype in [DType::F32, DType::Bf16] {
            let mut room = Room::new(rows, dtype);
            for case in norms().iter().chain(&activations()).chain(&sums()) {
                report(&mut room, dtype, case);
            }
            match dtype {
                DType::Bf16 => report(&mut room, dtype, &split()),
                _ => losses().iter().for_each(|case| report(&mut room, dtype, case)),
            }
        }
    });
}
