//! Every scheme on square, rectangular and uneven meshes gives the products of one rank, within the
//! bound that the lengths of the sums and the rounding of their terms allow, and moves the elements
//! its formula says (docs/parallelism.md).

mod common;

use common::{Outcome, Pair, Whole, matrix, peers, received, run, tensor_axes};
use device::DType;
use dist::{Algorithm, Axis, Communicator, Cut, Dim, Held, Keep, Layout, Leave, Mesh, Product, Scheme};

/// An even grid and an uneven one for every scheme.
const MESHES: &[(Scheme, &[&str])] = &[
    (Scheme::OneD, &["x=2", "x=4", "x=3"]),
    (Scheme::OneDSequence, &["x=2", "x=4"]),
    (Scheme::Summa, &["x=2,y=2", "x=2,y=3", "x=3,y=2", "x=1,y=3", "x=3", "x=4,y=2"]),
    (Scheme::TwoPointFiveD, &["x=2,y=2,z=2", "x=1,y=2,z=2", "y=2,z=3"]),
    (Scheme::ThreeD, &["x=2,y=2,z=2", "x=1,y=2,z=3", "x=3,y=1,z=2", "x=2,y=2"]),
    (Scheme::WeightStationary, &["x=2,y=2", "x=2,y=3", "x=1,y=3", "x=4"]),
];

/// Values in f64 beside a bound of the error of each, for rounding unit `out` of what is stored.
struct Bounded {
    rows: usize,
    cols: usize,
    values: Vec<f64>,
    bounds: Vec<f64>,
}

/// Unit roundoff of f32; every product accumulates in it.
const U: f64 = 1.0 / (1u64 << 24) as f64;

fn unit(dtype: DType) -> f64 {
    if dtype == DType::F32 { U } else { 1.0 / 256.0 }
}

impl Bounded {
    fn exact(whole: &Whole) -> Bounded {
        let values: Vec<f64> = whole.values.iter().map(|x| *x as f64).collect();
        let (cols, bounds) = (whole.cols, vec![0.0; values.len()]);
        Bounded { rows: values.len() / cols, cols, values, bounds }
    }

    fn t(&self) -> Bounded {
        let (rows, cols) = (self.cols, self.rows);
        let turn = |x: &[f64]| (0..rows * cols).map(|i| x[i % cols * rows + i / cols]).collect();
        Bounded { rows, cols, values: turn(&self.values), bounds: turn(&self.bounds) }
    }

    /// self times other, summed in any order in f32, of which at most `ranks` partial sums are
    /// rounded to `dtype` before they are added up and rounded once more: |error| is at most
    /// (k + ranks + 1) u |a||b| + 2 r |a||b| + what the errors of a and b contribute.
    fn times(&self, other: &Bounded, ranks: usize, dtype: DType) -> Bounded {
        let (m, n, k) = (self.rows, other.cols, self.cols);
        let (mut values, mut bounds) = (vec![0.0; m * n], vec![0.0; m * n]);
        let own = (k + ranks + 1) as f64 * U + 2.0 * unit(dtype);
        for (i, j) in (0..m * n).map(|at| (at / n, at % n)) {
            let (mut sum, mut size, mut carried) = (0.0, 0.0, 0.0);
            for l in 0..k {
                let (a, ea) = (self.values[i * k + l], self.bounds[i * k + l]);
                let (b, eb) = (other.values[l * n + j], other.bounds[l * n + j]);
                sum += a * b;
                size += (a.abs() + ea) * (b.abs() + eb);
                carried += ea * b.abs() + eb * a.abs() + ea * eb;
            }
            values[i * n + j] = sum;
            bounds[i * n + j] = own * size + carried;
        }
        Bounded { rows: m, cols: n, values, bounds }
    }

    /// Plus another, rounded to `dtype` once.
    fn plus(mut self, more: impl Fn(usize, usize) -> (f64, f64), dtype: DType) -> Bounded {
        for at in 0..self.values.len() {
            let (value, bound) = more(at / self.cols, at % self.cols);
            self.values[at] += value;
            self.bounds[at] += bound + unit(dtype) * (self.values[at].abs() + self.bounds[at]);
        }
        self
    }

    fn column_sums(&self, ranks: usize) -> Bounded {
        let own = (self.rows + ranks) as f64 * U;
        let (mut values, mut bounds) = (vec![0.0; self.cols], vec![0.0; self.cols]);
        for at in 0..self.values.len() {
            values[at % self.cols] += self.values[at];
            bounds[at % self.cols] += self.bounds[at] + own * (self.values[at].abs() + self.bounds[at]);
        }
        Bounded { rows: self.cols, cols: 1, values, bounds }
    }

    fn check(&self, what: &str, got: &Whole) {
        assert_eq!(got.values.len(), self.values.len(), "{what}");
        for (at, got) in got.values.iter().enumerate() {
            let (want, bound) = (self.values[at], self.bounds[at]);
            assert!((*got as f64 - want).abs() <= bound, "{what}[{at}]: {got} for {want} +- {bound}");
        }
    }
}

fn check(pair: Pair, ranks: usize, got: &Outcome, what: &str) {
    let Pair { m, d, dtype, .. } = pair;
    let f = pair.f.0 * pair.f.1;
    let of = |name, rows, cols| Bounded::exact(&matrix(name, rows, cols, dtype));
    let (x, dy, w1, w2) = (of("x", m, d), of("dy", m, d), of("w1", f, d), of("w2", d, f));
    let (b1, b2) = (of("b1", f, 1), of("b2", d, 1));
    let add = |b: &Bounded, j: usize| (b.values[j], b.bounds[j]);
    let h = x.times(&w1.t(), ranks, dtype).plus(|_, j| add(&b1, j), dtype);
    let y =
        h.times(&w2.t(), ranks, dtype).plus(|_, j| add(&b2, j), dtype).plus(|i, j| add(&x, i * d + j), dtype);
    let dh = dy.times(&w2, ranks, dtype);
    let dx = dh.times(&w1, ranks, dtype).plus(|i, j| add(&dy, i * d + j), dtype);
    let name = |part: &str| format!("{what}: {part}");
    h.check(&name("h"), &got.wholes["h"]);
    y.check(&name("y"), &got.wholes["y"]);
    dx.check(&name("dx"), &got.wholes["dx"]);
    dh.t().times(&x, ranks, DType::F32).check(&name("dw1"), &got.wholes["w1"]);
    dy.t().times(&h, ranks, DType::F32).check(&name("dw2"), &got.wholes["w2"]);
    dh.column_sums(ranks).check(&name("db1"), &got.wholes["b1"]);
    dy.column_sums(ranks).check(&name("db2"), &got.wholes["b2"]);
}

#[test]
fn every_scheme_gives_the_products_of_one_rank() {
    for dtype in [DType::F32, DType::Bf16] {
        // The second one divides by nothing: 13 tokens, width 22, 5 units of 6.
        for pair in [Pair { m: 24, d: 48, f: (12, 8), dtype }, Pair { m: 26, d: 22, f: (5, 6), dtype }] {
            for (scheme, meshes) in MESHES {
                for mesh in *meshes {
                    let (x, y, z) = tensor_axes(mesh);
                    // Tokens are whole sequences: the model pads them, so here they divide.
                    let m = pair.m.next_multiple_of(x * y * z);
                    let pair = Pair { m, ..pair };
                    let what = format!("{} on {mesh}, {pair:?}", scheme.name());
                    check(pair, x * y * z, &run(pair, mesh, *scheme), &what);
                }
            }
        }
    }
}

#[test]
fn a_run_has_the_same_bits_each_time() {
    let pair = Pair { m: 24, d: 22, f: (5, 6), dtype: DType::Bf16 };
    for (scheme, meshes) in MESHES {
        let mesh = meshes[0];
        assert_eq!(run(pair, mesh, *scheme).wholes, run(pair, mesh, *scheme).wholes, "{}", scheme.name());
    }
}

/// Cutting the tokens alone leaves every sum over a width as it was: outputs and gradients of x have
/// the bits of one rank.
#[test]
fn cutting_tokens_alone_changes_no_bit_of_what_belongs_to_a_token() {
    for dtype in [DType::F32, DType::Bf16] {
        // More than eight rows a rank: fewer are multiplied by another kernel.
        let pair = Pair { m: 48, d: 48, f: (12, 8), dtype };
        let solo = run(pair, "solo", Scheme::OneD);
        for (scheme, mesh) in [(Scheme::TwoPointFiveD, "z=3"), (Scheme::ThreeD, "x=3")] {
            let got = run(pair, mesh, scheme);
            for name in ["h", "y", "dx"] {
                assert_eq!(got.wholes[name], solo.wholes[name], "{name} on {mesh}");
            }
        }
        // Column cuts of the first weight and nothing else: h is not summed over ranks.
        let got = run(pair, "x=4", Scheme::OneD);
        assert_eq!(got.wholes["h"], solo.wholes["h"]);
        assert_eq!(got.wholes["w2"], solo.wholes["w2"]);
    }
}

/// Elements one rank receives for an opening product [M, K] x [N, K] and its way back.
fn formula(scheme: Scheme, mesh: &str, (m, k, n): (u64, u64, u64), opening: bool) -> u64 {
    let (x, y, z) = tensor_axes(mesh);
    let (x, y, z) = (x as u64, y as u64, z as u64);
    let (mk, kn, mn) = (m * k, k * n, m * n);
    match (scheme, opening) {
        (Scheme::OneD, true) | (Scheme::OneDSequence, true) => 2 * (x - 1) * mk / x,
        (Scheme::OneD, false) | (Scheme::OneDSequence, false) => 2 * (x - 1) * mn / x,
        (Scheme::Summa | Scheme::TwoPointFiveD, _) => 3 * ((y - 1) * mk / z + (x - 1) * kn) / (x * y),
        (Scheme::ThreeD, true) => 2 * ((y - 1) * mk + (x - 1) * kn + (z - 1) * mn) / (x * y * z),
        (Scheme::ThreeD, false) => 2 * ((z - 1) * mk + (x - 1) * kn + (y - 1) * mn) / (x * y * z),
        (Scheme::WeightStationary, true) => 2 * ((y - 1) * mk + (x - 1) * mn) / (x * y),
        (Scheme::WeightStationary, false) => 2 * ((x - 1) * mk + (y - 1) * mn) / (x * y),
    }
}

#[test]
fn every_rank_receives_what_the_formula_says_from_its_row_and_column_only() {
    let pair = Pair { m: 72, d: 48, f: (12, 12), dtype: DType::F32 };
    let (m, d, f) = (72, 48, 144);
    for (scheme, meshes) in MESHES {
        for mesh in *meshes {
            let (x, y, z) = tensor_axes(mesh);
            let want = formula(*scheme, mesh, (m, d, f), true) + formula(*scheme, mesh, (m, f, d), false);
            for (rank, counts) in run(pair, mesh, *scheme).counts.iter().enumerate() {
                let what = format!("{} on {mesh}, rank {rank}", scheme.name());
                assert_eq!(received(counts), want, "{what}");
                let lines = match scheme {
                    // Copies of weights along z are summed once a step, not in the products.
                    Scheme::TwoPointFiveD => x - 1 + y - 1,
                    _ => x - 1 + y - 1 + z - 1,
                };
                assert_eq!(peers(counts), lines, "{what}");
            }
        }
    }
}

#[test]
fn layouts_that_do_not_meet_are_refused_with_both_named() {
    let shape = common::shape("x=2,y=2");
    let mesh = Mesh::new(shape, Communicator::null(0, 4)).unwrap();
    let cut = |axes: &[Axis]| Cut::over(&mesh, axes);
    let held = |axes: &[Axis]| Held::plainly(Dim::plain(8), cut(axes));
    let gather = Algorithm::Gather { enter: None, leave: Leave::Whole, keep: Keep::Gathered };
    let (x, y) = (&[Axis::X][..], &[Axis::Y][..]);
    for (algorithm, tokens, widths, rows, cols, why) in [
        (gather, x, y, y, x, "the summed dim is cut differently"),
        (gather, x, y, x, y, "an axis cuts the tokens and w at once"),
        (Algorithm::Panels, x, y, x, y, "the outputs of w cut over the same axis"),
        (Algorithm::Panels, y, x, x, x, "an axis that cuts the tokens of x"),
    ] {
        let lies = Layout::new(cut(tokens), cut(widths));
        let refused = Product::new(&mesh, algorithm, lies, (&held(rows), &held(cols))).unwrap_err();
        let (text, w) = (refused.to_string(), Layout::new(cut(rows), cut(cols)).to_string());
        assert!(text.contains(why) && text.contains(&lies.to_string()) && text.contains(&w), "{text}");
    }
    let lies = Layout::new(cut(x), cut(y)).to_string();
    assert_eq!(lies, "[rows over x; columns over y]");
}
