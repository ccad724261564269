//! Ranks of a mesh whose state lies in tiers learn what those learn whose state lies in memory, to the
//! last bit, and save and export the same.
//!
//! One test after the other: what is held is counted for the whole process.

mod common;

use common::meshes::states_are_gone_on_with;
use common::runs::{begin, run};
use common::{Place, moved};
use dist::{Options, launch};
use std::sync::Mutex;
use train::{BudgetFile, Prepared, Progress, Start, TrainError, Trainer};

static ALONE: Mutex<()> = Mutex::new(());

const MODEL: [&str; 8] = [
    "model.layers=4",
    "model.width=64",
    "tokenizer.vocab=500",
    "train.steps=5",
    "train.batch=4",
    "eval.every=3",
    "checkpoint.every=3",
    "checkpoint.keep_last=1",
];

const MESHES: [&[&str]; 16] = [
    &["mesh.x=2"],
    &["mesh.x=2", "mesh.y=2", "train.clip=0"],
    &["mesh.dp=2", "train.moments=8bit"],
    &["mesh.pp=2", "train.accumulate=2", "model.tied=true"],
    &["mesh.cp=2", "train.clip=0.1"],
    // Offloaded, pipelined and cut in two dimensions, in one recipe.
    &["mesh.pp=2", "mesh.x=2", "mesh.y=2", "train.accumulate=2", "train.recompute=always"],
    &["mesh.pp=2", "mesh.dp=2", "train.accumulate=4", "mesh.schedule=zero-bubble", "model.tied=false"],
    &["mesh.ep=2", "model.family=mixtral", "model.experts=4"],
    // State that ranks share, each with its shard in tiers of its own.
    &["mesh.fsdp=2"],
    &["mesh.fsdp=2", "mesh.dp=2", "train.accumulate=2", "train.gradients=bf16", "train.clip=0"],
    &["mesh.fsdp=3", "train.batch=3", "model.tied=true", "train.moments=8bit", "train.recompute=always"],
    &["mesh.fsdp=2", "mesh.x=2", "train.accumulate=2", "mesh.overlap=false"],
    &["mesh.fsdp=2", "mesh.cp=2", "train.accumulate=2"],
    &["mesh.fsdp=2", "mesh.ep=2", "model.family=mixtral", "model.experts=4"],
    &["mesh.fsdp=2", "mesh.pp=2", "train.accumulate=2", "model.tied=true", "train.gradients=bf16"],
    &[
        "mesh.fsdp=2",
        "mesh.pp=2",
        "train.accumulate=4",
        "mesh.schedule=zero-bubble",
        "train.recompute=always",
    ],
];

/// Bytes of memory for all ranks: activations as predicted, and this part of the state.
fn budget(place: &Place, sets: &[&str], part: f64) -> u64 {
    let recipe = place.settings("probe", sets).recipe().unwrap();
    let estimate = Prepared::new(&recipe, false, &mut |_| {}).unwrap().estimate(&recipe);
    let others = estimate.activation_bytes as f64 * 1.25 + estimate.exponent_bytes as f64;
    ((others + estimate.state_bytes as f64 * part) * 65.0 / 64.0) as u64
}

#[test]
fn every_mesh_gives_the_bits_of_its_run_without_limits() {
    let _alone = ALONE.lock();
    let place = Place::new();
    for (i, mesh) in MESHES.iter().enumerate() {
        let (sets, whole) = ([&MODEL[..], mesh].concat(), format!("whole{i}"));
        run(&place, &whole, &sets, Start::New, false);
        let state = budget(&place, &sets, 1.0) - budget(&place, &sets, 0.0);
        // In models as small as this, what ranks gather is whole pages here and there, too.
        let part = if mesh[0].starts_with("mesh.fsdp") { 0.7 } else { 0.5 };
        let two = vec![format!("memory.dram={}B", budget(&place, &sets, part))];
        let three = vec![
            format!("memory.simulate_device={}B", budget(&place, &sets, part - 0.05)),
            format!("memory.dram={}B", state / 2),
        ];
        for tiers in [two, three] {
            let tiers: Vec<&str> = tiers.iter().map(String::as_str).collect();
            let sets = [&sets[..], &tiers].concat();
            run(&place, "tiers", &sets, Start::Overwrite, false);
            let (up, down, bound) = moved(&place.path("tiers"));
            println!("{mesh:?} {tiers:?}: {up} up, {down} down, bound {bound:?}");
            assert!(up > 0 && down > 0, "{sets:?} moved nothing");
            let (whole, tiers) = (place.result(&whole), place.result("tiers"));
            assert_eq!(tiers.2, whole.2, "log of {sets:?}");
            assert!(tiers.0 == whole.0, "weights of {sets:?}");
            assert!(tiers.1 == whole.1, "state of {sets:?}");
        }
    }
}

#[test]
fn states_go_from_tiers_of_one_mesh_to_memory_of_another_and_back() {
    let _alone = ALONE.lock();
    let place = Place::new();
    let model = ["model.layers=4", "model.width=64", "tokenizer.vocab=500"];
    let base = [&model[..], &["train.batch=4", "train.accumulate=2", "train.precision=f32"]].concat();
    let dram = format!("memory.dram={}B", budget(&place, &base, 0.9));
    let device = format!("memory.simulate_device={}B", budget(&place, &base, 0.8));
    let chain: [&[&str]; 9] = [
        &["mesh.x=2", "mesh.y=2", &dram],
        &[],
        &["mesh.pp=2", "mesh.x=2", &dram],
        &["mesh.dp=2", "mesh.fsdp=2"],
        &["mesh.fsdp=2", "mesh.x=2", &dram],
        &["mesh.dp=2", "mesh.y=2", &dram, &device],
        &["mesh.fsdp=4", &dram],
        &[&dram],
        &["mesh.cp=2", &dram],
    ];
    states_are_gone_on_with(&base, &chain);
}

#[test]
fn budgets_change_on_all_ranks_or_on_none() {
    let _alone = ALONE.lock();
    let place = Place::new();
    let sets = [&MODEL[..], &["mesh.pp=2", "mesh.x=2", "train.accumulate=2", "train.steps=8"]].concat();
    run(&place, "whole", &sets, Start::New, false);
    let (low, high) = (budget(&place, &sets, 0.5), budget(&place, &sets, 0.8));
    let (dram, folder) = (format!("memory.dram={high}B"), place.path("live"));
    let sets = [&sets[..], &[&dram]].concat();
    let begin = begin(&place, "live", &sets, Start::New);
    let ask = |dram_bytes| BudgetFile { dram_bytes, ..BudgetFile::default() }.write(&folder).unwrap();
    device::release_cached();
    device::reset_peak();
    let told = launch(&begin.recipe.mesh.shape, &Options::default(), |mesh| {
        let mut trainer = Trainer::on(mesh, begin.clone())?;
        let mut told = Vec::new();
        while let Some(progress) = trainer.advance()? {
            match progress {
                Progress::Budget { step, change } => {
                    told.push((step, change.budgets.dram, change.refused.is_some()))
                }
                Progress::Step(step) if mesh.rank() == 0 => match step.step {
                    3 => ask(Some(low)),
                    5 => ask(Some(100_000)),
                    _ => {}
                },
                _ => {}
            }
        }
        Ok::<_, TrainError>((told, trainer.learner_mut().budgets().unwrap().dram))
    })
    .unwrap();
    assert_eq!(told[0].0, [(3, Some(low), false), (5, Some(low), true)]);
    assert!(told.iter().all(|(_, dram)| *dram == Some(low)), "{told:?}");
    assert_eq!(BudgetFile::read(&folder).unwrap().dram_bytes, Some(low));
    let (whole, mut live) = (place.result("whole"), place.result("live"));
    live.2.retain(|line| line["kind"] != "budget");
    assert_eq!(live.2, whole.2);
    assert!(live.0 == whole.0 && live.1 == whole.1, "budgets changed bits");
}

#[test]
fn what_tiers_of_ranks_cannot_do_is_refused_with_a_remedy() {
    let place = Place::new();
    let refused = |sets: &[&str]| place.settings("run", sets).recipe().unwrap_err().to_string();
    let shared = refused(&["mesh.fsdp=2", "mesh.zero=2", "memory.dram=auto"]);
    assert!(
        shared.contains("mesh.zero = 2 with memory.dram") && shared.contains("mesh.zero = 3"),
        "{shared}"
    );
    let sample = refused(&["mesh.x=2", "memory.dram=auto", "sample.every=3"]);
    assert!(sample.contains("sample.every = 3") && sample.contains("trilith chat"), "{sample}");
    let sets = [&MODEL[..], &["mesh.pp=2", "mesh.x=2", "train.accumulate=2", "memory.dram=200000B"]].concat();
    let recipe = place.settings("run", &sets).recipe().unwrap();
    let little = Prepared::new(&recipe, false, &mut |_| {}).unwrap().check_memory(&recipe, 1).unwrap_err();
    assert!(little.to_string().contains("raise memory.dram to"), "{little}");
}
