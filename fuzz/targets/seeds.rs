//! Small valid files, one folder per target, under the folder given.

#[path = "../../crates/checkpoint/tests/common/mod.rs"]
mod common;

use checkpoint::{Array, StateDir};
use std::fs;
use std::path::{Path, PathBuf};

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let root = PathBuf::from(std::env::args().nth(1).ok_or("usage: seeds FOLDER")?);
    let put = |target: &str, bytes: &[u8]| -> std::io::Result<()> {
        fs::create_dir_all(root.join(target))?;
        fs::write(root.join(target).join("seed"), bytes)
    };
    let tensors: [(&str, &str, &[usize], &[u8]); 2] =
        [("a", "F32", &[2, 3], &[0; 24]), ("b", "BF16", &[4], &[0; 8])];
    put("safetensors_header", &common::safetensors(&tensors))?;
    put("gguf", &common::tiny_llama().build())?;
    put("manifest", &manifest(&root.join("state"))?)?;
    Ok(())
}

fn manifest(dir: &Path) -> Result<Vec<u8>, Box<dyn std::error::Error>> {
    let state = StateDir::new(dir, 1)?;
    state.save(1, &serde_json::json!({ "position": 3 }), &[Array::new("w", &[1; 9]), Array::new("m", &[2; 9])])?;
    Ok(fs::read(state.step_path(1).join("manifest.json"))?)
}
