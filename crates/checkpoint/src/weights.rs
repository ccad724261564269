//! One reader for model files: named tensors, whatever file and element type holds them.
//!
//! Opening reads headers only; elements are read on demand with positioned reads, so a tensor
//! larger than memory can be taken in pieces. A file that shrinks meanwhile is an error, not a crash.

use crate::WeightType;
use std::collections::HashMap;
use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// Bytes read at a time while widening: fits the second-level cache beside its output.
const PIECE_BYTES: usize = 256 << 10;

/// A weight file that cannot be read.
#[derive(Debug, thiserror::Error)]
pub enum WeightError {
    /// The operating system refused.
    #[error("cannot read {}: {source}", path.display())]
    Io {
        /// Which file.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// A folder without weights.
    #[error(
        "{} holds neither model.safetensors nor model.safetensors.index.json; name a Hugging Face model folder",
        path.display()
    )]
    NoWeights {
        /// Which folder.
        path: PathBuf,
    },
    /// The bytes do not follow the format.
    #[error("{}: {source}", path.display())]
    Format {
        /// Which file.
        path: PathBuf,
        /// What is wrong.
        source: FormatError,
    },
    /// An index and its shards disagree.
    #[error("{}: {what}; download the folder again", path.display())]
    Index {
        /// Which index.
        path: PathBuf,
        /// What is wrong.
        what: String,
    },
    /// No tensor of that name.
    #[error("no tensor `{name}` in {}; it holds {holds}", path.display())]
    Missing {
        /// The name asked for.
        name: String,
        /// Where.
        path: PathBuf,
        /// A few names that are there.
        holds: String,
    },
    /// A tensor whose elements we cannot widen.
    #[error("{}: tensor `{name}` is of type {dtype}; {SUPPORTED}", path.display())]
    Type {
        /// Which tensor.
        name: String,
        /// Its type.
        dtype: String,
        /// In which file.
        path: PathBuf,
    },
    /// Elements asked for that are not there, or not whole blocks.
    #[error(
        "tensor `{name}`: elements {first}..{end} were asked for, it has {elements} in blocks of {block}; ask for whole blocks within it"
    )]
    Range {
        /// Which tensor.
        name: String,
        /// First element asked for.
        first: usize,
        /// End of what was asked for.
        end: usize,
        /// Elements it has.
        elements: usize,
        /// Elements of a block.
        block: usize,
    },
    /// GGUF metadata that describes no model we know.
    #[error("{}: `{key}` {what}", path.display())]
    Metadata {
        /// Which file.
        path: PathBuf,
        /// Which key.
        key: String,
        /// What is wrong with it, and the remedy.
        what: String,
    },
}

pub(crate) const SUPPORTED: &str = "supported are f32, f16, bf16 and in GGUF q4_0, q4_1, q5_0, q5_1, q8_0, q2_k to q6_k: convert the model to one of them";

/// Bytes that do not follow their format.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
pub enum FormatError {
    /// The file ends early.
    #[error("{what} needs {needs} bytes, the file has {has}: it is truncated, download it again")]
    Truncated {
        /// What was being read.
        what: String,
        /// Bytes the file would have to have.
        needs: u64,
        /// Bytes it has.
        has: u64,
    },
    /// A count or length beyond what any real file has.
    #[error("{what} is {found}, the limit is {limit}: the file is damaged or of another format")]
    Limit {
        /// Which count.
        what: String,
        /// Its value.
        found: u64,
        /// Our limit.
        limit: u64,
    },
    /// Not what the format says.
    #[error("{what}: the file is damaged or of another format")]
    Malformed {
        /// What is wrong.
        what: String,
    },
    /// A name stands twice.
    #[error("`{name}` stands twice in the header: the file is damaged, write it again")]
    Duplicate {
        /// Which.
        name: String,
    },
    /// An element type that is not supported.
    #[error("tensor `{tensor}` is of type {dtype}; {SUPPORTED}")]
    Type {
        /// Which tensor.
        tensor: String,
        /// Name or number of its type.
        dtype: String,
    },
    /// Shape, type and bytes do not agree.
    #[error("tensor `{tensor}` {shape:?} of type {dtype} does not make {found} bytes: the file is damaged")]
    Size {
        /// Which tensor.
        tensor: String,
        /// Its shape.
        shape: Vec<u64>,
        /// Its type.
        dtype: String,
        /// Bytes the header gives it.
        found: u64,
    },
    /// Two tensors share bytes, or bytes belong to none.
    #[error("tensor `{tensor}` starts at byte {found} of the data, expected {expected}: the file is damaged")]
    Offset {
        /// Which tensor.
        tensor: String,
        /// Where it starts.
        found: u64,
        /// Where it should.
        expected: String,
    },
}

impl FormatError {
    pub(crate) fn malformed(what: impl Into<String>) -> FormatError {
        FormatError::Malformed { what: what.into() }
    }

    pub(crate) fn at(self, path: &Path) -> WeightError {
        WeightError::Format { path: path.to_path_buf(), source: self }
    }
}

/// How the rows of a stored matrix lie.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Rows {
    /// In order.
    InOrder,
    /// Each head's two halves interleaved (row 2i + s holds row s H/2 + i), as llama GGUFs have q and k.
    Interleaved {
        /// Rows H of one head.
        head: usize,
    },
}

impl Rows {
    /// Stored row of row `row`.
    fn stored(self, row: usize) -> usize {
        match self {
            Rows::InOrder => row,
            Rows::Interleaved { head } => {
                let (first, within) = (row / head * head, row % head);
                first + 2 * (within % (head / 2)) + within / (head / 2)
            }
        }
    }
}

/// A tensor of a model file.
#[derive(Clone, Debug, PartialEq)]
pub struct WeightInfo {
    /// Name in the file.
    pub name: String,
    /// Shape, outermost dimension first, also for GGUF.
    pub shape: Vec<usize>,
    /// Element type in the file.
    pub dtype: WeightType,
    /// Bytes in the file.
    pub bytes: u64,
    /// The file.
    pub file: PathBuf,
    /// First byte in the file.
    pub(crate) offset: u64,
    pub(crate) rows: Rows,
}

impl WeightInfo {
    /// Elements.
    pub fn len(&self) -> usize {
        self.shape.iter().product()
    }

    /// Whether it has no elements.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    fn row_len(&self) -> usize {
        self.shape.iter().skip(1).product()
    }
}

/// The tensors of a model, over one file or several.
#[derive(Debug, Clone)]
pub struct Weights {
    path: PathBuf,
    infos: Vec<WeightInfo>,
    /// Tensors of types we do not widen: name to (type, file). Refused when asked for, since
    /// folders carry integer buffers no model of ours reads.
    refused: HashMap<String, (String, PathBuf)>,
    files: HashMap<PathBuf, Arc<File>>,
}

impl Weights {
    /// Nothing yet, from `path` (for messages).
    pub(crate) fn empty(path: &Path) -> Weights {
        let path = path.to_path_buf();
        Weights { path, infos: Vec::new(), refused: HashMap::new(), files: HashMap::new() }
    }

    pub(crate) fn add_file(&mut self, path: &Path, file: Arc<File>, infos: Vec<WeightInfo>) {
        self.files.insert(path.to_path_buf(), file);
        self.infos.extend(infos);
        self.infos.sort_by(|a, b| a.name.cmp(&b.name));
    }

    pub(crate) fn refuse(&mut self, name: String, dtype: String, path: &Path) {
        self.refused.insert(name, (dtype, path.to_path_buf()));
    }

    pub(crate) fn absorb(&mut self, other: Weights) {
        self.infos.extend(other.infos);
        self.infos.sort_by(|a, b| a.name.cmp(&b.name));
        self.refused.extend(other.refused);
        self.files.extend(other.files);
    }

    /// The same files under other names: `rename` gives the new name and order of rows, or drops it.
    pub(crate) fn renamed(&self, rename: impl Fn(&WeightInfo) -> Option<(String, Rows)>) -> Weights {
        let mut to = self.clone();
        to.infos = self
            .infos
            .iter()
            .filter_map(|info| rename(info).map(|(name, rows)| WeightInfo { name, rows, ..info.clone() }))
            .collect();
        to.infos.sort_by(|a, b| a.name.cmp(&b.name));
        to
    }

    /// Whether a tensor is there, of any type.
    pub(crate) fn has(&self, name: &str) -> bool {
        self.find(name).is_some() || self.refused.contains_key(name)
    }

    /// Every name with its file, of any type.
    pub(crate) fn names(&self) -> impl Iterator<Item = &str> {
        self.infos.iter().map(|info| info.name.as_str()).chain(self.refused.keys().map(String::as_str))
    }

    /// All tensors that can be read, sorted by name.
    pub fn infos(&self) -> &[WeightInfo] {
        &self.infos
    }

    /// The file or folder this was opened from.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// A tensor by name.
    pub fn find(&self, name: &str) -> Option<&WeightInfo> {
        let at = self.infos.binary_search_by(|info| info.name.as_str().cmp(name)).ok()?;
        Some(&self.infos[at])
    }

    /// A tensor by name, with an error that tells an absent one from one of a type we cannot read.
    pub fn get(&self, name: &str) -> Result<&WeightInfo, WeightError> {
        if let Some(info) = self.find(name) {
            return Ok(info);
        }
        let name = name.to_string();
        if let Some((dtype, path)) = self.refused.get(&name) {
            return Err(WeightError::Type { name, dtype: dtype.clone(), path: path.clone() });
        }
        let few: Vec<String> = self.infos.iter().take(3).map(|info| format!("`{}`", info.name)).collect();
        let holds = match self.infos.len() {
            0 => "no tensors".to_string(),
            1..=3 => few.join(", "),
            n => format!("{} and {} more", few.join(", "), n - 3),
        };
        Err(WeightError::Missing { name, path: self.path.clone(), holds })
    }

    /// All elements of a tensor, widened to f32.
    pub fn read_f32(&self, name: &str) -> Result<Vec<f32>, WeightError> {
        let mut out = vec![0.0; self.get(name)?.len()];
        self.read_rows_f32(name, 0, &mut out)?;
        Ok(out)
    }

    /// Elements `first_element..` of a tensor into `out`, widened to f32. For block types both ends
    /// are multiples of the block.
    pub fn read_rows_f32(
        &self,
        name: &str,
        first_element: usize,
        out: &mut [f32],
    ) -> Result<(), WeightError> {
        let info = self.get(name)?;
        let (block, _) = info.dtype.block();
        let end = first_element.saturating_add(out.len());
        let whole = first_element.is_multiple_of(block) && out.len().is_multiple_of(block);
        if end > info.len() || !whole {
            let (name, elements) = (name.to_string(), info.len());
            return Err(WeightError::Range { name, first: first_element, end, elements, block });
        }
        if out.is_empty() {
            return Ok(());
        }
        match info.rows {
            Rows::InOrder => self.read_run(info, first_element, out),
            Rows::Interleaved { .. } => {
                let (columns, mut at, mut out) = (info.row_len(), first_element, out);
                while !out.is_empty() {
                    let (row, column) = (at / columns, at % columns);
                    let (piece, rest) = out.split_at_mut((columns - column).min(out.len()));
                    self.read_run(info, info.rows.stored(row) * columns + column, piece)?;
                    at += piece.len();
                    out = rest;
                }
                Ok(())
            }
        }
    }

    /// Elements in the order of the file.
    fn read_run(&self, info: &WeightInfo, first: usize, out: &mut [f32]) -> Result<(), WeightError> {
        let (values, bytes) = info.dtype.block();
        let file = &self.files[&info.file];
        let blocks = (PIECE_BYTES / bytes).min(out.len() / values);
        let mut raw = vec![0; blocks * bytes];
        let mut at = info.offset + (first / values * bytes) as u64;
        for out in out.chunks_mut(blocks * values) {
            let raw = &mut raw[..out.len() / values * bytes];
            file.read_exact_at(raw, at)
                .map_err(|source| WeightError::Io { path: info.file.clone(), source })?;
            info.dtype.widen(raw, out);
            at += raw.len() as u64;
        }
        Ok(())
    }
}

/// Open a regular file: (file, length in bytes).
pub(crate) fn open(path: &Path) -> Result<(File, u64), WeightError> {
    let failed = |source| WeightError::Io { path: path.to_path_buf(), source };
    let file = File::open(path).map_err(failed)?;
    let meta = file.metadata().map_err(failed)?;
    if !meta.is_file() {
        return Err(failed(io::Error::other("it is no regular file; name the file itself")));
    }
    Ok((file, meta.len()))
}
