//! Keys and typed values of a GGUF file.

use std::collections::HashMap;

/// A value. Integers and floats are widened: the width in the file carries no meaning.
#[derive(Debug, Clone, PartialEq)]
pub enum Value {
    /// u8 to u64.
    Uint(u64),
    /// i8 to i64.
    Int(i64),
    /// f32 or f64.
    Float(f64),
    /// Boolean.
    Bool(bool),
    /// UTF-8.
    Text(String),
    /// A list of one type.
    Array(Array),
}

/// A list of values of one type, kept close to its size in the file.
#[derive(Debug, Clone, PartialEq)]
pub enum Array {
    /// Numbers or booleans, undecoded: `kind` is the GGUF type number.
    Plain {
        /// GGUF type number of an item.
        kind: u32,
        /// Little-endian items.
        bytes: Vec<u8>,
    },
    /// Strings.
    Text(Vec<String>),
    /// Lists of lists.
    Nested(Vec<Array>),
}

/// Bytes of a number or boolean of a GGUF type.
pub(crate) fn plain_size(kind: u32) -> Option<usize> {
    match kind {
        0 | 1 | 7 => Some(1),
        2 | 3 => Some(2),
        4..=6 => Some(4),
        10..=12 => Some(8),
        _ => None,
    }
}

/// Decode one number or boolean from exactly its bytes; none for a boolean above 1.
pub(crate) fn plain_value(kind: u32, bytes: &[u8]) -> Option<Value> {
    let mut wide = [0; 8];
    wide[..bytes.len()].copy_from_slice(bytes);
    let raw = u64::from_le_bytes(wide);
    Some(match kind {
        0 | 2 | 4 | 10 => Value::Uint(raw),
        1 => Value::Int(i64::from(raw as i8)),
        3 => Value::Int(i64::from(raw as i16)),
        5 => Value::Int(i64::from(raw as i32)),
        11 => Value::Int(raw as i64),
        6 => Value::Float(f64::from(f32::from_bits(raw as u32))),
        12 => Value::Float(f64::from_bits(raw)),
        7 if raw <= 1 => Value::Bool(raw == 1),
        _ => return None,
    })
}

impl Value {
    /// As a number without sign.
    pub fn as_u64(&self) -> Option<u64> {
        match self {
            Value::Uint(value) => Some(*value),
            Value::Int(value) => u64::try_from(*value).ok(),
            _ => None,
        }
    }

    /// As a number with sign.
    pub fn as_i64(&self) -> Option<i64> {
        match self {
            Value::Uint(value) => i64::try_from(*value).ok(),
            Value::Int(value) => Some(*value),
            _ => None,
        }
    }

    /// As a float.
    pub fn as_f64(&self) -> Option<f64> {
        match self {
            Value::Float(value) => Some(*value),
            Value::Uint(value) => Some(*value as f64),
            Value::Int(value) => Some(*value as f64),
            _ => None,
        }
    }
}

impl Array {
    /// Items.
    pub fn len(&self) -> usize {
        match self {
            Array::Plain { kind, bytes } => bytes.len() / plain_size(*kind).unwrap_or(1),
            Array::Text(items) => items.len(),
            Array::Nested(items) => items.len(),
        }
    }

    /// Whether it has no items.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Strings, if it holds strings.
    pub fn as_text(&self) -> Option<&[String]> {
        match self {
            Array::Text(items) => Some(items),
            _ => None,
        }
    }

    /// Decoded numbers or booleans, if it holds those.
    pub fn values(&self) -> Option<impl Iterator<Item = Value>> {
        match self {
            Array::Plain { kind, bytes } => {
                let (kind, size) = (*kind, plain_size(*kind)?);
                Some(bytes.chunks_exact(size).filter_map(move |item| plain_value(kind, item)))
            }
            _ => None,
        }
    }
}

/// Keys and values in the order of the file.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Metadata {
    entries: Vec<(String, Value)>,
    places: HashMap<String, usize>,
}

impl Metadata {
    /// Add a key; false if it is there already.
    pub(crate) fn insert(&mut self, key: String, value: Value) -> bool {
        let fresh = self.places.insert(key.clone(), self.entries.len()).is_none();
        self.entries.push((key, value));
        fresh
    }

    /// Keys and values in the order of the file.
    pub fn iter(&self) -> impl Iterator<Item = (&str, &Value)> {
        self.entries.iter().map(|(key, value)| (key.as_str(), value))
    }

    /// Number of keys.
    pub fn len(&self) -> usize {
        self.entries.len()
    }

    /// Whether there are no keys.
    pub fn is_empty(&self) -> bool {
        self.entries.is_empty()
    }

    /// A value.
    pub fn get(&self, key: &str) -> Option<&Value> {
        self.places.get(key).map(|at| &self.entries[*at].1)
    }

    /// A whole number that fits 32 bits.
    pub fn get_u32(&self, key: &str) -> Option<u32> {
        self.get(key)?.as_u64()?.try_into().ok()
    }

    /// A float.
    pub fn get_f32(&self, key: &str) -> Option<f32> {
        self.get(key)?.as_f64().map(|value| value as f32)
    }

    /// A boolean.
    pub fn get_bool(&self, key: &str) -> Option<bool> {
        match self.get(key)? {
            Value::Bool(value) => Some(*value),
            _ => None,
        }
    }

    /// A string.
    pub fn get_str(&self, key: &str) -> Option<&str> {
        match self.get(key)? {
            Value::Text(value) => Some(value),
            _ => None,
        }
    }

    /// A list.
    pub fn get_array(&self, key: &str) -> Option<&Array> {
        match self.get(key)? {
            Value::Array(value) => Some(value),
            _ => None,
        }
    }
}
