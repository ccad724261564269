//! Stages of a pipeline whose ranks share gradients and weights (ZeRO 2 and 3): the steps of one rank and
//! the bits of no pipeline, in every schedule.

mod common;

use common::Place;
use common::meshes::{states_are_gone_on_with, steps_are_those_of_one_rank};
use common::runs::{begin, losses, run};
use common::shards::{KEPT, on_ranks, resident};
use dist::Axis;
use dist::cost::Zero;
use train::Start;

const SCHEDULES: [&str; 4] =
    ["mesh.schedule=gpipe", "mesh.schedule=1f1b", "mesh.schedule=interleaved", "mesh.schedule=zero-bubble"];

const ZEROS: [&str; 2] = ["mesh.zero=2", "mesh.zero=3"];

/// Four microbatches of four rows; stages of two slices each have layers that share stripes.
const BASE: [&str; 5] =
    ["train.precision=f32", "train.batch=4", "train.accumulate=4", "model.layers=5", "checkpoint.every=1"];

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
            for zero in ZEROS {
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

/// The same where sums are rounded to bf16 once all microbatches and replicas are in them, and where layers
/// have experts.
#[test]
fn rounded_gradients_and_experts_share_in_stages_too() {
    let place = Place::new();
    let rounded: &[&str] = &["train.precision=bf16", "train.gradients=bf16", "mesh.dp=2"];
    let mixture: &[&str] = &["model.family=mixtral", "model.experts=4", "mesh.ep=2"];
    for more in [rounded, mixture] {
        let base: &[&[&str]] = &[&BASE, &STEPS, &["model.tied=false", "mesh.fsdp=2"], more];
        let want = go(&place, "flat", &[base, &[&["mesh.zero=2"]]].concat());
        for schedule in &SCHEDULES[1..] {
            let got = go(&place, "stages", &[base, &[&["mesh.pp=2", schedule, "mesh.zero=3"]]].concat());
            assert!(got == want, "{schedule}, {more:?}: {:?} and {:?}", got.2, want.2);
        }
    }
}

/// A tied embedding is whole once, for the sum of both ends.
#[test]
fn stages_that_share_take_the_steps_of_one_rank() {
    let all: Vec<[&str; 4]> = SCHEDULES
        .into_iter()
        .flat_map(|schedule| ZEROS.map(|zero| ["mesh.pp=2", "mesh.fsdp=2", schedule, zero]))
        .collect();
    let mut meshes: Vec<&[&str]> = all.iter().map(|mesh| &mesh[..]).collect();
    meshes.push(&["mesh.pp=2", "mesh.dp=2", "mesh.fsdp=2", "mesh.zero=3"]);
    meshes.push(&["mesh.pp=2", "mesh.fsdp=2", "mesh.x=2", "mesh.scheme=1d-sequence", "mesh.zero=2"]);
    meshes.push(&["mesh.pp=2", "mesh.fsdp=2", "mesh.cp=2", "mesh.schedule=zero-bubble"]);
    meshes.push(&["mesh.pp=5", "mesh.fsdp=2", "mesh.schedule=zero-bubble", "mesh.zero=3"]);
    let keep: &[&str] = &["checkpoint.keep_last=9", "eval.every=0"];
    let tied: Vec<&str> = BASE.iter().chain(keep).copied().collect();
    steps_are_those_of_one_rank(&tied, &meshes);
    let gpt2: Vec<&str> = tied.iter().copied().chain(["model.family=gpt2", "model.kv_heads=0"]).collect();
    steps_are_those_of_one_rank(&gpt2, &[meshes[3], meshes[7]]);
}

/// Clipped by the global norm, validated on the way, with an embedding on both ends: whether weights are
/// shared too, whether messages travel beside, and a second time.
#[test]
fn stages_that_share_more_have_the_same_bits_each_time() {
    let place = Place::new();
    let base: &[&str] =
        &["train.steps=4", "train.clip=0.1", "eval.every=2", "eval.batches=3", "mesh.pp=2", "mesh.fsdp=2"];
    for schedule in SCHEDULES {
        let result = |sets: &[&str]| {
            let sets: Vec<&str> = BASE.iter().chain(base).chain(sets).copied().collect();
            run(&place, "run", &sets, Start::Overwrite, false);
            place.result("run")
        };
        let want = result(&[schedule, "mesh.zero=2"]);
        // 3 is what a recipe means that says nothing.
        for (what, sets) in [
            ("weights too", &[schedule][..]),
            ("again", &[schedule, "mesh.zero=3"]),
            ("in the foreground", &[schedule, "mesh.overlap=false"]),
        ] {
            let got = result(sets);
            assert_eq!(got.2, want.2, "{schedule}, {what}");
            assert!(got == want, "{schedule}, {what}: weights or state differ");
        }
    }
}

#[test]
fn a_state_of_stages_that_share_is_gone_on_with_on_one_rank_and_back() {
    let solo: &[&str] = &[];
    let three: &[&str] = &["mesh.pp=2", "mesh.fsdp=2", "mesh.zero=3", "mesh.schedule=interleaved"];
    let two: &[&str] = &["mesh.pp=4", "mesh.fsdp=2", "mesh.zero=2", "mesh.schedule=zero-bubble"];
    let flat: &[&str] = &["mesh.fsdp=4", "mesh.zero=3"];
    let chain = [solo, three, solo, two, three, flat, three, two, solo];
    states_are_gone_on_with(&["train.batch=4", "train.accumulate=4", "model.layers=4"], &chain);
}

/// Between steps a rank has what its stage of ZeRO says of its stage of the pipeline.
#[test]
fn resident_state_falls_as_one_over_the_ranks_of_a_stage() {
    let place = Place::new();
    let sets = ["train.batch=4", "train.accumulate=4", "model.width=64", "model.layers=4"];
    for schedule in ["mesh.schedule=1f1b", "mesh.schedule=zero-bubble"] {
        let begin = begin(&place, "run", &[&sets[..], &["mesh.pp=2", schedule]].concat(), Start::New);
        for (zero, shared) in [(Zero::Two, &KEPT[1..]), (Zero::Three, &KEPT)] {
            let resident = on_ranks(&begin, "pp=2,fsdp=4", zero, |learner, step| {
                let before = resident(learner);
                step(learner, 0);
                step(learner, 1);
                assert_eq!(resident(learner), before, "{zero:?}, {schedule}");
                let arrays = learner.store.arrays();
                let stripes = arrays.stripes().unwrap();
                let padded = stripes.count(arrays.len()) * stripes.stripe();
                (before, KEPT.map(|class| padded * arrays.dtype(class).size_bytes()))
            });
            for (resident, whole) in resident {
                for ((class, resident), whole) in KEPT.into_iter().zip(resident).zip(whole) {
                    let part = if shared.contains(&class) { 4 } else { 1 };
                    assert_eq!(resident * part, whole, "{class} of {zero:?}, {schedule}");
                }
            }
        }
    }
}

/// Every unit scatters the stripes it wrote once, and with ZeRO 3 every way there and back gathers each
/// stripe at most once.
#[test]
fn bytes_of_stages_that_share_are_those_of_the_formulas() {
    let place = Place::new();
    let sets = ["train.batch=4", "train.accumulate=4", "model.layers=8", "model.tied=false", "mesh.pp=2"];
    for schedule in ["mesh.schedule=1f1b", "mesh.schedule=zero-bubble"] {
        let begin = begin(&place, "run", &[&sets[..], &[schedule]].concat(), Start::New);
        for zero in [Zero::Two, Zero::Three] {
            on_ranks(&begin, "pp=2,fsdp=2", zero, |learner, step| {
                step(learner, 0);
                let before = learner.mesh.group(Axis::Fsdp).counts();
                step(learner, 1);
                let counts = learner.mesh.group(Axis::Fsdp).counts();
                let store = &learner.store;
                let stripes = store.arrays().stripes().unwrap();
                let all = stripes.count(store.flat_len()) as u64;
                // Stripes that hold some of the parameters a kind of unit writes.
                let holding = |written: &dyn Fn(&str) -> bool| {
                    let params = store.refs().filter(|param| written(&store.spec(*param).name));
                    let mut held: Vec<usize> =
                        params.flat_map(|param| stripes.of(&store.range(param))).collect();
                    held.sort_unstable();
                    held.dedup();
                    held.len() as u64
                };
                let (head, later) = (
                    |name: &str| name == "head",
                    |name: &str| name.starts_with("layers.") && !name.contains("norm"),
                );
                let written = holding(&head)
                    + match schedule {
                        "mesh.schedule=1f1b" => holding(&|name| !head(name)),
                        _ => holding(&later) + holding(&|name| !head(name) && !later(name)),
                    };
                let (a, others, granule) = (4, 1, stripes.granule as u64);
                // Learned targets, losses on the last stage, squares of granules.
                let tokens = 2 * begin.recipe.train.context as u64;
                let last = learner.mesh.coord(Axis::Pp) as u64;
                let scalars = others * (8 + last * a * 4 * tokens + 8 * all);
                let scattered = a * written * others * granule * 4 + scalars;
                let bytes = counts.bytes_received - before.bytes_received;
                assert_eq!(bytes, counts.bytes_sent - before.bytes_sent);
                let stripe = others * granule * store.dtype().size_bytes() as u64;
                let what = format!("{zero:?}, {schedule}, stage {last}: {bytes} bytes, {all} stripes");
                match zero {
                    Zero::Three => {
                        let gathered = bytes.checked_sub(scattered).expect(&what);
                        println!("{what}: {} gathered", gathered / stripe);
                        assert!(gathered > 0 && gathered <= 2 * a * all * stripe, "{what}");
                    }
                    _ => assert_eq!(bytes, scattered + all * stripe, "{what}"),
                }
            });
        }
    }
}
