//! Every family on every scheme, mixtures of experts over `ep` too: the loss and the gradients of one
//! rank and of `transformers`, and what is refused when a model is built.

mod common;

use common::{BF16, CONTEXT, DENSE, F32, Golden, SPARSE, Tolerances, assert_close, config_json};
use dist::{Axis, Flow, Mesh, MeshShape, Options, Parts, Scheme, launch};
use model::{Built, Config, Model, Recompute, Tokens};
use std::collections::BTreeMap;
use std::sync::Arc;
use tensor::{DType, Device, Fault, ParamStore, Piece, Tape, Targets};

/// Rectangles, boxes and sizes that divide nothing: the models have 4 or 6 heads, 2 or 4 kv heads.
const MESHES: [(Scheme, &str); 14] = [
    (Scheme::OneD, "x=2"),
    (Scheme::OneD, "x=3"),
    (Scheme::OneDSequence, "x=2"),
    (Scheme::OneDSequence, "x=4"),
    (Scheme::Summa, "x=2,y=2"),
    (Scheme::Summa, "x=3,y=2"),
    (Scheme::Summa, "x=2,y=3"),
    (Scheme::TwoPointFiveD, "x=2,y=2,z=2"),
    (Scheme::TwoPointFiveD, "y=2,z=3"),
    (Scheme::ThreeD, "x=2,y=2,z=2"),
    (Scheme::ThreeD, "x=3,y=1,z=2"),
    (Scheme::ThreeD, "y=3,z=2"),
    (Scheme::WeightStationary, "x=2,y=2"),
    (Scheme::WeightStationary, "x=3,y=2"),
];

/// Schemes of the stream, of attention and of the feed-forward part.
type Schemes = (Scheme, Scheme, Scheme);

/// Every step between two layouts, on squares, rectangles and lines.
const MIXED: [(Schemes, &str); 10] = [
    ((Scheme::Summa, Scheme::Summa, Scheme::WeightStationary), "x=2,y=2"),
    ((Scheme::Summa, Scheme::Summa, Scheme::WeightStationary), "x=2,y=3"),
    ((Scheme::Summa, Scheme::WeightStationary, Scheme::Summa), "x=3,y=2"),
    ((Scheme::WeightStationary, Scheme::WeightStationary, Scheme::Summa), "x=3,y=2"),
    ((Scheme::WeightStationary, Scheme::Summa, Scheme::ThreeD), "x=2,y=3"),
    ((Scheme::ThreeD, Scheme::WeightStationary, Scheme::Summa), "x=2,y=2"),
    ((Scheme::OneD, Scheme::OneDSequence, Scheme::WeightStationary), "x=2"),
    ((Scheme::OneDSequence, Scheme::WeightStationary, Scheme::OneD), "x=4"),
    ((Scheme::OneDSequence, Scheme::Summa, Scheme::OneDSequence), "x=2"),
    ((Scheme::TwoPointFiveD, Scheme::TwoPointFiveD, Scheme::ThreeD), "z=2"),
];

fn flow(mesh: &Mesh, (stream, attention, ffn): Schemes) -> Flow {
    let parts = Parts { attention: Some(attention), ffn: Some(ffn) };
    Flow::new(mesh, stream).unwrap().with_parts(parts).unwrap()
}

/// Mean loss, and the whole gradient of every parameter by name.
struct Outcome {
    loss: f32,
    grads: BTreeMap<String, Vec<f32>>,
}

/// What one rank has of the gradients: (name, piece, row length, values).
type Pieces = Vec<(String, Option<Piece>, usize, Vec<f32>)>;

fn rank(golden: &Golden, mesh: &Mesh, schemes: Schemes, dtype: DType) -> Result<(f32, Pieces), Fault> {
    let flow = flow(mesh, schemes);
    let Built { model, params, stored, spreads } = Model::build_on(&golden.config, CONTEXT, &flow).unwrap();
    let mut store = ParamStore::new(Device::Cpu, dtype, &params)?;
    store.enable_grads()?;
    let read = |name: &str, _: &[usize]| Ok::<_, Fault>(golden.weights[name].f32());
    model::fill(&params, &stored, read, |param, first, values| {
        store.set_weights(param, first, device::View::of_f32(values)).unwrap();
        Ok(())
    })?;
    let targets = golden.targets();
    let scale = 1.0 / targets.iter().filter(|id| **id != u32::MAX).count() as f32;
    let (tokens, targets) = share_of(mesh, &golden.tokens(), &targets);
    let mut tape = Tape::recording(&mut store);
    let recompute = if schemes.0 == Scheme::Summa { Recompute::First(1) } else { Recompute::Never };
    let hidden = model.hidden(&mut tape, &tokens, recompute)?;
    let losses = model.loss(&mut tape, &hidden, Targets { ids: &targets, scale }, tokens.b)?;
    tape.backward()?;
    store.settle_grads()?;
    let mut parts = Pieces::new();
    for (param, spread) in store.refs().zip(&spreads) {
        let mut grad = store.grad(param).f32().to_vec();
        // Replicas hold copies of all but the experts they share.
        let replicas = ROWS.iter().filter(|axis| !spread.cut.contains(axis));
        for axis in spread.sums.iter().chain(replicas) {
            mesh.group(*axis).all_reduce_sum(device::ViewMut::of_f32(&mut grad))?;
        }
        let spec = store.spec(param);
        let ld = spec.shape.get(1).copied().unwrap_or(1);
        parts.push((spec.name.clone(), params.piece(param).cloned(), ld, grad));
    }
    let mut loss = [losses.to_f32().iter().sum::<f32>()];
    for axis in ROWS {
        mesh.group(axis).all_reduce_sum(device::ViewMut::of_f32(&mut loss))?;
    }
    Ok((loss[0] * scale, parts))
}

/// Axes whose ranks have other rows.
const ROWS: [Axis; 2] = [Axis::Dp, Axis::Ep];

/// The rows of a batch that a replica has.
fn share_of(mesh: &Mesh, all: &Tokens, targets: &[u32]) -> (Tokens, Vec<u32>) {
    let (index, count) = ROWS.iter().fold((0, 1), |(index, count), axis| {
        (index * mesh.size(*axis) + mesh.coord(*axis), count * mesh.size(*axis))
    });
    assert!(all.b.is_multiple_of(count), "{} rows over {count}", all.b);
    let each = targets.len() / count;
    let range = index * each..(index + 1) * each;
    let part = |x: &Arc<[u32]>| -> Arc<[u32]> { x[range.clone()].into() };
    let tokens =
        Tokens { b: all.b / count, ids: part(&all.ids), positions: part(&all.positions), starts: None };
    (tokens, targets[range.clone()].to_vec())
}

fn on_mesh(golden: &Golden, mesh: &str, scheme: Scheme, dtype: DType) -> Outcome {
    mixed_on_mesh(golden, mesh, (scheme, scheme, scheme), dtype)
}

fn mixed_on_mesh(golden: &Golden, mesh: &str, schemes: Schemes, dtype: DType) -> Outcome {
    let shape: MeshShape = mesh.parse().unwrap();
    let ranks = launch(&shape, &Options::default(), |mesh| rank(golden, mesh, schemes, dtype)).unwrap();
    let loss = ranks[0].0;
    let mut grads: BTreeMap<String, Vec<f32>> = BTreeMap::new();
    for (other, parts) in ranks {
        assert_eq!(other, loss, "ranks disagree on the loss");
        for (name, piece, ld, values) in parts {
            let len = piece.as_ref().map_or(values.len(), Piece::whole_len);
            let whole = grads.entry(name.clone()).or_insert_with(|| vec![f32::NAN; len]);
            let mut put = |at: usize, from: usize, len: usize| {
                for (new, old) in values[at..at + len].iter().zip(&mut whole[from..from + len]) {
                    assert!(old.is_nan() || old == new, "copies of {name} differ: {old} and {new}");
                    *old = *new;
                }
            };
            match &piece {
                None => put(0, 0, len),
                Some(piece) => piece.stretches(ld, put),
            }
        }
    }
    Outcome { loss, grads }
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

#[test]
fn every_dense_family_on_every_scheme_computes_what_transformers_does() {
    for family in DENSE {
        let golden = Golden::open(family, DType::F32);
        for (scheme, mesh) in MESHES {
            let got = on_mesh(&golden, mesh, scheme, DType::F32);
            check(&golden, &format!("{family}, {} on {mesh}", scheme.name()), &got, &F32);
        }
    }
}

#[test]
fn bf16_on_every_scheme_stays_within_what_bf16_is_allowed_on_one_rank() {
    for family in ["llama3", "gpt2"] {
        let golden = Golden::open(family, DType::Bf16);
        for (scheme, mesh) in MESHES {
            let got = on_mesh(&golden, mesh, scheme, DType::Bf16);
            check(&golden, &format!("{family} bf16, {} on {mesh}", scheme.name()), &got, &BF16);
        }
    }
}

/// Why a model cannot lie on a mesh.
fn refusal(golden: &Golden, text: &str, schemes: Schemes) -> Option<String> {
    let shape: MeshShape = text.parse().unwrap();
    let mesh = Mesh::new(shape, dist::Communicator::null(0, shape.world_size())).unwrap();
    Model::build_on(&golden.config, CONTEXT, &flow(&mesh, schemes)).err().map(|error| error.to_string())
}

/// The families of width 40 cannot be exchanged between six pieces, and say so.
#[test]
fn every_dense_family_with_parts_of_other_schemes_computes_what_transformers_does() {
    for family in DENSE {
        let golden = Golden::open(family, DType::F32);
        for (schemes, mesh) in MIXED {
            let what = format!("{family}, {schemes:?} on {mesh}");
            if let Some(refused) = refusal(&golden, mesh, schemes) {
                let six = "width 40 does not divide into the 6 pieces";
                assert!(family == "qwen3" && refused.contains(six), "{what}: {refused}");
                continue;
            }
            check(&golden, &what, &mixed_on_mesh(&golden, mesh, schemes, DType::F32), &F32);
        }
    }
    for family in ["llama3", "gpt2"] {
        let golden = Golden::open(family, DType::Bf16);
        for (schemes, mesh) in MIXED {
            let what = format!("{family} bf16, {schemes:?} on {mesh}");
            check(&golden, &what, &mixed_on_mesh(&golden, mesh, schemes, DType::Bf16), &BF16);
        }
    }
}

/// Experts follow the stream; attention, and the expert every token goes to, their own schemes.
#[test]
fn mixtures_with_parts_of_other_schemes_compute_what_transformers_does() {
    let shared = [
        ((Scheme::Summa, Scheme::WeightStationary, Scheme::WeightStationary), "ep=2,x=2,y=2"),
        ((Scheme::WeightStationary, Scheme::Summa, Scheme::Summa), "x=2,y=2"),
        ((Scheme::OneDSequence, Scheme::OneDSequence, Scheme::WeightStationary), "ep=2,x=2"),
    ];
    for family in SPARSE {
        let golden = Golden::open(family, DType::F32);
        for (schemes, mesh) in shared {
            let got = mixed_on_mesh(&golden, mesh, schemes, DType::F32);
            check(&golden, &format!("{family}, {schemes:?} on {mesh}"), &got, &F32);
        }
    }
}

/// The loss is a sum over tokens; cut tokens are gathered before it is taken, and nothing of a token
/// is summed over ranks when only tokens are cut.
#[test]
fn cutting_tokens_alone_leaves_the_loss_bit_for_bit() {
    for family in ["llama3", "gpt2"] {
        for dtype in [DType::F32, DType::Bf16] {
            let golden = Golden::open(family, dtype);
            let solo = on_mesh(&golden, "solo", Scheme::OneD, dtype);
            for (scheme, mesh) in [(Scheme::TwoPointFiveD, "z=2"), (Scheme::ThreeD, "x=2")] {
                assert_eq!(on_mesh(&golden, mesh, scheme, dtype).loss, solo.loss, "{family} on {mesh}");
            }
        }
    }
}

#[test]
fn a_mesh_the_scheme_cannot_use_is_refused_with_a_remedy() {
    let shape = MeshShape::new(&[(Axis::X, 2), (Axis::Z, 2)]).unwrap();
    let mesh = Mesh::new(shape, dist::Communicator::null(0, 4)).unwrap();
    let refused = Flow::new(&mesh, Scheme::Summa).unwrap_err().to_string();
    assert!(refused.contains("`summa`") && refused.contains("mesh.z = 1"), "{refused}");
}

/// The experts of two families divide by 2, the 5 of Qwen2-MoE do not.
#[test]
fn experts_on_every_scheme_compute_what_transformers_does() {
    let shared = [
        (Scheme::OneD, "ep=2"),
        (Scheme::OneD, "ep=2,x=2"),
        (Scheme::OneDSequence, "ep=2,x=2"),
        (Scheme::OneD, "dp=2,x=3"),
        (Scheme::Summa, "ep=2,x=2,y=2"),
        (Scheme::ThreeD, "ep=2,y=2,z=2"),
        (Scheme::WeightStationary, "ep=2,x=3,y=2"),
    ];
    for family in SPARSE {
        let golden = Golden::open(family, DType::F32);
        for (scheme, mesh) in MESHES.into_iter().chain(shared) {
            let got = on_mesh(&golden, mesh, scheme, DType::F32);
            check(&golden, &format!("{family}, {} on {mesh}", scheme.name()), &got, &F32);
        }
    }
}

/// An expert sees the rows of both ranks, in the order of the batch: its gradient is one product, as on
/// one rank, while that of what the ranks hold copies of is the sum of two.
#[test]
fn sharing_experts_alone_leaves_their_gradients_bit_for_bit() {
    for family in SPARSE {
        let golden = Golden::open(family, DType::F32);
        let solo = on_mesh(&golden, "solo", Scheme::OneD, DType::F32);
        let shared = on_mesh(&golden, "ep=2", Scheme::OneD, DType::F32);
        let experts = solo.grads.iter().filter(|(name, _)| name.contains(".experts."));
        assert!(experts.clone().count() > 0, "{family}");
        for (name, grad) in experts {
            assert!(*grad == shared.grads[name], "{family} {name}");
        }
    }
}

#[test]
fn what_cannot_share_experts_is_refused_with_a_remedy() {
    let refused = |family: &str, text: &str| {
        let config = Config::from_json(&config_json(family)).unwrap();
        let shape: MeshShape = text.parse().unwrap();
        let mesh = Mesh::new(shape, dist::Communicator::null(0, shape.world_size())).unwrap();
        Model::build(&config, CONTEXT, &mesh).err().unwrap().to_string()
    };
    let few = refused("mixtral", "ep=8");
    assert!(few.contains("4 experts") && few.contains("set mesh.ep to at most 4"), "{few}");
    let none = refused("llama3", "ep=2");
    assert!(none.contains("`llama` has none; use mesh.dp"), "{none}");
}
