//! A run several times larger than a hard limit of the system ends within it, with the bits of a
//! run without limits.

mod common;

use common::Place;
use std::path::PathBuf;
use std::process::{Command, Stdio};

/// A memory control group (v1) of this test, removed when it is dropped.
struct Group(PathBuf);

impl Group {
    fn new(limit_bytes: u64) -> Result<Group, String> {
        let dir = PathBuf::from(format!("/sys/fs/cgroup/memory/trilith-test-{}", std::process::id()));
        std::fs::create_dir(&dir).map_err(|error| format!("{}: {error}", dir.display()))?;
        let group = Group(dir);
        let limit = group.0.join("memory.limit_in_bytes");
        std::fs::write(&limit, limit_bytes.to_string())
            .map_err(|error| format!("{}: {error}", limit.display()))?;
        Ok(group)
    }

    fn peak_bytes(&self) -> u64 {
        let peak = std::fs::read_to_string(self.0.join("memory.max_usage_in_bytes")).unwrap();
        peak.trim().parse().unwrap()
    }
}

impl Drop for Group {
    fn drop(&mut self) {
        std::fs::remove_dir(&self.0).ok();
    }
}

const STATE: [&str; 12] = [
    "--set",
    "model.width=512",
    "--set",
    "model.heads=8",
    "--set",
    "model.layers=7",
    "--set",
    "train.steps=2",
    "--set",
    "checkpoint.every=1",
    "--set",
    "eval.every=0",
];

#[test]
fn a_hard_limit_of_the_system_is_kept_and_changes_no_bit() {
    const LIMIT: u64 = 160 << 20;
    let group = match Group::new(LIMIT) {
        Ok(group) => group,
        Err(why) => return println!("skipped: no memory control group can be made here ({why})"),
    };
    let place = Place::new();
    // 22M parameters: 350 MiB of weights, gradients and optimizer state.
    place.succeeds(&[&["train", "tiny.toml", "--set", "run.dir=whole"][..], &STATE].concat());
    let mut command = Command::new("bash");
    let enter = "echo $$ > \"$0\"/cgroup.procs && exec \"$@\"";
    let more = ["train", "tiny.toml", "--set", "run.dir=limited", "--set", "memory.dram=80MiB"];
    let limited = command
        .args(["-c", enter, group.0.to_str().unwrap(), env!("CARGO_BIN_EXE_trilith")])
        .args([&more[..], &STATE].concat())
        .current_dir(place.path(""))
        .stdin(Stdio::null())
        .output()
        .unwrap();
    let said = String::from_utf8_lossy(&limited.stderr);
    assert!(limited.status.success(), "{:?}: {said}", limited.status);
    assert!(said.contains("dram-nvme") && said.contains("bound") && said.contains("peak:"), "{said}");
    assert!(group.peak_bytes() <= LIMIT);
    let (whole, limited) = (place.result("whole"), place.result("limited"));
    assert_eq!(whole.2, limited.2);
    assert!(whole.0 == limited.0 && whole.1 == limited.1);
}
