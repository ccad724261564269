//! Model folders and what `transformers` made of them, as `scripts/make_goldens.py` left both.
#![allow(dead_code, reason = "each test binary uses a part")]

use dist::Mesh;
use model::{Built, Config, Model, Recompute, StoredWeight, Tokens};
use safetensors::SafeTensors;
use serde_json::Value;
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use tensor::{DType, Device, KvCache, ParamStore, Tape, Targets, Tensor};

/// Every family, one folder each.
pub const FAMILIES: [&str; 10] =
    ["llama2", "llama3", "smollm2", "mistral", "qwen2", "qwen3", "gpt2", "mixtral", "qwen2_moe", "qwen3_moe"];

/// Those without experts: the ones that run on meshes.
pub const DENSE: [&str; 7] = ["llama2", "llama3", "smollm2", "mistral", "qwen2", "qwen3", "gpt2"];

/// Those with experts.
pub const SPARSE: [&str; 3] = ["mixtral", "qwen2_moe", "qwen3_moe"];

/// Longest sequence the models are built for.
pub const CONTEXT: usize = 32;

/// Largest differences allowed, over the largest expected magnitude of the tensor.
#[derive(Clone, Copy)]
pub struct Tolerances {
    pub logits: f32,
    pub loss: f32,
    pub grads: f32,
}

/// Both sides sum in f32, in another order; 1e-6, 2e-7 and 3e-6 are the worst seen.
pub const F32: Tolerances = Tolerances { logits: 1e-5, loss: 1e-6, grads: 2e-5 };
/// Weights and every activation between ops keep 8 bits; 2e-2, 8e-4 and 8e-2 are the worst seen.
/// The last, Qwen3's k norm, is 12e-2 apart when PyTorch itself computes in bf16.
pub const BF16: Tolerances = Tolerances { logits: 4e-2, loss: 3e-3, grads: 1.5e-1 };

/// One array of a file: little-endian f32 or i32.
pub struct Array {
    pub shape: Vec<usize>,
    bytes: Vec<u8>,
}

impl Array {
    pub fn f32(&self) -> Vec<f32> {
        self.bytes.as_chunks().0.iter().map(|word| f32::from_le_bytes(*word)).collect()
    }

    pub fn u32(&self) -> Vec<u32> {
        self.bytes.as_chunks().0.iter().map(|word| u32::from_le_bytes(*word)).collect()
    }
}

pub type Arrays = BTreeMap<String, Array>;

fn read_arrays(path: &Path, into: &mut Arrays) {
    let bytes = std::fs::read(path).unwrap_or_else(|e| panic!("{}: {e}", path.display()));
    for (name, view) in SafeTensors::deserialize(&bytes).unwrap().iter() {
        let array = Array { shape: view.shape().to_vec(), bytes: view.data().to_vec() };
        assert!(into.insert(name.to_string(), array).is_none(), "{name} lies in two files");
    }
}

fn folder(family: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden").join(family)
}

pub fn config_json(family: &str) -> Value {
    serde_json::from_slice(&std::fs::read(folder(family).join("config.json")).unwrap()).unwrap()
}

/// Weights of a folder, in one file or in several with an index.
fn weights(folder: &Path) -> Arrays {
    let mut arrays = Arrays::new();
    let Ok(index) = std::fs::read(folder.join("model.safetensors.index.json")) else {
        read_arrays(&folder.join("model.safetensors"), &mut arrays);
        return arrays;
    };
    let index: Value = serde_json::from_slice(&index).unwrap();
    let map = index["weight_map"].as_object().unwrap();
    let mut files: Vec<&str> = map.values().map(|file| file.as_str().unwrap()).collect();
    files.sort();
    files.dedup();
    assert!(files.len() > 1, "an index over one file tests nothing");
    files.iter().for_each(|file| read_arrays(&folder.join(file), &mut arrays));
    assert!(map.keys().eq(arrays.keys()), "the index and its files differ");
    arrays
}

/// A folder built and loaded, beside what it should compute.
pub struct Golden {
    pub config: Config,
    pub built: Built,
    pub store: ParamStore,
    pub weights: Arrays,
    pub expected: Arrays,
    /// Rows, tokens a row.
    pub sizes: (usize, usize),
}

impl Golden {
    pub fn open(family: &str, dtype: DType) -> Golden {
        let config = Config::from_json(&config_json(family)).unwrap();
        let built = Model::build(&config, CONTEXT, &Mesh::solo()).unwrap();
        let weights = weights(&folder(family));
        let mut expected = Arrays::new();
        read_arrays(&folder(family).join("golden.safetensors"), &mut expected);
        let mut store = ParamStore::new(Device::Cpu, dtype, &built.params).unwrap();
        for stored in &built.stored {
            fill(&mut store, stored, weights[&stored.name].f32());
        }
        store.enable_grads().unwrap();
        let sizes = (expected["ids"].shape[0], expected["ids"].shape[1]);
        Golden { config, built, store, weights, expected, sizes }
    }

    /// The types in which a family can be compared: rounded to bf16, a score near another sends its
    /// token to another expert.
    pub fn dtypes(family: &str) -> &'static [(DType, Tolerances)] {
        const BOTH: [(DType, Tolerances); 2] = [(DType::F32, F32), (DType::Bf16, BF16)];
        let experts = Config::from_json(&config_json(family)).unwrap().experts();
        if experts > 0 { &BOTH[..1] } else { &BOTH }
    }

    /// The rows as a batch.
    pub fn tokens(&self) -> Tokens {
        let (b, t) = self.sizes;
        let positions = (0..b).flat_map(|_| 0..t as u32).collect();
        Tokens { b, ids: self.expected["ids"].u32().into(), positions, starts: None }
    }

    /// The rows packed into one, a document each.
    pub fn packed(&self) -> Tokens {
        let (b, t) = self.sizes;
        let starts: Arc<[u32]> = (0..b * t).map(|i| (i - i % t) as u32).collect();
        Tokens { b: 1, starts: Some(starts), ..self.tokens() }
    }

    /// The next token of each, none for the last of a row.
    pub fn targets(&self) -> Vec<u32> {
        let (ids, t) = (self.expected["ids"].u32(), self.sizes.1);
        (0..ids.len()).map(|i| if i % t + 1 == t { u32::MAX } else { ids[i + 1] }).collect()
    }

    /// Empty caches with room for `capacity` tokens.
    pub fn caches(&self, capacity: usize) -> Vec<KvCache> {
        let (_, k, h) = self.config.heads();
        let cache = |_| KvCache::new(Device::Cpu, self.store.dtype(), capacity, k * h).unwrap();
        (0..self.config.layers()).map(cache).collect()
    }

    /// Logits of tokens that continue what `caches` hold.
    pub fn logits_cached(&mut self, ids: &[u32], caches: &mut [KvCache]) -> Vec<f32> {
        let mut tape = Tape::running(&mut self.store);
        let hidden = self.built.model.hidden_cached(&mut tape, ids, caches).unwrap();
        tape.logits(&hidden.value, self.built.model.head()).unwrap().to_f32()
    }

    /// Logits of a batch.
    pub fn logits(&mut self, tokens: &Tokens) -> Vec<f32> {
        let mut tape = Tape::running(&mut self.store);
        let hidden = self.built.model.hidden(&mut tape, tokens, Recompute::Never).unwrap();
        tape.logits(&hidden.value, self.built.model.head()).unwrap().to_f32()
    }

    /// Mean loss of a batch; its gradients are left in the store.
    pub fn train(&mut self, tokens: &Tokens, recompute: Recompute) -> f32 {
        let targets = self.targets();
        let scale = 1.0 / targets.iter().filter(|id| **id != u32::MAX).count() as f32;
        self.store.clear_grads().unwrap();
        let mut tape = Tape::recording(&mut self.store);
        let hidden = self.built.model.hidden(&mut tape, tokens, recompute).unwrap();
        let targets = Targets { ids: &targets, scale };
        let losses = tape.head_loss(&hidden, self.built.model.head(), targets).unwrap();
        tape.backward().unwrap();
        self.store.settle_grads().unwrap();
        losses.to_f32().iter().sum::<f32>() * scale
    }

    /// Logits, loss and every gradient against what is expected.
    pub fn check(&mut self, what: &str, tolerances: &Tolerances) {
        let (tokens, what) = (self.tokens(), format!("{what} {}", self.store.dtype()));
        let logits = self.logits(&tokens);
        assert_close(&format!("{what} logits"), &logits, &self.expected["logits"].f32(), tolerances.logits);
        let loss = self.train(&tokens, Recompute::Never);
        assert_close(&format!("{what} loss"), &[loss], &self.expected["loss"].f32(), tolerances.loss);
        self.assert_grads(&what, tolerances.grads);
    }

    /// Every gradient in the store against what is expected.
    pub fn assert_grads(&self, what: &str, tolerance: f32) {
        for stored in &self.built.stored {
            let expected = self.expected[&format!("grad.{}", stored.name)].f32();
            assert_close(&format!("{what} grad {}", stored.name), &self.grad(stored), &expected, tolerance);
        }
    }

    /// Gradient of one tensor of the folder, as it would lie there.
    pub fn grad(&self, stored: &StoredWeight) -> Vec<f32> {
        stored.to_stored(self.store.grad(stored.param).f32())
    }
}

fn fill(store: &mut ParamStore, stored: &StoredWeight, values: Vec<f32>) {
    let ours = stored.to_ours(values);
    let rounded = Tensor::from_f32(&ours, store.dtype(), &[ours.len()]).unwrap();
    let weight = store.weight_mut(stored.param).narrow(stored.first, stored.len());
    weight.bytes().copy_from_slice(rounded.view().bytes());
}

pub fn assert_close(what: &str, found: &[f32], expected: &[f32], tolerance: f32) {
    let apart = distance(found, expected);
    println!("{what}: {apart:.1e}");
    assert!(apart <= tolerance, "{what}: {apart:.2e} apart, {tolerance:.0e} allowed");
}

/// Largest difference over the largest expected magnitude.
fn distance(found: &[f32], expected: &[f32]) -> f32 {
    assert_eq!(found.len(), expected.len());
    let largest = expected.iter().fold(0f32, |top, x| top.max(x.abs()));
    let apart = found.iter().zip(expected).map(|(a, b)| (a - b).abs());
    // A NaN must not hide behind `max`, which drops it.
    apart.fold(0f32, |top, x| if x.is_nan() { f32::INFINITY } else { top.max(x) }) / largest.max(1e-6)
}
