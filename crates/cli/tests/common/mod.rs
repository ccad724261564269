//! The real binary, run in a folder of its own.
#![allow(dead_code)]

use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};

pub const REPOSITORY: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../..");

/// A folder with a small corpus and a recipe `tiny.toml` that trains on it within a second.
pub struct Place(tempfile::TempDir);

impl Place {
    pub fn new() -> Place {
        let place = Place(tempfile::tempdir().unwrap());
        let play = Path::new(REPOSITORY).join("data/shakespeare/valid.txt");
        let text = std::fs::read_to_string(play).unwrap();
        place.write("corpus.txt", &text[..30_000]);
        place.write(
            "tiny.toml",
            "run = { dir = \"run\", threads = 1 }\n\
             model = { layers = 2, width = 32, heads = 4 }\n\
             tokenizer = { vocab = 300 }\n\
             data = { path = \"corpus.txt\" }\n\
             train = { steps = 24, batch = 2, context = 32, warmup = 2 }\n\
             eval = { every = 8, batches = 2 }\n\
             checkpoint = { every = 4 }\n",
        );
        place
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    pub fn write(&self, name: &str, content: impl AsRef<[u8]>) {
        let path = self.path(name);
        std::fs::create_dir_all(path.parent().unwrap()).unwrap();
        std::fs::write(path, content).unwrap();
    }

    pub fn read(&self, name: &str) -> Vec<u8> {
        std::fs::read(self.path(name)).unwrap_or_else(|error| panic!("{name}: {error}"))
    }

    pub fn command(&self, args: &[&str]) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_trilith"));
        command.args(args).current_dir(self.0.path()).stdin(Stdio::null());
        command
    }

    pub fn run(&self, args: &[&str]) -> Output {
        self.command(args).output().unwrap()
    }

    /// Standard output of a run that must succeed.
    pub fn succeeds(&self, args: &[&str]) -> String {
        let output = self.run(args);
        assert!(output.status.success(), "{args:?}: {}", String::from_utf8_lossy(&output.stderr));
        String::from_utf8(output.stdout).unwrap()
    }

    /// The one error of a run that must fail in an orderly way: exit code 1, `error: ` and a
    /// message, no panic.
    pub fn fails(&self, args: &[&str]) -> String {
        let output = self.run(args);
        let said = String::from_utf8_lossy(&output.stderr).into_owned();
        assert_eq!(output.status.code(), Some(1), "{args:?}: {said}");
        assert!(!said.contains("panicked"), "{args:?}: {said}");
        assert_eq!(said.lines().filter(|line| line.starts_with("error: ")).count(), 1, "{args:?}: {said}");
        said
    }

    /// What a finished run is: weights, newest state, and the log without the clock.
    pub fn result(&self, run: &str) -> (Vec<u8>, Vec<u8>, Vec<serde_json::Value>) {
        let states = std::fs::read_dir(self.path(run).join("state")).unwrap();
        let newest = states.map(|entry| entry.unwrap().path()).max().unwrap();
        let log = String::from_utf8(self.read(&format!("{run}/metrics.jsonl"))).unwrap();
        let without_clock = |line: &str| {
            let mut line: serde_json::Value = serde_json::from_str(line).unwrap();
            for key in ["seconds", "tokens_per_s", "gflops", "mfu", "tiers", "messages"] {
                line.as_object_mut().unwrap().remove(key);
            }
            line
        };
        (
            self.read(&format!("{run}/model.safetensors")),
            std::fs::read(newest.join("state.bin")).unwrap(),
            // What is predicted is predicted from the clock.
            log.lines().map(without_clock).filter(|line| line["kind"] != "predicted").collect(),
        )
    }
}

/// Numbers that look random and are the same every time.
pub struct Draws(pub u64);

impl Draws {
    pub fn below(&mut self, limit: u64) -> u64 {
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (self.0 >> 33) % limit
    }
}
