//! Training states that survive a crash at any moment.
//!
//! `DIR/step-00000100/` holds `state.bin` (arrays back to back, 4096-aligned) and `manifest.json`
//! (what lies where, with a checksum of every 4 MiB). A folder appears whole; older ones go only
//! when a newer one has been read back.

mod manifest;
mod read;
mod save;
mod saver;

pub use manifest::{ArrayInfo, BLOCK_BYTES, Manifest, ManifestError, parse_manifest};
pub use read::{Checkpoint, Found, Newest};
pub use save::{Array, SaveReport};
pub use saver::Saver;

use crate::atomic::SaveError;
use std::io;
use std::path::{Path, PathBuf};

/// A training state that cannot be saved or read.
#[derive(Debug, thiserror::Error)]
pub enum StateError {
    /// No states would be kept.
    #[error("keep_last is 0: at least one state must be kept, set it to 1 or more")]
    KeepLast,
    /// Saving failed; what existed before still stands.
    #[error(transparent)]
    Save(#[from] SaveError),
    /// The operating system refused.
    #[error("cannot read {}: {source}", path.display())]
    Io {
        /// Which file.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// The manifest is damaged.
    #[error("{}: {source}; remove its folder to fall back on the state before", path.display())]
    Manifest {
        /// Which manifest.
        path: PathBuf,
        /// What is wrong.
        source: ManifestError,
    },
    /// A file is shorter or longer than the manifest says.
    #[error(
        "{} has {found} bytes, its manifest says {expected}; remove its folder to fall back on the state before",
        path.display()
    )]
    Length {
        /// Which file.
        path: PathBuf,
        /// Bytes by the manifest.
        expected: u64,
        /// Bytes it has.
        found: u64,
    },
    /// A block does not match its checksum.
    #[error(
        "{}: array `{array}`, block {block} (byte {offset} of the file) does not match its checksum; remove the folder to fall back on the state before",
        path.display()
    )]
    Corrupt {
        /// Which file.
        path: PathBuf,
        /// Which array.
        array: String,
        /// Which of its blocks.
        block: usize,
        /// Where the block starts in the file.
        offset: u64,
    },
    /// No array of that name.
    #[error("{} has no array `{name}`; it was saved by another version or for another model", path.display())]
    Missing {
        /// Which folder.
        path: PathBuf,
        /// The name asked for.
        name: String,
    },
    /// An array of another length than asked for.
    #[error("{}: array `{name}` has {expected} bytes, {found} were asked for; the state is of another model or layout", path.display())]
    Size {
        /// Which folder.
        path: PathBuf,
        /// Which array.
        name: String,
        /// Bytes it has.
        expected: u64,
        /// Bytes asked for.
        found: u64,
    },
    /// Whoever holds the arrays could not give their bytes.
    #[error("cannot read what is to be saved: {what}")]
    Source {
        /// Why.
        what: String,
    },
    /// Two arrays of one name were to be saved.
    #[error("two arrays are named `{name}`; rename one")]
    Duplicate {
        /// The name.
        name: String,
    },
    /// The thread that saves is gone.
    #[error("the thread that saves states has stopped; start the run again from the newest state")]
    Thread,
}

/// A folder of training states.
#[derive(Debug, Clone)]
pub struct StateDir {
    dir: PathBuf,
    keep_last: usize,
}

impl StateDir {
    /// Name a folder, which the first save creates; `keep_last` states stay in it, at least one.
    pub fn new(dir: &Path, keep_last: usize) -> Result<StateDir, StateError> {
        if keep_last == 0 {
            return Err(StateError::KeepLast);
        }
        Ok(StateDir { dir: dir.to_path_buf(), keep_last })
    }

    /// The folder.
    pub fn path(&self) -> &Path {
        &self.dir
    }

    /// Where a step's state lies.
    pub fn step_path(&self, step: u64) -> PathBuf {
        self.dir.join(format!("step-{step:08}"))
    }
}

/// The step of a folder's name, as `step_path` writes it.
fn parse_step(name: &str) -> Option<u64> {
    let step = name.strip_prefix("step-")?.parse().ok()?;
    (format!("step-{step:08}") == name).then_some(step)
}

#[cfg(test)]
mod tests;
