//! The header of a GGUF file, checked against the length of the file.
//!
//! Nothing is allocated from a count alone: a list grows only as its items are found in the bytes.

use super::metadata::{Array, Metadata, Value, plain_size, plain_value};
use crate::WeightType;
use crate::weights::FormatError;
use std::collections::HashSet;

const MAX_ITEMS: u64 = 1 << 20;
const MAX_NAME: u64 = 1 << 10;
const MAX_KEY: u64 = 1 << 16;
const MAX_DIMS: u32 = 4;
const MAX_NESTING: u32 = 4;
const MAX_ALIGNMENT: u64 = 1 << 20;
const DEFAULT_ALIGNMENT: u64 = 32;
/// GGUF type numbers.
const TEXT: u32 = 8;
const ARRAY: u32 = 9;

/// A checked header.
#[derive(Debug, Clone, PartialEq)]
pub struct Header {
    /// Version of the format, 2 or 3.
    pub version: u32,
    /// Alignment of tensors in bytes, a power of two.
    pub alignment: u64,
    /// Keys and values.
    pub metadata: Metadata,
    /// Tensors in the order of the file.
    pub tensors: Vec<Entry>,
}

/// A tensor of a checked header.
#[derive(Debug, Clone, PartialEq)]
pub struct Entry {
    /// Name.
    pub name: String,
    /// Shape, outermost dimension first (the file has the reverse).
    pub shape: Vec<usize>,
    /// Element type.
    pub dtype: WeightType,
    /// First byte in the file.
    pub offset: u64,
    /// Bytes.
    pub bytes: u64,
}

/// Check the header of a file of `file_len` bytes that starts with `bytes`. `Truncated` when `bytes`
/// end within the header, which a longer prefix of the file may cure.
pub fn parse_header(bytes: &[u8], file_len: u64) -> Result<Header, FormatError> {
    let mut cursor = Cursor { bytes, at: 0, file_len };
    if cursor.take(4, "the magic number")? != b"GGUF" {
        return Err(FormatError::malformed("the first four bytes are not `GGUF`"));
    }
    let version = cursor.u32("the version")?;
    match version {
        2 | 3 => {}
        v if v & 0xFFFF == 0 => {
            return Err(FormatError::malformed("it is big endian, which is not supported"));
        }
        v => return Err(FormatError::malformed(format!("version {v} is not supported, only 2 and 3"))),
    }
    let tensors = cursor.count("the number of tensors", MAX_ITEMS)?;
    let keys = cursor.count("the number of metadata keys", MAX_ITEMS)?;
    let mut metadata = Metadata::default();
    for _ in 0..keys {
        let key = cursor.text("a metadata key", MAX_KEY)?;
        let kind = cursor.u32(&key)?;
        let value = cursor.value(&key, kind)?;
        if !metadata.insert(key.clone(), value) {
            return Err(FormatError::Duplicate { name: key });
        }
    }
    let alignment = alignment(&metadata)?;
    let mut entries = Vec::new();
    let mut seen = HashSet::new();
    for _ in 0..tensors {
        let entry = cursor.tensor(alignment)?;
        if !seen.insert(entry.name.clone()) {
            return Err(FormatError::Duplicate { name: entry.name });
        }
        entries.push(entry);
    }
    place(&mut entries, (cursor.at as u64).next_multiple_of(alignment), file_len)?;
    Ok(Header { version, alignment, metadata, tensors: entries })
}

fn alignment(metadata: &Metadata) -> Result<u64, FormatError> {
    let Some(value) = metadata.get("general.alignment") else { return Ok(DEFAULT_ALIGNMENT) };
    match value.as_u64() {
        Some(n) if n.is_power_of_two() && (8..=MAX_ALIGNMENT).contains(&n) => Ok(n),
        _ => Err(FormatError::malformed(format!(
            "`general.alignment` is {value:?}, expected a power of two from 8 to {MAX_ALIGNMENT}"
        ))),
    }
}

/// Turn offsets in the data into offsets in the file; each within it, none overlapping another.
fn place(entries: &mut [Entry], data_start: u64, file_len: u64) -> Result<(), FormatError> {
    for entry in entries.iter_mut() {
        let start = data_start.checked_add(entry.offset);
        let end = start.and_then(|start| start.checked_add(entry.bytes)).unwrap_or(u64::MAX);
        if end > file_len {
            let what = format!("tensor `{}`", entry.name);
            return Err(FormatError::Truncated { what, needs: end, has: file_len });
        }
        entry.offset += data_start;
    }
    let mut order: Vec<&Entry> = entries.iter().collect();
    order.sort_by_key(|entry| (entry.offset, entry.bytes));
    for pair in order.windows(2) {
        let end = pair[0].offset + pair[0].bytes;
        if end > pair[1].offset {
            return Err(FormatError::Offset {
                tensor: pair[1].name.clone(),
                found: pair[1].offset - data_start,
                expected: format!("{} or more, where `{}` ends", end - data_start, pair[0].name),
            });
        }
    }
    Ok(())
}

struct Cursor<'a> {
    bytes: &'a [u8],
    at: usize,
    file_len: u64,
}

impl<'a> Cursor<'a> {
    fn take(&mut self, length: u64, what: &str) -> Result<&'a [u8], FormatError> {
        let end = (self.at as u64).saturating_add(length);
        if end > self.bytes.len() as u64 {
            // Past the file there is no longer prefix to try; both read as truncation.
            return Err(FormatError::Truncated { what: shorten(what), needs: end, has: self.file_len });
        }
        let piece = &self.bytes[self.at..end as usize];
        self.at = end as usize;
        Ok(piece)
    }

    fn u32(&mut self, what: &str) -> Result<u32, FormatError> {
        let bytes = self.take(4, what)?;
        Ok(u32::from_le_bytes([bytes[0], bytes[1], bytes[2], bytes[3]]))
    }

    fn u64(&mut self, what: &str) -> Result<u64, FormatError> {
        let bytes = self.take(8, what)?;
        Ok(bytes.iter().rev().fold(0, |value, byte| value << 8 | u64::from(*byte)))
    }

    fn count(&mut self, what: &str, limit: u64) -> Result<u64, FormatError> {
        let found = self.u64(what)?;
        if found > limit {
            return Err(FormatError::Limit { what: shorten(what), found, limit });
        }
        Ok(found)
    }

    fn text(&mut self, what: &str, limit: u64) -> Result<String, FormatError> {
        let length = self.count(what, limit)?;
        let bytes = self.take(length, what)?;
        let text = std::str::from_utf8(bytes)
            .map_err(|_| FormatError::malformed(format!("{} is not UTF-8", shorten(what))))?;
        Ok(text.to_string())
    }

    fn value(&mut self, key: &str, kind: u32) -> Result<Value, FormatError> {
        match (plain_size(kind), kind) {
            (Some(size), _) => plain_value(kind, self.take(size as u64, key)?)
                .ok_or_else(|| FormatError::malformed(format!("`{}` is no boolean", shorten(key)))),
            (_, TEXT) => self.text(key, self.file_len).map(Value::Text),
            (_, ARRAY) => self.array(key, 0).map(Value::Array),
            _ => Err(FormatError::malformed(format!("`{}` is of unknown type {kind}", shorten(key)))),
        }
    }

    fn array(&mut self, key: &str, depth: u32) -> Result<Array, FormatError> {
        let kind = self.u32(key)?;
        let count = self.count(key, self.file_len)?;
        if let Some(size) = plain_size(kind) {
            let bytes = self.take(count.saturating_mul(size as u64), key)?.to_vec();
            return Ok(Array::Plain { kind, bytes });
        }
        match kind {
            TEXT => {
                let items = (0..count).map(|_| self.text(key, self.file_len));
                Ok(Array::Text(items.collect::<Result<_, _>>()?))
            }
            ARRAY if depth + 1 < MAX_NESTING => {
                let items = (0..count).map(|_| self.array(key, depth + 1));
                Ok(Array::Nested(items.collect::<Result<_, _>>()?))
            }
            ARRAY => {
                let what = format!("the nesting of `{}`", shorten(key));
                Err(FormatError::Limit { what, found: MAX_NESTING.into(), limit: (MAX_NESTING - 1).into() })
            }
            _ => Err(FormatError::malformed(format!("`{}` lists unknown type {kind}", shorten(key)))),
        }
    }

    /// A tensor's entry; its offset is still relative to the data.
    fn tensor(&mut self, alignment: u64) -> Result<Entry, FormatError> {
        let name = self.text("the name of a tensor", MAX_NAME)?;
        let dims = self.u32(&name)?;
        if dims > MAX_DIMS {
            let what = format!("the number of dimensions of `{name}`");
            return Err(FormatError::Limit { what, found: dims.into(), limit: MAX_DIMS.into() });
        }
        let mut shape = (0..dims).map(|_| self.u64(&name)).collect::<Result<Vec<u64>, _>>()?;
        shape.reverse();
        let number = self.u32(&name)?;
        let offset = self.u64(&name)?;
        let Some(dtype) = WeightType::from_ggml(number) else {
            return Err(FormatError::Type { tensor: name, dtype: ggml_name(number) });
        };
        if !offset.is_multiple_of(alignment) {
            let expected = format!("a multiple of {alignment}");
            return Err(FormatError::Offset { tensor: name, found: offset, expected });
        }
        // Blocks never span rows, so a row is a whole number of them.
        let (block, _) = dtype.block();
        let whole_rows = shape.last().copied().unwrap_or(1).is_multiple_of(block as u64);
        let elements = shape.iter().try_fold(1u64, |product, size| product.checked_mul(*size));
        let fits = shape.iter().all(|size| usize::try_from(*size).is_ok());
        match elements.and_then(|elements| dtype.bytes(elements)) {
            Some(bytes) if whole_rows && fits => {
                let shape = shape.into_iter().map(|size| size as usize).collect();
                Ok(Entry { name, shape, dtype, offset, bytes })
            }
            bytes => {
                let found = bytes.unwrap_or(u64::MAX);
                Err(FormatError::Size { tensor: name, shape, dtype: dtype.to_string(), found })
            }
        }
    }
}

/// Names from the file go into messages; a long one must not.
fn shorten(what: &str) -> String {
    match what.char_indices().nth(80) {
        Some((end, _)) => format!("{}...", &what[..end]),
        None => what.to_string(),
    }
}

/// Names of the types we do not widen, for the message.
fn ggml_name(number: u32) -> String {
    let known = match number {
        9 => "q8_1",
        15 => "q8_k",
        16 => "iq2_xxs",
        17 => "iq2_xs",
        18 => "iq3_xxs",
        19 => "iq1_s",
        20 => "iq4_nl",
        21 => "iq3_s",
        22 => "iq2_s",
        23 => "iq4_xs",
        24 => "i8",
        25 => "i16",
        26 => "i32",
        27 => "i64",
        28 => "f64",
        29 => "iq1_m",
        39 => "mxfp4",
        other => return format!("number {other}"),
    };
    known.to_string()
}
