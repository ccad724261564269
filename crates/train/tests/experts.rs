//! Mixtures of experts on meshes: the steps of one rank wherever the experts lie, and states that know
//! no mesh.

mod common;

use common::runs::{F32, begin, losses, run, state};
use common::{Place, log};
use dist::{Axis, Flow, Options, launch};
use train::Start;

/// 4 experts of Mixtral: halves and quarters of them, replicas, slices, three axes at once, shards.
const EVEN: [&[&str]; 9] = [
    &["mesh.ep=2"],
    &["mesh.ep=4"],
    &["mesh.ep=2", "mesh.dp=2"],
    &["mesh.ep=2", "mesh.x=2"],
    &["mesh.dp=2", "mesh.ep=2", "mesh.x=2", "mesh.scheme=1d-sequence"],
    &["mesh.ep=2", "mesh.x=2", "mesh.y=2"],
    &["mesh.fsdp=2", "mesh.ep=2"],
    &["mesh.fsdp=2", "mesh.ep=2", "mesh.x=2", "mesh.zero=2", "mesh.scheme=1d-sequence"],
    &["mesh.ep=2", "mesh.x=2", "mesh.y=2", "mesh.attention_scheme=weight-stationary"],
];

/// 5 experts and a shared one of Qwen2-MoE, which nothing divides; 4 rows over 3 ranks are padded.
const ODD: [&[&str]; 8] = [
    &["mesh.dp=2"],
    &["mesh.ep=2"],
    &["mesh.ep=4"],
    &["mesh.ep=2", "mesh.x=3", "mesh.scheme=1d-sequence"],
    &["mesh.x=3", "mesh.y=2", "mesh.scheme=summa"],
    &["mesh.ep=2", "mesh.x=3", "mesh.y=2", "mesh.scheme=weight-stationary"],
    &["mesh.fsdp=2", "mesh.ep=2", "mesh.zero=1", "train.recompute=always"],
    &["mesh.ep=2", "mesh.x=2", "mesh.y=2", "mesh.ffn_scheme=weight-stationary"],
];

/// Rows of 24 tokens cut among context ranks, 5 of which pad them to 30.
const CONTEXTS: [&[&str]; 7] = [
    &["mesh.cp=2", "mesh.attention=ring"],
    &["mesh.cp=5", "mesh.attention=ring"],
    &["mesh.cp=5", "mesh.attention=all-to-all"],
    &["mesh.cp=2", "mesh.ep=2", "mesh.attention=ring"],
    &["mesh.cp=2", "mesh.ep=2", "mesh.x=2", "mesh.scheme=1d-sequence", "train.recompute=always"],
    &["mesh.cp=5", "mesh.ep=2", "mesh.x=2", "mesh.y=2", "mesh.attention=ring"],
    &["mesh.cp=2", "mesh.dp=2", "mesh.fsdp=2", "mesh.zero=2", "mesh.attention=all-to-all"],
];

/// Stages of one layer each.
const STAGED: [&[&str]; 8] = [
    &["mesh.pp=2"],
    &["mesh.pp=2", "mesh.ep=2"],
    &["mesh.pp=2", "mesh.ep=2", "mesh.schedule=zero-bubble"],
    &["mesh.pp=2", "mesh.dp=2", "mesh.ep=2", "mesh.schedule=gpipe", "train.recompute=always"],
    &["mesh.pp=2", "mesh.ep=2", "mesh.x=2", "mesh.scheme=1d-sequence", "mesh.schedule=zero-bubble"],
    &["mesh.pp=2", "mesh.fsdp=2", "mesh.ep=2", "mesh.zero=1"],
    &["mesh.pp=2", "mesh.fsdp=2", "mesh.ep=2", "mesh.schedule=zero-bubble"],
    &["mesh.pp=2", "mesh.cp=5", "mesh.ep=2", "mesh.attention=ring", "mesh.schedule=zero-bubble"],
];

/// Of what a rank's state takes, `ep` multiplies all but the experts, `dp` everything.
#[test]
fn the_state_of_all_ranks_is_predicted_with_one_copy_of_shared_experts() {
    let place = Place::new();
    let predicted = |mesh: &[&str]| {
        let sets: Vec<&str> = MIXTRAL.iter().chain(&["train.batch=4"]).chain(mesh).copied().collect();
        let begin = begin(&place, "run", &sets, Start::New);
        (begin.prepared.estimate(&begin.recipe), begin.prepared.config.expert_params())
    };
    let (one, experts) = predicted(&[]);
    // Gate, up and down of 4 experts of 48 in 2 layers of width 32.
    assert_eq!(experts, 2 * 4 * 3 * 32 * 48);
    let each = one.state_bytes / one.params as u64;
    let shared = predicted(&["mesh.ep=2"]).0.state_bytes;
    assert_eq!(shared, (2 * one.params - experts) as u64 * each);
    assert_eq!(predicted(&["mesh.dp=2"]).0.state_bytes, 2 * one.state_bytes);
    assert_eq!(predicted(&["mesh.dp=2", "mesh.ep=2"]).0.state_bytes, 2 * shared);
}

const MIXTRAL: [&str; 4] =
    ["model.family=mixtral", "model.experts=4", "model.expert_ffn=48", "model.balance=0.05"];
const QWEN: [&str; 6] = [
    "model.family=qwen2_moe",
    "model.experts=5",
    "model.experts_per_token=3",
    "model.expert_ffn=28",
    "model.shared_ffn=44",
    "model.balance=0.05",
];

const ULP: f32 = 1.0 / (1u64 << 24) as f32;

/// As in `mesh.rs`: roundings of the products on the longest path, 5 a layer with the router's and
/// twice as many on the way back, 2 layers, and the head's 3, each by (length of its sum + ranks)
/// units; the longest sum is over the 300 words.
const GRADIENT: f32 = (2.0 * 15.0 + 3.0) * (300.0 + 12.0) * ULP;

/// The same of a score: the forward products of both layers, none over more than 96 columns.
const SCORE: f32 = 2.0 * 5.0 * (96.0 + 12.0) * ULP;

/// Settings of a run in f32 whose first step chooses experts with a margin above the roundings of any
/// mesh, so that every mesh chooses alike: the first such seed.
fn base(place: &Place, settings: &[&'static str]) -> Vec<String> {
    let fixed = F32.iter().chain(settings).chain(&["train.steps=1", "train.clip=0"]);
    let fixed: Vec<String> = fixed.map(|set| set.to_string()).collect();
    let found = (1..80).find_map(|seed| {
        let sets: Vec<String> = fixed.iter().cloned().chain([format!("run.seed={seed}")]).collect();
        let sets_ref: Vec<&str> = sets.iter().map(String::as_str).collect();
        let begin = begin(place, "margin", &sets_ref, Start::New);
        let recipe = &begin.recipe;
        let samples = data::Samples::new(begin.prepared.train.clone(), recipe.train.context).unwrap();
        let loader = data::Loader::new(samples, seed, true);
        let mut learner = begin.prepared.learner(recipe, &Flow::solo()).unwrap();
        learner.initialise(seed).unwrap();
        for first in (0..recipe.train.accumulate as u64).map(|i| 4 * i) {
            let batch = loader.batch(first, 4, 0, 1);
            learner.accumulate(&batch, 1.0 / batch.learned as f32).unwrap();
        }
        let margin = learner.loads.iter().map(|load| load.margin).fold(f32::INFINITY, f32::min);
        // A score is at most |w| |h|, and h, normed, sqrt(D) long. Softmax turns an error d of scores
        // into at most d / 2 of a probability, and two of them meet in a margin.
        let routers = learner.store.refs().filter(|param| learner.store.spec(*param).name.contains("router"));
        let norm = |row: &[f32]| row.iter().map(|w| w * w).sum::<f32>().sqrt();
        let rows = routers
            .flat_map(|param| learner.store.weight(param).f32().chunks(32).map(norm).collect::<Vec<_>>());
        let top = rows.fold(0f32, f32::max) * 32f32.sqrt();
        (margin > SCORE * top).then_some(sets)
    });
    found.expect("a seed whose margins are above the roundings")
}

fn steps_are_those_of_one_rank(settings: &[&'static str], meshes: &[&[&str]]) {
    let place = Place::new();
    let base = base(&place, settings);
    let base: Vec<&str> = base.iter().map(String::as_str).collect();
    run(&place, "solo", &base, Start::New, false);
    let solo = place.path("solo");
    let (_, one) = state(&solo, 1);
    let begin = begin(&place, "solo", &base, Start::Resume);
    let context = begin.recipe.train.context;
    let built = model::Model::build_on(&begin.prepared.config, context, &Flow::solo()).unwrap();
    let (starts, _) = built.params.layout();
    let lr = begin.recipe.train.schedule.at(1) as f32;
    let (wanted, line) = (losses(&solo), log(&solo)[0].clone());
    let balance = |line: &serde_json::Value, key: &str| line["balance"][key].as_f64().unwrap();
    for (i, mesh) in meshes.iter().enumerate() {
        let dir = format!("mesh-{i}");
        let sets: Vec<&str> = base.iter().chain(*mesh).copied().collect();
        run(&place, &dir, &sets, Start::New, false);
        let (_, got) = state(&place.path(&dir), 1);
        for (spec, start) in built.params.specs().iter().zip(&starts) {
            let at = *start..*start + spec.len();
            // weights, m, v: after one step m is a tenth of the gradient.
            let (w, m) = (&one[0][at.clone()], &one[1][at.clone()]);
            let top = m.iter().fold(0f32, |top, x| top.max(x.abs()));
            for (j, (w, m)) in w.iter().zip(m).enumerate() {
                let (w2, m2) = (got[0][start + j], got[1][start + j]);
                let (bound, name) = (GRADIENT * top, &spec.name);
                assert!((m - m2).abs() <= bound, "{mesh:?} {name}[{j}]: gradient {m} and {m2} +- {bound}");
                // AdamW's first step turns an error d of g into at most lr min(2, 2 d / |g|).
                let step = lr * (2.0 * bound / m.abs().max(1e-20)).min(2.0) + 1e-6 * w.abs();
                assert!((w - w2).abs() <= step, "{mesh:?} {name}[{j}]: weight {w} and {w2} +- {step}");
            }
        }
        let (found, other) = (losses(&place.path(&dir)), log(&place.path(&dir))[0].clone());
        let bound = wanted[0] * f64::from(GRADIENT);
        assert!((found[0] - wanted[0]).abs() <= bound, "{mesh:?}: loss {} and {}", found[0], wanted[0]);
        // Choices are counted exactly; probabilities are sums of rounded ones.
        assert_eq!(balance(&other, "imbalance"), balance(&line, "imbalance"), "{mesh:?}");
        let (a, b) = (balance(&other, "loss"), balance(&line, "loss"));
        assert!((a - b).abs() <= b * f64::from(SCORE), "{mesh:?}: balance {a} and {b}");
    }
}

#[test]
fn a_step_of_mixtral_on_any_mesh_is_the_step_of_one_rank() {
    steps_are_those_of_one_rank(&MIXTRAL, &EVEN);
}

#[test]
fn a_step_of_qwen2_moe_on_any_mesh_is_the_step_of_one_rank() {
    steps_are_those_of_one_rank(&QWEN, &ODD);
}

/// Tokens behind the end of a row go to experts too and are in no sum; the balance is that of the rows of
/// all context ranks. Around a ring attention's sums, over at most 24 keys, are joined with 4 roundings a
/// rank: far fewer than the bounds have.
#[test]
fn a_step_on_context_ranks_is_the_step_of_one_rank() {
    steps_are_those_of_one_rank(&MIXTRAL, &CONTEXTS);
    steps_are_those_of_one_rank(&QWEN, &CONTEXTS[1..5]);
}

/// Two microbatches, each with the balance of its own tokens on every stage.
#[test]
fn a_step_through_stages_is_the_step_of_one_rank() {
    for (family, meshes) in [(&MIXTRAL[..], &STAGED[..]), (&QWEN, &STAGED[2..5])] {
        let settings: Vec<&str> = family.iter().copied().chain(["train.accumulate=2"]).collect();
        steps_are_those_of_one_rank(&settings, meshes);
    }
}

/// Stages alone change no sum: losses, norms, balances, weights and moments are those of one rank.
#[test]
fn a_pipeline_of_experts_has_the_bits_of_one_rank() {
    let place = Place::new();
    let untied = ["model.layers=4", "model.tied=false", "train.accumulate=4", "train.steps=3"];
    let pipelines: [&[&str]; 5] = [
        &["mesh.pp=2", "mesh.schedule=gpipe"],
        &["mesh.pp=4"],
        &["mesh.pp=2", "mesh.schedule=interleaved"],
        &["mesh.pp=3", "mesh.schedule=zero-bubble"],
        &["mesh.pp=2", "mesh.schedule=zero-bubble", "train.recompute=always"],
    ];
    for family in [&MIXTRAL[..], &QWEN] {
        let base: Vec<&str> = untied.iter().chain(family).copied().collect();
        run(&place, "solo", &base, Start::Overwrite, false);
        let one = place.result("solo");
        assert!(one.2.iter().any(|line| line["balance"]["loss"].as_f64().is_some_and(|loss| loss > 1.0)));
        for pipeline in pipelines {
            let sets: Vec<&str> = base.iter().chain(pipeline).copied().collect();
            run(&place, "stages", &sets, Start::Overwrite, false);
            let many = place.result("stages");
            assert_eq!(one.2, many.2, "{family:?} {pipeline:?}");
            assert!(one == many, "{family:?} {pipeline:?}: weights or state differ");
        }
    }
}

/// Gradients of a step over microbatches whose targets are not as many, by the names of parameters.
fn uneven_step(place: &Place, sets: &[&str]) -> std::collections::BTreeMap<String, Vec<f32>> {
    let begin = begin(place, "uneven", sets, Start::New);
    let recipe = &begin.recipe;
    let samples = data::Samples::new(begin.prepared.train.clone(), recipe.train.context).unwrap();
    let loader = data::Loader::new(samples, 1, true);
    let stages = launch(&recipe.mesh.shape, &Options::default(), |mesh| {
        let mut learner = begin.prepared.learner(recipe, &recipe.mesh.flow(mesh)?)?;
        learner.initialise(1)?;
        let batches: Vec<_> = (0..4)
            .map(|i| {
                let mut batch = loader.batch(2 * i, 2, 0, 1);
                let few = batch.targets.iter_mut().filter(|id| **id != u32::MAX).take(9 * i as usize);
                batch.learned -= few.map(|id| *id = u32::MAX).count();
                batch
            })
            .collect();
        learner.step(&batches, train::StepPlan { lr: 1e-2, clip: 1.0 })?;
        let store = &learner.store;
        let of = |param| (store.spec(param).name.clone(), store.grad(param).f32().to_vec());
        Ok::<_, train::TrainError>(store.refs().map(of).collect::<Vec<_>>())
    });
    stages.unwrap().into_iter().flatten().collect()
}

/// When a layer of one microbatch runs again, the stage has been through others since: its balance still
/// counts as much as its own targets.
#[test]
fn layers_that_run_again_on_a_stage_count_their_own_microbatch() {
    let place = Place::new();
    let base = ["model.tied=false", "train.accumulate=4", "train.recompute=always"];
    let base: Vec<&str> = base.iter().chain(&MIXTRAL).chain(&["model.balance=0.5"]).copied().collect();
    let solo = uneven_step(&place, &base);
    for schedule in ["mesh.schedule=gpipe", "mesh.schedule=1f1b", "mesh.schedule=zero-bubble"] {
        let sets: Vec<&str> = base.iter().copied().chain(["mesh.pp=2", schedule]).collect();
        assert!(uneven_step(&place, &sets) == solo, "{schedule}");
    }
}

#[test]
fn the_same_run_twice_has_the_same_bits() {
    let place = Place::new();
    for (family, mesh) in [
        (&MIXTRAL[..], EVEN[4]),
        (&QWEN[..], ODD[2]),
        (&MIXTRAL[..], EVEN[6]),
        (&QWEN[..], CONTEXTS[5]),
        (&MIXTRAL[..], STAGED[4]),
    ] {
        let base = ["train.batch=4", "train.steps=3", "train.accumulate=2"];
        let sets: Vec<&str> = base.iter().chain(family).chain(mesh).copied().collect();
        run(&place, "once", &sets, Start::Overwrite, false);
        run(&place, "again", &sets, Start::Overwrite, false);
        assert_eq!(place.result("once"), place.result("again"), "{mesh:?}");
    }
}

/// Microbatches, an odd number of validation batches, and layers that run again: the losses of one
/// rank, whose tokens are the same with `ep`, bit for bit in the first step.
#[test]
fn shared_experts_leave_the_losses_of_a_step_bit_for_bit() {
    let place = Place::new();
    let base = [
        "train.batch=4",
        "train.steps=1",
        "train.accumulate=2",
        "train.recompute=always",
        "eval.every=1",
        "eval.batches=3",
    ];
    for family in [&MIXTRAL[..], &QWEN[..]] {
        let sets: Vec<&str> = base.iter().chain(family).copied().collect();
        run(&place, "solo", &sets, Start::Overwrite, false);
        for mesh in [
            &["mesh.ep=2"][..],
            &["mesh.ep=4"],
            &["mesh.pp=2", "mesh.ep=2"],
            &["mesh.cp=5", "mesh.ep=2", "mesh.attention=all-to-all"],
        ] {
            let sets: Vec<&str> = sets.iter().chain(mesh).copied().collect();
            run(&place, "ep", &sets, Start::Overwrite, false);
            assert_eq!(losses(&place.path("solo")), losses(&place.path("ep")), "{family:?} {mesh:?}");
        }
    }
}

/// From and to one rank among them: the state put together is the state saved, byte for byte.
#[test]
fn a_state_of_one_mesh_is_gone_on_with_on_another() {
    let place = Place::new();
    let solo: &[&str] = &[];
    for (family, chain) in [
        (
            &MIXTRAL[..],
            vec![solo, EVEN[0], EVEN[3], EVEN[1], solo, EVEN[4], EVEN[7], EVEN[2], EVEN[6], EVEN[5], solo],
        ),
        (&QWEN[..], vec![ODD[2], solo, ODD[1], ODD[5], ODD[3], ODD[0], ODD[6], ODD[4], ODD[2], solo]),
        (&MIXTRAL[..], vec![STAGED[1], solo, STAGED[4], CONTEXTS[4], STAGED[5], EVEN[1], STAGED[6], solo]),
    ] {
        let dir = place.path("run");
        let with = |mesh: &[&str], steps: usize| -> Vec<String> {
            let base = ["train.batch=4", "train.accumulate=2", "eval.every=0", "train.schedule=constant"];
            let base = base.into_iter().chain(["train.warmup=1"]);
            let steps = format!("train.steps={steps}");
            let sets = base.chain(family.iter().chain(mesh).copied()).chain([steps.as_str()]);
            sets.map(str::to_string).collect()
        };
        let go = |sets: Vec<String>, start: Start, stop: bool| {
            let sets: Vec<&str> = sets.iter().map(String::as_str).collect();
            run(&place, "run", &sets, start, stop);
        };
        for (i, mesh) in chain.iter().enumerate() {
            if i > 0 {
                // Taken over and saved again without a step: every byte comes back.
                let before = state(&dir, i as u64).0;
                go(with(mesh, i + 1), Start::Resume, true);
                assert!(state(&dir, i as u64).0 == before, "{:?} taken over by {mesh:?}", chain[i - 1]);
            }
            let start = if i == 0 { Start::Overwrite } else { Start::Resume };
            go(with(mesh, i + 1), start, false);
        }
    }
}

/// Every copy of every parameter is the same after steps; experts have copies along `dp` alone.
#[test]
fn copies_stay_equal_after_steps() {
    let place = Place::new();
    for mesh in [EVEN[2], EVEN[4], EVEN[5]] {
        let sets: Vec<&str> = ["train.batch=4"].iter().chain(&MIXTRAL).chain(mesh).copied().collect();
        let begin = begin(&place, "copies", &sets, Start::New);
        let recipe = &begin.recipe;
        let samples = data::Samples::new(begin.prepared.train.clone(), recipe.train.context).unwrap();
        let loader = data::Loader::new(samples, 1, true);
        let ranks = launch(&recipe.mesh.shape, &Options::default(), |mesh| {
            let mut learner = begin.prepared.learner(recipe, &recipe.mesh.flow(mesh)?)?;
            learner.initialise(1)?;
            let (dp, ep) = (mesh.size(Axis::Dp), mesh.size(Axis::Ep));
            let replica = mesh.coord(Axis::Dp) * ep + mesh.coord(Axis::Ep);
            for step in 0..2 {
                let batch = loader.batch(4 * step, 4 / (dp * ep), replica, dp * ep);
                learner.step(&[batch], train::StepPlan { lr: 1e-2, clip: 1.0 })?;
            }
            let mut pieces = Vec::new();
            for (param, spread) in learner.store.refs().zip(&learner.spreads) {
                let place: Vec<usize> = spread.cut.iter().map(|axis| mesh.coord(*axis)).collect();
                let name = learner.store.spec(param).name.clone();
                pieces.push(((name, place), learner.store.weight(param).bytes().to_vec()));
            }
            Ok::<_, train::TrainError>(pieces)
        })
        .unwrap();
        let mut seen = std::collections::BTreeMap::new();
        for (piece, bytes) in ranks.into_iter().flatten() {
            let first = seen.entry(piece.clone()).or_insert_with(|| bytes.clone());
            assert!(*first == bytes, "copies of {piece:?} differ on {mesh:?}");
        }
        let experts = seen.keys().filter(|(name, _)| name == "layers.0.experts.down.weight").count();
        assert!(experts > 1 && experts < recipe.mesh.shape.world_size(), "{experts} pieces on {mesh:?}");
    }
}
