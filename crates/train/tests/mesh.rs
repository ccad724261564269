//! Runs on meshes of threads: the steps of one rank, and states that know no mesh.

mod common;

use common::meshes::{states_are_gone_on_with, steps_are_those_of_one_rank};
use common::runs::{F32, begin, losses, run};
use common::{Place, log};
use dist::{Axis, Options, launch};
use train::{Begin, Start, Trainer};

/// Every scheme, with replicas and without, and sizes that do not divide: 4 heads, 2 kv heads,
/// width 32, ffn 96, 4 rows.
const MESHES: [&[&str]; 14] = [
    &["mesh.x=2"],
    &["mesh.dp=2"],
    &["mesh.dp=2", "mesh.x=2", "mesh.scheme=1d-sequence"],
    &["mesh.x=2", "mesh.y=2"],
    &["mesh.dp=2", "mesh.x=3", "mesh.y=1", "mesh.scheme=summa"],
    &["mesh.x=1", "mesh.y=2", "mesh.z=2", "mesh.scheme=2.5d"],
    &["mesh.x=2", "mesh.y=2", "mesh.z=2"],
    &["mesh.dp=2", "mesh.y=2", "mesh.z=3", "mesh.scheme=3d"],
    &["mesh.x=2", "mesh.y=2", "mesh.scheme=weight-stationary"],
    &["mesh.dp=2", "mesh.x=3", "mesh.y=2", "mesh.scheme=weight-stationary"],
    &["mesh.fsdp=4"],
    &["mesh.fsdp=2", "mesh.x=2", "mesh.zero=1", "mesh.scheme=1d-sequence"],
    &["mesh.fsdp=2", "mesh.x=2", "mesh.y=2", "mesh.zero=2"],
    &["mesh.dp=2", "mesh.fsdp=2", "mesh.x=3"],
];

/// Rows of 24 tokens cut among context ranks, 5 of which pad them to 30; alone and beside other axes.
const CONTEXTS: [&[&str]; 11] = [
    &["mesh.cp=2", "mesh.attention=ring"],
    &["mesh.cp=4", "mesh.attention=ring"],
    &["mesh.cp=5", "mesh.attention=ring"],
    &["mesh.cp=4", "mesh.attention=all-to-all"],
    &["mesh.cp=2", "mesh.dp=2", "mesh.attention=ring"],
    &["mesh.cp=2", "mesh.dp=2", "mesh.x=2", "mesh.scheme=1d-sequence", "mesh.attention=ring"],
    &["mesh.cp=2", "mesh.x=2", "mesh.y=2", "mesh.attention=ring"],
    &["mesh.cp=2", "mesh.x=2", "train.recompute=always"],
    &["mesh.cp=2", "mesh.fsdp=2", "mesh.attention=ring"],
    &["mesh.cp=2", "mesh.fsdp=2", "mesh.zero=2", "mesh.attention=all-to-all", "train.recompute=always"],
    &["mesh.cp=2", "mesh.dp=2", "mesh.fsdp=2", "mesh.x=2", "mesh.attention=ring"],
];

/// Parts of a layer by other schemes than the stream; width 48, which six ranks divide.
const WIDE: &str = "model.width=48";
const MIXED: [&[&str]; 7] = [
    &["mesh.x=2", "mesh.y=2", "mesh.ffn_scheme=weight-stationary"],
    &["mesh.x=3", "mesh.y=2", "mesh.scheme=weight-stationary", "mesh.attention_scheme=summa"],
    &["mesh.dp=2", "mesh.x=2", "mesh.y=3", "mesh.attention_scheme=weight-stationary"],
    &["mesh.dp=2", "mesh.x=2", "mesh.scheme=1d-sequence", "mesh.attention_scheme=1d"],
    &["mesh.fsdp=2", "mesh.x=2", "mesh.y=2", "mesh.ffn_scheme=weight-stationary", "train.recompute=always"],
    &["mesh.cp=2", "mesh.x=2", "mesh.y=2", "mesh.attention_scheme=weight-stationary", "mesh.attention=ring"],
    &["mesh.pp=2", "mesh.x=2", "mesh.y=2", "mesh.ffn_scheme=3d", "mesh.attention_scheme=weight-stationary"],
];

#[test]
fn a_step_of_parts_of_other_schemes_is_the_step_of_one_rank() {
    let base: Vec<&str> = F32.iter().chain(&[WIDE]).copied().collect();
    steps_are_those_of_one_rank(&base, &MIXED);
}

#[test]
fn a_state_of_mixed_schemes_is_gone_on_with_on_any_mesh() {
    let solo: &[&str] = &[];
    let chain = [MIXED[0], solo, MIXED[1], MIXED[4], MESHES[3], MIXED[2], MIXED[6], MIXED[5], MIXED[3], solo];
    states_are_gone_on_with(&["train.batch=4", WIDE], &chain);
}

#[test]
fn a_width_that_parts_cannot_exchange_is_refused_before_anything_is_reserved() {
    let place = Place::new();
    let recipe = place.settings("run", MIXED[1]).recipe().unwrap();
    let refused = train::Prepared::new(&recipe, false, &mut |_| {}).err().unwrap().to_string();
    assert!(refused.contains("width 32 does not divide into the 6 pieces"), "{refused}");
}

#[test]
fn a_step_on_any_mesh_is_the_step_of_one_rank() {
    let meshes: Vec<&[&str]> = MESHES.into_iter().chain(CONTEXTS).collect();
    steps_are_those_of_one_rank(&F32, &meshes);
}

/// Sharing gradients, ranks add up microbatch by microbatch what others add up at the end.
#[test]
fn a_step_of_several_microbatches_on_shards_is_the_step_of_one_rank() {
    let base: Vec<&str> = F32.iter().chain(&["train.accumulate=2"]).copied().collect();
    steps_are_those_of_one_rank(&base, &[&MESHES[10..], &CONTEXTS[8..]].concat());
}

#[test]
fn replicas_alone_leave_the_losses_of_a_step_bit_for_bit() {
    let place = Place::new();
    let base = ["train.batch=4", "train.steps=1", "eval.every=1"];
    run(&place, "solo", &base, Start::New, false);
    let sets: Vec<&str> = base.iter().copied().chain(["mesh.dp=2"]).collect();
    run(&place, "dp", &sets, Start::New, false);
    assert_eq!(losses(&place.path("solo")), losses(&place.path("dp")));
}

/// Heads against tokens are attended as on one rank; validation and samples go on with whole rows.
#[test]
fn heads_against_tokens_leave_the_losses_of_a_step_bit_for_bit() {
    let place = Place::new();
    let base = ["train.batch=4", "train.steps=1", "eval.every=1", "sample.every=1"];
    run(&place, "solo", &base, Start::New, false);
    for mesh in [["mesh.cp=2", "mesh.dp=1"], ["mesh.cp=5", "mesh.dp=2"]] {
        let sets: Vec<&str> = base.iter().copied().chain(mesh).chain(["mesh.attention=all-to-all"]).collect();
        run(&place, "context", &sets, Start::Overwrite, false);
        assert_eq!(losses(&place.path("solo")), losses(&place.path("context")), "{mesh:?}");
        let validation = |dir: &str| {
            let lines = log(&place.path(dir));
            let line = lines.iter().find(|line| line["kind"] == "validation").unwrap();
            (line["targets"].as_u64().unwrap(), line["loss"].as_f64().unwrap())
        };
        let (one, other) = (validation("solo"), validation("context"));
        // After a step whose gradients were summed in another order, so to what bf16 leaves.
        assert!(one.0 == other.0 && (one.1 - other.1).abs() < 0.02, "{mesh:?}: {one:?} and {other:?}");
    }
}

#[test]
fn the_same_run_twice_has_the_same_bits() {
    let place = Place::new();
    for mesh in
        [MESHES[2], MESHES[3], MESHES[7], MESHES[10], MESHES[13], CONTEXTS[2], CONTEXTS[5], CONTEXTS[9]]
    {
        let base = ["train.batch=4", "train.steps=3"];
        let sets: Vec<&str> = base.iter().chain(mesh).copied().collect();
        run(&place, "once", &sets, Start::Overwrite, false);
        run(&place, "again", &sets, Start::Overwrite, false);
        assert_eq!(place.result("once"), place.result("again"), "{mesh:?}");
    }
}

/// Every copy of every parameter, and of what the optimizer keeps of it, is the same after a step:
/// those of 2.5D along z above all, whose gradients come from other tokens.
#[test]
fn copies_stay_equal_after_steps() {
    let place = Place::new();
    let plane: &[&str] = &["mesh.x=2", "mesh.y=1", "mesh.z=2", "mesh.scheme=2.5d"];
    for mesh in [MESHES[5], MESHES[4], MESHES[2], plane, CONTEXTS[4], MIXED[0]] {
        let sets: Vec<&str> = ["train.batch=4"].iter().chain(mesh).copied().collect();
        let begin = begin(&place, "copies", &sets, Start::New);
        let recipe = &begin.recipe;
        let samples = data::Samples::new(begin.prepared.train.clone(), recipe.train.context).unwrap();
        let loader = data::Loader::new(samples, 1, true);
        let ranks = launch(&recipe.mesh.shape, &Options::default(), |mesh| {
            let flow = recipe.mesh.flow(mesh).unwrap();
            let mut learner = begin.prepared.learner(recipe, &flow)?;
            learner.initialise(1)?;
            let (replica, replicas) = (mesh.coord(Axis::Dp), mesh.size(Axis::Dp));
            for step in 0..2 {
                let batch = loader.batch(4 * step, 4 / replicas, replica, replicas);
                learner.step(&[batch], train::StepPlan { lr: 1e-2, clip: 1.0 })?;
            }
            let mut pieces = Vec::new();
            for (param, spread) in learner.store.refs().zip(&learner.spreads) {
                // Ranks that agree on these coordinates hold one piece.
                let place: Vec<usize> = spread.cut.iter().map(|axis| mesh.coord(*axis)).collect();
                pieces.push((place, learner.store.weight(param).bytes().to_vec()));
            }
            Ok::<_, train::TrainError>(pieces)
        })
        .unwrap();
        let mut copies = 0;
        let mut seen = std::collections::BTreeMap::new();
        for pieces in ranks {
            for (param, (place, bytes)) in pieces.into_iter().enumerate() {
                if let Some(first) = seen.get(&(param, place.clone())) {
                    copies += 1;
                    assert!(*first == bytes, "copies of parameter {param} differ on {mesh:?}");
                }
                seen.entry((param, place)).or_insert(bytes);
            }
        }
        assert!(copies > 0, "{mesh:?} has no copies");
    }
}

/// 20 pairs, from and to one rank among them.
#[test]
fn a_state_of_one_mesh_is_gone_on_with_on_another() {
    let solo: &[&str] = &[];
    let chain = [solo, MESHES[0], MESHES[3], solo, MESHES[8], MESHES[6], MESHES[1], MESHES[7], MESHES[5]];
    let chain = chain.into_iter().chain([MESHES[2], MESHES[4], solo, MESHES[9], MESHES[6]]);
    let chain = chain.chain([MESHES[10], MESHES[11], MESHES[1], MESHES[12], MESHES[13]]);
    let chain = chain.chain([CONTEXTS[5], CONTEXTS[10], solo]);
    states_are_gone_on_with(&["train.batch=4"], &chain.collect::<Vec<_>>());
}

#[test]
fn what_cannot_be_spread_is_refused_with_a_remedy() {
    let place = Place::new();
    let refused = |sets: &[&str]| place.settings("run", sets).recipe().unwrap_err().to_string();
    assert!(refused(&["mesh.dp=3"]).contains("train.batch = 2 does not divide by 3, the product of mesh.dp"));
    let idle = refused(&["mesh.scheme=summa", "mesh.z=2"]);
    assert!(idle.contains("no use for mesh axis z = 2"), "{idle}");
    let context = refused(&["mesh.cp=13"]);
    assert!(context.contains("mesh.cp = 13 cuts rows of train.context = 24 tokens"), "{context}");
    let shape = place.settings("run", &["mesh.x=2", "mesh.y=3"]).recipe().unwrap().mesh.shape;
    assert_eq!((shape.size(Axis::X), shape.size(Axis::Y), shape.world_size()), (2, 3, 6));
}

#[test]
fn a_rank_that_would_train_something_else_is_refused() {
    let place = Place::new();
    let ours = begin(&place, "run", &["mesh.dp=2", "mesh.x=2"], Start::New);
    let theirs = begin(&place, "run", &["mesh.dp=2", "mesh.x=2", "train.lr=2e-3"], Start::New);
    let other_data = begin(&place, "run", &["mesh.dp=2", "mesh.x=2", "data.valid_fraction=0.3"], Start::New);
    let other_data = Begin { resolved: ours.resolved.clone(), ..other_data };
    for (theirs, name) in [(theirs, "recipe"), (other_data, "training data")] {
        let failure = launch(&ours.recipe.mesh.shape, &Options::default(), |mesh| {
            let begin = if mesh.rank() == 3 { theirs.clone() } else { ours.clone() };
            let mut trainer = Trainer::on(mesh, begin)?;
            while trainer.advance()?.is_some() {}
            Ok::<_, train::TrainError>(())
        });
        let failure = failure.unwrap_err().to_string();
        assert!(failure.starts_with(&format!("rank 3 has another {name} than rank 0")), "{failure}");
    }
}
