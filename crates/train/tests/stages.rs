//! Pipelines: every schedule has the bits of one rank, holds what it promises and moves what the formula
//! says.

mod common;

use common::Place;
use common::meshes::{states_are_gone_on_with, steps_are_those_of_one_rank};
use common::runs::{begin, losses, run};
use dist::pipeline::{Pipeline, Schedule};
use dist::{Axis, Options, launch};
use train::Start;

/// An untied head, so that no parameter is on two stages; sizes that do not divide.
const UNTIED: [&str; 5] =
    ["model.layers=5", "model.tied=false", "train.accumulate=6", "train.steps=3", "eval.batches=3"];

/// Every schedule, with more microbatches than stages and (1F1B on 4 stages aside) as many.
const PIPELINES: [&[&str]; 7] = [
    &["mesh.pp=2", "mesh.schedule=gpipe"],
    &["mesh.pp=2"],
    &["mesh.pp=4"],
    &["mesh.pp=5", "mesh.schedule=zero-bubble"],
    &["mesh.pp=2", "mesh.schedule=interleaved"],
    &["mesh.pp=3", "mesh.schedule=zero-bubble"],
    &["mesh.pp=2", "mesh.schedule=zero-bubble", "train.recompute=always"],
];

#[test]
fn every_schedule_has_the_bits_of_one_rank() {
    let place = Place::new();
    for precision in ["train.precision=bf16", "train.precision=f32"] {
        let base: Vec<&str> = UNTIED.iter().copied().chain([precision]).collect();
        run(&place, "solo", &base, Start::Overwrite, false);
        for pipeline in PIPELINES {
            let sets: Vec<&str> = base.iter().chain(pipeline).copied().collect();
            run(&place, "stages", &sets, Start::Overwrite, false);
            let (one, many) = (place.result("solo"), place.result("stages"));
            // Losses, norms and validations; then weights and moments.
            assert_eq!(one.2, many.2, "{pipeline:?}, {precision}");
            assert!(one == many, "{pipeline:?}, {precision}: weights or state differ");
        }
    }
}

const TIED: [&str; 6] = [
    "train.precision=f32",
    "train.batch=4",
    "train.accumulate=2",
    "checkpoint.every=1",
    "checkpoint.keep_last=9",
    "eval.every=0",
];

/// A tied embedding is summed over both ends, in another order than on one rank; so are sums over other
/// axes.
#[test]
fn a_pipeline_beside_any_other_axis_takes_the_steps_of_one_rank() {
    let meshes: [&[&str]; 12] = [
        &["mesh.pp=2"],
        &["mesh.pp=2", "mesh.schedule=zero-bubble"],
        &["mesh.pp=2", "mesh.dp=2"],
        &["mesh.pp=2", "mesh.x=2", "mesh.schedule=zero-bubble"],
        &["mesh.pp=2", "mesh.x=2", "mesh.y=2", "mesh.scheme=summa", "mesh.schedule=zero-bubble"],
        &["mesh.pp=2", "mesh.dp=2", "mesh.x=2", "mesh.scheme=1d-sequence", "mesh.schedule=gpipe"],
        &["mesh.pp=2", "mesh.x=2", "mesh.y=2", "mesh.z=2", "mesh.schedule=zero-bubble"],
        &["mesh.pp=2", "mesh.x=2", "mesh.y=2", "mesh.scheme=weight-stationary"],
        &["mesh.pp=2", "mesh.fsdp=2", "mesh.zero=1"],
        &["mesh.pp=2", "mesh.cp=2", "mesh.attention=ring", "mesh.schedule=zero-bubble"],
        &["mesh.pp=2", "mesh.cp=5", "mesh.attention=all-to-all"],
        &["mesh.pp=2", "mesh.dp=2", "mesh.fsdp=2", "mesh.zero=1", "mesh.cp=2", "mesh.attention=ring"],
    ];
    steps_are_those_of_one_rank(&TIED, &meshes);
    let gpt2: Vec<&str> = TIED.iter().copied().chain(["model.family=gpt2", "model.kv_heads=0"]).collect();
    steps_are_those_of_one_rank(&gpt2, &meshes[1..4]);
}

#[test]
fn a_pipeline_run_twice_has_the_same_bits() {
    let place = Place::new();
    let mesh = ["mesh.pp=2", "mesh.dp=2", "mesh.x=2", "mesh.schedule=zero-bubble"];
    let sets: Vec<&str> = TIED.iter().chain(&mesh).copied().collect();
    run(&place, "once", &sets, Start::Overwrite, false);
    run(&place, "again", &sets, Start::Overwrite, false);
    assert_eq!(place.result("once"), place.result("again"));
}

/// Ranks that share the optimizer's state beside stages take the steps of replicas. Without clipping: the
/// norm is added up in another order.
#[test]
fn shards_beside_a_pipeline_have_the_bits_of_replicas() {
    let place = Place::new();
    let base: Vec<&str> = TIED.iter().copied().chain(["train.clip=0", "mesh.pp=2"]).collect();
    let go = |dir: &str, mesh: &[&'static str]| {
        let sets: Vec<&str> = base.iter().chain(mesh).copied().collect();
        run(&place, dir, &sets, Start::New, false);
        (place.result(dir).0, place.result(dir).1, losses(&place.path(dir)))
    };
    let replicas = go("replicas", &["mesh.dp=2"]);
    assert!(go("shards", &["mesh.fsdp=2", "mesh.zero=1"]) == replicas);
}

/// 12 pairs: to and from one rank, other schedules, other axes.
#[test]
fn a_state_of_a_pipeline_is_gone_on_with_on_any_mesh_and_back() {
    let solo: &[&str] = &[];
    let waits: &[&str] = &["mesh.pp=2", "mesh.schedule=zero-bubble"];
    let interleaved: &[&str] = &["mesh.pp=2", "mesh.schedule=interleaved"];
    let replicas: &[&str] = &["mesh.pp=4", "mesh.dp=2"];
    let square: &[&str] = &["mesh.x=2", "mesh.y=2"];
    let both: &[&str] = &["mesh.pp=2", "mesh.x=2", "mesh.y=2", "mesh.schedule=gpipe"];
    let shards: &[&str] = &["mesh.pp=2", "mesh.fsdp=2", "mesh.zero=1", "mesh.cp=2"];
    let chain = [solo, waits, solo, interleaved, replicas, square, both, waits, shards, interleaved, both];
    let chain: Vec<&[&str]> = chain.into_iter().chain([shards, square]).collect();
    states_are_gone_on_with(&["train.batch=4", "train.accumulate=2", "model.layers=4"], &chain);
}

/// What one rank of a pipeline held at most, and (bytes sent, bytes received, peers) along it.
type Counted = (usize, (u64, u64, Vec<usize>));

/// One step on threads: M D elements are one message.
fn counted(sets: &[&str]) -> (Vec<Counted>, u64) {
    let place = Place::new();
    let begin = begin(&place, "run", sets, Start::New);
    let recipe = &begin.recipe;
    let samples = data::Samples::new(begin.prepared.train.clone(), recipe.train.context).unwrap();
    let loader = data::Loader::new(samples, 1, true);
    let ranks = launch(&recipe.mesh.shape, &Options::default(), |mesh| {
        let mut learner = begin.prepared.learner(recipe, &recipe.mesh.flow(mesh).unwrap())?;
        learner.initialise(1)?;
        let batches: Vec<_> =
            (0..recipe.train.accumulate as u64).map(|i| loader.batch(2 * i, 2, 0, 1)).collect();
        learner.step(&batches, train::StepPlan { lr: 1e-2, clip: 1.0 })?;
        let counts = mesh.counts().into_iter().find(|counts| counts.axes == Axis::Pp.name()).unwrap();
        let peers = counts.peers.into_iter().collect();
        Ok::<_, train::TrainError>((learner.peak_live(), (counts.bytes_sent, counts.bytes_received, peers)))
    })
    .unwrap();
    let message = 2 * recipe.train.context * begin.prepared.config.width() * recipe.train.dtype.size_bytes();
    (ranks, message as u64)
}

#[test]
fn stages_hold_and_move_what_the_schedule_says() {
    for (schedule, stages, sets) in [
        (Schedule::GPipe, 3, &["mesh.pp=3", "mesh.schedule=gpipe"][..]),
        (Schedule::OneFOneB, 4, &["mesh.pp=4"]),
        (Schedule::OneFOneB, 3, &["mesh.pp=3", "train.precision=f32", "train.recompute=always"]),
        (Schedule::ZeroBubble, 4, &["mesh.pp=4", "mesh.schedule=zero-bubble"]),
        (Schedule::Interleaved { chunks: 2 }, 3, &["mesh.pp=3", "mesh.schedule=interleaved"]),
    ] {
        let m = 6;
        let base = ["model.layers=7", "train.accumulate=6"];
        let (ranks, message) = counted(&base.iter().chain(sets).copied().collect::<Vec<_>>());
        let pipeline = Pipeline::new(stages, m as usize, schedule).unwrap();
        let slices = stages * schedule.chunks();
        for (stage, (held, (sent, received, peers))) in ranks.iter().enumerate() {
            assert_eq!(*held, pipeline.peak_live(stage), "{schedule} holds on stage {stage} of {stages}");
            if schedule == Schedule::OneFOneB {
                assert!(*held <= stages - stage);
            }
            // Each boundary between slices is crossed by an activation and a gradient a microbatch.
            let own = (stage..slices).step_by(stages);
            let ends: u64 = own.map(|slice| u64::from(slice > 0) + u64::from(slice + 1 < slices)).sum();
            assert_eq!((*sent, *received), (ends * m * message, ends * m * message), "{schedule}, {stage}");
            let ring = schedule.chunks() > 1;
            let next = (stage + 1 < stages || ring).then_some((stage + 1) % stages);
            let before = (stage > 0 || ring).then_some((stage + stages - 1) % stages);
            let mut want: Vec<usize> = next.into_iter().chain(before).collect();
            want.sort_unstable();
            assert_eq!(*peers, want, "{schedule}: peers of stage {stage}");
        }
    }
}

/// Both ends of a tied embedding stay equal, and every stage has its layers alone.
#[test]
fn stages_have_their_own_layers_and_equal_copies_of_a_tied_embedding() {
    let place = Place::new();
    let sets = ["model.layers=7", "train.accumulate=6", "mesh.pp=3", "mesh.schedule=interleaved"];
    let begin = begin(&place, "run", &sets, Start::New);
    let recipe = &begin.recipe;
    let samples = data::Samples::new(begin.prepared.train.clone(), recipe.train.context).unwrap();
    let loader = data::Loader::new(samples, 1, true);
    let stages = launch(&recipe.mesh.shape, &Options::default(), |mesh| {
        let mut learner = begin.prepared.learner(recipe, &recipe.mesh.flow(mesh).unwrap())?;
        learner.initialise(1)?;
        for step in 0..2 {
            let batches: Vec<_> = (0..6).map(|i| loader.batch(12 * step + 2 * i, 2, 0, 1)).collect();
            learner.step(&batches, train::StepPlan { lr: 1e-2, clip: 1.0 })?;
        }
        let weights = learner.store.refs().map(|param| {
            (learner.store.spec(param).name.clone(), learner.store.weight(param).bytes().to_vec())
        });
        Ok::<_, train::TrainError>(weights.collect::<std::collections::BTreeMap<_, _>>())
    })
    .unwrap();
    assert!(stages[0]["embedding"] == stages[2]["embedding"], "the ends of the embedding differ");
    assert!(!stages[1].contains_key("embedding") && stages[2].contains_key("norm"));
    let all = |stage: &std::collections::BTreeMap<String, Vec<u8>>| stage.len();
    // The embedding twice.
    assert_eq!(stages.iter().map(all).sum::<usize>(), begin.prepared.params.specs().len() + 1);
}

#[test]
fn what_no_pipeline_can_be_is_refused_with_a_remedy() {
    let place = Place::new();
    let refused = |sets: &[&str]| {
        let recipe = place.settings("run", sets).recipe().map_err(|error| error.to_string())?;
        train::Prepared::new(&recipe, false, &mut |_| {}).map_err(|error| error.to_string()).map(drop)
    };
    let few = refused(&["mesh.pp=3"]).unwrap_err();
    assert!(few.contains("2 layers cannot be cut into 3 stages of 1 slices"), "{few}");
    let groups = refused(&["mesh.pp=2", "mesh.schedule=interleaved", "train.accumulate=3"]).unwrap_err();
    assert!(groups.contains("3 microbatches do not divide by 2 stages; take 2 or 4"), "{groups}");
    let slices = refused(&["mesh.pp=2", "mesh.virtual=2"]).unwrap_err();
    assert!(slices.contains("belong to mesh.schedule = \"interleaved\""), "{slices}");
    let experts = refused(&["mesh.pp=2", "mesh.ep=2"]).unwrap_err();
    assert!(experts.contains("`llama` has none; use mesh.dp"), "{experts}");
    refused(&["mesh.pp=2"]).unwrap();
    assert!(!place.path("run").exists(), "a refused run left a folder");
}
