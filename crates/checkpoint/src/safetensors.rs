//! Reading safetensors: the header is checked here, the bytes are read later by `Weights`.
//!
//! The entries are parsed with the `safetensors` crate's types; the map around them by us, because
//! a hash map would hide a name that stands twice. Rules: tensors lie back to back from byte 0 of
//! the data to the end of the file, and shape times type is exactly the bytes.

use crate::WeightType;
use crate::weights::{FormatError, Rows, WeightError, WeightInfo, Weights, open};
use safetensors::Dtype;
use safetensors::tensor::TensorInfo;
use serde::de::{Deserialize, Deserializer, Error, MapAccess, Visitor};
use std::collections::{BTreeMap, HashMap, HashSet};
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::Arc;

/// Longest header we read, as in the reference implementation.
const MAX_HEADER: u64 = 100_000_000;
const MAX_DIMS: usize = 16;

/// A checked header.
#[derive(Debug, Clone, PartialEq)]
pub struct Header {
    /// Tensors in the order of their bytes.
    pub tensors: Vec<Entry>,
    /// First byte of the data in the file.
    pub data_start: u64,
}

/// A tensor of a checked header.
#[derive(Debug, Clone, PartialEq)]
pub struct Entry {
    /// Name.
    pub name: String,
    /// Shape, outermost dimension first.
    pub shape: Vec<usize>,
    /// Element type, or the name of one we do not widen.
    pub dtype: Result<WeightType, String>,
    /// First byte in the file.
    pub offset: u64,
    /// Bytes.
    pub bytes: u64,
}

/// The entries of a header with their names, none lost.
struct Entries(Vec<(String, TensorInfo)>);

impl<'de> Deserialize<'de> for Entries {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Entries, D::Error> {
        struct Walk;
        impl<'de> Visitor<'de> for Walk {
            type Value = Entries;

            fn expecting(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
                f.write_str("an object of tensors")
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Entries, A::Error> {
                let mut entries = Vec::new();
                while let Some(name) = map.next_key::<String>()? {
                    if name == "__metadata__" {
                        map.next_value::<Option<HashMap<String, String>>>()?;
                        continue;
                    }
                    let info = map
                        .next_value::<TensorInfo>()
                        .map_err(|error| A::Error::custom(format!("tensor `{name}`: {error}")))?;
                    entries.push((name, info));
                }
                Ok(Entries(entries))
            }
        }
        deserializer.deserialize_map(Walk)
    }
}

/// Length of the JSON after the first eight bytes, which `prefix` holds.
pub fn header_length(prefix: &[u8], file_len: u64) -> Result<u64, FormatError> {
    let truncated = |what: &str, needs| FormatError::Truncated { what: what.into(), needs, has: file_len };
    let Some(length) = prefix.first_chunk::<8>() else {
        return Err(truncated("the length of the header", 8));
    };
    let length = u64::from_le_bytes(*length);
    if length > MAX_HEADER {
        let what = "the header's length in bytes".to_string();
        return Err(FormatError::Limit { what, found: length, limit: MAX_HEADER });
    }
    if length + 8 > file_len {
        return Err(truncated("the header", length + 8));
    }
    Ok(length)
}

/// Check the header of a file of `file_len` bytes that starts with `bytes` (at least the header).
pub fn parse_header(bytes: &[u8], file_len: u64) -> Result<Header, FormatError> {
    let length = header_length(bytes, file_len)?;
    let json = bytes.get(8..8 + length as usize).ok_or_else(|| FormatError::Truncated {
        what: "the header".into(),
        needs: length + 8,
        has: bytes.len() as u64,
    })?;
    let Entries(mut entries) = serde_json::from_slice(json)
        .map_err(|error| FormatError::malformed(format!("the header is no safetensors JSON ({error})")))?;
    let mut seen = HashSet::with_capacity(entries.len());
    if let Some((name, _)) = entries.iter().find(|(name, _)| !seen.insert(name.as_str())) {
        return Err(FormatError::Duplicate { name: name.clone() });
    }
    entries.sort_by_key(|(_, info)| info.data_offsets);
    let data_start = length + 8;
    let mut expected = 0u64;
    let mut tensors = Vec::with_capacity(entries.len());
    for (name, info) in entries {
        let entry = check_entry(name, info, expected, data_start, file_len)?;
        expected += entry.bytes;
        tensors.push(entry);
    }
    if data_start + expected != file_len {
        let extra = file_len - data_start - expected;
        return Err(FormatError::malformed(format!("{extra} bytes after the last tensor belong to none")));
    }
    Ok(Header { tensors, data_start })
}

fn check_entry(
    name: String,
    info: TensorInfo,
    expected: u64,
    data_start: u64,
    file_len: u64,
) -> Result<Entry, FormatError> {
    let (start, end) = (info.data_offsets.0 as u64, info.data_offsets.1 as u64);
    if info.shape.len() > MAX_DIMS {
        let what = format!("the number of dimensions of `{name}`");
        return Err(FormatError::Limit { what, found: info.shape.len() as u64, limit: MAX_DIMS as u64 });
    }
    if start != expected || end < start {
        return Err(FormatError::Offset { tensor: name, found: start, expected: expected.to_string() });
    }
    if end > file_len - data_start {
        let what = format!("tensor `{name}`");
        return Err(FormatError::Truncated { what, needs: end.saturating_add(data_start), has: file_len });
    }
    let bits = info
        .shape
        .iter()
        .try_fold(1usize, |product, size| product.checked_mul(*size))
        .and_then(|elements| elements.checked_mul(info.dtype.bitsize()));
    let bytes = end - start;
    if bits.map(|bits| bits as u64) != bytes.checked_mul(8) {
        let shape = info.shape.iter().map(|size| *size as u64).collect();
        return Err(FormatError::Size { tensor: name, shape, dtype: info.dtype.to_string(), found: bytes });
    }
    let dtype = match info.dtype {
        Dtype::F32 => Ok(WeightType::F32),
        Dtype::F16 => Ok(WeightType::F16),
        Dtype::BF16 => Ok(WeightType::Bf16),
        other => Err(other.to_string()),
    };
    Ok(Entry { name, shape: info.shape, dtype, offset: data_start + start, bytes })
}

impl Weights {
    /// One safetensors file. Tensors of other types than F32, F16 and BF16 are refused by name when
    /// they are asked for.
    pub fn open_safetensors(path: &Path) -> Result<Weights, WeightError> {
        let (file, file_len) = open(path)?;
        let failed = |source| WeightError::Io { path: path.to_path_buf(), source };
        let mut bytes = vec![0; file_len.min(8) as usize];
        file.read_exact_at(&mut bytes, 0).map_err(failed)?;
        let length = header_length(&bytes, file_len).map_err(|error| error.at(path))?;
        bytes.resize(8 + length as usize, 0);
        file.read_exact_at(&mut bytes, 0).map_err(failed)?;
        let header = parse_header(&bytes, file_len).map_err(|error| error.at(path))?;
        let mut weights = Weights::empty(path);
        let mut infos = Vec::with_capacity(header.tensors.len());
        for Entry { name, shape, dtype, offset, bytes } in header.tensors {
            match dtype {
                Ok(dtype) => {
                    let file = path.to_path_buf();
                    infos.push(WeightInfo { name, shape, dtype, bytes, file, offset, rows: Rows::InOrder });
                }
                Err(dtype) => weights.refuse(name, dtype, path),
            }
        }
        weights.add_file(path, Arc::new(file), infos);
        Ok(weights)
    }

    /// A Hugging Face folder: `model.safetensors`, or the shards of `model.safetensors.index.json`,
    /// each of which must hold exactly the tensors the index says.
    pub fn open_folder(dir: &Path) -> Result<Weights, WeightError> {
        let single = dir.join("model.safetensors");
        if single.exists() {
            return Weights::open_safetensors(&single);
        }
        let index = dir.join("model.safetensors.index.json");
        if !index.exists() {
            return Err(WeightError::NoWeights { path: dir.to_path_buf() });
        }
        let wrong = |what: String| WeightError::Index { path: index.clone(), what };
        let shards = read_index(&index)?;
        let mut weights = Weights::empty(dir);
        for (shard, names) in shards {
            let path = dir.join(&shard);
            if !path.exists() {
                return Err(wrong(format!("shard {shard} is not in the folder")));
            }
            let part = Weights::open_safetensors(&path)?;
            if let Some(name) = names.iter().find(|name| !part.has(name)) {
                return Err(wrong(format!("tensor `{name}` should be in {shard} and is not")));
            }
            if let Some(name) = part.names().find(|name| !names.contains(*name)) {
                return Err(wrong(format!(
                    "{shard} holds tensor `{name}`, which the index does not place there"
                )));
            }
            weights.absorb(part);
        }
        Ok(weights)
    }
}

/// Shard file to the names of its tensors.
fn read_index(index: &Path) -> Result<BTreeMap<String, HashSet<String>>, WeightError> {
    let (file, length) = open(index)?;
    let failed = |source| WeightError::Io { path: index.to_path_buf(), source };
    let wrong = |what: String| WeightError::Index { path: index.to_path_buf(), what };
    if length > MAX_HEADER {
        return Err(wrong(format!("{length} bytes are too many for an index (limit {MAX_HEADER})")));
    }
    let mut bytes = vec![0; length as usize];
    file.read_exact_at(&mut bytes, 0).map_err(failed)?;
    #[derive(serde::Deserialize)]
    struct Index {
        weight_map: BTreeMap<String, String>,
    }
    let Index { weight_map } = serde_json::from_slice(&bytes).map_err(|error| wrong(error.to_string()))?;
    let mut shards: BTreeMap<String, HashSet<String>> = BTreeMap::new();
    for (name, shard) in weight_map {
        // A shard is a file of this folder: an index from elsewhere must not make us open others.
        if shard.contains('/') || shard == ".." || shard.contains('\0') {
            return Err(wrong(format!("tensor `{name}` lies in {shard:?}, which is outside the folder")));
        }
        shards.entry(shard).or_default().insert(name);
    }
    Ok(shards)
}
