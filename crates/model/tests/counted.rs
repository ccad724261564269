//! Elements a rank receives for one transformer layer, forward and backward, against the closed
//! formulas of docs/parallelism.md: GPT-2's layer (products of 12 h^2 weights) on a rank that only
//! counts, on squares, rectangles and boxes.

use dist::cost::mixed_flows;
use dist::{Communicator, ContextAttention, Counts, Flow, Mesh, MeshShape, Moved, Parts, Scheme};
use model::{Config, Model, Recompute, Tokens};
use serde_json::json;
use tensor::{DType, Device, ParamStore, Tape, Targets};

/// Rows, tokens a row, width h.
const B: usize = 48;
const T: usize = 8;
const H: usize = 96;
const M: u64 = (B * T) as u64;

/// Bytes per axis after the passes, and after the sums that end a step.
fn counts(layers: usize, mesh_text: &str, scheme: Scheme) -> (Vec<Counts>, Vec<Counts>) {
    counts_of_parts(layers, mesh_text, (scheme, Parts::default()))
}

fn gpt2(layers: usize, (width, heads): (usize, usize)) -> serde_json::Value {
    json!({
        "model_type": "gpt2", "vocab_size": 64, "n_embd": width, "n_head": heads, "n_layer": layers,
        "n_positions": T,
    })
}

fn counts_of_parts(layers: usize, mesh_text: &str, schemes: (Scheme, Parts)) -> (Vec<Counts>, Vec<Counts>) {
    counts_of_config(&gpt2(layers, (H, 48)), mesh_text, schemes)
}

fn counts_of_config(
    config: &serde_json::Value,
    mesh_text: &str,
    (scheme, parts): (Scheme, Parts),
) -> (Vec<Counts>, Vec<Counts>) {
    let shape: MeshShape = mesh_text.parse().unwrap();
    let last = shape.world_size() - 1;
    let mesh = Mesh::new(shape, Communicator::null(last, shape.world_size())).unwrap();
    let flow = Flow::new(&mesh, scheme).unwrap().with_parts(parts).unwrap();
    counts_of(config, &flow, DType::F32)
}

fn counts_of(config: &serde_json::Value, flow: &Flow, dtype: DType) -> (Vec<Counts>, Vec<Counts>) {
    let mesh = &flow.mesh;
    let config = Config::from_json(config).unwrap();
    let built = Model::build_on(&config, T, flow).unwrap();
    let mut store = ParamStore::new(Device::Cpu, dtype, &built.params).unwrap();
    store.enable_grads().unwrap();
    let ids = vec![1u32; B * T];
    let positions = (0..B).flat_map(|_| 0..T as u32).collect();
    let tokens = Tokens { b: B, ids: ids.clone().into(), positions, starts: None };
    let mut tape = Tape::recording(&mut store);
    let hidden = built.model.hidden(&mut tape, &tokens, Recompute::Never).unwrap();
    built.model.loss(&mut tape, &hidden, Targets { ids: &ids, scale: 1.0 }, B).unwrap();
    tape.backward().unwrap();
    let passes = mesh.counts();
    store.settle_grads().unwrap();
    for (param, spread) in store.refs().zip(&built.spreads) {
        let mut grad = store.grad(param).f32().to_vec();
        for axis in &spread.sums {
            mesh.group(*axis).all_reduce_sum(device::ViewMut::of_f32(&mut grad)).unwrap();
        }
    }
    (passes, mesh.counts())
}

fn elements<'a>(counts: impl IntoIterator<Item = &'a Counts>) -> u64 {
    counts.into_iter().map(|counts| counts.bytes_received / 4).sum()
}

/// What the second layer adds: (products and norms, sums that end a step).
fn of_a_layer(mesh: &str, scheme: Scheme) -> (u64, u64) {
    let (one, two) = (counts(1, mesh, scheme), counts(2, mesh, scheme));
    let passes = elements(&two.0) - elements(&one.0);
    (passes, elements(&two.1) - elements(&one.1) - passes)
}

fn sizes(mesh: &str) -> (u64, u64, u64) {
    let shape: MeshShape = mesh.parse().unwrap();
    let size = |axis| shape.size(axis) as u64;
    (size(dist::Axis::X), size(dist::Axis::Y), size(dist::Axis::Z))
}

/// An all-reduce of `len` elements over `ranks`.
fn all_reduce(len: u64, ranks: u64) -> u64 {
    assert!(len.is_multiple_of(ranks), "{len} over {ranks}");
    2 * (ranks - 1) * len / ranks
}

/// Two LayerNorms: mean and deviation forward, two sums backward, one number a token each.
fn norms(tokens: u64, axes: &[u64]) -> u64 {
    axes.iter().map(|ranks| 4 * all_reduce(tokens, *ranks) + 2 * all_reduce(2 * tokens, *ranks)).sum()
}

/// The closed formulas for h = width, M tokens.
fn formula(scheme: Scheme, mesh: &str) -> u64 {
    let (x, y, z) = sizes(mesh);
    let h = H as u64;
    let (mh, hh) = (M * h, 12 * h * h);
    match scheme {
        Scheme::OneD | Scheme::OneDSequence => 8 * (x - 1) * mh / x,
        Scheme::Summa => 3 * ((y - 1) * 7 * mh + (x - 1) * hh) / (x * y) + norms(M / x, &[y]),
        Scheme::TwoPointFiveD => 3 * ((y - 1) * 7 * mh / z + (x - 1) * hh) / (x * y) + norms(M / x / z, &[y]),
        Scheme::ThreeD => {
            let products = (y - 1) * 4 * mh + (z - 1) * 12 * mh + (x - 1) * hh;
            2 * products / (x * y * z) + norms(M / x / y, &[z])
        }
        Scheme::WeightStationary => 2 * ((y - 1) * 4 * mh + (x - 1) * 12 * mh) / (x * y) + norms(M, &[x, y]),
    }
}

#[test]
fn a_layer_receives_what_the_formula_says() {
    for (scheme, meshes) in [
        (Scheme::OneD, &["x=2", "x=8", "x=16"][..]),
        (Scheme::OneDSequence, &["x=2", "x=16"]),
        (Scheme::Summa, &["x=2,y=2", "x=4,y=4", "x=2,y=4", "x=4,y=2", "x=8,y=2", "x=8,y=3", "x=3,y=8"]),
        (Scheme::TwoPointFiveD, &["x=2,y=2,z=2", "x=4,y=2,z=2", "x=2,y=4,z=4"]),
        (Scheme::ThreeD, &["x=2,y=2,z=2", "x=4,y=4,z=4", "x=2,y=4,z=2", "x=4,y=2,z=2", "x=1,y=2,z=4"]),
        (Scheme::WeightStationary, &["x=2,y=2", "x=4,y=4", "x=2,y=4", "x=8,y=2", "x=3,y=4"]),
    ] {
        for mesh in meshes {
            assert_eq!(of_a_layer(mesh, scheme).0, formula(scheme, mesh), "{} on {mesh}", scheme.name());
        }
    }
}

/// Products of the attention part (MK of the opening one, MN; of the closing one) or of the feed-forward
/// part, in units of M h, and their weights in units of h^2.
fn part(scheme: Scheme, (x, y): (u64, u64), attention: bool) -> u64 {
    let h = H as u64;
    let (mh, inner) = (M * h, if attention { (3, 1) } else { (4, 4) });
    match scheme {
        Scheme::Summa => {
            let (mk, kn) = ((1 + inner.1) * mh, (inner.0 + inner.1) * h * h);
            3 * ((y - 1) * mk + (x - 1) * kn) / (x * y)
        }
        _ => 2 * ((y - 1) * 2 * mh + (x - 1) * (inner.0 + inner.1) * mh) / (x * y),
    }
}

/// A part of another scheme has x and y exchanged, and is led there and back, four times what a rank
/// keeps of one exchanged axis: x under a SUMMA stream, y under a weight-stationary one.
#[test]
fn parts_of_other_schemes_receive_what_the_formula_says() {
    use Scheme::{Summa, WeightStationary};
    for mesh in ["x=2,y=2", "x=4,y=4", "x=8,y=2", "x=2,y=4", "x=3,y=4"] {
        for (stream, other) in [(Summa, WeightStationary), (WeightStationary, Summa)] {
            for own in [[true, false], [false, true], [true, true]] {
                let of = |own: bool| own.then_some(other);
                let parts = Parts { attention: of(own[0]), ffn: of(own[1]) };
                let (x, y, _) = sizes(mesh);
                let moved = if stream == Summa { x } else { y };
                let way = 4 * (moved - 1) * M * H as u64 / (moved * x * y);
                let part = |own: bool, attention| match own {
                    false => part(stream, (x, y), attention),
                    true => way + part(other, (y, x), attention),
                };
                let norms = if stream == Summa { norms(M / x, &[y]) } else { norms(M, &[x, y]) };
                let want = part(own[0], true) + part(own[1], false) + norms;
                let (one, two) =
                    (counts_of_parts(1, mesh, (stream, parts)), counts_of_parts(2, mesh, (stream, parts)));
                let what = format!("{} on {mesh}", parts.named(stream));
                assert_eq!(elements(&two.0) - elements(&one.0), want, "{what}");
                let shape = Config::from_json(&gpt2(1, (H, 48))).unwrap().shape();
                let flows = mixed_flows(&shape, (stream, parts), &mesh.parse().unwrap(), M as f64);
                let predicted: f64 = flows.iter().map(|flow| flow.elements).sum();
                assert!((predicted - (want - norms) as f64).abs() < 1e-6, "{what}: {predicted} predicted");
                assert!(two.1.iter().all(|counts| !counts.axes.contains('+')), "{what}: more than one axis");
            }
        }
    }
}

/// With three times as many tokens as columns, SUMMA moves least for attention and weight-stationary
/// products for the feed-forward part; both together move less than either alone, axis by axis as
/// predicted.
#[test]
fn where_parts_want_different_schemes_the_mixed_layer_receives_least() {
    use Scheme::{Summa, WeightStationary};
    let (mesh, width) = ("x=8,y=8", 128);
    assert_eq!(M, 3 * width as u64);
    let parts = Parts { attention: None, ffn: Some(WeightStationary) };
    let received = |scheme, parts| {
        let counts = |layers| counts_of_config(&gpt2(layers, (width, 64)), mesh, (scheme, parts)).0;
        let (one, two) = (counts(1), counts(2));
        ["x", "y"].map(|axis| {
            let on = |counts: &[Counts]| elements(counts.iter().filter(|counts| counts.axes == axis));
            on(&two) - on(&one)
        })
    };
    let mixed = received(Summa, parts);
    let sum = |axes: [u64; 2]| axes[0] + axes[1];
    // In units of 7/64 h^2: 21 a + 36, 32 a, and 26 a + 12 + a/2, for a = 3.
    let unit = 7 * (width * width) as u64 / 64;
    let summa = sum(received(Summa, Parts::default())) - norms(M / 8, &[8]);
    let stationary = sum(received(WeightStationary, Parts::default())) - norms(M, &[8, 8]);
    assert_eq!([summa, stationary], [99 * unit, 96 * unit]);
    assert_eq!(2 * (sum(mixed) - norms(M / 8, &[8])), 183 * unit);
    let shape = Config::from_json(&gpt2(1, (width, 64))).unwrap().shape();
    let flows = mixed_flows(&shape, (Summa, parts), &mesh.parse().unwrap(), M as f64);
    let norms = [0, norms(M / 8, &[8])];
    for ((flow, norms), counted) in flows.iter().zip(norms).zip(mixed) {
        assert_eq!(flow.elements.round() as u64 + norms, counted, "x, then y");
    }
}

/// On squares and cubes the general forms are the ones of the design: 8(p-1)/p, 3(q-1)/q^2 (7, 12),
/// 2(q-1)/q^3 (16, 12) and 32(q-1)/q^2.
#[test]
fn on_squares_and_cubes_the_general_forms_are_the_usual_ones() {
    let h = H as u64;
    let (q, mh, hh) = (4, M * h, 12 * h * h);
    let usual = |scheme: Scheme, mesh: &str, elements: u64, norms: u64| {
        assert_eq!(formula(scheme, mesh) - norms, elements, "{}", scheme.name());
    };
    usual(Scheme::Summa, "x=4,y=4", 3 * (q - 1) * (7 * mh + hh) / (q * q), norms(M / q, &[q]));
    let box_of_two = norms(M / q / 2, &[q]);
    usual(Scheme::TwoPointFiveD, "x=4,y=4,z=2", 3 * (q - 1) * (7 * mh / 2 + hh) / (q * q), box_of_two);
    usual(Scheme::ThreeD, "x=4,y=4,z=4", 2 * (q - 1) * (16 * mh + hh) / (q * q * q), norms(M / q / q, &[q]));
    usual(Scheme::WeightStationary, "x=4,y=4", 32 * (q - 1) * mh / (q * q), norms(M, &[q, q]));
}

/// What ends a step: copies of weights along z are summed in 2.5D; biases and norms, 13 h numbers a
/// layer, wherever tokens are cut.
#[test]
fn the_sums_that_end_a_step_are_those_of_copies() {
    let h = H as u64;
    // Norms 4 h, biases of closing products 2 h, of opening products 7 h.
    let vectors = 13 * h;
    let of = |mesh, scheme| of_a_layer(mesh, scheme).1;
    assert_eq!(of("x=4", Scheme::OneD), 0);
    assert_eq!(of("x=4", Scheme::OneDSequence), all_reduce(6 * h, 4));
    assert_eq!(of("x=4,y=2", Scheme::Summa), all_reduce(vectors / 2, 4));
    let depth = all_reduce(12 * h * h / 4, 2) + all_reduce(vectors / 2, 2) + all_reduce(vectors / 2, 2);
    assert_eq!(of("x=2,y=2,z=2", Scheme::TwoPointFiveD), depth);
    assert_eq!(of("x=2,y=2", Scheme::WeightStationary), 0);
}

#[test]
fn a_rank_of_a_square_meets_its_row_and_its_column_only() {
    for (scheme, mesh, want) in [
        (Scheme::OneD, "x=48", 47),
        (Scheme::Summa, "x=8,y=6", 12),
        (Scheme::WeightStationary, "x=8,y=6", 12),
        (Scheme::TwoPointFiveD, "x=4,y=4,z=3", 8),
        (Scheme::ThreeD, "x=4,y=4,z=3", 8),
    ] {
        let all = counts(1, mesh, scheme).1;
        let peers: std::collections::BTreeSet<usize> =
            all.iter().flat_map(|c| c.peers.iter().copied()).collect();
        assert_eq!(peers.len(), want, "{} on {mesh}", scheme.name());
        assert!(all.iter().all(|counts| !counts.axes.contains('+')), "groups of more than one axis");
    }
}

/// Bytes that rank 1 of `ranks` context ranks sends and receives for a layer of a Llama of 96 wide with
/// these heads of 4.
fn context(ranks: usize, attention: ContextAttention, (n, k): (usize, usize), dtype: DType) -> [u64; 2] {
    let run = |layers: usize| {
        let shape: MeshShape = format!("cp={ranks}").parse().unwrap();
        let mesh = Mesh::new(shape, Communicator::null(1, ranks)).unwrap();
        let flow = Flow { attention, ..Flow::new(&mesh, Scheme::OneD).unwrap() };
        let config = json!({
            "model_type": "llama", "vocab_size": 64, "hidden_size": H, "num_attention_heads": n,
            "num_key_value_heads": k, "head_dim": 4, "intermediate_size": 8, "num_hidden_layers": layers,
            "max_position_embeddings": T, "rms_norm_eps": 1e-5,
        });
        let counts = counts_of(&config, &flow, dtype).0;
        counts.iter().fold([0, 0], |[sent, got], c| [sent + c.bytes_sent, got + c.bytes_received])
    };
    let (one, two) = (run(1), run(2));
    [two[0] - one[0], two[1] - one[1]]
}

/// Whom rank 1 meets in its attention alone.
fn peers_of_attention(ranks: usize, attention: ContextAttention, (n, k): (usize, usize)) -> Vec<usize> {
    let shape: MeshShape = format!("cp={ranks}").parse().unwrap();
    let mesh = Mesh::new(shape, Communicator::null(1, ranks)).unwrap();
    let (positions, h) = ((0..2).collect(), 4);
    let (scale, window, rope, starts) = (1.0, None, None, None);
    let shape = tensor::AttentionShape { b: 1, n, k, h, scale, window, rope, positions, starts };
    let mut store = ParamStore::new(Device::Cpu, DType::F32, &tensor::ParamList::default()).unwrap();
    let mut tape = Tape::running(&mut store);
    let qkv = tensor::Tensor::zeros(Device::Cpu, DType::F32, &[2, (n + 2 * k) * h]).unwrap();
    let qkv = tape.input(qkv);
    dist::Context::new(&mesh, attention).attention(&mut tape, qkv, &shape).unwrap();
    mesh.counts().iter().flat_map(|counts| counts.peers.iter().copied()).collect()
}

/// Keys and values of all others there, the same again and their gradients, in f32, back; or q, k, v of
/// a share of the heads and the outputs, there and back. With as many kv heads as query heads that is
/// 6 (N-1)/N Mh and 8 (N-1)/N^2 Mh elements.
#[test]
fn attention_on_the_context_axis_receives_what_the_formulas_say() {
    let methods = [ContextAttention::Ring, ContextAttention::AllToAll];
    for (ranks, heads, dtype) in [
        (2, (8, 8), DType::F32),
        (4, (8, 8), DType::Bf16),
        (4, (8, 2), DType::F32),
        (2, (8, 2), DType::Bf16),
        (4, (8, 4), DType::Bf16),
    ] {
        let bytes = |moved: Moved| {
            let own = M as f64 / ranks as f64 * 4.0;
            let of_type = (moved.forward + moved.backward) * dtype.size_bytes() as f64;
            [(own * (of_type + moved.backward_f32 * 4.0)) as u64; 2]
        };
        let (ring, exchange) = (Moved::ring(ranks, heads.1), Moved::all_to_all(ranks, heads));
        for (method, moved) in methods.into_iter().zip([ring, exchange]) {
            let what = format!("{} of {ranks}, {heads:?} heads, {dtype}", method.name());
            assert_eq!(context(ranks, method, heads, dtype), bytes(moved), "{what}");
        }
    }
    let (n, mh) = (4, M * 8 * 4);
    let of = |method| context(n as usize, method, (8, 8), DType::F32)[1] / 4;
    assert_eq!(of(ContextAttention::Ring), 6 * (n - 1) * mh / n);
    assert_eq!(of(ContextAttention::AllToAll), 8 * (n - 1) * mh / (n * n));
}

#[test]
fn a_ring_meets_its_neighbours_and_an_exchange_the_line() {
    assert_eq!(peers_of_attention(6, ContextAttention::Ring, (8, 2)), [0, 2]);
    assert_eq!(peers_of_attention(6, ContextAttention::AllToAll, (12, 6)), [0, 2, 3, 4, 5]);
}
