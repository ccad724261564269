//! A pair of products as a transformer has them, on any mesh, against sums in f64.

#![allow(dead_code)]

use device::{DType, Device};
use dist::{
    Axis, Counts, Cut, Dim, Flow, Held, Layout, Mesh, MeshShape, Options, Scheme, Weighted, crossing, launch,
    matmul,
};
use half::bf16;
use std::collections::BTreeMap;
use tensor::{Fault, Init, ParamList, ParamRef, ParamSpec, ParamStore, Piece, Tape, Tensor};

/// y = (x W1^T + b1) W2^T + b2 + x for x [m, d], W1 [f, d], W2 [d, f].
#[derive(Clone, Copy, Debug)]
pub struct Pair {
    /// Rows of x.
    pub m: usize,
    /// Width of the residual stream.
    pub d: usize,
    /// Inner width as (units, elements of a unit).
    pub f: (usize, usize),
    /// Type of weights and activations.
    pub dtype: DType,
}

/// A whole matrix [rows, cols] row by row.
#[derive(Clone, Debug, PartialEq)]
pub struct Whole {
    /// Columns.
    pub cols: usize,
    /// Elements.
    pub values: Vec<f32>,
}

/// What a run gives: matrices by name, and the counts of every rank.
pub struct Outcome {
    /// `h`, `y`, `dx`, `w1`, `w2`, `b1`, `b2`: values and gradients of whole matrices.
    pub wholes: BTreeMap<&'static str, Whole>,
    /// By rank.
    pub counts: Vec<Vec<Counts>>,
}

/// A number in (-1, 1) that depends on name and place alone.
pub fn number(name: &str, index: usize, dtype: DType) -> f32 {
    let seed = name.bytes().fold(17u64, |h, b| h.wrapping_mul(31).wrapping_add(b as u64));
    let bits = (index as u64 ^ seed << 32).wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 40;
    let x = bits as f32 / (1u64 << 23) as f32 - 1.0;
    if dtype == DType::F32 { x } else { bf16::from_f32(x).to_f32() }
}

pub fn matrix(name: &str, rows: usize, cols: usize, dtype: DType) -> Whole {
    Whole { cols, values: (0..rows * cols).map(|i| number(name, i, dtype)).collect() }
}

pub fn shape(text: &str) -> MeshShape {
    text.parse().unwrap()
}

/// A piece of a matrix as one rank holds it.
pub struct Part {
    name: &'static str,
    piece: Piece,
    ld: usize,
    values: Vec<f32>,
}

/// Where activations [rows, cols] of `layout` lie.
fn held(mesh: &Mesh, layout: Layout, rows: usize, cols: Dim) -> Piece {
    let order = layout.cols;
    crossing(
        mesh,
        &Held::plainly(Dim::plain(rows), layout.rows),
        &Held { dim: cols, order, cut: order, stored: Cut::WHOLE },
    )
}

fn local(mesh: &Mesh, whole: &Whole, layout: Layout, dtype: DType) -> Tensor {
    let rows = whole.values.len() / whole.cols;
    let dim = Dim::plain(whole.cols);
    let m = rows.div_ceil(layout.rows.pieces(mesh));
    let n = dim.piece_len(layout.cols.pieces(mesh));
    let mut here = vec![0f32; m * n];
    held(mesh, layout, rows, dim).take(&whole.values, &mut here, n);
    Tensor::from_f32(&here, dtype, &[m, n]).unwrap()
}

fn add_weight(list: &mut ParamList, mesh: &Mesh, name: &str, rows: &Held, cols: &Held) -> ParamRef {
    let shape = vec![rows.stored_len(mesh), cols.stored_len(mesh)];
    let spec = ParamSpec { name: name.into(), shape, init: Init::Zeros, decay: true };
    list.add_piece(spec, crossing(mesh, rows, cols))
}

fn column() -> Held {
    Held::plainly(Dim::plain(1), Cut::WHOLE)
}

pub fn run(pair: Pair, mesh_text: &str, scheme: Scheme) -> Outcome {
    let outcomes = launch(&shape(mesh_text), &Options::default(), |mesh| rank(pair, mesh, scheme)).unwrap();
    let mut wholes: BTreeMap<&'static str, Whole> = BTreeMap::new();
    let mut counts = Vec::new();
    for (parts, count) in outcomes {
        counts.push(count);
        for part in parts {
            let [rows, cols] = part.piece.whole;
            let unset = || Whole { cols, values: vec![f32::NAN; rows * cols] };
            let whole = wholes.entry(part.name).or_insert_with(unset);
            part.piece.stretches(part.ld, |at, from, len| {
                for i in 0..len {
                    let (new, old) = (part.values[at + i], &mut whole.values[from + i]);
                    assert!(old.is_nan() || *old == new, "copies of {} differ: {old} and {new}", part.name);
                    *old = new;
                }
            });
        }
    }
    for (name, whole) in &wholes {
        assert!(whole.values.iter().all(|x| !x.is_nan()), "an element of {name} lies nowhere");
    }
    Outcome { wholes, counts }
}

/// The layers of one rank with its parameters.
struct Layers {
    opening: Weighted,
    closing: Weighted,
    params: [ParamRef; 4],
    list: ParamList,
    store: ParamStore,
}

fn layers(pair: Pair, flow: &Flow) -> Layers {
    let mesh = &flow.mesh;
    let (d, f) = (Dim::plain(pair.d), Dim::of_parts(&[pair.f]));
    let opening = flow.opening(f.clone(), d.clone()).unwrap();
    let closing = flow.closing(d, f).unwrap();
    let mut list = ParamList::default();
    let params = [
        add_weight(&mut list, mesh, "w1", &opening.rows, &opening.cols),
        add_weight(&mut list, mesh, "b1", &opening.bias, &column()),
        add_weight(&mut list, mesh, "w2", &closing.rows, &closing.cols),
        add_weight(&mut list, mesh, "b2", &closing.bias, &column()),
    ];
    let mut store = ParamStore::new(Device::Cpu, pair.dtype, &list).unwrap();
    store.enable_grads().unwrap();
    for param in params {
        let spec = &list.specs()[param.index()];
        let piece = list.piece(param).unwrap();
        let whole: Vec<f32> = (0..piece.whole_len()).map(|i| number(&spec.name, i, pair.dtype)).collect();
        let mut here = vec![0f32; spec.len()];
        piece.take(&whole, &mut here, spec.shape[1]);
        store.set_weights(param, 0, device::View::of_f32(&here)).unwrap();
    }
    Layers { opening, closing, params, list, store }
}

fn rank(pair: Pair, mesh: &Mesh, scheme: Scheme) -> Result<(Vec<Part>, Vec<Counts>), Fault> {
    let flow = Flow::new(mesh, scheme).unwrap();
    let mut layers = layers(pair, &flow);
    let [w1, b1, w2, b2] = layers.params;
    let x = local(mesh, &matrix("x", pair.m, pair.d, pair.dtype), flow.outer, pair.dtype);
    let dy = local(mesh, &matrix("dy", pair.m, pair.d, pair.dtype), flow.outer, pair.dtype);
    let mut parts = Vec::new();
    let mut keep = |name, layout, cols: Dim, value: &Tensor| {
        let piece = held(mesh, layout, pair.m, cols);
        parts.push(Part { name, piece, ld: value.cols(), values: value.to_f32() });
    };
    let (opening, closing) = (layers.opening.product.clone(), layers.closing.product.clone());
    let dx = {
        let mut tape = Tape::recording(&mut layers.store);
        let x = tape.input(x);
        let probe = std::rc::Rc::new(std::cell::RefCell::new(None));
        let seen = probe.clone();
        // What arrives here is the gradient of x.
        let x = tape.outside(&[&x], x.value.clone(), move |_, dx| {
            *seen.borrow_mut() = Some(dx);
            Ok(vec![None])
        });
        let h = matmul(&mut tape, &opening, &x, (w1, Some(b1)), None)?;
        keep("h", flow.inner, Dim::of_parts(&[pair.f]), &h.value);
        let y = matmul(&mut tape, &closing, &h, (w2, Some(b2)), Some(&x))?;
        keep("y", flow.outer, Dim::plain(pair.d), &y.value);
        tape.seed(&y, &y.value, dy);
        tape.backward()?;
        probe.take().unwrap()
    };
    keep("dx", flow.outer, Dim::plain(pair.d), &dx);
    // Before the sums that end a step.
    let counts = mesh.counts();
    for (param, axes) in [
        (w1, opening.weight_sums().collect::<Vec<_>>()),
        (b1, flow.inner.rows.axes().collect()),
        (w2, closing.weight_sums().collect()),
        (b2, flow.outer.rows.axes().collect()),
    ] {
        let spec = &layers.list.specs()[param.index()];
        let (name, ld) = (["w1", "b1", "w2", "b2"][param.index()], spec.shape[1]);
        let mut grad = layers.store.grad(param).f32().to_vec();
        for axis in axes {
            mesh.group(axis).all_reduce_sum(device::ViewMut::of_f32(&mut grad))?;
        }
        parts.push(Part { name, piece: layers.list.piece(param).unwrap().clone(), ld, values: grad });
    }
    Ok((parts, counts))
}

/// Elements of f32 a rank received over tensor axes.
pub fn received(counts: &[Counts]) -> u64 {
    counts.iter().map(|counts| counts.bytes_received / 4).sum()
}

/// Ranks a rank exchanged bytes with.
pub fn peers(counts: &[Counts]) -> usize {
    let all: std::collections::BTreeSet<usize> =
        counts.iter().flat_map(|c| c.peers.iter().copied()).collect();
    all.len()
}

/// Sizes of x, y, z in a mesh text.
pub fn tensor_axes(mesh_text: &str) -> (usize, usize, usize) {
    let shape = shape(mesh_text);
    (shape.size(Axis::X), shape.size(Axis::Y), shape.size(Axis::Z))
}
