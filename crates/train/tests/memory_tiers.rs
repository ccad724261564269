//! A run whose state lies in tiers is the run whose state lies in memory, to the last bit, and it
//! keeps its budget.
//!
//! One test after the other: what is held is counted for the whole process.

mod common;

use common::{MODEL, Place, bounds, budget, moved};
use memory::plan::Budgets;
use std::os::unix::fs::FileExt;
use std::sync::Mutex;
use train::{BudgetFile, MOST_RECOVERIES, Prepared, Progress, Recovery, Start, TrainError};

static ALONE: Mutex<()> = Mutex::new(());

/// Run within a budget, which is kept.
fn run_within(place: &Place, dir: &str, sets: &[&str], start: Start, bytes: u64) -> Result<(), TrainError> {
    let dram = format!("memory.dram={bytes}B");
    let sets = [sets, &[dram.as_str()]].concat();
    device::release_cached();
    device::reset_peak();
    let end = place.run(dir, &sets, start, None)?;
    assert!(matches!(end, Progress::Ended { complete: true, .. }));
    let held = device::memory_use().peak_held_bytes as u64;
    assert!(held <= bytes, "{sets:?}: {held} of {bytes} bytes");
    Ok(())
}

fn assert_same(place: &Place, whole: &str, tiers: &str, what: &str) {
    let (whole, tiers) = (place.result(whole), place.result(tiers));
    assert_eq!(tiers.2, whole.2, "log of {what}");
    assert!(tiers.0 == whole.0, "weights of {what}");
    assert!(tiers.1 == whole.1, "state of {what}");
}

#[test]
fn every_budget_model_and_policy_gives_the_bits_of_a_run_without_limits() {
    let _alone = ALONE.lock();
    let place = Place::new();
    let variants: &[&[&str]] = &[
        &[],
        &["train.clip=0", "model.tied=false"],
        &["train.clip=0.1", "train.accumulate=3", "train.batch=1"],
        &["train.recompute=always", "train.clip=0", "train.accumulate=2"],
        &["model.family=gpt2", "model.kv_heads=0", "train.clip=0", "train.recompute_layers=2"],
        &["model.family=qwen3", "model.ffn=512", "train.precision=f32"],
        &["train.moments=8bit", "train.clip=0"],
        &["train.moments=8bit", "train.precision=f32", "train.accumulate=2"],
    ];
    for (i, variant) in variants.iter().enumerate() {
        let (sets, whole) = ([&MODEL[..], variant].concat(), format!("whole{i}"));
        place.run(&whole, &sets, Start::New, None).unwrap();
        for (policy, part) in
            [("dynamic", 0.3), ("dynamic", 0.7), ("belady", 0.4), ("static", 0.5), ("lru", 0.35)]
        {
            let what = format!("{variant:?} {policy} {part}");
            let bytes = budget(&place, &sets, part);
            let policy = format!("memory.policy={policy}");
            let sets = [&sets[..], &[policy.as_str()]].concat();
            run_within(&place, "tiers", &sets, Start::Overwrite, bytes).unwrap();
            let (up, down, bound) = moved(&place.path("tiers"));
            println!("{what}: {up} up, {down} down, bound {bound:?}");
            assert!(up > 0 && down > 0, "{what} moved nothing");
            assert_same(&place, &whole, "tiers", &what);
        }
    }
}

/// Bytes of a device for a run: activations as predicted, and room for its ops.
fn device(place: &Place, sets: &[&str], part: f64) -> String {
    format!("memory.simulate_device={}B", budget(place, sets, part))
}

#[test]
fn three_tiers_give_the_bits_of_a_run_without_limits() {
    let _alone = ALONE.lock();
    let place = Place::new();
    let variants: &[&[&str]] = &[
        &[],
        &["train.clip=0", "model.tied=false"],
        &["train.accumulate=3", "train.batch=1", "train.recompute=always"],
    ];
    for (i, variant) in variants.iter().enumerate() {
        let (sets, whole) = ([&MODEL[..], variant].concat(), format!("whole{i}"));
        place.run(&whole, &sets, Start::New, None).unwrap();
        let state = {
            let recipe = place.settings("probe", &sets).recipe().unwrap();
            Prepared::new(&recipe, false, &mut |_| {}).unwrap().estimate(&recipe).state_bytes as f64
        };
        // Of the device and of the host, in parts of the state; beyond 1 there is no drive.
        for (policy, upper, host) in [
            ("dynamic", 0.25, 0.4),
            ("dynamic", 0.3, 1.3),
            ("belady", 0.3, 0.5),
            ("lru", 0.25, 0.4),
            ("static", 0.3, 1.2),
        ] {
            let what = format!("{variant:?} {policy} {upper} {host}");
            let dram = (state * host) as u64;
            let (device, policy, dram_set) = (
                device(&place, &sets, upper),
                format!("memory.policy={policy}"),
                format!("memory.dram={dram}B"),
            );
            let sets = [&sets[..], &[&device, &policy, &dram_set]].concat();
            device::release_cached();
            device::reset_peak();
            place.run("tiers", &sets, Start::Overwrite, None).unwrap();
            let (up, down, bound) = moved(&place.path("tiers"));
            println!("{what}: {up} up, {down} down, bound {bound:?}");
            assert!(up > 0 && down > 0, "{what} moved nothing");
            assert_same(&place, &whole, "tiers", &what);
        }
    }
}

#[test]
fn budgets_change_while_a_run_goes_on() {
    let _alone = ALONE.lock();
    let place = Place::new();
    let sets = [&MODEL[..], &["train.steps=9"]].concat();
    place.run("whole", &sets, Start::New, None).unwrap();
    let (low, high) = (budget(&place, &sets, 0.3), budget(&place, &sets, 0.6));
    let dram = format!("memory.dram={high}B");
    device::Threads::new(2).unwrap().run(|| {
        let mut trainer = place.trainer("live", &[&sets[..], &[&dram]].concat(), Start::New).unwrap();
        while let Some(progress) = trainer.advance().unwrap() {
            let Progress::Step(m) = progress else { continue };
            let learner = trainer.learner_mut();
            let budgets = learner.store.arrays().budgets().unwrap();
            match m.step {
                3 => learner.set_budget(Budgets { dram: Some(low), ..budgets }).unwrap(),
                5 => {
                    let said = learner.set_budget(Budgets { dram: Some(100_000), ..budgets }).unwrap_err();
                    assert!(said.to_string().contains("memory.dram = 100000 bytes is too little"), "{said}");
                    assert_eq!(learner.store.arrays().budgets(), Some(budgets));
                }
                6 => learner.set_budget(Budgets { dram: Some(high), ..budgets }).unwrap(),
                _ => {}
            }
        }
    });
    assert_same(&place, "whole", "live", "changing budgets");
}

/// Someone asks for memory back through the run folder, asks for too much, and gives it back.
#[test]
fn budgets_in_the_run_folder_are_taken_up_between_steps_and_by_a_resumed_run() {
    let _alone = ALONE.lock();
    let place = Place::new();
    let sets = [&MODEL[..], &["train.steps=9", "eval.every=0", "checkpoint.every=0"]].concat();
    place.run("whole", &sets, Start::New, None).unwrap();
    let (low, high) = (budget(&place, &sets, 0.3), budget(&place, &sets, 0.6));
    let (dram, folder) = (format!("memory.dram={high}B"), place.path("live"));
    let sets = [&sets[..], &[&dram]].concat();
    let ask = |dram_bytes| BudgetFile { dram_bytes, ..BudgetFile::default() }.write(&folder).unwrap();
    let run = |start| {
        let (mut told, mut held) = (Vec::new(), Vec::new());
        let mut trainer = place.trainer("live", &sets, start).unwrap();
        while let Some(progress) = trainer.advance().unwrap() {
            match progress {
                Progress::Budget { step, change } => {
                    told.push((step, change.budgets.dram.unwrap(), change.refused))
                }
                Progress::Step(m) => {
                    let tier = m.tiers.unwrap().tiers[0];
                    held.push((tier.peak_bytes, tier.capacity_bytes));
                    match m.step {
                        3 => ask(Some(low)),
                        5 => ask(Some(100_000)),
                        6 => trainer.stop(),
                        7 => ask(None),
                        _ => {}
                    }
                }
                _ => {}
            }
        }
        (told, held)
    };
    let threads = device::Threads::new(2).unwrap();
    let (told, held) = threads.run(|| run(Start::New));
    assert_eq!(told.len(), 2, "{told:?}");
    assert_eq!(told[0], (3, low, None));
    let why = told[1].2.as_ref().expect("what cannot work is refused");
    assert!((told[1].0, told[1].1) == (5, low) && why.contains("100000 bytes is too little"), "{told:?}");
    assert!(held[2].1 > low && held[4..].iter().all(|(peak, capacity)| peak <= capacity), "{held:?}");
    assert!(held[3..].iter().all(|(_, capacity)| *capacity < low), "{held:?}");
    // What was refused does not stand for the next process.
    assert_eq!(BudgetFile::read(&folder).unwrap().dram_bytes, Some(low));
    let (told, _) = threads.run(|| run(Start::Resume));
    assert_eq!(told, [(6, low, None), (7, high, None)]);
    let (whole, (weights, state, mut log)) = (place.result("whole"), place.result("live"));
    let mut asked = log.extract_if(.., |line| line["kind"] == "budget").map(|line| line["step"].clone());
    assert!(asked.by_ref().eq([3, 5, 6, 7]), "every change is in the log");
    drop(asked);
    assert_eq!(log, whole.2);
    assert!(weights == whole.0 && state == whole.1, "budgets changed bits");
}

/// Updates of clipped runs wait for the next step; whoever looks in between sees them made.
#[test]
fn looks_between_steps_see_every_update_made() {
    let _alone = ALONE.lock();
    let place = Place::new();
    let often = ["train.steps=6", "eval.every=1", "checkpoint.every=2", "checkpoint.keep_last=9"];
    // The second clips every step, the third none though it could, the last does not clip.
    for clip in ["1.0", "0.05", "1e6", "0"] {
        let clip = format!("train.clip={clip}");
        let sets = [&MODEL[..], &often, &[&clip, "train.accumulate=2", "train.batch=1"]].concat();
        place.run("whole", &sets, Start::Overwrite, None).unwrap();
        let bytes = budget(&place, &sets, 0.35);
        run_within(&place, "tiers", &sets, Start::Overwrite, bytes).unwrap();
        assert_same(&place, "whole", "tiers", &clip);
        for state in std::fs::read_dir(place.path("whole").join("state")).unwrap() {
            let name = state.unwrap().file_name();
            let saved =
                |dir: &str| std::fs::read(place.path(dir).join("state").join(&name).join("state.bin"));
            assert!(saved("tiers").unwrap() == saved("whole").unwrap(), "{clip} {name:?}");
        }
        // Told to stop right after a step nobody looked at, and gone on with.
        let rare = ["eval.every=0", "checkpoint.every=0"];
        let dram = format!("memory.dram={bytes}B");
        let rare = [&sets[..], &rare].concat();
        place.run("whole", &rare, Start::Overwrite, None).unwrap();
        place.run("stopped", &[&rare[..], &[&dram]].concat(), Start::Overwrite, Some(3)).unwrap();
        run_within(&place, "stopped", &rare, Start::Resume, bytes).unwrap();
        assert_same(&place, "whole", "stopped", &format!("{clip}, stopped"));
    }
}

/// A look between two steps leaves the plan in force: the last step knows its bound though the one
/// before was followed by a validation.
#[test]
fn the_plan_survives_a_look() {
    let _alone = ALONE.lock();
    let place = Place::new();
    let sets = [&MODEL[..], &["train.steps=7", "eval.every=5", "checkpoint.every=0"]].concat();
    let bytes = budget(&place, &sets, 0.35);
    run_within(&place, "tiers", &sets, Start::New, bytes).unwrap();
    let bounds = bounds(&place.path("tiers"));
    assert_eq!(bounds.len(), 7);
    assert!(bounds[2..].iter().all(|bound| *bound == bounds[2] && bound.is_some()), "{bounds:?}");
}

/// Bytes a parameter that the drive of a run without clipping reads and writes in a step.
fn carried(place: &Place, sets: &[&str], part: f64) -> (f64, f64) {
    let sets = [&MODEL[..], sets, &["train.clip=0", "train.steps=6", "eval.every=0"]].concat();
    let recipe = place.settings("probe", &sets).recipe().unwrap();
    let prepared = Prepared::new(&recipe, false, &mut |_| {}).unwrap();
    let params = prepared.params.layout().1 as f64;
    // Room for what layers keep, so that nothing but the state moves.
    let kept = prepared.estimate(&recipe).filed_bytes * 5 / 4;
    run_within(place, "tiers", &sets, Start::Overwrite, budget(place, &sets, part) + kept).unwrap();
    let (up, down, bound) = moved(&place.path("tiers"));
    assert!(bound.is_some_and(|bound| bound <= up + down), "{up} up, {down} down, bound {bound:?}");
    let (up, down) = (up as f64 / params, down as f64 / params);
    println!("{sets:?}, {part} of the state in memory: {up:.2} up and {down:.2} down a parameter");
    (up, down)
}

/// With f32 moments an update reads and writes 12 bytes: weights, low halves and moments, and the
/// gradient never leaves. The way forth reads the weights once more where they do not rest.
#[test]
fn the_drive_reads_and_writes_at_most_twelve_bytes_a_parameter_and_step() {
    let _alone = ALONE.lock();
    let place = Place::new();
    for (precision, weight) in [("train.precision=bf16", 2.0), ("train.precision=f32", 4.0)] {
        for part in [0.15, 0.3] {
            let (up, down) = carried(&place, &[precision], part);
            // Room for three tenths of the state is room for the weights.
            let again = if part < 0.3 { weight } else { 0.0 };
            assert!(up <= 12.0 + again && down <= 12.0, "{precision}, {part}: {up} up, {down} down");
        }
    }
}

/// With bf16 weights an update reads and writes 2 bytes of weight, 2 of its low half and 2 of moments;
/// the gradient never leaves, and the way forth reads the weights once more where they do not fit.
#[test]
fn moments_of_8_bits_halve_what_the_drive_carries() {
    let _alone = ALONE.lock();
    let place = Place::new();
    let (up, down) = carried(&place, &["train.moments=8bit"], 0.3);
    assert!(up > 1.0 && up <= 6.0 && down > 1.0 && down <= 6.0, "{up} up, {down} down");
    let (up32, down32) = carried(&place, &["train.moments=f32"], 0.3);
    assert!(up32 + down32 > 1.5 * (up + down), "{up32} up, {down32} down with f32");
}

#[test]
fn a_run_goes_on_under_another_budget() {
    let _alone = ALONE.lock();
    let place = Place::new();
    place.run("whole", &MODEL, Start::New, None).unwrap();
    let bytes = budget(&place, &MODEL, 0.3);
    let (small, large) =
        (format!("memory.dram={bytes}B"), format!("memory.dram={}B", budget(&place, &MODEL, 0.6)));
    place.run("parts", &[&MODEL[..], &[&small]].concat(), Start::New, Some(1)).unwrap();
    place.run("parts", &[&MODEL[..], &[&large]].concat(), Start::Resume, Some(2)).unwrap();
    place.run("parts", &MODEL, Start::Resume, Some(4)).unwrap();
    run_within(&place, "parts", &MODEL, Start::Resume, bytes).unwrap();
    assert_same(&place, "whole", "parts", "four parts");
    // The exported model can be the beginning of another, within a budget, too.
    let from = format!("model.from={}", place.path("whole").display());
    let tuned = [&from, "train.steps=2", "eval.every=1"];
    place.run("tuned", &tuned, Start::New, None).unwrap();
    run_within(&place, "tuned-within", &tuned, Start::New, bytes).unwrap();
    assert_same(&place, "tuned", "tuned-within", "a tuned model");
}

#[test]
fn a_budget_nothing_fits_in_is_refused_with_the_least_that_does() {
    let _alone = ALONE.lock();
    let place = Place::new();
    let refused = |sets: &[&str]| {
        let recipe = place.settings("run", &[&MODEL[..], sets].concat()).recipe().unwrap();
        let prepared = Prepared::new(&recipe, false, &mut |_| {}).unwrap();
        prepared.check_memory(&recipe, 1).unwrap_err().to_string()
    };
    let said = refused(&["memory.dram=300KiB"]);
    assert!(
        said.contains("memory.dram = 300.0 KiB is too little") && said.contains("raise memory.dram to"),
        "{said}"
    );
    let said = refused(&["memory.dram=2MiB", "memory.nvme=1MiB"]);
    assert!(said.contains("memory.nvme = 1.0 MiB, the state takes"), "{said}");
    let said = refused(&["memory.dram=900TiB", "memory.policy=lru"]);
    assert!(said.contains("memory.dram = 900.0 TiB") && said.contains("available"), "{said}");
    // Past the check it is an error of the op, not a panic.
    let said = run_within(&place, "run", &MODEL, Start::New, 300_000).unwrap_err().to_string();
    assert!(said.contains("memory.dram = 300000 bytes"), "{said}");
}

#[test]
fn damage_on_the_drive_ends_the_run_and_is_never_learnt_from() {
    let _alone = ALONE.lock();
    let place = Place::new();
    let dram = format!("memory.dram={}B", budget(&place, &MODEL, 0.3));
    let sets = [&MODEL[..], &[&dram, "train.steps=1000", "checkpoint.every=1"]].concat();
    device::Threads::new(2).unwrap().run(|| {
        let mut trainer = place.trainer("run", &sets, Start::New).unwrap();
        let mut error = None;
        for _ in 0..40 {
            match trainer.advance() {
                Ok(_) if trainer.step() >= 2 => damage(&place.path("run")),
                Ok(_) => {}
                Err(found) => {
                    error = Some(found.to_string());
                    break;
                }
            }
        }
        let said = error.expect("damaged bytes are noticed");
        assert!(said.contains("checksum") && said.contains("checkpoint"), "{said}");
        // Whatever is tried next, nothing comes of it.
        assert!(trainer.advance().is_err());
    });
    // The states saved before are whole.
    place.run("run", &[&MODEL[..], &["train.steps=4"]].concat(), Start::Resume, None).unwrap();
    place.run("whole", &[&MODEL[..], &["train.steps=4"]].concat(), Start::New, None).unwrap();
    assert!(place.result("run").0 == place.result("whole").0);
}

#[test]
fn a_run_whose_drive_loses_bytes_goes_on_from_its_last_state_as_if_nothing_had_been() {
    let _alone = ALONE.lock();
    let place = Place::new();
    let dram = format!("memory.dram={}B", budget(&place, &MODEL, 0.3));
    let sets = [&MODEL[..], &["train.steps=8"]].concat();
    place.run("whole", &sets, Start::New, None).unwrap();
    let sets = [&sets[..], &[&dram]].concat();
    device::Threads::new(2).unwrap().run(|| {
        let (mut recovery, mut found) = (Recovery::default(), Vec::new());
        let mut trainer = place.trainer("run", &sets, Start::New).unwrap();
        // Before the first state, and after one.
        let mut damage_after = vec![5, 1];
        loop {
            match trainer.advance() {
                Ok(Some(Progress::Step(step))) if damage_after.last() == Some(&step.step) => {
                    damage_after.pop();
                    damage(&place.path("run"));
                }
                Ok(Some(_)) => {}
                Ok(None) => break,
                Err(error) => {
                    let lost = recovery.after(error, &trainer).unwrap();
                    drop(trainer);
                    assert_eq!(offload_files(&place.path("run")).len(), 0, "space is given back");
                    found.push(lost);
                    trainer = place.trainer("run", &sets, Start::Resume).unwrap();
                }
            }
        }
        assert_eq!(found.len(), 2, "{found:?}");
        for lost in &found {
            assert!(lost.nth == 1 && !lost.params.is_empty(), "{lost:?}");
            assert!(lost.cause.to_string().contains("checksum"), "{lost:?}");
        }
        assert!(found[0].step < found[1].step, "{found:?}");
    });
    assert_same(&place, "whole", "run", "a run that lost bytes twice");
}

#[test]
fn a_drive_that_loses_bytes_again_and_again_ends_the_run() {
    let _alone = ALONE.lock();
    let place = Place::new();
    let dram = format!("memory.dram={}B", budget(&place, &MODEL, 0.3));
    let sets = [&MODEL[..], &[&dram, "train.steps=8"]].concat();
    device::Threads::new(2).unwrap().run(|| {
        let (mut recovery, mut times) = (Recovery::default(), 0);
        let error = loop {
            let start = if times == 0 { Start::New } else { Start::Resume };
            let mut trainer = place.trainer("run", &sets, start).unwrap();
            let error = loop {
                match trainer.advance() {
                    Ok(_) => damage(&place.path("run")),
                    Err(error) => break error,
                }
            };
            match recovery.after(error, &trainer) {
                Ok(lost) => assert_eq!(lost.nth, times + 1),
                Err(error) => break error,
            }
            times += 1;
        };
        assert_eq!(times, MOST_RECOVERIES);
        assert!(error.to_string().contains("checksum"), "{error}");
        // What is no loss of the drive is no case for it.
        let trainer = place.trainer("other", &MODEL, Start::New).unwrap();
        let other = TrainError::Threads { count: 1 };
        assert!(Recovery::default().after(other, &trainer).is_err());
    });
}

/// The nameless offload files of this process below `dir`.
fn offload_files(dir: &std::path::Path) -> Vec<std::path::PathBuf> {
    let fds = std::fs::read_dir("/proc/self/fd").unwrap().map(|entry| entry.unwrap().path());
    let dir = dir.display().to_string();
    fds.filter(|fd| {
        let target = std::fs::read_link(fd).unwrap_or_default().display().to_string();
        target.starts_with(&dir) && target.ends_with("(deleted)")
    })
    .collect()
}

/// Flip a bit in every page of the offload file of this process below `dir`.
fn damage(dir: &std::path::Path) {
    for fd in offload_files(dir) {
        let file = std::fs::File::options().read(true).write(true).open(&fd).unwrap();
        let length = file.metadata().unwrap().len();
        for page in (0..length).step_by(4096) {
            let mut byte = [0];
            file.read_exact_at(&mut byte, page + 100).unwrap();
            file.write_all_at(&[byte[0] ^ 1], page + 100).unwrap();
        }
    }
}
