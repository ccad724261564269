//! A run that was stopped and resumed is the run that was not, to the last bit.

mod common;

use common::Place;
use train::{Progress, Start, TrainError};

#[test]
fn resumed_equals_uninterrupted() {
    let place = Place::new();
    let variants: &[&[&str]] = &[
        &[],
        &["train.precision=f32", "train.accumulate=2"],
        &["train.recompute=always", "data.shuffle=false", "train.schedule=wsd"],
        &["model.family=gpt2", "model.kv_heads=0", "checkpoint.background=false"],
    ];
    for (i, sets) in variants.iter().enumerate() {
        let (whole, parts) = (format!("whole{i}"), format!("parts{i}"));
        let end = place.run(&whole, sets, Start::New, None).unwrap();
        assert_eq!(end, Progress::Ended { step: 12, complete: true });
        let stopped = place.run(&parts, sets, Start::New, Some(4)).unwrap();
        assert_eq!(stopped, Progress::Ended { step: 4, complete: false });
        place.run(&parts, sets, Start::Resume, Some(9)).unwrap();
        place.run(&parts, sets, Start::Resume, None).unwrap();
        let (whole, parts) = (place.result(&whole), place.result(&parts));
        assert!(whole.0 == parts.0, "weights of {sets:?}");
        assert!(whole.1 == parts.1, "state of {sets:?}");
        assert_eq!(whole.2, parts.2, "log of {sets:?}");
    }
}

#[test]
fn recompute_and_the_number_of_threads_change_no_bit() {
    let place = Place::new();
    place.run("plain", &[], Start::New, None).unwrap();
    place.run("again", &["train.recompute=always"], Start::New, None).unwrap();
    place.run("some", &["train.recompute_layers=1"], Start::New, None).unwrap();
    let plain = place.result("plain");
    assert!(plain == place.result("again") && plain == place.result("some"));
    let settings = place.settings("single", &[]);
    let recipe = settings.recipe().unwrap();
    device::Threads::new(1).unwrap().run(|| {
        let prepared = train::Prepared::new(&recipe, false, &mut |_| {}).unwrap();
        let resolved = settings.resolved();
        let mut trainer = train::Trainer::new(recipe, &resolved, prepared, Start::New, 100.0).unwrap();
        while trainer.advance().unwrap().is_some() {}
    });
    assert!(plain == place.result("single"));
}

#[test]
fn a_damaged_state_is_passed_over_for_the_one_before() {
    let place = Place::new();
    place.run("whole", &[], Start::New, None).unwrap();
    place.run("hurt", &[], Start::New, Some(9)).unwrap();
    let file = place.path("hurt/state/step-00000009/state.bin");
    let mut bytes = std::fs::read(&file).unwrap();
    let middle = bytes.len() / 2;
    bytes[middle] ^= 1;
    std::fs::write(&file, bytes).unwrap();
    let trainer = place.trainer("hurt", &[], Start::Resume).unwrap();
    assert_eq!(trainer.step(), 6);
    assert!(trainer.skipped_states[0].1.contains("state.bin"), "{:?}", trainer.skipped_states);
    drop(trainer);
    place.run("hurt", &[], Start::Resume, None).unwrap();
    assert!(place.result("whole") == place.result("hurt"));
}

#[test]
fn a_run_is_not_overwritten_by_accident_nor_resumed_as_another() {
    let place = Place::new();
    place.run("run", &[], Start::New, Some(3)).unwrap();
    let error = place.run("run", &[], Start::New, None).unwrap_err();
    assert!(matches!(error, TrainError::Exists { step: 3, .. }), "{error}");
    let error = place.run("run", &["train.context=32"], Start::Resume, None).unwrap_err().to_string();
    assert!(error.contains("train.context = 24") && error.contains("32"), "{error}");
    let error = place.run("run", &["model.width=64"], Start::Resume, None).unwrap_err().to_string();
    assert!(error.contains("model"), "{error}");
    // What may change between parts of a run: its length, its rates, its saves.
    place.run("run", &["train.steps=5", "checkpoint.every=1"], Start::Resume, None).unwrap();
    place.run("run", &["model.width=64"], Start::Overwrite, Some(1)).unwrap();
}

#[test]
fn two_runs_do_not_share_a_folder() {
    let place = Place::new();
    let _first = place.trainer("run", &[], Start::New).unwrap();
    let second = place.trainer("run", &[], Start::New).map(|_| ()).unwrap_err();
    assert!(second.to_string().contains("in use by another"), "{second}");
}
