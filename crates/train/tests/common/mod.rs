//! Tiny runs on real text, and what is left of them.
#![allow(dead_code)]

pub mod meshes;
pub mod runs;
pub mod shards;

use std::path::{Path, PathBuf};
use train::{Prepared, Progress, Settings, Start, TrainError, Trainer};

/// A folder with a corpus and room for runs.
pub struct Place(pub tempfile::TempDir);

impl Place {
    pub fn new() -> Place {
        let place = Place(tempfile::tempdir().unwrap());
        let play = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../data/shakespeare/valid.txt");
        let text = std::fs::read_to_string(play).unwrap();
        std::fs::write(place.path("corpus.txt"), &text[..40_000]).unwrap();
        place
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    /// A recipe of a tiny model that trains in `dir`; `sets` override it.
    pub fn settings(&self, dir: &str, sets: &[&str]) -> Settings {
        let tuned = sets.iter().any(|set| set.starts_with("model.from"));
        let model = if tuned { "" } else { "model = { layers = 2, width = 32, heads = 4, kv_heads = 2 }" };
        let recipe = format!(
            r#"
            run.dir = {:?}
            run.threads = 2
            {model}
            tokenizer.vocab = 300
            data.path = {:?}
            train = {{ steps = 12, batch = 2, context = 24, warmup = 3, lr = 1e-2 }}
            eval = {{ every = 4, batches = 2 }}
            checkpoint = {{ every = 3, keep_last = 3 }}
            "#,
            self.path(dir),
            self.path("corpus.txt"),
        );
        let mut settings = Settings::parse(&recipe, "a test").unwrap();
        for set in sets {
            settings.set(set).unwrap();
        }
        settings
    }

    /// Set a run up.
    pub fn trainer(&self, dir: &str, sets: &[&str], start: Start) -> Result<Trainer, TrainError> {
        let settings = self.settings(dir, sets);
        let recipe = settings.recipe()?;
        let prepared = Prepared::new(&recipe, start == Start::Resume, &mut |_| {})?;
        Trainer::new(recipe, &settings.resolved(), prepared, start, 100.0)
    }

    /// Run to the end, or stop after `stop_at` steps; the last progress.
    pub fn run(
        &self,
        dir: &str,
        sets: &[&str],
        start: Start,
        stop_at: Option<u64>,
    ) -> Result<Progress, TrainError> {
        device::Threads::new(2).unwrap().run(|| {
            let mut trainer = self.trainer(dir, sets, start)?;
            let mut last = None;
            while let Some(progress) = trainer.advance()? {
                if matches!(&progress, Progress::Step(m) if Some(m.step) == stop_at) {
                    trainer.stop();
                }
                last = Some(progress);
            }
            Ok(last.unwrap())
        })
    }

    /// What a run is: weights, newest state and the log without its clock.
    pub fn result(&self, dir: &str) -> (Vec<u8>, Vec<u8>, Vec<serde_json::Value>) {
        let dir = self.path(dir);
        let weights = std::fs::read(dir.join("model.safetensors")).unwrap();
        let mut states: Vec<_> =
            std::fs::read_dir(dir.join("state")).unwrap().map(|entry| entry.unwrap().path()).collect();
        states.sort();
        let state = std::fs::read(states.last().unwrap().join("state.bin")).unwrap();
        (weights, state, log(&dir))
    }
}

/// A model whose state, over tiers, has chunks to move.
pub const MODEL: [&str; 7] = [
    "model.layers=4",
    "model.width=64",
    "tokenizer.vocab=500",
    "train.steps=5",
    "eval.every=3",
    "checkpoint.every=3",
    "checkpoint.keep_last=1",
];

/// Bytes of memory for all ranks of a run: what is no chunk as predicted, and this part of the state.
pub fn budget(place: &Place, sets: &[&str], part: f64) -> u64 {
    let recipe = place.settings("probe", sets).recipe().unwrap();
    let estimate = Prepared::new(&recipe, false, &mut |_| {}).unwrap().estimate(&recipe);
    // Several ranks file nothing.
    let filed = if recipe.mesh.shape.world_size() == 1 { estimate.filed_bytes } else { 0 };
    let others = (estimate.activation_bytes - filed) as f64 * 1.25 + estimate.exponent_bytes as f64;
    ((others + estimate.state_bytes as f64 * part) * 65.0 / 64.0) as u64
}

/// The lines of metrics.jsonl without what the clock says.
pub fn log(dir: &Path) -> Vec<serde_json::Value> {
    let text = std::fs::read_to_string(dir.join("metrics.jsonl")).unwrap();
    let without_clock = |line: &str| {
        let mut line: serde_json::Value = serde_json::from_str(line).unwrap();
        for key in ["seconds", "tokens_per_s", "gflops", "mfu", "tiers", "messages"] {
            line.as_object_mut().unwrap().remove(key);
        }
        line
    };
    text.lines().map(without_clock).collect()
}

/// What the tiers did in the last step: bytes up and down the lowest link, and their bound.
pub fn moved(dir: &Path) -> (u64, u64, Option<u64>) {
    let text = std::fs::read_to_string(dir.join("metrics.jsonl")).unwrap();
    let mut steps = text.lines().rev().map(|line| serde_json::from_str::<serde_json::Value>(line).unwrap());
    let last = steps.find(|line| line["kind"] == "step").unwrap();
    let link = &last["tiers"]["links"][0];
    (link["up_bytes"].as_u64().unwrap(), link["down_bytes"].as_u64().unwrap(), link["bound_bytes"].as_u64())
}

/// By step: the bound the plan in force knows.
pub fn bounds(dir: &Path) -> Vec<Option<u64>> {
    let text = std::fs::read_to_string(dir.join("metrics.jsonl")).unwrap();
    let lines = text.lines().map(|line| serde_json::from_str::<serde_json::Value>(line).unwrap());
    let steps = lines.filter(|line| line["kind"] == "step");
    steps.map(|line| line["tiers"]["links"][0]["bound_bytes"].as_u64()).collect()
}
