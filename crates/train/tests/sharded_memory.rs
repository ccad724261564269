//! What ranks that share the state hold at their highest, beside plain replicas.

mod common;

use common::Place;
use common::runs::begin;
use dist::{Axis, MeshShape, Options, launch};
use train::{Begin, Start, StepPlan};

/// Highest bytes of all ranks over three steps of `train.accumulate` microbatches, of which each rank has a
/// row, and bytes of the whole state on one rank (of the first stage): weights, gradients, moments.
fn peak(begin: &Begin, mesh: &str) -> (usize, [usize; 3]) {
    let shape: MeshShape = mesh.parse().unwrap();
    let mut recipe = begin.recipe.clone();
    recipe.mesh.shape = shape;
    let samples = data::Samples::new(begin.prepared.train.clone(), recipe.train.context).unwrap();
    let loader = data::Loader::new(samples, 1, true);
    device::release_cached();
    device::reset_peak();
    let before = device::memory_use().live_bytes;
    let states = launch(&shape, &Options::default(), |mesh| {
        let mut learner = begin.prepared.learner(&recipe, &recipe.mesh.flow(mesh)?)?;
        learner.initialise(1)?;
        let at = mesh.coord(Axis::Dp) + mesh.coord(Axis::Fsdp);
        for step in 0..3 {
            let of = |i| loader.batch(4 * (step + i), 1, at, 4);
            let batches: Vec<_> = (0..recipe.train.accumulate as u64).map(of).collect();
            learner.step(&batches, StepPlan { lr: 1e-2, clip: 1.0 }).unwrap();
        }
        let len = learner.store.flat_len();
        Ok::<_, train::TrainError>([4 * len, 4 * len, 8 * len])
    });
    (device::memory_use().peak_bytes - before, states.unwrap()[0])
}

/// One test: what is measured belongs to the whole process.
#[test]
fn the_highest_that_ranks_hold_falls_with_every_stage() {
    let place = Place::new();
    let sets =
        ["train.batch=4", "model.layers=8", "model.width=128", "train.precision=f32", "model.tied=false"];
    let with = |zero: &str| begin(&place, "run", &[&sets[..], &[zero]].concat(), Start::New);
    let (replicas, [weights, grads, moments]) = peak(&with("mesh.zero=1"), "dp=4");
    let ranks = 4;
    let others = replicas - ranks * (weights + grads + moments);
    // Whole for a while: two layers of eight and the stripes they share with others, about an eighth
    // of the gradients or weights more.
    let window = |whole: usize| whole / ranks + whole * 3 / 8;
    let mut before = replicas;
    for (zero, each) in [
        ("mesh.zero=1", weights + grads + moments / ranks),
        ("mesh.zero=2", weights + window(grads) + moments / ranks),
        ("mesh.zero=3", window(weights) + window(grads) + moments / ranks),
    ] {
        let (held, _) = peak(&with(zero), "fsdp=4");
        let most = ranks * (each + each / 16) + others;
        println!("{zero}: {held} bytes held by {ranks} ranks, at most {most}; replicas {replicas}");
        assert!(held <= most, "{zero}: {held} bytes, at most {most}");
        assert!(held < before, "{zero}: {held} bytes, the stage before {before}");
        before = held;
    }
    stages();
}

/// Stages of eight layers, each shared by four ranks, with four microbatches under way.
fn stages() {
    let place = Place::new();
    let sets = [
        "train.batch=4",
        "train.accumulate=4",
        "model.layers=16",
        "model.width=128",
        "train.precision=f32",
        "model.tied=false",
        "mesh.pp=2",
    ];
    for schedule in ["mesh.schedule=1f1b", "mesh.schedule=interleaved", "mesh.schedule=zero-bubble"] {
        let with = |zero: &str| begin(&place, "run", &[&sets[..], &[schedule, zero]].concat(), Start::New);
        let ranks = 8;
        // Two layers of eight are whole for a while, which is 3/16 more, and some stripes reach beyond them;
        // beside gradients stand the sums so far.
        let window = |whole: usize| whole / 4 + whole / 4;
        let (mut before, [weights, grads, _]) = peak(&with("mesh.zero=1"), "pp=2,fsdp=4");
        for (zero, less) in
            [("mesh.zero=2", grads - window(grads) - grads / 4), ("mesh.zero=3", weights - window(weights))]
        {
            let (held, _) = peak(&with(zero), "pp=2,fsdp=4");
            // Ranks are not at their highest at once.
            let most = before - ranks * (less - less / 5);
            println!(
                "{schedule}, {zero}: {held} bytes held by {ranks} ranks, at most {most}; before {before}"
            );
            assert!(held <= most, "{schedule}, {zero}: {held} bytes, at most {most}");
            before = held;
        }
    }
}
