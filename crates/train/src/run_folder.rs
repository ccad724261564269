//! What lies where in a run's folder, who may write it, and the state a run resumes from.

use crate::TrainError;
use checkpoint::{Checkpoint, StateDir, write_file};
use serde::{Deserialize, Serialize};
use std::fs::{File, TryLockError};
use std::path::{Path, PathBuf};

/// The folder of a run, held by one process at a time.
pub struct RunFolder {
    dir: PathBuf,
    /// Released by the system however the process ends.
    _lock: File,
}

/// What a saved state remembers beside its arrays.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct StateMeta {
    /// Samples consumed: the whole state of the loader.
    pub samples: u64,
    /// Tokens consumed.
    pub tokens: u64,
    /// Steps the optimizer applied; fewer than the steps of the run when some were skipped.
    pub applied: u64,
    /// Skipped steps up to now, in a row.
    pub skipped_in_row: u64,
    /// Step of the last validation; 0 when there was none.
    #[serde(default)]
    pub validated: u64,
    /// Length of metrics.jsonl.
    pub metrics_bytes: u64,
    /// What must not change between a run and its continuation.
    pub identity: Identity,
}

/// What must not change between a run and its continuation.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Identity {
    /// config.json of the model.
    pub model: serde_json::Value,
    /// `bf16` or `f32`.
    pub precision: String,
    /// Tokens per row.
    pub context: usize,
    /// Checksum of the training tokens.
    pub data: u32,
    /// Seed of the order.
    pub seed: u64,
    /// Whether the order is drawn.
    pub shuffle: bool,
}

impl Identity {
    /// The first thing in which `now` differs: (key, then, now).
    fn difference(&self, now: &Identity) -> Option<(String, String, String)> {
        let pair = |name: &str, a: &dyn std::fmt::Display, b: &dyn std::fmt::Display| {
            let (a, b) = (a.to_string(), b.to_string());
            (a != b).then_some((name.to_string(), a, b))
        };
        pair("train.precision", &self.precision, &now.precision)
            .or(pair("train.context", &self.context, &now.context))
            .or(self.model_difference(now))
            .or(pair("checksum of the training data", &self.data, &now.data))
            .or(pair("run.seed", &self.seed, &now.seed))
            .or(pair("data.shuffle", &self.shuffle, &now.shuffle))
    }

    fn model_difference(&self, now: &Identity) -> Option<(String, String, String)> {
        let empty = serde_json::Map::new();
        let (then, now) = (self.model.as_object().unwrap_or(&empty), now.model.as_object().unwrap_or(&empty));
        let keys = then.keys().chain(now.keys());
        let text = |value: Option<&serde_json::Value>| value.map_or("absent".into(), |v| v.to_string());
        keys.filter(|key| then.get(*key) != now.get(*key))
            .map(|key| (format!("the model's {key}"), text(then.get(key)), text(now.get(key))))
            .next()
    }
}

impl RunFolder {
    /// Make the folder and take its lock.
    pub fn open(dir: &Path) -> Result<RunFolder, TrainError> {
        let failed = |source| TrainError::Folder { path: dir.to_path_buf(), source };
        std::fs::create_dir_all(dir).map_err(failed)?;
        let lock = File::create(dir.join(".lock")).map_err(failed)?;
        match lock.try_lock() {
            Ok(()) => {}
            Err(TryLockError::WouldBlock) => return Err(TrainError::Locked { path: dir.to_path_buf() }),
            Err(TryLockError::Error(source)) => return Err(failed(source)),
        }
        checkpoint::clean_leftovers(dir)?;
        Ok(RunFolder { dir: dir.to_path_buf(), _lock: lock })
    }

    /// Where it is.
    pub fn path(&self) -> &Path {
        &self.dir
    }

    /// The folder of training states.
    pub fn states(&self, keep_last: usize) -> Result<StateDir, TrainError> {
        Ok(StateDir::new(&self.dir.join("state"), keep_last)?)
    }

    /// Write small files, each whole or not at all.
    pub fn write(&self, files: &[(String, Vec<u8>)]) -> Result<(), TrainError> {
        for (name, bytes) in files {
            write_file(&self.dir.join(name), bytes)?;
        }
        Ok(())
    }

    /// Throw away the states and the log of an earlier run.
    pub fn clear(&self) -> Result<(), TrainError> {
        for name in ["state", "tensorboard", "metrics.jsonl"] {
            let path = self.dir.join(name);
            let gone =
                if path.is_dir() { std::fs::remove_dir_all(&path) } else { std::fs::remove_file(&path) };
            match gone {
                Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
                    return Err(TrainError::Folder { path, source: error });
                }
                _ => {}
            }
        }
        Ok(())
    }
}

/// The meta of a state, checked against what the run is now.
pub fn meta_of(state: &Checkpoint, now: &Identity) -> Result<StateMeta, TrainError> {
    let meta: StateMeta = serde_json::from_value(state.meta.clone())
        .map_err(|error| TrainError::StateMeta { path: state.path.clone(), what: error.to_string() })?;
    match meta.identity.difference(now) {
        None => Ok(meta),
        Some((key, then, now)) => Err(TrainError::Changed { path: state.path.clone(), key, then, now }),
    }
}
