//! Rows that go to the ranks of their experts and come back: every token has what it would have on one
//! rank, bit for bit, and what is moved is what the formula says.

use dist::{Axis, Experts, Flow, Mesh, MeshShape, Mixture, Options, Scheme, Traffic, cost, launch, piece};
use std::cell::RefCell;
use std::rc::Rc;
use tensor::{
    DType, Device, Fault, Init, ParamList, ParamSpec, ParamStore, Piece, Real, Router, Tape, Tensor, normal,
};

const D: usize = 12;
const F: usize = 10;

/// What one rank has after a layer of experts, there and back.
struct Outcome {
    /// Rows for each rank.
    rows_for: Vec<usize>,
    bytes_received: u64,
    y: Vec<f32>,
    dx: Vec<f32>,
}

fn layer(
    mesh: &Mesh,
    experts: usize,
    choices: usize,
    dtype: DType,
    tokens: &[f32],
) -> Result<Outcome, Fault> {
    let lies = Experts::new(&Flow::new(mesh, Scheme::OneD).unwrap(), experts).unwrap();
    let mut list = ParamList::default();
    let mut add = |name: &str, (piece, shape): (Option<Piece>, Vec<usize>)| {
        let spec = ParamSpec { name: name.into(), shape, init: Init::Normal(0.5), decay: true };
        match piece {
            None => list.add(spec),
            Some(piece) => list.add_piece(spec, piece),
        }
    };
    let held = |(piece, shape)| (Some(piece), shape);
    let route = add("route", (None, vec![experts, D]));
    let params = (add("gate_up", held(lies.gate_up(D, F))), add("down", held(lies.down(D, F))));
    let mut store = ParamStore::new(Device::Cpu, dtype, &list)?;
    store.enable_grads()?;
    list.initial_values(11, |param, first, values| {
        store.set_weights(param, first, device::View::of_f32(values)).unwrap();
        Ok::<_, Fault>(())
    })?;
    let m = tokens.len() / D;
    let router = Router { experts, choices, normalise: true, balance: 0.0 };
    let mut tape = Tape::recording(&mut store);
    let caught = Rc::new(RefCell::new(Vec::new()));
    let out = caught.clone();
    let x = tape.outside(&[], Tensor::from_f32(tokens, dtype, &[m, D])?, move |_, dx| {
        *out.borrow_mut() = dx.to_f32();
        Ok(Vec::new())
    });
    let zero = tape.input(Tensor::zeros(Device::Cpu, dtype, &[m, D])?);
    // Who goes where, by the router alone.
    let scores = tape.scores(&x, route)?;
    let (_, ids) = tape.route(&scores, router, &Real::first(m), &|_| Ok(()))?;
    let ranks = mesh.size(Axis::Ep);
    let here = |rank: &usize, id: &u32| piece(experts, ranks, *rank).contains(&(*id as usize));
    let rows_for = (0..ranks).map(|rank| ids.iter().filter(|id| here(&rank, id)).count()).collect();
    let mixture = Mixture { router, route, experts: params };
    let y = lies.forward(&mut tape, (&x, &zero), &mixture, &Real::first(m))?;
    let dy = Tensor::from_f32(tokens, dtype, &[m, D])?;
    tape.seed(&y, &Tensor::zeros(Device::Cpu, DType::F32, &[1, 1])?, dy);
    tape.backward()?;
    let bytes_received = mesh.counts().iter().map(|counts| counts.bytes_received).sum();
    let dx = caught.borrow().clone();
    Ok(Outcome { rows_for, bytes_received, y: y.value.to_f32(), dx })
}

/// A rank without tokens, and experts that do not divide among the ranks. One rank with the tokens of all
/// multiplies the same rows by the same experts.
#[test]
fn rows_come_back_as_from_one_rank_and_bytes_are_those_of_the_formula() {
    for (experts, choices, ranks) in [(4, 2, 2), (5, 3, 2), (5, 2, 4), (3, 1, 3), (7, 2, 4), (8, 8, 4)] {
        for dtype in [DType::F32, DType::Bf16] {
            let tokens = |rank: usize| -> Vec<f32> {
                let m = [9, 0, 11, 14][rank];
                (0..m * D).map(|i| normal(rank as u64, "tokens", i as u64)).collect()
            };
            let shape = MeshShape::new(&[(Axis::Ep, ranks)]).unwrap();
            let run = |mesh: &Mesh| layer(mesh, experts, choices, dtype, &tokens(mesh.rank()));
            let found = launch(&shape, &Options::default(), run).unwrap();
            let all: Vec<f32> = (0..ranks).flat_map(tokens).collect();
            let alone = layer(&Mesh::solo(), experts, choices, dtype, &all).unwrap();
            let mut first = 0;
            for (rank, own) in found.iter().enumerate() {
                let what = format!("{choices} of {experts} experts on rank {rank} of {ranks}, {dtype}");
                let range = first..first + own.y.len();
                first = range.end;
                assert!(own.y == alone.y[range.clone()], "{what}");
                assert!(own.dx == alone.dx[range], "{what}: gradients");
                let sent: usize = own.rows_for.iter().sum::<usize>() - own.rows_for[rank];
                let others = found.iter().enumerate().filter(|(other, _)| *other != rank);
                let got: usize = others.map(|(_, other)| other.rows_for[rank]).sum();
                // Rows of others come and ours come back, values and then their gradients; before
                // them the counts, and the sums of the balance.
                let rows = 2 * (sent + got) * D * dtype.size_bytes();
                let counts = 4 * (ranks - 1) * piece(experts, ranks, rank).len();
                let sums = Traffic::all_reduce(ranks, rank, 2 * experts + 1, 4).received;
                assert_eq!(own.bytes_received, (rows + counts) as u64 + sums, "{what}: bytes");
            }
        }
    }
}

/// Elements a rank receives on tensor axes: whole rows of its tokens enter and sums leave, there and back
/// (docs/parallelism.md), and what the router needs. The cost model says the same.
#[test]
fn tensor_axes_move_what_the_table_says() {
    let (m, d) = (M, WIDTH);
    for (scheme, text) in [
        (Scheme::OneD, "x=4"),
        (Scheme::OneDSequence, "x=4"),
        (Scheme::Summa, "x=2,y=4"),
        (Scheme::TwoPointFiveD, "x=2,y=2,z=2"),
        (Scheme::ThreeD, "x=2,y=2,z=2"),
        (Scheme::WeightStationary, "x=2,y=3"),
    ] {
        let shape: MeshShape = text.parse().unwrap();
        let received = launch(&shape, &Options::default(), |mesh| even_loads(mesh, scheme));
        let size = |axis| shape.size(axis);
        let (x, y, z) = (size(Axis::X), size(Axis::Y), size(Axis::Z));
        // Axes of the slices, and of the tokens.
        let (slices, tokens) = match scheme {
            Scheme::OneD => (vec![x], vec![]),
            Scheme::OneDSequence => (vec![x], vec![x]),
            Scheme::Summa | Scheme::TwoPointFiveD => (vec![y], vec![z, x]),
            Scheme::ThreeD => (vec![z], vec![x, y]),
            Scheme::WeightStationary => (vec![x, y], vec![]),
        };
        let sequence = scheme == Scheme::OneDSequence;
        let m = if sequence { m } else { m / tokens.iter().product::<usize>() };
        let n: usize = slices.iter().product();
        let all_reduce = |n: usize, len: usize| 2 * (n - 1) * len / n;
        let rows = 4 * (n - 1) * m * d / n;
        let cut_columns = !matches!(scheme, Scheme::OneD | Scheme::OneDSequence);
        let scores: usize = slices.iter().map(|n| all_reduce(*n, m * E)).sum();
        let weights: usize = slices.iter().map(|n| all_reduce(*n, m * K)).sum();
        let ids = if sequence { (n - 1) * m * K / n } else { 0 };
        let router = if cut_columns { scores } else { 0 } + weights + ids;
        let sums: u64 = tokens
            .iter()
            .filter(|n| **n > 1)
            .map(|n| Traffic::all_reduce(*n, 0, 2 * E + 1, 4).received)
            .sum();
        let all = (4 * (rows + router)) as u64 + sums;
        assert_eq!(received.unwrap()[0], all, "{scheme} on {text}");
        assert_eq!(priced(scheme, text), all, "{scheme} on {text}, priced");
    }
}

/// With even loads a rank receives what the cost model says: over `ep`, beside axes that cut tokens, rows
/// or neurons, and where experts do not divide among the ranks.
#[test]
fn even_loads_move_what_the_cost_model_says() {
    for (scheme, text) in [
        (Scheme::OneD, "ep=2"),
        (Scheme::OneD, "ep=4"),
        (Scheme::OneD, "ep=3"),
        (Scheme::OneD, "dp=2,ep=2,x=2"),
        (Scheme::OneDSequence, "ep=2,x=4"),
        (Scheme::OneDSequence, "fsdp=2,ep=3,x=2"),
        (Scheme::Summa, "ep=2,x=2,y=2"),
        (Scheme::TwoPointFiveD, "ep=2,x=2,y=2,z=2"),
        (Scheme::ThreeD, "ep=4,x=2,y=1,z=2"),
        (Scheme::ThreeD, "ep=2,x=2,y=2,z=1"),
        (Scheme::WeightStationary, "cp=2,ep=2,x=2,y=3"),
    ] {
        let shape: MeshShape = text.parse().unwrap();
        let received = launch(&shape, &Options::default(), |mesh| even_loads(mesh, scheme)).unwrap();
        // The first rank has as many experts as any.
        assert_eq!(received[0], priced(scheme, text), "{scheme} on {text}");
        assert!(received.iter().all(|bytes| *bytes <= received[0]), "{scheme} on {text}: {received:?}");
    }
}

/// Experts, choices, tokens of a microbatch and width of `even_loads`.
const E: usize = 4;
const K: usize = 2;
const M: usize = 96;
const WIDTH: usize = 48;

/// Bytes by the cost model, with sums of the balance that do not divide as they are sent.
fn priced(scheme: Scheme, text: &str) -> u64 {
    let shape: MeshShape = text.parse().unwrap();
    let sizes = Axis::ALL.iter().map(|axis| (*axis, shape.size(*axis)));
    let mesh = sizes.fold(MeshShape::SOLO, |mesh, (axis, size)| mesh.with(axis, size));
    let mixture = cost::MixtureShape { experts: E, choices: K, ffn: F, shared_ffn: 0 };
    let flows = cost::expert_flows(&mixture, WIDTH, (scheme, &mesh), M as f64);
    let both = flows.forward.iter().chain(&flows.backward);
    let words: f64 = both.map(|flow| flow.rows.elements + flow.words.elements).sum();
    let mut sums = 0;
    for (axis, flow) in Axis::ALL.iter().zip(cost::pool_flows(&mixture, scheme, &mesh)) {
        let sent = if flow.calls > 0.0 {
            Traffic::all_reduce(shape.size(*axis), 0, 2 * E + 1, 4).received
        } else {
            0
        };
        // Pieces are whole words: rounded up, on the way there and on the way back.
        let apart = sent as f64 / 4.0 - flow.elements;
        assert!(
            (0.0..2.0 * shape.size(*axis) as f64).contains(&apart),
            "{scheme} on {text}: {}",
            axis.name()
        );
        sums += sent;
    }
    (4.0 * words).round() as u64 + sums
}

/// Bytes a rank receives for a layer of experts, there and back, when token i chooses experts i and i + 1.
fn even_loads(mesh: &Mesh, scheme: Scheme) -> Result<u64, Fault> {
    let (m, d, experts, choices) = (M, WIDTH, E, K);
    let flow = Flow::new(mesh, scheme).unwrap();
    let lies = Experts::new(&flow, experts).unwrap();
    let (rows, cols) = (m / flow.outer.rows.pieces(mesh), d / flow.outer.cols.pieces(mesh));
    let mut list = ParamList::default();
    let mut add = |name: &str, shape: Vec<usize>| {
        list.add(ParamSpec { name: name.into(), shape, init: Init::Normal(0.5), decay: true })
    };
    let route = add("route", vec![experts, cols]);
    let params = (add("gate_up", lies.gate_up(d, F).1), add("down", lies.down(d, F).1));
    let mut store = ParamStore::new(Device::Cpu, DType::F32, &list)?;
    store.enable_grads()?;
    // Of the whole matrices the columns of this rank: token i is 1 at column i mod E.
    let first = flow.outer.cols.index(mesh) * cols;
    let place = |i: usize, period: usize| (i / cols % period, first + i % cols);
    let weights: Vec<f32> = (0..experts * cols)
        .map(|i| match place(i, experts) {
            (expert, col) if col == expert => 2.0,
            (expert, col) if (col + 1) % experts == expert && col < experts => 1.0,
            _ => 0.0,
        })
        .collect();
    store.set_weights(route, 0, device::View::of_f32(&weights)).unwrap();
    let router = Router { experts, choices, normalise: true, balance: 0.1 };
    let mut tape = Tape::recording(&mut store);
    let one_hot = |i: usize| {
        let (token, col) = place(i, experts);
        if col == token { 1.0 } else { 0.0 }
    };
    let values: Vec<f32> = (0..rows * cols).map(one_hot).collect();
    let h = tape.outside(&[], Tensor::from_f32(&values, DType::F32, &[rows, cols])?, |_, _| Ok(Vec::new()));
    let mixture = Mixture { router, route, experts: params };
    let y = lies.forward(&mut tape, (&h, &h), &mixture, &Real::first(rows))?;
    let dy = Tensor::from_f32(&values, DType::F32, &[rows, cols])?;
    tape.seed(&y, &Tensor::zeros(Device::Cpu, DType::F32, &[1, 1])?, dy);
    tape.backward()?;
    Ok(mesh.counts().iter().map(|counts| counts.bytes_received).sum())
}

#[test]
fn more_ranks_than_experts_are_refused() {
    let shape = MeshShape::new(&[(Axis::Ep, 4)]).unwrap();
    let mesh = Mesh::new(shape, dist::Communicator::null(0, 4)).unwrap();
    let refused = Experts::new(&Flow::new(&mesh, Scheme::OneD).unwrap(), 3).unwrap_err().to_string();
    assert!(refused.contains("3 experts") && refused.contains("mesh.ep to at most 3"), "{refused}");
}
