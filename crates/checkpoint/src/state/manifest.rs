//! The manifest of a training state: one line of JSON, then one with its checksum.

use serde::{Deserialize, Serialize};
use serde_json::Value;
use std::collections::HashSet;

/// Bytes per checksum. Small enough to name a bad sector, large enough that sums weigh nothing.
pub const BLOCK_BYTES: u64 = 4 << 20;
/// Arrays start on page boundaries, so that they can be read straight into aligned memory.
pub(crate) const ALIGN: u64 = 4096;
pub(crate) const FORMAT: u32 = 1;
pub(crate) const MANIFEST: &str = "manifest.json";
pub(crate) const DATA: &str = "state.bin";
/// A manifest of 64 MiB describes a state of some 20 TB.
pub(crate) const MAX_MANIFEST: u64 = 64 << 20;

/// What a state's folder holds.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Manifest {
    /// Version of this layout.
    pub format: u32,
    /// Optimizer steps done.
    pub step: u64,
    /// What the owner of the loop wants back.
    pub meta: Value,
    /// Length of `state.bin`.
    pub file_bytes: u64,
    /// Bytes per checksum.
    pub block_bytes: u64,
    /// Arrays in the order of their bytes.
    pub arrays: Vec<ArrayInfo>,
}

/// A named array of a state.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct ArrayInfo {
    /// Name.
    pub name: String,
    /// First byte in `state.bin`.
    pub offset: u64,
    /// Bytes.
    pub bytes: u64,
    /// CRC-32C of each block of `BLOCK_BYTES`, the last one shorter.
    pub crc32c: Vec<u32>,
}

/// A manifest that cannot be believed.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
pub enum ManifestError {
    /// Bytes were lost or changed.
    #[error("the manifest does not match its checksum")]
    Checksum,
    /// Written by another version.
    #[error("the manifest is of format {0}, this build reads format {FORMAT}")]
    Format(u64),
    /// Whole, but not a manifest.
    #[error("the manifest is wrong: {0}")]
    Content(String),
}

#[derive(Serialize, Deserialize)]
struct Trailer {
    crc32c: String,
}

impl Manifest {
    /// The two lines.
    pub(crate) fn to_bytes(&self) -> Vec<u8> {
        let mut bytes = serde_json::to_vec(self).expect("a manifest has string keys only");
        let crc32c = format!("{:08x}", crc32c::crc32c(&bytes));
        bytes.push(b'\n');
        bytes.extend(serde_json::to_vec(&Trailer { crc32c }).expect("one string"));
        bytes.push(b'\n');
        bytes
    }

    fn check(&self) -> Result<(), ManifestError> {
        let wrong = |what: String| Err(ManifestError::Content(what));
        if self.block_bytes != BLOCK_BYTES {
            return wrong(format!("blocks of {} bytes, expected {BLOCK_BYTES}", self.block_bytes));
        }
        let (mut names, mut end) = (HashSet::new(), 0);
        for array in &self.arrays {
            let name = &array.name;
            if !names.insert(name) {
                return wrong(format!("array `{name}` stands twice"));
            }
            if array.offset < end || !array.offset.is_multiple_of(ALIGN) {
                return wrong(format!("array `{name}` starts at byte {}", array.offset));
            }
            end = match array.offset.checked_add(array.bytes) {
                Some(end) if end <= self.file_bytes => end,
                _ => return wrong(format!("array `{name}` ends after the file")),
            };
            let blocks = array.bytes.div_ceil(BLOCK_BYTES);
            if blocks != array.crc32c.len() as u64 {
                return wrong(format!(
                    "array `{name}` has {} checksums, expected {blocks}",
                    array.crc32c.len()
                ));
            }
        }
        Ok(())
    }
}

/// Check the bytes of a manifest: its checksum, and that its arrays lie in order within the file.
pub fn parse_manifest(bytes: &[u8]) -> Result<Manifest, ManifestError> {
    let mut lines = bytes.split_inclusive(|byte| *byte == b'\n');
    let (Some(body), Some(trailer), None) = (lines.next(), lines.next(), lines.next()) else {
        return Err(ManifestError::Checksum);
    };
    let (Some(body), true) = (body.strip_suffix(b"\n"), trailer.ends_with(b"\n")) else {
        return Err(ManifestError::Checksum);
    };
    let expected = Trailer { crc32c: format!("{:08x}", crc32c::crc32c(body)) };
    // Compared as bytes: any change to the last line counts, too.
    let expected = serde_json::to_vec(&expected).expect("one string");
    if trailer.strip_suffix(b"\n") != Some(&expected[..]) {
        return Err(ManifestError::Checksum);
    }
    parse_body(body)
}

/// The first line, once its checksum has been found right.
pub(crate) fn parse_body(body: &[u8]) -> Result<Manifest, ManifestError> {
    let content = |error: serde_json::Error| ManifestError::Content(error.to_string());
    // The version first: a later one may have other fields.
    #[derive(Deserialize)]
    struct Version {
        format: u64,
    }
    let Version { format } = serde_json::from_slice(body).map_err(content)?;
    if format != u64::from(FORMAT) {
        return Err(ManifestError::Format(format));
    }
    let manifest: Manifest = serde_json::from_slice(body).map_err(content)?;
    manifest.check()?;
    Ok(manifest)
}
