//! Rows cut among context ranks: the loss and the gradients of one rank and of `transformers`, by the
//! ring and by the exchange of heads, alone and beside tensor axes.

mod common;

use common::{BF16, CONTEXT, DENSE, F32, Golden, SPARSE, Tolerances, assert_close};
use dist::{Axis, ContextAttention, Flow, Mesh, MeshShape, Options, Scheme, launch};
use model::{Built, Model, Recompute, Tokens};
use std::collections::BTreeMap;
use tensor::{DType, Device, Fault, ParamStore, Tape, Targets};

/// Mean loss, and the whole gradient of every parameter by name.
#[derive(Debug, PartialEq)]
struct Outcome {
    loss: f32,
    grads: BTreeMap<String, Vec<f32>>,
}

/// One rank: loss, and the elements of the gradients it holds as (name, whole length, (place, value)).
type Held = (f32, Vec<(String, usize, Vec<(usize, f32)>)>);

fn rank(golden: &Golden, flow: &Flow, dtype: DType, tokens: &Tokens) -> Result<Held, Fault> {
    let Built { model, params, stored, spreads } = Model::build_on(&golden.config, CONTEXT, flow).unwrap();
    let mut store = ParamStore::new(Device::Cpu, dtype, &params)?;
    store.enable_grads()?;
    let read = |name: &str, _: &[usize]| Ok::<_, Fault>(golden.weights[name].f32());
    model::fill(&params, &stored, read, |param, first, values| {
        store.set_weights(param, first, device::View::of_f32(values)).unwrap();
        Ok(())
    })?;
    let targets = golden.targets();
    let scale = 1.0 / targets.iter().filter(|id| **id != u32::MAX).count() as f32;
    let mut tape = Tape::recording(&mut store);
    // One layer of two: what travels, travels again.
    let recompute = if flow.scheme == Scheme::Summa { Recompute::First(1) } else { Recompute::Never };
    let hidden = model.hidden(&mut tape, tokens, recompute)?;
    let losses = model.loss(&mut tape, &hidden, Targets { ids: &targets, scale }, tokens.b)?;
    tape.backward()?;
    store.settle_grads()?;
    let mut held = Vec::new();
    for (param, spread) in store.refs().zip(&spreads) {
        let mut grad = store.grad(param).f32().to_vec();
        for axis in spread.sums.iter().chain(&[Axis::Cp]) {
            flow.mesh.group(*axis).all_reduce_sum(device::ViewMut::of_f32(&mut grad))?;
        }
        let spec = store.spec(param);
        let (mut places, mut len) = (Vec::new(), grad.len());
        match params.piece(param) {
            None => places.extend(grad.into_iter().enumerate()),
            Some(piece) => {
                len = piece.whole_len();
                let ld = spec.shape.get(1).copied().unwrap_or(1);
                piece
                    .stretches(ld, |at, from, len| places.extend((0..len).map(|i| (from + i, grad[at + i]))));
            }
        }
        held.push((spec.name.clone(), len, places));
    }
    Ok((losses.to_f32().iter().sum::<f32>() * scale, held))
}

fn on_flow(
    golden: &Golden,
    mesh: &str,
    flow: impl Fn(&Mesh) -> Flow + Sync,
    dtype: DType,
    tokens: &Tokens,
) -> Outcome {
    let shape: MeshShape = mesh.parse().unwrap();
    let ranks = launch(&shape, &Options::default(), |mesh| rank(golden, &flow(mesh), dtype, tokens)).unwrap();
    let mut outcome = Outcome { loss: ranks[0].0, grads: BTreeMap::new() };
    for (loss, held) in ranks {
        assert_eq!(loss, outcome.loss, "ranks disagree on the loss");
        for (name, len, places) in held {
            let whole = outcome.grads.entry(name.clone()).or_insert_with(|| vec![f32::NAN; len]);
            for (place, value) in places {
                let old = std::mem::replace(&mut whole[place], value);
                assert!(old.is_nan() || old == value, "copies of {name} differ: {old} and {value}");
            }
        }
    }
    outcome
}

fn check(golden: &Golden, what: &str, got: &Outcome, tolerances: &Tolerances) {
    assert_close(&format!("{what} loss"), &[got.loss], &golden.expected["loss"].f32(), tolerances.loss);
    let specs = golden.built.params.specs();
    for stored in &golden.built.stored {
        let grad = stored.to_stored(&got.grads[&specs[stored.param.index()].name]);
        let expected = golden.expected[&format!("grad.{}", stored.name)].f32();
        assert_close(&format!("{what} grad {}", stored.name), &grad, &expected, tolerances.grads);
    }
}

/// Context ranks alone, and beside every kind of tensor axes; rows of 24 tokens, which 5 ranks pad to
/// 30; 2 kv heads, of which 4 ranks hold copies and 3 or 5 leave some without. SUMMA runs its first
/// layer again.
const CONTEXTS: [(ContextAttention, Scheme, &str); 11] = [
    (ContextAttention::Ring, Scheme::OneD, "cp=2"),
    (ContextAttention::Ring, Scheme::OneD, "cp=4"),
    (ContextAttention::Ring, Scheme::OneD, "cp=5"),
    (ContextAttention::Ring, Scheme::OneD, "cp=2,x=2"),
    (ContextAttention::Ring, Scheme::OneDSequence, "cp=2,x=2"),
    (ContextAttention::Ring, Scheme::Summa, "cp=3,x=2,y=2"),
    (ContextAttention::AllToAll, Scheme::OneD, "cp=2"),
    (ContextAttention::AllToAll, Scheme::OneD, "cp=4"),
    (ContextAttention::AllToAll, Scheme::OneD, "cp=5"),
    (ContextAttention::AllToAll, Scheme::OneDSequence, "cp=2,x=2"),
    (ContextAttention::AllToAll, Scheme::Summa, "cp=3,x=2,y=2"),
];

#[test]
fn rows_cut_among_context_ranks_compute_what_transformers_does() {
    for family in DENSE {
        let golden = Golden::open(family, DType::F32);
        for (attention, scheme, mesh) in CONTEXTS {
            let flow = |mesh: &Mesh| Flow { attention, ..Flow::new(mesh, scheme).unwrap() };
            // As rows, and as documents of one row.
            for (kind, tokens) in [("rows", golden.tokens()), ("packed", golden.packed())] {
                let got = on_flow(&golden, mesh, flow, DType::F32, &tokens);
                let what = format!("{family}, {kind}, {} {} on {mesh}", attention.name(), scheme.name());
                check(&golden, &what, &got, &F32);
            }
        }
    }
}

#[test]
fn context_ranks_in_bf16_stay_within_what_bf16_is_allowed_on_one_rank() {
    for family in ["llama3", "gpt2"] {
        let golden = Golden::open(family, DType::Bf16);
        for (attention, scheme, mesh) in CONTEXTS {
            let flow = |mesh: &Mesh| Flow { attention, ..Flow::new(mesh, scheme).unwrap() };
            let got = on_flow(&golden, mesh, flow, DType::Bf16, &golden.tokens());
            check(&golden, &format!("{family} bf16, {} on {mesh}", attention.name()), &got, &BF16);
        }
    }
}

/// Whole rows of a share of the heads are attended as on one rank, and everything else is local in
/// tokens; losses are added up in the order of the tokens. Experts are not among these: products of up to eight rows
/// (`kernels::gemm`) sum in another order, and an expert may have as few on a rank and more on one.
#[test]
fn heads_against_tokens_leave_the_loss_bit_for_bit() {
    for family in ["llama3", "gpt2", "mistral"] {
        for dtype in [DType::F32, DType::Bf16] {
            let golden = Golden::open(family, dtype);
            let whole = |_: &Mesh| Flow::solo();
            let solo = on_flow(&golden, "solo", whole, dtype, &golden.tokens());
            for mesh in ["cp=2", "cp=4", "cp=5"] {
                let flow = |mesh: &Mesh| Flow {
                    attention: ContextAttention::AllToAll,
                    ..Flow::new(mesh, Scheme::OneD).unwrap()
                };
                let got = on_flow(&golden, mesh, flow, dtype, &golden.tokens());
                assert_eq!(got.loss, solo.loss, "{family} {dtype} on {mesh}");
            }
        }
    }
}

#[test]
fn a_ring_has_the_same_bits_each_time() {
    let golden = Golden::open("llama3", DType::Bf16);
    let ring =
        |mesh: &Mesh| Flow { attention: ContextAttention::Ring, ..Flow::new(mesh, Scheme::OneD).unwrap() };
    let run = || on_flow(&golden, "cp=4", ring, DType::Bf16, &golden.packed());
    assert!(run() == run());
}

/// Tokens behind the end of a row are routed too, and count nowhere: neither in the balance nor in a
/// gradient. Two documents a row, packed, choose as two rows do.
#[test]
fn experts_on_context_ranks_compute_what_transformers_does() {
    let contexts = CONTEXTS.into_iter().chain([
        (ContextAttention::Ring, Scheme::WeightStationary, "cp=2,x=3,y=2"),
        (ContextAttention::AllToAll, Scheme::TwoPointFiveD, "cp=2,y=2,z=2"),
        (ContextAttention::Ring, Scheme::ThreeD, "cp=5,y=2,z=2"),
    ]);
    for family in SPARSE {
        let golden = Golden::open(family, DType::F32);
        for (attention, scheme, mesh) in contexts.clone() {
            let flow = |mesh: &Mesh| Flow { attention, ..Flow::new(mesh, scheme).unwrap() };
            for (kind, tokens) in [("rows", golden.tokens()), ("packed", golden.packed())] {
                let got = on_flow(&golden, mesh, flow, DType::F32, &tokens);
                let what = format!("{family}, {kind}, {} {} on {mesh}", attention.name(), scheme.name());
                check(&golden, &what, &got, &F32);
            }
        }
    }
}
