//! Gradients that are rounded once they are final: a property of the run and not of where its state
//! lies, so tiers, budgets, threads and ranks change no bit; over tiers they travel in two bytes.
//!
//! One test after the other: what is held is counted for the whole process.

mod common;

use common::runs::run;
use common::{MODEL, Place, budget, moved};
use std::sync::Mutex;
use train::{Prepared, Start, TrainError};

static ALONE: Mutex<()> = Mutex::new(());

const ROUNDED: &str = "train.gradients=bf16";

/// Bytes of a state in memory.
fn state_bytes(place: &Place, sets: &[&str]) -> u64 {
    let recipe = place.settings("probe", sets).recipe().unwrap();
    Prepared::new(&recipe, false, &mut |_| {}).unwrap().estimate(&recipe).state_bytes
}

/// Two tiers with two budgets and a policy that knows no plan, three with a drive and without.
fn tiers(place: &Place, sets: &[&str], (least, device): (f64, f64)) -> [Vec<String>; 5] {
    let state = state_bytes(place, sets) as f64;
    let dram = |part| format!("memory.dram={}B", budget(place, sets, part));
    let device = format!("memory.simulate_device={}B", budget(place, sets, device));
    let host = |part: f64| format!("memory.dram={}B", (state * part) as u64);
    [
        vec![dram(least)],
        vec![dram(0.7)],
        vec![dram(least + 0.05), "memory.policy=lru".into()],
        vec![device.clone(), host(0.5)],
        vec![device, host(1.3)],
    ]
}

#[test]
fn every_budget_gives_the_bits_of_a_run_in_memory() {
    let _alone = ALONE.lock();
    let place = Place::new();
    let variants: &[&[&str]] = &[
        &["train.clip=0.1"],
        &["train.clip=0", "model.tied=false"],
        &["train.clip=0.1", "train.accumulate=3", "train.batch=1"],
        &["train.clip=0", "train.accumulate=3", "train.batch=1", "train.moments=8bit"],
        &["train.precision=f32", "train.recompute=always"],
    ];
    for (i, variant) in variants.iter().enumerate() {
        let (plain, whole) = (format!("plain{i}"), format!("whole{i}"));
        let sets = [&MODEL[..], variant].concat();
        place.run(&plain, &sets, Start::New, None).unwrap();
        let sets = [&sets[..], &[ROUNDED]].concat();
        place.run(&whole, &sets, Start::New, None).unwrap();
        assert!(place.result(&plain).0 != place.result(&whole).0, "{variant:?}: nothing was rounded");
        for tiers in tiers(&place, &sets, (0.3, 0.3)) {
            let tiers: Vec<&str> = tiers.iter().map(String::as_str).collect();
            device::release_cached();
            device::reset_peak();
            place.run("tiers", &[&sets[..], &tiers].concat(), Start::Overwrite, None).unwrap();
            let (up, down, bound) = moved(&place.path("tiers"));
            println!("{variant:?} {tiers:?}: {up} up, {down} down, bound {bound:?}");
            assert!(up > 0 && down > 0, "{variant:?} {tiers:?} moved nothing");
            assert!(place.result("tiers") == place.result(&whole), "{variant:?} {tiers:?}");
        }
    }
}

#[test]
fn threads_change_no_bit() {
    let _alone = ALONE.lock();
    let place = Place::new();
    let sets = [&MODEL[..], &[ROUNDED, "train.accumulate=2"]].concat();
    place.run("whole", &sets, Start::New, None).unwrap();
    let dram = format!("memory.dram={}B", budget(&place, &sets, 0.3));
    for (threads, tiers) in [(1, &[][..]), (1, &[dram.as_str()]), (3, &[dram.as_str()])] {
        let sets = [&sets[..], tiers].concat();
        device::release_cached();
        device::reset_peak();
        device::Threads::new(threads).unwrap().run(|| {
            let mut trainer = place.trainer("run", &sets, Start::Overwrite).unwrap();
            while trainer.advance().unwrap().is_some() {}
        });
        assert!(place.result("run") == place.result("whole"), "{threads} threads, {tiers:?}");
    }
}

#[test]
fn ranks_give_the_bits_of_their_mesh_in_memory() {
    let _alone = ALONE.lock();
    let place = Place::new();
    let meshes: [&[&str]; 4] = [
        &["mesh.dp=2", "train.accumulate=3", "train.batch=2"],
        &["mesh.dp=2", "train.clip=0"],
        &["mesh.x=2"],
        &["mesh.pp=2", "train.accumulate=2", "model.tied=true"],
    ];
    for mesh in meshes {
        let sets = [&MODEL[..], &["train.batch=4", ROUNDED], mesh].concat();
        run(&place, "whole", &sets, Start::Overwrite, false);
        for tiers in tiers(&place, &sets, (0.5, 0.45)).into_iter().skip(1) {
            let tiers: Vec<&str> = tiers.iter().map(String::as_str).collect();
            run(&place, "tiers", &[&sets[..], &tiers].concat(), Start::Overwrite, false);
            let (up, down, bound) = moved(&place.path("tiers"));
            println!("{mesh:?} {tiers:?}: {up} up, {down} down, bound {bound:?}");
            assert!(place.result("tiers") == place.result("whole"), "{mesh:?} {tiers:?}");
        }
    }
}

/// Sums over ranks are rounded where a granule is final, so sharing changes no bit of one microbatch.
#[test]
fn what_ranks_share_changes_no_bit() {
    let _alone = ALONE.lock();
    let place = Place::new();
    let sets = [&MODEL[..], &["train.batch=4", ROUNDED]].concat();
    run(&place, "whole", &[&sets[..], &["mesh.dp=2"]].concat(), Start::New, false);
    for zero in ["mesh.zero=1", "mesh.zero=2", "mesh.zero=3"] {
        run(&place, "shared", &[&sets[..], &["mesh.fsdp=2", zero]].concat(), Start::Overwrite, false);
        assert!(place.result("shared").0 == place.result("whole").0, "{zero}");
    }
}

/// What cannot be applied is skipped over tiers as in memory, and so is what comes after it.
#[test]
fn steps_that_are_not_finite_are_skipped_over_tiers_too() {
    let _alone = ALONE.lock();
    let place = Place::new();
    // Runs away within a few steps; so high a clip only makes updates wait.
    let wild =
        ["train.lr=10", "train.clip=1e9", "train.warmup=0", "train.eps=1e-30", "train.weight_decay=10"];
    let sets = [&MODEL[..], &wild, &[ROUNDED, "train.steps=400", "train.max_skipped=2"]].concat();
    let dram = format!("memory.dram={}B", budget(&place, &sets, 0.3));
    for (dir, tiers) in [("whole", &[][..]), ("tiers", &[dram.as_str()])] {
        device::release_cached();
        device::reset_peak();
        let end = place.run(dir, &[&sets[..], tiers].concat(), Start::New, None);
        assert!(matches!(end, Err(TrainError::NotFinite { count: 3, .. })), "{dir}: {end:?}");
    }
    assert_eq!(common::log(&place.path("whole")), common::log(&place.path("tiers")));
}

/// With everything but the widest op off the device: 2 bytes of weight there, 2(1 - r) back, 2 of
/// gradient down, where r rested in between. With f32 gradients 4 come down.
#[test]
fn the_host_link_carries_at_most_six_less_two_r_bytes_a_parameter_and_step() {
    let _alone = ALONE.lock();
    let place = Place::new();
    for clip in ["train.clip=1", "train.clip=0"] {
        for part in [0.2, 0.3] {
            let sets = [&MODEL[..], &["model.tied=false", "train.steps=6", "eval.every=0", clip]].concat();
            let recipe = place.settings("probe", &sets).recipe().unwrap();
            let params = Prepared::new(&recipe, false, &mut |_| {}).unwrap().params.layout().1 as u64;
            // The last chunk is whole pages.
            let params = params.next_multiple_of(2048);
            let device = format!("memory.simulate_device={}B", budget(&place, &sets, part));
            let host = format!("memory.dram={}B", 2 * state_bytes(&place, &sets));
            let sets = [&sets[..], &[&device, &host]].concat();
            for gradients in [ROUNDED, "train.gradients=f32"] {
                device::release_cached();
                device::reset_peak();
                let sets = [&sets[..], &[gradients]].concat();
                place.run("run", &sets, Start::Overwrite, None).unwrap();
                let (up, down, _) = moved(&place.path("run"));
                let (a, b) = (up as f64 / params as f64, down as f64 / params as f64);
                println!("{clip}, {part} of the state, {gradients}: {a:.3} up, {b:.3} down a parameter");
                assert!(up <= 4 * params, "{clip} {part} {gradients}: {up} of {params} parameters");
                match gradients {
                    ROUNDED => assert_eq!(down, 2 * params, "{clip} {part}"),
                    // A chunk that parameters share may leave before it is final.
                    _ => assert!(down >= 4 * params, "{clip} {part}: {down} of {params} parameters"),
                }
            }
        }
    }
}

/// The drive carries at most what it carries with f32 gradients, and less where they leave.
#[test]
fn the_drive_carries_no_more_than_with_f32() {
    let _alone = ALONE.lock();
    let place = Place::new();
    let carried = |sets: &[&str], part: f64| {
        let sets = [&MODEL[..], sets, &["train.steps=6", "eval.every=0"]].concat();
        let recipe = place.settings("probe", &sets).recipe().unwrap();
        let params = Prepared::new(&recipe, false, &mut |_| {}).unwrap().params.layout().1 as f64;
        let dram = format!("memory.dram={}B", budget(&place, &sets, part));
        device::release_cached();
        device::reset_peak();
        place.run("run", &[&sets[..], &[&dram]].concat(), Start::Overwrite, None).unwrap();
        let (up, down, _) = moved(&place.path("run"));
        println!("{sets:?}, {part}: {:.2} up, {:.2} down", up as f64 / params, down as f64 / params);
        (up as f64 / params, down as f64 / params)
    };
    // Updates in the way back: the gradient never leaves.
    let (up, down) = carried(&[ROUNDED, "train.clip=0"], 0.3);
    assert!(up <= 12.0 && down <= 12.0, "{up} up, {down} down");
    // Clipped: it waits for its update, in 2 bytes instead of 4.
    let (up, down) = carried(&[ROUNDED, "train.clip=1"], 0.3);
    let (up32, down32) = carried(&["train.clip=1"], 0.3);
    assert!(up < up32 && down < down32, "{up} up, {down} down; with f32 {up32} up, {down32} down");
}

/// A run learns what it learns with f32 gradients, and a state of either kind goes on with the other.
#[test]
fn a_run_learns_as_with_f32() {
    let _alone = ALONE.lock();
    let place = Place::new();
    let last = |dir: &str| {
        let log = common::log(&place.path(dir));
        let mut losses = log.iter().filter(|line| line["kind"] == "validation").map(|line| &line["loss"]);
        losses.next_back().unwrap().as_f64().unwrap()
    };
    place.run("f32", &[], Start::New, None).unwrap();
    place.run("whole", &[ROUNDED], Start::New, None).unwrap();
    place.run("parts", &[ROUNDED], Start::New, Some(7)).unwrap();
    place.run("changed", &[], Start::New, Some(6)).unwrap();
    place.run("parts", &[ROUNDED], Start::Resume, None).unwrap();
    place.run("changed", &[ROUNDED], Start::Resume, None).unwrap();
    assert!(place.result("parts") == place.result("whole"));
    let (f32s, learnt) = (last("f32"), 300f64.ln() - last("f32"));
    for dir in ["whole", "changed"] {
        println!("{dir}: {} after {f32s} with f32", last(dir));
        assert!((last(dir) - f32s).abs() < 0.02 * learnt, "{dir}: {} for {f32s}", last(dir));
    }
}

/// Ranks add a granule up, and round it, while it is on the device.
#[test]
fn of_ranks_a_gradient_crosses_the_host_link_in_two_bytes_too() {
    let _alone = ALONE.lock();
    let place = Place::new();
    let sets = [&MODEL[..], &["mesh.dp=2", "train.batch=4", "model.tied=false", "eval.every=0"]].concat();
    let recipe = place.settings("probe", &sets).recipe().unwrap();
    let params = Prepared::new(&recipe, false, &mut |_| {}).unwrap().params.layout().1 as u64;
    let device = format!("memory.simulate_device={}B", budget(&place, &sets, 0.35));
    let host = format!("memory.dram={}B", 2 * state_bytes(&place, &sets));
    for (gradients, bytes) in [(ROUNDED, 2), ("train.gradients=f32", 4)] {
        let sets = [&sets[..], &[&device, &host, gradients]].concat();
        run(&place, "run", &sets, Start::Overwrite, false);
        let (up, down, _) = moved(&place.path("run"));
        let (a, b) = (up as f64 / params as f64, down as f64 / params as f64);
        println!("{gradients}: {a:.3} up, {b:.3} down a parameter");
        assert!(up <= 4 * params.next_multiple_of(2048), "{gradients}: {up} of {params} parameters");
        let (least, exact) = (bytes * params.next_multiple_of(2048), gradients == ROUNDED);
        assert!(down == least || (down > least && !exact), "{gradients}: {down} of {params} parameters");
    }
}
