//! A run whose state lies in tiers is the run whose state lies in memory, to the last bit, and it
//! keeps its budget.

mod common;

use common::{Place, moved};
use train::{Prepared, Progress, Start};

/// Bytes of DRAM for a run: activations as predicted, and this part of the state.
fn budget(place: &Place, sets: &[&str], part: f64) -> u64 {
    let recipe = place.settings("probe", sets).recipe().unwrap();
    let estimate = Prepared::new(&recipe, false, &mut |_| {}).unwrap().estimate(&recipe);
    let others = estimate.activation_bytes as f64 * 1.25;
    ((others + estimate.state_bytes as f64 * part) * 65.0 / 64.0) as u64
}

/// Run within a budget; the most that was held, and whether anything was moved.
fn run_within(place: &Place, dir: &str, sets: &[&str], bytes: u64) -> Result<usize, train::TrainError> {
    let dram = format!("memory.dram={bytes}B");
    let sets = [sets, &[dram.as_str()]].concat();
    device::release_cached();
    device::reset_peak();
    let end = place.run(dir, &sets, Start::Overwrite, None)?;
    assert!(matches!(end, Progress::Ended { complete: true, .. }));
    Ok(device::memory_use().peak_bytes)
}

const MODEL: [&str; 6] = [
    "model.layers=4",
    "model.width=64",
    "tokenizer.vocab=500",
    "train.steps=6",
    "eval.every=3",
    "checkpoint.every=4",
];

/// One test: what is held is counted for the whole process.
#[test]
fn every_budget_model_and_policy_gives_the_bits_of_a_run_without_limits() {
    let place = Place::new();
    let variants: &[&[&str]] = &[
        &[],
        &["train.clip=0", "train.precision=f32"],
        &["train.clip=0", "model.tied=false"],
        &["train.clip=0.1", "train.accumulate=3", "train.batch=1"],
        &["train.recompute=always", "train.clip=0", "train.accumulate=2"],
        &["model.family=gpt2", "model.kv_heads=0"],
        &["model.family=gpt2", "model.kv_heads=0", "train.clip=0", "train.recompute_layers=2"],
        &["model.family=qwen3", "model.ffn=512", "train.precision=f32"],
    ];
    for (i, variant) in variants.iter().enumerate() {
        let sets = [&MODEL[..], variant].concat();
        place.run(&format!("whole{i}"), &sets, Start::New, None).unwrap();
        let whole = place.result(&format!("whole{i}"));
        for (policy, part) in [
            ("dynamic", 0.3),
            ("belady", 0.3),
            ("dynamic", 0.6),
            ("belady", 0.6),
            ("static", 0.4),
            ("lru", 0.35),
        ] {
            let policy_is = format!("memory.policy={policy}");
            let sets = [&sets[..], &[policy_is.as_str()]].concat();
            let bytes = budget(&place, &sets[..sets.len() - 1], part);
            let held = run_within(&place, "tiers", &sets, bytes).unwrap();
            assert!(held as u64 <= bytes, "{variant:?} {policy} {part}: {held} of {bytes} bytes");
            let (up, down, bound) = moved(&place.path("tiers"));
            println!(
                "{variant:?} {policy} {part}: {held} of {bytes} bytes, {up} up, {down} down, bound {bound:?}"
            );
            assert_eq!(up > 0, part < 1.0, "{variant:?} {policy} {part}: {up} bytes came from the drive");
            let tiers = place.result("tiers");
            assert_eq!(tiers.2, whole.2, "log of {variant:?} {policy} {part}");
            assert!(tiers.0 == whole.0, "weights of {variant:?} {policy} {part}");
            assert!(tiers.1 == whole.1, "state of {variant:?} {policy} {part}");
        }
    }
}
