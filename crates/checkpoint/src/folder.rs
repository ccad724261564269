//! Writing a Hugging Face folder: safetensors in one file or shards, and the small files beside it.
//!
//! Tensors are streamed: the caller writes each one's bytes when its turn comes, so nothing is ever
//! held whole. The folder appears when all of it is on disk.

use crate::atomic::{FolderWriter, SaveError, check_space};
use device::DType;
use serde_json::{Map, Value, json};
use std::collections::HashSet;
use std::io::{self, BufWriter, Write};
use std::path::Path;

/// A tensor to be written.
#[derive(Debug, Clone, PartialEq)]
pub struct OutTensor {
    /// Name in the file.
    pub name: String,
    /// Shape, outermost dimension first.
    pub shape: Vec<usize>,
    /// `F32`, `Bf16` or `F16`.
    pub dtype: DType,
}

impl OutTensor {
    /// Bytes in the file.
    pub fn bytes(&self) -> u64 {
        self.shape.iter().map(|size| *size as u64).product::<u64>() * self.dtype.size_bytes() as u64
    }

    fn dtype_name(&self) -> Result<&'static str, SaveError> {
        match self.dtype {
            DType::F32 => Ok("F32"),
            DType::Bf16 => Ok("BF16"),
            DType::F16 => Ok("F16"),
            dtype => Err(SaveError::Type { tensor: self.name.clone(), dtype }),
        }
    }
}

/// Write a model folder whole or not at all. `write` is called once per tensor, with its index and
/// where its little-endian bytes go, in the order of the files rather than of `tensors`.
/// `extra_files` (config.json, tokenizer.json) are written beside. Above `shard_bytes` of tensors
/// the folder is split as `transformers` splits it. An existing model folder is replaced.
pub fn save_folder(
    dir: &Path,
    tensors: &[OutTensor],
    mut write: impl FnMut(usize, &mut dyn Write) -> io::Result<()>,
    extra_files: &[(String, Vec<u8>)],
    shard_bytes: u64,
) -> Result<(), SaveError> {
    check_names(tensors, extra_files)?;
    check_replaceable(dir, extra_files)?;
    let shards = plan(tensors, shard_bytes);
    let headers = shards.iter().map(|shard| header(tensors, shard)).collect::<Result<Vec<_>, _>>()?;
    let total: u64 = tensors.iter().map(OutTensor::bytes).sum();
    let small = extra_files.iter().map(|(_, bytes)| bytes.len() as u64).sum::<u64>()
        + headers.iter().map(|header| header.len() as u64 * 2).sum::<u64>();
    check_space(dir, total + small)?;

    let folder = FolderWriter::new(dir)?;
    let mut weight_map: Vec<(&str, String)> = Vec::new();
    for (n, (shard, header)) in shards.iter().zip(&headers).enumerate() {
        let name = match shards.len() {
            1 => "model.safetensors".to_string(),
            count => format!("model-{:05}-of-{count:05}.safetensors", n + 1),
        };
        write_shard(&folder, &name, tensors, shard, header, &mut write)?;
        weight_map.extend(shard.iter().map(|index| (tensors[*index].name.as_str(), name.clone())));
    }
    if shards.len() > 1 {
        weight_map.sort();
        let weight_map: Map<String, Value> =
            weight_map.into_iter().map(|(name, shard)| (name.to_string(), json!(shard))).collect();
        let index = json!({ "metadata": { "total_size": total }, "weight_map": weight_map });
        folder.write("model.safetensors.index.json", format!("{index:#}\n").as_bytes())?;
    }
    for (name, bytes) in extra_files {
        folder.write(name, bytes)?;
    }
    folder.commit()
}

fn check_names(tensors: &[OutTensor], extra_files: &[(String, Vec<u8>)]) -> Result<(), SaveError> {
    let bad = |name: &str, why| Err(SaveError::Name { name: name.to_string(), why });
    let mut seen = HashSet::new();
    for tensor in tensors {
        if tensor.name == "__metadata__" {
            return bad(&tensor.name, "safetensors keeps it for itself; rename the tensor");
        }
        if !seen.insert(tensor.name.as_str()) {
            return bad(&tensor.name, "two tensors have it; rename one");
        }
    }
    let mut seen = HashSet::new();
    for (name, _) in extra_files {
        if is_weights(name) {
            return bad(name, "the weights are written under such names; rename the file");
        }
        if !seen.insert(name.as_str()) {
            return bad(name, "two files have it; rename one");
        }
    }
    Ok(())
}

fn is_weights(name: &str) -> bool {
    name.starts_with("model") && (name.ends_with(".safetensors") || name.ends_with(".safetensors.index.json"))
}

/// A folder that holds more than a model is somebody's work: replacing it would delete that.
fn check_replaceable(dir: &Path, extra_files: &[(String, Vec<u8>)]) -> Result<(), SaveError> {
    let foreign = |entry: String| Err(SaveError::Foreign { path: dir.to_path_buf(), entry });
    let meta = match dir.symlink_metadata() {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        other => other.map_err(SaveError::io("look at", dir))?,
    };
    if !meta.is_dir() {
        let why = "it is a file or a link; name a folder";
        return Err(SaveError::Name { name: dir.display().to_string(), why });
    }
    for entry in dir.read_dir().map_err(SaveError::io("list", dir))? {
        let entry = entry.map_err(SaveError::io("list", dir))?;
        let name = entry.file_name().to_string_lossy().into_owned();
        let ours = is_weights(&name)
            || extra_files.iter().any(|(extra, _)| *extra == name)
            || [".json", ".txt", ".jinja", ".model", "README.md"].iter().any(|end| name.ends_with(end));
        if !ours || !entry.file_type().is_ok_and(|kind| kind.is_file()) {
            return foreign(name);
        }
    }
    Ok(())
}

/// Indices of the tensors of each shard, in the order of the file. Shards fill in the order given.
fn plan(tensors: &[OutTensor], shard_bytes: u64) -> Vec<Vec<usize>> {
    let mut shards = vec![Vec::new()];
    let mut filled = 0;
    for (index, tensor) in tensors.iter().enumerate() {
        if filled > 0 && filled + tensor.bytes() > shard_bytes {
            shards.push(Vec::new());
            filled = 0;
        }
        shards.last_mut().expect("never empty").push(index);
        filled += tensor.bytes();
    }
    // Wider types first keeps every tensor aligned to its own elements, as the library does.
    for shard in &mut shards {
        shard.sort_by_key(|index| {
            let tensor = &tensors[*index];
            (std::cmp::Reverse(tensor.dtype.size_bytes()), &tensor.name)
        });
    }
    shards
}

/// Length, JSON, and spaces up to a multiple of eight.
fn header(tensors: &[OutTensor], shard: &[usize]) -> Result<Vec<u8>, SaveError> {
    let mut entries = Map::new();
    // Without it `transformers` refuses the file.
    entries.insert("__metadata__".into(), json!({ "format": "pt" }));
    let mut at = 0;
    for index in shard {
        let tensor = &tensors[*index];
        let end = at + tensor.bytes();
        let entry =
            json!({ "dtype": tensor.dtype_name()?, "shape": tensor.shape, "data_offsets": [at, end] });
        entries.insert(tensor.name.clone(), entry);
        at = end;
    }
    let mut text = Value::Object(entries).to_string();
    while !text.len().is_multiple_of(8) {
        text.push(' ');
    }
    let mut bytes = (text.len() as u64).to_le_bytes().to_vec();
    bytes.extend(text.into_bytes());
    Ok(bytes)
}

fn write_shard(
    folder: &FolderWriter,
    name: &str,
    tensors: &[OutTensor],
    shard: &[usize],
    header: &[u8],
    write: &mut impl FnMut(usize, &mut dyn Write) -> io::Result<()>,
) -> Result<(), SaveError> {
    let file = folder.file(name)?;
    let path = file.path().to_path_buf();
    let mut out = BufWriter::with_capacity(1 << 20, file);
    out.write_all(header).map_err(SaveError::io("write", &path))?;
    for index in shard {
        let mut counted = Counted { out: &mut out, written: 0 };
        write(*index, &mut counted).map_err(SaveError::io("write", &path))?;
        let (tensor, written) = (&tensors[*index], counted.written);
        if written != tensor.bytes() {
            let (tensor, expected) = (tensor.name.clone(), tensor.bytes());
            return Err(SaveError::Length { tensor, expected, written });
        }
    }
    let file = out.into_inner().map_err(|error| SaveError::io("write", &path)(error.into_error()))?;
    file.finish().map(drop)
}

struct Counted<'a, W: Write> {
    out: &'a mut W,
    written: u64,
}

impl<W: Write> Write for Counted<'_, W> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let n = self.out.write(bytes)?;
        self.written += n as u64;
        Ok(n)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.out.flush()
    }
}
