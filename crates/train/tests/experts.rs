//! Mixtures of experts on meshes: the steps of one rank wherever the experts lie, and states that know
//! no mesh.

mod common;

use common::runs::{F32, begin, losses, run, state};
use common::{Place, log};
use dist::{Axis, Flow, Options, launch};
use train::Start;

/// 4 experts of Mixtral: halves and quarters of them, replicas, slices, three axes at once, shards.
const EVEN: [&[&str]; 8] = [
    &["mesh.ep=2"],
    &["mesh.ep=4"],
    &["mesh.ep=2", "mesh.dp=2"],
    &["mesh.ep=2", "mesh.x=2"],
    &["mesh.dp=2", "mesh.ep=2", "mesh.x=2", "mesh.scheme=1d-sequence"],
    &["mesh.ep=2", "mesh.x=2", "mesh.y=2"],
    &["mesh.fsdp=2", "mesh.ep=2"],
    &["mesh.fsdp=2", "mesh.ep=2", "mesh.x=2", "mesh.zero=2", "mesh.scheme=1d-sequence"],
];

/// 5 experts and a shared one of Qwen2-MoE, which nothing divides; 4 rows over 3 ranks are padded.
const ODD: [&[&str]; 7] = [
    &["mesh.dp=2"],
    &["mesh.ep=2"],
    &["mesh.ep=4"],
    &["mesh.ep=2", "mesh.x=3", "mesh.scheme=1d-sequence"],
    &["mesh.x=3", "mesh.y=2", "mesh.scheme=summa"],
    &["mesh.ep=2", "mesh.x=3", "mesh.y=2", "mesh.scheme=weight-stationary"],
    &["mesh.fsdp=2", "mesh.ep=2", "mesh.zero=1", "train.recompute=always"],
];

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
fn base(place: &Place, family: &[&'static str]) -> Vec<String> {
    let fixed = F32.iter().chain(family).chain(&["train.steps=1", "train.clip=0"]);
    let fixed: Vec<String> = fixed.map(|set| set.to_string()).collect();
    let found = (1..40).find_map(|seed| {
        let sets: Vec<String> = fixed.iter().cloned().chain([format!("run.seed={seed}")]).collect();
        let sets_ref: Vec<&str> = sets.iter().map(String::as_str).collect();
        let begin = begin(place, "margin", &sets_ref, Start::New);
        let recipe = &begin.recipe;
        let samples = data::Samples::new(begin.prepared.train.clone(), recipe.train.context).unwrap();
        let batch = data::Loader::new(samples, seed, true).batch(0, 4, 0, 1);
        let mut learner = begin.prepared.learner(recipe, &Flow::solo()).unwrap();
        learner.initialise(seed).unwrap();
        learner.accumulate(&batch, 1.0 / batch.learned as f32).unwrap();
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

fn steps_are_those_of_one_rank(family: &[&'static str], meshes: &[&[&str]]) {
    let place = Place::new();
    let base = base(&place, family);
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

#[test]
fn the_same_run_twice_has_the_same_bits() {
    let place = Place::new();
    for (family, mesh) in [(&MIXTRAL[..], EVEN[4]), (&QWEN[..], ODD[2]), (&MIXTRAL[..], EVEN[6])] {
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
        for ep in ["mesh.ep=2", "mesh.ep=4"] {
            let sets: Vec<&str> = sets.iter().copied().chain([ep]).collect();
            run(&place, "ep", &sets, Start::Overwrite, false);
            assert_eq!(losses(&place.path("solo")), losses(&place.path("ep")), "{family:?} {ep}");
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
    ] {
        let dir = place.path("run");
        let with = |mesh: &[&str], steps: usize| -> Vec<String> {
            let base = ["train.batch=4", "eval.every=0", "train.schedule=constant", "train.warmup=1"];
            let steps = format!("train.steps={steps}");
            let sets = base.iter().chain(family).chain(mesh).copied().chain([steps.as_str()]);
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

#[test]
fn experts_on_rows_cut_among_ranks_are_refused_with_a_remedy() {
    let place = Place::new();
    let sets: Vec<&str> = MIXTRAL.into_iter().chain(["mesh.cp=2"]).collect();
    let recipe = place.settings("run", &sets).recipe().unwrap();
    let refusal = train::Prepared::new(&recipe, false, &mut |_| {}).err().unwrap().to_string();
    assert!(refusal.contains("experts") && refusal.contains("set mesh.cp = 1"), "{refusal}");
}
