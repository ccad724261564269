//! `trilith inspect`: what a folder or a file holds.

use crate::show;
use anyhow::{Result, bail};
use checkpoint::{ModelFiles, StateDir, WeightInfo, Weights};
use model::Config;
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

#[derive(clap::Args)]
#[command(
    after_help = "Examples:\n  trilith inspect runs/shakespeare\n  trilith inspect model.gguf --all\n  trilith inspect model.safetensors"
)]
pub struct Args {
    /// A model folder, a run, a .safetensors or a .gguf file
    path: PathBuf,
    /// List every tensor, not one row for each kind
    #[arg(long)]
    all: bool,
    /// Read saved training states whole and check every block
    #[arg(long)]
    verify: bool,
}

pub fn run(args: Args) -> Result<ExitCode> {
    let path = &args.path;
    let extension = path.extension().and_then(|e| e.to_str()).unwrap_or("");
    if path.is_dir() {
        let (model, states) = (path.join("config.json").exists(), path.join("state").is_dir());
        if !model && !states {
            bail!(
                "{} holds neither config.json nor training states; name a model folder, a run, a .safetensors or a .gguf file",
                path.display()
            );
        }
        if model {
            show_model(&ModelFiles::open(path)?, args.all)?;
        }
        if states && !show_states(&path.join("state"), args.verify)? {
            return Ok(ExitCode::FAILURE);
        }
    } else if extension == "safetensors" {
        show_tensors(&Weights::open_safetensors(path)?, args.all);
    } else if extension == "gguf" {
        show_model(&ModelFiles::open(path)?, args.all)?;
    } else if path.exists() {
        bail!(
            "{}: unknown kind of file; name a model folder, a run, a .safetensors or a .gguf file",
            path.display()
        );
    } else {
        bail!("{} does not exist", path.display());
    }
    Ok(ExitCode::SUCCESS)
}

fn show_model(files: &ModelFiles, all: bool) -> Result<()> {
    let mut facts = Vec::new();
    match Config::from_json(files.config()) {
        Ok(config) => {
            let (n, k, h) = config.heads();
            facts.push(("architecture", config.family().to_string()));
            facts.push(("layers", config.layers().to_string()));
            facts.push(("width, feed-forward", format!("{}, {}", config.width(), config.ffn())));
            if let Some(moe) = config.moe() {
                let shared =
                    moe.shared_ffn.map_or(String::new(), |ffn| format!(", and one of {ffn} for all"));
                let (experts, choices, ffn) = (moe.experts, moe.choices, moe.ffn);
                facts.push(("experts", format!("{experts} of {ffn} a layer, {choices} for a token{shared}")));
            }
            facts.push(("heads", format!("{n} of {h}, {k} for keys and values")));
            facts.push(("vocabulary", config.vocab().to_string()));
            facts.push(("positions", config.max_positions().to_string()));
            let flops = config.flops();
            let cache = 2 * config.layers() * k * h * 2;
            facts.push((
                "FLOPs to train a token",
                show::count(flops.per_token(config.max_positions().min(2048))),
            ));
            facts.push(("cache per token (bf16)", show::bytes(cache as u64)));
        }
        Err(error) => facts.push(("architecture", format!("unknown: {error}"))),
    }
    if let Some(gguf) = files.gguf() {
        facts.push(("GGUF", format!("version {}, {} metadata entries", gguf.version, gguf.metadata.len())));
    }
    match files.tokenizer() {
        Ok(tokenizer) => {
            let template = if tokenizer.chat_template().is_some() { "with" } else { "without" };
            facts.push((
                "tokenizer",
                format!("{} tokens, {template} a chat template", tokenizer.vocab_size()),
            ));
        }
        Err(error) => facts.push(("tokenizer", format!("none: {error}"))),
    }
    println!("{}\n{}", files.path().display(), show::facts(&facts));
    show_tensors(files.weights(), all);
    Ok(())
}

/// `model.layers.7.mlp` -> `model.layers.*.mlp`: the layers of a model are alike.
fn kind(name: &str) -> String {
    name.split('.')
        .map(|part| if part.parse::<u32>().is_ok() { "*" } else { part })
        .collect::<Vec<_>>()
        .join(".")
}

fn show_tensors(weights: &Weights, all: bool) {
    let mut groups: BTreeMap<(String, String, &str), (usize, u64)> = BTreeMap::new();
    for WeightInfo { name, shape, dtype, bytes, .. } in weights.infos() {
        let name = if all { name.clone() } else { kind(name) };
        let group = groups.entry((name, format!("{shape:?}"), dtype.name())).or_default();
        group.0 += 1;
        group.1 += bytes;
    }
    let rows = groups
        .into_iter()
        .map(|((name, shape, dtype), (count, bytes))| {
            vec![name, shape, dtype.into(), count.to_string(), show::bytes(bytes)]
        })
        .collect();
    println!("{}", show::table(&["tensor", "shape", "type", "count", "size"], rows, &[3, 4]));
    let elements: usize = weights.infos().iter().map(WeightInfo::len).sum();
    let bytes: u64 = weights.infos().iter().map(|info| info.bytes).sum();
    println!(
        "{} tensors, {} parameters, {}\n",
        weights.infos().len(),
        show::count(elements as f64),
        show::bytes(bytes)
    );
}

/// Whether every state is whole.
fn show_states(dir: &Path, verify: bool) -> Result<bool> {
    let states = StateDir::new(dir, 1)?;
    let mut rows = Vec::new();
    let mut whole = true;
    for found in states.list()? {
        let checked = found
            .whole
            .and_then(|()| states.open(found.step))
            .and_then(|state| if verify { state.verify_all().map(|()| state) } else { Ok(state) });
        rows.push(match checked {
            Ok(state) => {
                let bytes: u64 = state.arrays().iter().map(|array| array.bytes).sum();
                let verdict = if verify { "every block checked" } else { "whole" };
                vec![found.step.to_string(), show::bytes(bytes), verdict.into()]
            }
            Err(error) => {
                whole = false;
                vec![found.step.to_string(), String::new(), error.to_string()]
            }
        });
    }
    println!("{}", show::table(&["state of step", "size", ""], rows, &[0, 1]));
    Ok(whole)
}

#[cfg(test)]
mod tests {
    #[test]
    fn layers_are_shown_once() {
        assert_eq!(super::kind("model.layers.17.mlp.up_proj.weight"), "model.layers.*.mlp.up_proj.weight");
    }
}
