//! A drive that loses bytes under a run of the real binary: once, and the run goes on by itself; again
//! and again, and it ends with an error from which `--resume` goes on. Either way with the bits of a run
//! to which nothing happened.

mod common;

use common::Place;
use std::os::unix::fs::FileExt;
use std::path::PathBuf;
use std::process::{Child, Stdio};
use std::time::Duration;

/// 290 thousand parameters, 4.6 MB of state, of which memory holds a part.
const MODEL: [&str; 10] = [
    "train",
    "tiny.toml",
    "--set",
    "model.width=128",
    "--set",
    "train.schedule=constant",
    "--set",
    "eval.every=0",
    "--set",
    "checkpoint.keep_last=1",
];
const TIERS: [&str; 2] = ["--set", "memory.dram=6MiB"];

fn start(place: &Place, sets: &[&str]) -> Child {
    let args = [&MODEL[..], &TIERS, sets].concat();
    place.command(&args).stdout(Stdio::null()).stderr(Stdio::piped()).spawn().unwrap()
}

/// Step of the newest saved state of `run`, once there is one.
fn newest(place: &Place, run: &str) -> Option<u64> {
    let states = std::fs::read_dir(place.path(run).join("state")).ok()?;
    let step = |name: &str| name.strip_prefix("step-")?.parse().ok();
    states.filter_map(|entry| step(&entry.ok()?.file_name().to_string_lossy())).max()
}

fn wait_for_a_state(place: &Place, run: &str, child: &mut Child) {
    while newest(place, run).is_none() {
        assert!(child.try_wait().unwrap().is_none(), "the run ended before it saved a state");
        std::thread::sleep(Duration::from_millis(1));
    }
}

/// The offload file of a process: it has no name, only a handle.
fn offload_files(child: &Child) -> Vec<PathBuf> {
    let handles = std::fs::read_dir(format!("/proc/{}/fd", child.id())).into_iter().flatten();
    handles
        .filter_map(|handle| Some(handle.ok()?.path()))
        .filter(|handle| {
            let target = std::fs::read_link(handle).unwrap_or_default().display().to_string();
            target.contains("/run") && target.ends_with("(deleted)")
        })
        .collect()
}

/// Flip bits of byte `at` of every page; how many pages that were.
fn damage(child: &Child, at: u64) -> u64 {
    let mut pages = 0;
    for handle in offload_files(child) {
        let Ok(file) = std::fs::File::options().read(true).write(true).open(&handle) else { continue };
        let len = file.metadata().map_or(0, |file| file.len());
        for page in (0..len).step_by(4096) {
            let mut byte = [0];
            if file.read_exact_at(&mut byte, page + at).is_ok() {
                pages += u64::from(file.write_all_at(&[!byte[0]], page + at).is_ok());
            }
        }
    }
    pages
}

#[test]
fn a_run_whose_drive_loses_bytes_once_goes_on_by_itself() {
    let place = Place::new();
    let sets = ["--set", "train.steps=120"];
    place.succeeds(&[&MODEL[..], &sets, &["--set", "run.dir=whole"]].concat());
    let mut child = start(&place, &sets);
    wait_for_a_state(&place, "run", &mut child);
    assert!(damage(&child, 100) > 0, "no offload file was found");
    let ended = child.wait_with_output().unwrap();
    let said = String::from_utf8_lossy(&ended.stderr);
    assert!(ended.status.success(), "{said}");
    // What is lost is named: where it lay, and which parameters it held.
    assert!(said.contains("checksum") && said.contains("it held "), "{said}");
    assert!(said.contains("setting up again from the newest state (1 of at most"), "{said}");
    assert!(place.result("run") == place.result("whole"), "{said}");
}

#[test]
fn a_drive_that_goes_on_losing_bytes_ends_the_run_and_resume_goes_on() {
    let place = Place::new();
    let mut child = start(&place, &["--set", "train.steps=1000000"]);
    wait_for_a_state(&place, "run", &mut child);
    // Another byte in each pass: the same one twice would be whole again.
    for at in (0..4096).cycle() {
        if child.try_wait().unwrap().is_some() {
            break;
        }
        damage(&child, at);
    }
    let ended = child.wait_with_output().unwrap();
    let said = String::from_utf8_lossy(&ended.stderr);
    assert_eq!(ended.status.code(), Some(1), "{said}");
    assert!(said.contains("it held ") && !said.contains("panicked"), "{said}");
    let (_, error) = said.split_once("\nerror: ").expect("an error");
    // The bytes, the file, what they were and what to do.
    for part in ["checksum", "of the offload file in ", "it held ", "--resume"] {
        assert!(error.contains(part), "no `{part}` in: {said}");
    }
    // What was saved is whole.
    let last = newest(&place, "run").expect("a state") + 7;
    let steps = format!("train.steps={last}");
    place.succeeds(&[&MODEL[..], &TIERS, &["--resume", "--set", &steps]].concat());
    place.succeeds(&[&MODEL[..], &["--set", &steps, "--set", "run.dir=whole"]].concat());
    let (run, whole) = (place.result("run"), place.result("whole"));
    assert!(run.0 == whole.0 && run.1 == whole.1, "{said}");
}
