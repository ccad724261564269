//! A run that is killed or told to stop at any moment, then resumed, ends with the bits of one
//! that was not.

mod common;

use common::{Draws, Place};
use std::process::{Child, Stdio};
use std::time::{Duration, Instant};

const KILLS: usize = 100;
const STEPS: u64 = 24;

fn start(place: &Place, run: &str, resume: bool, steps: u64) -> Child {
    let (dir, steps) = (format!("run.dir={run}"), format!("train.steps={steps}"));
    let mut args = vec!["train", "tiny.toml", "--set", &dir, "--set", &steps];
    args.extend(resume.then_some("--resume"));
    place.command(&args).stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap()
}

/// Until a save has begun and is not yet in place, or the child is gone.
fn wait_for_save(place: &Place, run: &str, child: &mut Child) {
    let states = place.path(run).join("state");
    while child.try_wait().unwrap().is_none() {
        let half_written = std::fs::read_dir(&states).is_ok_and(|mut entries| {
            entries.any(|entry| entry.is_ok_and(|e| e.file_name().to_string_lossy().starts_with('.')))
        });
        if half_written {
            return;
        }
    }
}

#[test]
fn killed_at_a_hundred_moments_it_ends_the_same() {
    let place = Place::new();
    let started = Instant::now();
    assert!(start(&place, "whole", false, STEPS).wait().unwrap().success());
    let whole = place.result("whole");
    let span = started.elapsed();
    let mut draws = Draws(7);
    let mut inside_a_save = 0;
    for kill in 0..KILLS {
        let run = format!("run{kill}");
        let mut child = start(&place, &run, false, STEPS);
        if kill % 2 == 0 {
            std::thread::sleep(span * draws.below(1000) as u32 / 1000);
        } else {
            // Let some saves pass, then strike inside one.
            std::thread::sleep(span * draws.below(800) as u32 / 1000);
            wait_for_save(&place, &run, &mut child);
            std::thread::sleep(Duration::from_micros(draws.below(1500)));
            let left = std::fs::read_dir(place.path(&run).join("state")).into_iter().flatten();
            inside_a_save +=
                left.filter(|e| e.as_ref().unwrap().file_name().to_string_lossy().starts_with('.')).count();
        }
        child.kill().unwrap();
        child.wait().unwrap();
        assert!(start(&place, &run, true, STEPS).wait().unwrap().success(), "kill {kill}");
        let result = place.result(&run);
        assert!(result.0 == whole.0, "weights after kill {kill}");
        assert!(result.1 == whole.1, "state after kill {kill}");
        assert_eq!(result.2, whole.2, "log after kill {kill}");
        std::fs::remove_dir_all(place.path(&run)).unwrap();
    }
    assert!(inside_a_save > 0, "no kill fell inside a save");
}

/// Until the log of `run` has this many lines, or the child is gone; how many it has.
fn wait_for_lines(place: &Place, wanted: usize, child: &mut Child) -> usize {
    loop {
        let log = std::fs::read(place.path("run").join("metrics.jsonl")).unwrap_or_default();
        let lines = log.iter().filter(|byte| **byte == b'\n').count();
        if lines >= wanted || child.try_wait().unwrap().is_some() {
            return lines;
        }
        std::thread::sleep(Duration::from_millis(2));
    }
}

#[test]
fn told_to_stop_it_saves_and_asks_to_be_run_again() {
    let place = Place::new();
    assert!(start(&place, "whole", false, 600).wait().unwrap().success());
    let mut again = 0;
    let mut draws = Draws(11);
    let mut child = start(&place, "run", false, 600);
    let mut logged = 0;
    loop {
        // Told after some steps, however slow the machine, so that every start makes progress.
        logged = wait_for_lines(&place, logged + 1 + draws.below(60) as usize, &mut child);
        let told = std::process::Command::new("kill").args(["-TERM", &child.id().to_string()]).status();
        assert!(told.is_ok());
        let status = child.wait().unwrap();
        match status.code() {
            Some(0) => break,
            Some(75) => again += 1,
            // Before it listens for signals, SIGTERM ends it as it ends any process.
            None => {}
            other => panic!("exit code {other:?}"),
        }
        assert!(again <= 600, "it makes no progress");
        child = start(&place, "run", true, 600);
    }
    assert!(again > 0, "it was never told in time");
    assert!(place.result("run") == place.result("whole"));
}
