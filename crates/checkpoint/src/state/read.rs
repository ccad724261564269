//! Finding and reading states.

use super::manifest::{ArrayInfo, BLOCK_BYTES, DATA, MANIFEST, MAX_MANIFEST, Manifest, ManifestError};
use super::{StateDir, StateError, parse_manifest, parse_step};
use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

/// A folder that bears the name of a step.
#[derive(Debug)]
pub struct Found {
    /// The step of its name.
    pub step: u64,
    /// The folder.
    pub path: PathBuf,
    /// Whether its manifest and the lengths of its files are right.
    pub whole: Result<(), StateError>,
}

/// The newest whole state, and what was passed over.
#[derive(Debug)]
pub struct Newest {
    /// The state; none if there is none whole.
    pub checkpoint: Option<Checkpoint>,
    /// Newer folders that are damaged, and how.
    pub skipped: Vec<(PathBuf, StateError)>,
}

/// A state whose manifest is right. Its blocks are checked as they are read.
#[derive(Debug)]
pub struct Checkpoint {
    /// Optimizer steps done.
    pub step: u64,
    /// What the owner of the loop saved beside the arrays.
    pub meta: serde_json::Value,
    /// Its folder.
    pub path: PathBuf,
    arrays: Vec<ArrayInfo>,
    /// Held open, so that a state being read survives its removal.
    data: File,
}

impl StateDir {
    /// Every state, oldest first, with a cheap check of each. Reads no arrays.
    pub fn list(&self) -> Result<Vec<Found>, StateError> {
        let failed = |source| StateError::Io { path: self.dir.clone(), source };
        let entries = match std::fs::read_dir(&self.dir) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
            other => other.map_err(failed)?,
        };
        let mut found = Vec::new();
        for entry in entries {
            let path = entry.map_err(failed)?.path();
            let step = path.file_name().and_then(|name| name.to_str()).and_then(parse_step);
            if let Some(step) = step {
                let whole = Checkpoint::open(&path, step).map(drop);
                found.push(Found { step, path, whole });
            }
        }
        found.sort_by_key(|state| state.step);
        Ok(found)
    }

    /// The newest state of which every block is right. Reads it once to know.
    pub fn newest(&self) -> Result<Newest, StateError> {
        let mut skipped = Vec::new();
        for state in self.list()?.into_iter().rev() {
            let open = || Checkpoint::open(&state.path, state.step);
            let checked = |state: Checkpoint| state.verify_all().map(|()| state);
            match state.whole.and_then(|()| open()).and_then(checked) {
                Ok(checkpoint) => return Ok(Newest { checkpoint: Some(checkpoint), skipped }),
                Err(error) => skipped.push((state.path, error)),
            }
        }
        Ok(Newest { checkpoint: None, skipped })
    }

    /// The state of one step.
    pub fn open(&self, step: u64) -> Result<Checkpoint, StateError> {
        Checkpoint::open(&self.step_path(step), step)
    }

    pub(super) fn check(&self, step: u64) -> Result<(), StateError> {
        self.open(step).map(drop)
    }
}

fn open_file(path: &Path) -> Result<(File, u64), StateError> {
    let failed = |source| StateError::Io { path: path.to_path_buf(), source };
    let file = File::open(path).map_err(failed)?;
    let length = file.metadata().map_err(failed)?.len();
    Ok((file, length))
}

impl Checkpoint {
    fn open(path: &Path, step: u64) -> Result<Checkpoint, StateError> {
        let manifest_path = path.join(MANIFEST);
        let wrong = |source| StateError::Manifest { path: manifest_path.clone(), source };
        let (file, length) = open_file(&manifest_path)?;
        if length > MAX_MANIFEST {
            let what = format!("{length} bytes, the limit is {MAX_MANIFEST}");
            return Err(wrong(ManifestError::Content(what)));
        }
        let mut bytes = vec![0; length as usize];
        file.read_exact_at(&mut bytes, 0)
            .map_err(|source| StateError::Io { path: manifest_path.clone(), source })?;
        let manifest: Manifest = parse_manifest(&bytes).map_err(wrong)?;
        if manifest.step != step {
            let what = format!("it is of step {}, its folder of step {step}", manifest.step);
            return Err(wrong(ManifestError::Content(what)));
        }
        let data_path = path.join(DATA);
        let (data, found) = open_file(&data_path)?;
        if found != manifest.file_bytes {
            return Err(StateError::Length { path: data_path, expected: manifest.file_bytes, found });
        }
        let Manifest { step, meta, arrays, .. } = manifest;
        Ok(Checkpoint { step, meta, path: path.to_path_buf(), arrays, data })
    }

    /// Arrays in the order of their bytes.
    pub fn arrays(&self) -> &[ArrayInfo] {
        &self.arrays
    }

    /// An array by name.
    pub fn array(&self, name: &str) -> Result<&ArrayInfo, StateError> {
        let missing = || StateError::Missing { path: self.path.clone(), name: name.to_string() };
        self.arrays.iter().find(|array| array.name == name).ok_or_else(missing)
    }

    /// Read an array whole into `out` of exactly its length, every block checked.
    pub fn read(&self, name: &str, out: &mut [u8]) -> Result<(), StateError> {
        self.check_size(name, out.len() as u64)?;
        let info = self.array(name)?;
        for (block, out) in out.chunks_mut(BLOCK_BYTES as usize).enumerate() {
            self.read_block(info, block, out)?;
        }
        Ok(())
    }

    /// Whether an array has the length it is expected to have.
    pub fn check_size(&self, name: &str, bytes: u64) -> Result<(), StateError> {
        let info = self.array(name)?;
        if info.bytes != bytes {
            return Err(StateError::Size {
                path: self.path.clone(),
                name: name.to_string(),
                expected: info.bytes,
                found: bytes,
            });
        }
        Ok(())
    }

    /// Visit an array block by block (first byte, bytes), each checked, holding one at a time.
    pub fn for_each_block<E: From<StateError>>(
        &self,
        name: &str,
        mut visit: impl FnMut(u64, &[u8]) -> Result<(), E>,
    ) -> Result<(), E> {
        let info = self.array(name)?;
        let mut buffer = vec![0; info.bytes.min(BLOCK_BYTES) as usize];
        for block in 0..info.crc32c.len() {
            let first = block as u64 * BLOCK_BYTES;
            let out = &mut buffer[..(info.bytes - first).min(BLOCK_BYTES) as usize];
            self.read_block(info, block, out)?;
            visit(first, out)?;
        }
        Ok(())
    }

    /// Check every block of every array.
    pub fn verify_all(&self) -> Result<(), StateError> {
        self.arrays.iter().try_for_each(|array| self.for_each_block(&array.name, |_, _| Ok(())))
    }

    fn read_block(&self, info: &ArrayInfo, block: usize, out: &mut [u8]) -> Result<(), StateError> {
        let path = || self.path.join(DATA);
        let offset = info.offset + block as u64 * BLOCK_BYTES;
        self.data.read_exact_at(out, offset).map_err(|source| StateError::Io { path: path(), source })?;
        if crc32c::crc32c(out) != info.crc32c[block] {
            return Err(StateError::Corrupt { path: path(), array: info.name.clone(), block, offset });
        }
        Ok(())
    }
}
