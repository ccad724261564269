//! Writing a state, then letting go of the oldest.

use super::manifest::{ALIGN, ArrayInfo, BLOCK_BYTES, DATA, FORMAT, MANIFEST, Manifest};
use super::{StateDir, StateError};
use crate::atomic::{FolderWriter, SaveError, check_space, clean_leftovers};
use crate::effects;
use serde_json::Value;
use std::borrow::Cow;
use std::collections::HashSet;
use std::io::Write;
use std::time::Instant;

/// A named array to be saved.
#[derive(Debug, Clone)]
pub struct Array<'a> {
    /// Name, unique within the state.
    pub name: String,
    /// Its bytes.
    pub bytes: Cow<'a, [u8]>,
}

impl<'a> Array<'a> {
    /// Borrow the bytes of an array.
    pub fn new(name: impl Into<String>, bytes: &'a [u8]) -> Array<'a> {
        Array { name: name.into(), bytes: Cow::Borrowed(bytes) }
    }
}

/// What a save did.
#[derive(Debug, Clone, PartialEq)]
pub struct SaveReport {
    /// The step saved.
    pub step: u64,
    /// Bytes on disk.
    pub bytes: u64,
    /// Time it took.
    pub seconds: f64,
    /// Older states removed.
    pub pruned: usize,
    /// Why an older state could not be removed; the new one stands nevertheless.
    pub prune_error: Option<String>,
}

impl StateDir {
    /// Save a step. On success it is durable and has been read back; on failure what existed
    /// before still stands. A state of the same step is replaced.
    pub fn save(&self, step: u64, meta: &Value, arrays: &[Array<'_>]) -> Result<SaveReport, StateError> {
        let named: Vec<(&str, u64)> =
            arrays.iter().map(|array| (array.name.as_str(), array.bytes.len() as u64)).collect();
        self.save_from(step, meta, &named, |array, first, out| {
            out.copy_from_slice(&arrays[array].bytes[first as usize..][..out.len()]);
            Ok(())
        })
    }

    /// The same for `arrays` (name, bytes) that are nowhere whole: `read(array, first byte, out)`
    /// gives a block at a time, in the order of the file.
    pub fn save_from(
        &self,
        step: u64,
        meta: &Value,
        arrays: &[(&str, u64)],
        read: impl FnMut(usize, u64, &mut [u8]) -> Result<(), StateError>,
    ) -> Result<SaveReport, StateError> {
        let started = Instant::now();
        let mut names = HashSet::new();
        if let Some((name, _)) = arrays.iter().find(|(name, _)| !names.insert(*name)) {
            return Err(StateError::Duplicate { name: name.to_string() });
        }
        effects::create_dirs(&self.dir).map_err(SaveError::io("create", &self.dir))?;
        clean_leftovers(&self.dir)?;
        let (mut manifest, file_bytes) = plan(step, meta, arrays);
        // Eleven digits a checksum, and a page for the folder itself.
        let blocks: u64 = manifest.arrays.iter().map(|array| array.bytes.div_ceil(BLOCK_BYTES)).sum();
        let needs = file_bytes + manifest.to_bytes().len() as u64 + blocks * 11 + ALIGN;
        check_space(&self.dir, needs)?;
        let folder = FolderWriter::new(&self.step_path(step))?;
        write_arrays(&folder, &mut manifest, read)?;
        let text = manifest.to_bytes();
        folder.write(MANIFEST, &text)?;
        folder.commit()?;
        self.check(step)?;
        let (pruned, prune_error) = self.prune(step);
        Ok(SaveReport {
            step,
            bytes: file_bytes + text.len() as u64,
            seconds: started.elapsed().as_secs_f64(),
            pruned,
            prune_error: prune_error.map(|error| error.to_string()),
        })
    }

    /// Keep the newest `keep_last` whole states up to the one just saved. Later steps are of a run
    /// that was rewound and stay: they are not ours to judge. Damaged ones go once they are older
    /// than all that is kept.
    fn prune(&self, saved: u64) -> (usize, Option<StateError>) {
        let found = match self.list() {
            Ok(found) => found,
            Err(error) => return (0, Some(error)),
        };
        let (mut kept, mut pruned) = (0, 0);
        for state in found.iter().rev().filter(|state| state.step <= saved) {
            if kept < self.keep_last {
                kept += usize::from(state.whole.is_ok());
                continue;
            }
            // Renamed first, so that a half-removed state is never seen as one.
            let aside = self.dir.join(format!(".step-{:08}.tmp-{}", state.step, std::process::id()));
            let removed = effects::rename(&state.path, &aside).and_then(|()| effects::remove(&aside));
            if let Err(error) = removed {
                return (pruned, Some(SaveError::io("remove", &state.path)(error).into()));
            }
            pruned += 1;
        }
        (pruned, None)
    }
}

/// Where each array will lie, checksums still absent, and the length of the file.
fn plan(step: u64, meta: &Value, arrays: &[(&str, u64)]) -> (Manifest, u64) {
    let mut end = 0u64;
    let arrays = arrays.iter().map(|(name, bytes)| {
        let (offset, bytes) = (end.next_multiple_of(ALIGN), *bytes);
        end = offset + bytes;
        ArrayInfo { name: name.to_string(), offset, bytes, crc32c: Vec::new() }
    });
    let arrays = arrays.collect();
    let manifest = Manifest {
        format: FORMAT,
        step,
        meta: meta.clone(),
        file_bytes: end,
        block_bytes: BLOCK_BYTES,
        arrays,
    };
    (manifest, end)
}

fn write_arrays(
    folder: &FolderWriter,
    manifest: &mut Manifest,
    mut read: impl FnMut(usize, u64, &mut [u8]) -> Result<(), StateError>,
) -> Result<(), StateError> {
    let mut file = folder.file(DATA)?;
    let path = file.path().to_path_buf();
    let mut block = Vec::new();
    for (array, info) in manifest.arrays.iter_mut().enumerate() {
        let padding = vec![0; (info.offset - file.written()) as usize];
        file.write_all(&padding).map_err(SaveError::io("write", &path))?;
        for first in (0..info.bytes).step_by(BLOCK_BYTES as usize) {
            block.resize((info.bytes - first).min(BLOCK_BYTES) as usize, 0);
            read(array, first, &mut block)?;
            // Summed while in cache, right before it is written.
            info.crc32c.push(crc32c::crc32c(&block));
            file.write_all(&block).map_err(SaveError::io("write", &path))?;
        }
    }
    Ok(file.finish().map(drop)?)
}
