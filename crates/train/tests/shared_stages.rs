//! Stages of a pipeline whose ranks share gradients and weights (ZeRO 2 and 3): the steps of one rank and
//! the bits of no pipeline, in every schedule.

mod common;

use common::Place;
use common::meshes::{states_are_gone_on_with, steps_are_those_of_one_rank};
use common::runs::{losses, run};
use train::Start;

const SCHEDULES: [&str; 4] = [
    "mesh.schedule=gpipe",
    "mesh.schedule=1f1b",
    "mesh.schedule=interleaved",
    "mesh.schedule=zero-bubble",
];

/// Four microbatches of four rows; stages of two slices each have layers that share stripes.
const BASE: [&str; 5] = [
    "train.precision=f32",
    "train.batch=4",
    "train.accumulate=4",
    "model.layers=5",
    "checkpoint.every=1",
];

/// Runs without clipping, whose norm is added up in another order on another mesh.
const STEPS: [&str; 3] = ["train.steps=3", "train.clip=0", "checkpoint.keep_last=9"];

fn go(place: &Place, dir: &str, sets: &[&[&str]]) -> (Vec<u8>, Vec<u8>, Vec<f64>) {
    let sets: Vec<&str> = sets.iter().copied().flatten().copied().collect();
    run(place, dir, &sets, Start::Overwrite, false);
    let (weights, state, _) = place.result(dir);
    (weights, state, losses(&place.path(dir)))
}

/// Each element is added up over ranks, then over microbatches, wherever its stripe lies and whatever else
/// a unit wrote in it.
#[test]
fn stages_that_share_have_the_bits_of_ranks_that_share() {
    let place = Place::new();
    let untied: &[&str] = &["model.tied=false"];
    for third in [&[][..], &["mesh.dp=2"]] {
        let base: &[&[&str]] = &[&BASE, &STEPS, untied, &["mesh.fsdp=2"], third];
        let want = go(&place, "flat", &[base, &[&["mesh.zero=2"]]].concat());
        for (i, schedule) in SCHEDULES.into_iter().enumerate() {
            for zero in ["mesh.zero=2", "mesh.zero=3"] {
                let more: &[&[&str]] = match i {
                    0 => &[&["mesh.overlap=false"]],
                    1 => &[&["train.recompute=always"]],
                    _ => &[],
                };
                let stages: &[&[&str]] = &[&["mesh.pp=2", schedule, zero]];
                let got = go(&place, "stages", &[base, stages, more].concat());
                assert!(got == want, "{schedule}, {zero}, {third:?}: {:?} and {:?}", got.2, want.2);
            }
        }
    }
}
