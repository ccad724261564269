//! Small valid files to start from.
#![allow(dead_code, reason = "each test file uses some of it")]

use std::path::PathBuf;

/// A safetensors file from (name, dtype, shape, data).
pub fn safetensors(tensors: &[(&str, &str, &[usize], &[u8])]) -> Vec<u8> {
    let mut entries = vec![r#""__metadata__":{"format":"pt"}"#.to_string()];
    let mut data = Vec::new();
    for (name, dtype, shape, bytes) in tensors {
        let (start, end) = (data.len(), data.len() + bytes.len());
        entries.push(format!(
            r#""{name}":{{"dtype":"{dtype}","shape":{shape:?},"data_offsets":[{start},{end}]}}"#
        ));
        data.extend_from_slice(bytes);
    }
    with_header(&format!("{{{}}}", entries.join(",")), &data)
}

/// A safetensors file from the text of its header.
pub fn with_header(json: &str, data: &[u8]) -> Vec<u8> {
    let mut file = (json.len() as u64).to_le_bytes().to_vec();
    file.extend(json.as_bytes());
    file.extend(data);
    file
}

pub fn floats(values: &[f32]) -> Vec<u8> {
    values.iter().flat_map(|value| value.to_le_bytes()).collect()
}

/// Builds a GGUF file byte by byte.
#[derive(Default, Clone)]
pub struct GgufBytes {
    keys: Vec<u8>,
    key_count: u64,
    tensors: Vec<u8>,
    tensor_count: u64,
    data: Vec<u8>,
}

impl GgufBytes {
    pub fn text(text: &str) -> Vec<u8> {
        let mut bytes = (text.len() as u64).to_le_bytes().to_vec();
        bytes.extend(text.as_bytes());
        bytes
    }

    pub fn key(&mut self, key: &str, kind: u32, value: &[u8]) -> &mut Self {
        self.keys.extend(Self::text(key));
        self.keys.extend(kind.to_le_bytes());
        self.keys.extend(value);
        self.key_count += 1;
        self
    }

    pub fn key_u32(&mut self, key: &str, value: u32) -> &mut Self {
        self.key(key, 4, &value.to_le_bytes())
    }

    pub fn key_f32(&mut self, key: &str, value: f32) -> &mut Self {
        self.key(key, 6, &value.to_le_bytes())
    }

    pub fn key_str(&mut self, key: &str, value: &str) -> &mut Self {
        let text = Self::text(value);
        self.key(key, 8, &text)
    }

    pub fn key_strs(&mut self, key: &str, values: &[&str]) -> &mut Self {
        let mut bytes = 8u32.to_le_bytes().to_vec();
        bytes.extend((values.len() as u64).to_le_bytes());
        bytes.extend(values.iter().flat_map(|value| Self::text(value)));
        self.key(key, 9, &bytes)
    }

    /// An entry as given, true or not.
    pub fn entry(&mut self, name: &str, dims: &[u64], kind: u32, offset: u64) -> &mut Self {
        self.tensors.extend(Self::text(name));
        self.tensors.extend((dims.len() as u32).to_le_bytes());
        self.tensors.extend(dims.iter().flat_map(|dim| dim.to_le_bytes()));
        self.tensors.extend(kind.to_le_bytes());
        self.tensors.extend(offset.to_le_bytes());
        self.tensor_count += 1;
        self
    }

    /// A tensor with its bytes; `dims` innermost first, as in the file.
    pub fn tensor(&mut self, name: &str, dims: &[u64], kind: u32, bytes: &[u8]) -> &mut Self {
        let offset = self.data.len() as u64;
        self.data.extend(bytes);
        self.data.resize(self.data.len().next_multiple_of(32), 0);
        self.entry(name, dims, kind, offset)
    }

    pub fn build(&self) -> Vec<u8> {
        let mut file = b"GGUF\x03\0\0\0".to_vec();
        file.extend(self.tensor_count.to_le_bytes());
        file.extend(self.key_count.to_le_bytes());
        file.extend(&self.keys);
        file.extend(&self.tensors);
        file.resize(file.len().next_multiple_of(32), 0);
        file.extend(&self.data);
        file
    }
}

/// A tiny llama of one layer: D = 8, two heads of 4, V = 3. Row r of q is all r.
pub fn tiny_llama() -> GgufBytes {
    let mut gguf = GgufBytes::default();
    let rows: Vec<f32> = (0..64).map(|i| (i / 8) as f32).collect();
    gguf.key_str("general.architecture", "llama")
        .key_u32("llama.block_count", 1)
        .key_u32("llama.embedding_length", 8)
        .key_u32("llama.feed_forward_length", 16)
        .key_u32("llama.attention.head_count", 2)
        .key_u32("llama.context_length", 64)
        .key_f32("llama.attention.layer_norm_rms_epsilon", 1e-5)
        .key_str("tokenizer.ggml.model", "gpt2")
        .key_strs("tokenizer.ggml.tokens", &["a", "b", "ab"])
        .key_strs("tokenizer.ggml.merges", &["a b"])
        .tensor("token_embd.weight", &[8, 3], 0, &floats(&[0.5; 24]))
        .tensor("blk.0.attn_q.weight", &[8, 8], 0, &floats(&rows))
        .tensor("blk.0.attn_v.weight", &[8, 8], 0, &floats(&rows));
    gguf
}

/// The real model that scripts/fetch_smollm2.sh downloads.
pub fn smollm2() -> Option<PathBuf> {
    let root = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../..");
    let path = root.join("target/models/smollm2-135m-instruct-q4_1.gguf");
    if !path.exists() {
        println!("skipped: {} is absent, run scripts/fetch_smollm2.sh", path.display());
        return None;
    }
    Some(path)
}
