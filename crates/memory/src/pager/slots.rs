//! The offload file: a slot for every chunk, a checksum of what was last written into it.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};

/// Where a chunk lies in the file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Slot {
    /// Count of all slots before it.
    pub index: usize,
    pub offset: u64,
}

/// Why a chunk could not be read or written; nothing of it has been used.
#[derive(Clone, Debug, thiserror::Error)]
pub enum SlotError {
    /// The system refused.
    #[error("cannot {verb} the offload file {}: {what}; free space there, or choose another memory.dir, and run again with --resume", path.display())]
    Io {
        /// read, write or create.
        verb: &'static str,
        /// Which file.
        path: PathBuf,
        /// Why.
        what: String,
    },
    /// The bytes that came back are not those that were written.
    #[error("the offload file {} gave back wrong bytes at {offset}: the drive is damaged; choose another memory.dir and run again with --resume", path.display())]
    Damaged {
        /// Which file.
        path: PathBuf,
        /// Where the chunk begins.
        offset: u64,
    },
}

/// The file of one run.
pub(super) struct Slots {
    path: PathBuf,
    file: File,
    sums: Mutex<Vec<Option<u32>>>,
}

impl Slots {
    /// Room for `count` slots in `bytes`, below `dir`. The name is gone at once: the space is free
    /// again however the process ends.
    pub fn create(dir: &Path, count: usize, bytes: u64) -> Result<Arc<Slots>, SlotError> {
        let path = dir.join(format!("offload-{}", std::process::id()));
        let failed = |source: std::io::Error| SlotError::Io {
            verb: "create",
            path: path.clone(),
            what: source.to_string(),
        };
        std::fs::create_dir_all(dir).map_err(failed)?;
        let file = File::options().read(true).write(true).create_new(true).open(&path).map_err(failed)?;
        std::fs::remove_file(&path).map_err(failed)?;
        file.set_len(bytes).map_err(failed)?;
        Ok(Arc::new(Slots { path: path.clone(), file, sums: Mutex::new(vec![None; count]) }))
    }

    fn sums(&self) -> std::sync::MutexGuard<'_, Vec<Option<u32>>> {
        self.sums.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
    }

    pub fn write(&self, slot: Slot, bytes: &[u8]) -> Result<(), SlotError> {
        self.sums()[slot.index] = Some(crc32c::crc32c(bytes));
        self.file.write_all_at(bytes, slot.offset).map_err(|source| SlotError::Io {
            verb: "write",
            path: self.path.clone(),
            what: source.to_string(),
        })
    }

    pub fn read(&self, slot: Slot, bytes: &mut [u8]) -> Result<(), SlotError> {
        self.file.read_exact_at(bytes, slot.offset).map_err(|source| SlotError::Io {
            verb: "read",
            path: self.path.clone(),
            what: source.to_string(),
        })?;
        if self.sums()[slot.index] != Some(crc32c::crc32c(bytes)) {
            return Err(SlotError::Damaged { path: self.path.clone(), offset: slot.offset });
        }
        Ok(())
    }
}
