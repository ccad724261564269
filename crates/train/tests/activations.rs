//! What layers keep for the way back, over tiers and in memory: inputs of layers that run again, and all
//! that the others keep, leave and come back, and how many run again may be chosen; no bit of a run changes.
//!
//! One test after the other: what is held is counted for the whole process.

mod common;

use common::Place;
use common::runs::{begin, run};
use dist::{Options, launch};
use memory::Class;
use memory::plan::Budgets;
use std::sync::Mutex;
use train::{NOMINAL_RATES, Prepared, Rerun, Speeds, Start, TrainError, Trainer};

static ALONE: Mutex<()> = Mutex::new(());

/// Rows so long that what layers keep is more than the budget, though they keep their inputs alone.
const LONG: [&str; 8] = [
    "model.layers=16",
    "model.width=64",
    "model.ffn=64",
    "tokenizer.vocab=300",
    "train.batch=2",
    "train.context=512",
    "train.steps=4",
    "eval.every=0",
];

#[test]
fn what_layers_keep_leaves_and_comes_back() {
    let _alone = ALONE.lock();
    let place = Place::new();
    let variants: &[(&[&str], &str, f64)] = &[
        (&["train.recompute=always"], "dynamic", 0.0),
        (&["train.recompute=always", "train.clip=0", "train.accumulate=2"], "dynamic", 0.0),
        (&["train.recompute=always"], "lru", 0.0),
        // Behind a device, with a drive and without.
        (&["train.recompute=always", "train.accumulate=2"], "dynamic", 0.5),
        (&["train.recompute=always", "train.clip=0"], "dynamic", 2.0),
        (&["model.family=gpt2", "model.kv_heads=0", "train.recompute_layers=15"], "belady", 0.5),
        // Layers that do not run again.
        (&["train.clip=0"], "dynamic", 0.0),
        (&["model.family=qwen3", "train.precision=f32", "train.steps=3"], "dynamic", 0.5),
        (&["model.family=gpt2", "model.kv_heads=0", "train.recompute_layers=8"], "lru", 0.0),
        (&["model.family=mixtral", "model.experts=4", "train.recompute=always"], "dynamic", 0.0),
        (&["model.family=mixtral", "model.experts=4"], "dynamic", 0.0),
        (&["model.family=qwen2_moe", "model.experts=4", "model.shared_ffn=64"], "dynamic", 0.5),
    ];
    for (variant, policy, host) in variants {
        let (sets, policy) = ([&LONG[..], variant].concat(), format!("memory.policy={policy}"));
        place.run("whole", &sets, Start::Overwrite, None).unwrap();
        let recipe = place.settings("probe", &sets).recipe().unwrap();
        let estimate = Prepared::new(&recipe, false, &mut |_| {}).unwrap().estimate(&recipe);
        // Room for the widest op beside what is no chunk.
        let others = (estimate.activation_bytes - estimate.filed_bytes) as f64 * 1.25;
        // A shared expert's is wider.
        let widest = if variant.contains(&"model.family=qwen2_moe") { 350_000.0 } else { 300_000.0 };
        let bytes = ((others + widest) * 34.0 / 32.0) as u64;
        assert!(bytes < estimate.activation_bytes, "{bytes} of {estimate:?}");
        let dram = (estimate.state_bytes as f64 * host) as u64;
        let budgets = match dram {
            0 => vec![format!("memory.dram={bytes}B")],
            dram => vec![format!("memory.simulate_device={bytes}B"), format!("memory.dram={dram}B")],
        };
        let mut sets = [&sets[..], &[policy.as_str()]].concat();
        sets.extend(budgets.iter().map(String::as_str));
        device::release_cached();
        device::reset_peak();
        let moved = device::Threads::new(2).unwrap().run(|| {
            let mut trainer = place.trainer("tiers", &sets, Start::Overwrite).unwrap();
            trainer.prepared.check_memory(trainer.recipe(), 1).unwrap();
            while trainer.advance().unwrap().is_some() {}
            trainer.learner_mut().store.arrays().moved_bytes(Class::Activation)
        });
        println!("{sets:?}: {moved} bytes of activations moved, {} kept", estimate.filed_bytes);
        assert!(moved > estimate.filed_bytes, "{sets:?}: {moved} bytes of activations moved");
        let held = device::memory_use().peak_held_bytes as u64;
        assert!(held <= bytes + dram, "{sets:?}: {held} of {bytes} + {dram} bytes");
        assert_same(&place, &format!("{sets:?}"));
    }
}

fn assert_same(place: &Place, what: &str) {
    let (whole, tiers) = (place.result("whole"), place.result("tiers"));
    assert_eq!(tiers.2, whole.2, "log of {what}");
    assert!(tiers.0 == whole.0, "weights of {what}");
    assert!(tiers.1 == whole.1, "state of {what}");
}

#[test]
fn what_replicas_keep_leaves_and_comes_back() {
    let _alone = ALONE.lock();
    let place = Place::new();
    let variants: [&[&str]; 3] = [
        &["mesh.dp=2", "train.recompute=always", "model.layers=24"],
        &["mesh.dp=2", "train.accumulate=2"],
        &["mesh.fsdp=2", "train.recompute_layers=8"],
    ];
    for variant in variants {
        let sets = [&LONG[..], variant, &["train.steps=3"]].concat();
        run(&place, "whole", &sets, Start::Overwrite, false);
        let recipe = place.settings("probe", &sets).recipe().unwrap();
        let estimate = Prepared::new(&recipe, false, &mut |_| {}).unwrap().estimate(&recipe);
        let others = (estimate.activation_bytes - estimate.filed_bytes) as f64 * 1.25;
        let bytes = ((others + 800_000.0) * 34.0 / 32.0) as u64;
        assert!(bytes < estimate.activation_bytes, "{bytes} of {estimate:?}");
        let dram = format!("memory.dram={bytes}B");
        let begin = begin(&place, "tiers", &[&sets[..], &[&dram]].concat(), Start::Overwrite);
        device::release_cached();
        device::reset_peak();
        let moved = launch(&begin.recipe.mesh.shape, &Options::default(), |mesh| {
            let mut trainer = Trainer::on(mesh, begin.clone())?;
            while trainer.advance()?.is_some() {}
            Ok::<_, TrainError>(trainer.learner_mut().store.arrays().moved_bytes(Class::Activation))
        })
        .unwrap();
        println!("{sets:?}: {moved:?} bytes of activations moved, {} kept", estimate.filed_bytes);
        assert!(moved.iter().all(|moved| *moved > estimate.filed_bytes / 2), "{sets:?}: {moved:?}");
        let held = device::memory_use().peak_held_bytes as u64;
        assert!(held <= bytes, "{sets:?}: {held} of {bytes} bytes");
        assert_same(&place, &format!("{sets:?}"));
    }
}

#[test]
fn as_few_layers_run_again_as_fit_and_the_run_is_the_same() {
    let _alone = ALONE.lock();
    let place = Place::new();
    let sets = [&LONG[..], &["train.recompute=auto", "checkpoint.background=false"]].concat();
    let recipe = place.settings("probe", &sets).recipe().unwrap();
    let prepared = Prepared::new(&recipe, false, &mut |_| {}).unwrap();
    // Memory enough for all of it here.
    assert_eq!(prepared.rerun.as_ref().unwrap().layers, 0);
    let speeds = Speeds { flops_per_s: 1e11, fastest_per_s: 1e11, host_per_s: None };
    let choose = |budgets: &Budgets| {
        let rerun = Rerun::choose(&prepared.config, &recipe, &speeds, (budgets, &NOMINAL_RATES)).unwrap();
        println!("{budgets:?}: {rerun}");
        rerun
    };
    let keeps_all = prepared.estimate(&recipe);
    let state = keeps_all.state_bytes;
    let within = |bytes: u64| Budgets { dram: Some(bytes), ..Budgets::default() };
    let all_kept = choose(&within(state + keeps_all.activation_bytes * 2));
    assert_eq!(all_kept.layers, 0);
    let some = choose(&within(state + keeps_all.activation_bytes * 3 / 4));
    assert!(some.layers > 0 && some.layers < 16, "{some}");
    // Fewer did not fit; more would take longer.
    for one in &some.candidates {
        assert_eq!(one.step_s.is_none(), one.layers < some.layers, "{some}");
    }
    let none = choose(&within(state / 2));
    assert!(none.layers == 16 && none.candidates.iter().all(|one| one.step_s.is_none()), "{none}");
    // Over tiers what runs again is weighed against what moves.
    let tiers = Budgets { nvme: Some(1 << 40), ..within(state / 2 + keeps_all.activation_bytes * 5 / 4) };
    let seconds = |rerun: &Rerun| {
        let chosen = rerun.candidates.iter().find(|one| one.layers == rerun.layers);
        chosen.and_then(|one| one.step_s).unwrap()
    };
    let chosen = choose(&tiers);
    for one in &chosen.candidates {
        assert!(one.step_s.is_none_or(|step_s| step_s >= seconds(&chosen)), "{chosen}");
    }

    place.run("whole", &[&LONG[..], &["train.steps=2"]].concat(), Start::New, None).unwrap();
    let bytes = keeps_all.activation_bytes * 5 / 4 + state / 2;
    let dram = format!("memory.dram={bytes}B");
    place.run("tiers", &[&sets[..], &["train.steps=2", &dram]].concat(), Start::New, None).unwrap();
    assert_same(&place, "auto");
}

#[test]
fn ranks_of_a_mesh_do_not_choose() {
    let place = Place::new();
    let recipe = place.settings("run", &["train.recompute=auto", "mesh.dp=2"]).recipe().unwrap();
    let said = Prepared::new(&recipe, false, &mut |_| {}).err().unwrap().to_string();
    assert!(said.contains("train.recompute") && said.contains("never"), "{said}");
}
