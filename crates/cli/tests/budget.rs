//! Memory is given back while a run goes on.

mod common;

use common::Place;
use std::process::{Child, Command, Stdio};
use std::time::Duration;

/// Until the log has a line of this kind after its first `from` bytes, or the child is gone.
fn wait_for(place: &Place, kind: &str, from: usize, child: &mut Child) -> serde_json::Value {
    let kind = format!("\"kind\":\"{kind}\"");
    loop {
        let log = std::fs::read_to_string(place.path("run/metrics.jsonl")).unwrap_or_default();
        let whole = log.rfind('\n').map_or("", |end| &log[from.min(end)..end]);
        if let Some(line) = whole.lines().find(|line| line.contains(&kind)) {
            return serde_json::from_str(line).unwrap();
        }
        assert!(child.try_wait().unwrap().is_none(), "the run ended before its log had {kind}");
        std::thread::sleep(Duration::from_millis(5));
    }
}

#[test]
fn a_run_takes_other_budgets_while_it_trains() {
    let place = Place::new();
    let wide = ["--set", "model.width=128", "--set", "memory.dram=6MiB", "--set", "eval.every=0"];
    let long = ["train", "tiny.toml", "--set", "train.steps=1000000", "--set", "checkpoint.every=0"];
    let mut command = place.command(&[&long[..], &wide].concat());
    let mut child = command.stdout(Stdio::null()).stderr(Stdio::piped()).spawn().unwrap();
    wait_for(&place, "step", 0, &mut child);
    let said = place.succeeds(&["budget", "run", "--dram", "5632KiB"]);
    assert!(said.contains("memory.dram = 5.5 MiB"), "{said}");
    let line = wait_for(&place, "budget", 0, &mut child);
    assert_eq!(line["bytes"]["dram"], 5632 << 10, "{line}");
    assert_eq!(line.get("refused"), None, "{line}");
    // Far too little: said once, and the run goes on with what it had.
    let from = place.read("run/metrics.jsonl").len();
    place.succeeds(&["budget", "run", "--dram", "10KiB"]);
    let line = wait_for(&place, "budget", from, &mut child);
    assert!(line["refused"].as_str().unwrap().contains("memory.dram = 10240 bytes is too little"), "{line}");
    assert_eq!(line["bytes"]["dram"], 5632 << 10, "{line}");
    let from = place.read("run/metrics.jsonl").len();
    wait_for(&place, "step", from, &mut child);
    assert!(Command::new("kill").arg(child.id().to_string()).status().unwrap().success());
    let ended = child.wait_with_output().unwrap();
    let said = String::from_utf8_lossy(&ended.stderr);
    assert_eq!(ended.status.code(), Some(75), "{said}");
    assert!(said.contains("from here on memory.dram = 5.5 MiB"), "{said}");
    assert_eq!(said.matches("warning:").count(), 1, "{said}");
    assert!(place.succeeds(&["budget", "run"]).contains("memory.dram = 5.5 MiB"));
    assert!(place.succeeds(&["budget", "run", "--recipe"]).contains("the budgets of the recipe"));
}

#[test]
fn what_is_no_budget_of_a_run_is_refused() {
    let place = Place::new();
    let said = place.fails(&["budget", "nowhere", "--dram", "1GiB"]);
    assert!(said.contains("nowhere holds no run"), "{said}");
    place.succeeds(&["train", "tiny.toml", "--set", "train.steps=1"]);
    let said = place.fails(&["budget", "run", "--dram", "1GiB"]);
    assert!(said.contains("has no tiers; set memory.dram"), "{said}");
    place.succeeds(&[
        "train",
        "tiny.toml",
        "--overwrite",
        "--set",
        "train.steps=1",
        "--set",
        "memory.dram=1GiB",
    ]);
    let said = place.fails(&["budget", "run", "--device", "1GiB"]);
    assert!(said.contains("has no device"), "{said}");
    let output = place.run(&["budget", "run", "--dram", "lots"]);
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.code() == Some(2) && said.contains("`lots` is no number of bytes"), "{said}");
    assert!(!place.path("run/budget.json").exists());
}
