//! Runs on meshes of threads: the steps of one rank, and states that know no mesh.

mod common;

use common::runs::{F32, begin, losses, run, state};
use common::{Place, log};
use dist::{Axis, Flow, Options, launch};
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

/// Relative to the largest of a tensor, a gradient of this model may be off by one rounding of each
/// product on its longest path, 4 products and 8 on the way back a layer, 2 layers, and the head's 3,
/// each by at most (length of its sum + ranks) units: the longest sum is over the 300 words. Around a
/// ring attention's sums, over at most 24 keys, are joined with 4 roundings a rank: far fewer.
const GRADIENT: f32 = (2.0 * 12.0 + 3.0) * (300.0 + 12.0) / (1u64 << 24) as f32;

#[test]
fn a_step_on_any_mesh_is_the_step_of_one_rank() {
    let meshes: Vec<&[&str]> = MESHES.into_iter().chain(CONTEXTS).collect();
    compare_with_one_rank(&["train.steps=2", "train.clip=0"], &meshes);
}

/// Sharing gradients, ranks add up microbatch by microbatch what others add up at the end.
#[test]
fn a_step_of_several_microbatches_on_shards_is_the_step_of_one_rank() {
    let meshes = [&MESHES[10..], &CONTEXTS[8..]].concat();
    compare_with_one_rank(&["train.steps=2", "train.clip=0", "train.accumulate=2"], &meshes);
}

fn compare_with_one_rank(more: &[&str], meshes: &[&[&str]]) {
    let place = Place::new();
    let base: Vec<&str> = F32.iter().chain(more).copied().collect();
    run(&place, "solo", &base, Start::New, false);
    let solo = place.path("solo");
    let (_, one) = state(&solo, 1);
    let begin = begin(&place, "solo", &base, Start::Resume);
    let flow = Flow::solo();
    let built = model::Model::build_on(&begin.prepared.config, begin.recipe.train.context, &flow).unwrap();
    let (starts, _) = built.params.layout();
    let lr = begin.recipe.train.schedule.at(1) as f32;
    let wanted = losses(&solo);
    for (i, mesh) in meshes.iter().enumerate() {
        let dir = format!("mesh-{i}");
        let sets: Vec<&str> = base.iter().chain(*mesh).copied().collect();
        run(&place, &dir, &sets, Start::New, false);
        let (_, got) = state(&place.path(&dir), 1);
        let mut apart = 0f64;
        for (spec, start) in built.params.specs().iter().zip(&starts) {
            let at = *start..*start + spec.len();
            // weights, m, v: after one step m is a tenth of the gradient.
            let (w, m) = (&one[0][at.clone()], &one[1][at.clone()]);
            let top = m.iter().fold(0f32, |top, x| top.max(x.abs()));
            for (j, (w, m)) in w.iter().zip(m).enumerate() {
                let (w2, m2) = (got[0][start + j], got[1][start + j]);
                let bound = GRADIENT * top;
                let name = &spec.name;
                assert!((m - m2).abs() <= bound, "{mesh:?} {name}[{j}]: gradient {m} and {m2} +- {bound}");
                // AdamW's first step is lr g / (|g| + eps): it turns an error d of g into at most
                // lr min(2, 2 d / |g|), and a rounding of the weight.
                let step = lr * (2.0 * bound / m.abs().max(1e-20)).min(2.0) + 1e-6 * w.abs();
                assert!((w - w2).abs() <= step, "{mesh:?} {name}[{j}]: weight {w} and {w2} +- {step}");
                apart += f64::from(w - w2).powi(2);
            }
        }
        let found = losses(&place.path(&dir));
        let norm = log(&solo)[1]["grad_norm"].as_f64().unwrap();
        let first = wanted[0] * f64::from(GRADIENT);
        assert!((found[0] - wanted[0]).abs() <= first, "{mesh:?}: loss {} and {}", found[0], wanted[0]);
        // Along the way from one set of weights to the other the loss changes by |gradient| |way| to
        // first order; half as much again for the rest.
        let second = 1.5 * norm * apart.sqrt() + first;
        assert!((found[1] - wanted[1]).abs() <= second, "{mesh:?}: loss {} and {}", found[1], wanted[1]);
    }
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
    for mesh in [MESHES[5], MESHES[4], MESHES[2], plane, CONTEXTS[4]] {
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

/// 20 pairs, from and to one rank among them: the state put together is the state saved, byte for
/// byte, and the run goes on with the next samples.
#[test]
fn a_state_of_one_mesh_is_gone_on_with_on_another() {
    let place = Place::new();
    let solo: &[&str] = &[];
    let chain = [solo, MESHES[0], MESHES[3], solo, MESHES[8], MESHES[6], MESHES[1], MESHES[7], MESHES[5]];
    let chain = chain.into_iter().chain([MESHES[2], MESHES[4], solo, MESHES[9], MESHES[6]]);
    let chain = chain.chain([
        MESHES[10],
        MESHES[11],
        MESHES[1],
        MESHES[12],
        MESHES[13],
        CONTEXTS[5],
        CONTEXTS[10],
        solo,
    ]);
    let meshes: Vec<&[&str]> = chain.collect();
    let with = |mesh: &[&'static str], steps: &'static str| -> Vec<&'static str> {
        let base = [
            "train.batch=4",
            "checkpoint.keep_last=2",
            "eval.every=0",
            "train.schedule=constant",
            "train.warmup=1",
        ];
        base.into_iter().chain([steps]).chain(mesh.iter().copied()).collect()
    };
    let steps: Vec<&'static str> = (1..=meshes.len())
        .map(|n| -> &'static str { Box::leak(format!("train.steps={n}").into_boxed_str()) })
        .collect();
    let dir = place.path("run");
    for (i, mesh) in meshes.iter().enumerate() {
        let mesh: Vec<&'static str> = mesh.to_vec();
        if i > 0 {
            // Taken over and saved again without a step: every byte comes back.
            let before = state(&dir, i as u64).0;
            std::fs::remove_dir_all(dir.join(format!("state/step-{:08}", i + 1))).ok();
            run(&place, "run", &with(&mesh, steps[i]), Start::Resume, true);
            assert_eq!(state(&dir, i as u64).0, before, "{:?} taken over by {mesh:?}", meshes[i - 1]);
        }
        run(&place, "run", &with(&mesh, steps[i]), Start::Resume, false);
    }
    // The same steps on one rank see the same samples: the losses follow each other closely, while
    // those of other samples differ by tenths.
    let last = steps[steps.len() - 1];
    run(&place, "solo", &with(&[], last), Start::New, false);
    for (step, (a, b)) in losses(&dir).iter().zip(losses(&place.path("solo"))).enumerate() {
        assert!((a - b).abs() < 0.02, "step {}: loss {a} across meshes, {b} on one", step + 1);
    }
}

#[test]
fn what_cannot_be_spread_is_refused_with_a_remedy() {
    let place = Place::new();
    let refused = |sets: &[&str]| place.settings("run", sets).recipe().unwrap_err().to_string();
    assert!(refused(&["mesh.dp=3"]).contains("train.batch = 2 does not divide by 3, the product of mesh.dp"));
    let idle = refused(&["mesh.scheme=summa", "mesh.z=2"]);
    assert!(idle.contains("no use for mesh.z"), "{idle}");
    let tiers = refused(&["mesh.x=2", "memory.dram=auto"]);
    assert!(tiers.contains("memory.dram is given for mesh `x=2`"), "{tiers}");
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
