//! The run as a Hugging Face folder, beside its state.

use crate::TrainError;
use crate::prepare::Prepared;
use crate::recipe::{ModelRecipe, Recipe};
use crate::run_folder::RunFolder;
use crate::whole::Reader;
use checkpoint::{OutTensor, save_folder};
use device::{Buffer, DType, Device, View};
use half::bf16;
use memory::pager::About;
use memory::trace::{Access, Phase};
use memory::{Class, Need};
use model::StoredWeight;
use serde_json::json;
use std::io::{self, Write};
use std::ops::Range;
use tensor::{ParamRef, ParamStore};

/// Above this a folder is cut into shards, as `transformers` does.
const SHARD_BYTES: u64 = 5_000_000_000;

/// Whose weights are written.
pub(crate) enum Weights<'a, 'b> {
    /// Of a store that has all of them, by their names in files.
    One(&'a mut ParamStore, &'a [StoredWeight]),
    /// Of all ranks.
    Ranks(&'a mut Reader<'b>),
}

impl Weights<'_, '_> {
    fn dtype(&self) -> DType {
        match self {
            Weights::One(store, _) => store.dtype(),
            Weights::Ranks(reader) => reader.dtype(),
        }
    }

    fn parameter_count(&self) -> usize {
        match self {
            Weights::One(store, _) => store.parameter_count(),
            Weights::Ranks(reader) => reader.params().specs().iter().map(|spec| spec.len()).sum(),
        }
    }

    fn stored(&self) -> Vec<StoredWeight> {
        match self {
            Weights::One(_, stored) => stored.to_vec(),
            Weights::Ranks(reader) => reader.stored().to_vec(),
        }
    }

    fn range(&self, param: ParamRef) -> Range<usize> {
        match self {
            Weights::One(store, _) => store.range(param),
            Weights::Ranks(reader) => reader.range(param),
        }
    }

    /// Hand `elements` of the flat array of all weights to `put`, piece by piece unless they are wanted
    /// `whole`.
    fn each(
        &mut self,
        elements: Range<usize>,
        whole: bool,
        mut put: impl FnMut(View<'_>) -> io::Result<()>,
    ) -> io::Result<()> {
        match self {
            Weights::One(store, _) => {
                let pieces: Vec<_> = match whole {
                    true => vec![elements],
                    false => store.arrays().pieces(elements).collect(),
                };
                pieces.into_iter().try_for_each(|piece| {
                    let need = Need { class: Class::Param, elements: piece.clone(), access: Access::Read };
                    store.bring(EXPORT, &[need]).map_err(io::Error::other)?;
                    let weights = store.arrays().view(Class::Param, piece);
                    if weights.device() == Device::Cpu {
                        return put(weights);
                    }
                    let mut here = Buffer::new(Device::Cpu, weights.len() * weights.dtype().size_bytes())
                        .map_err(io::Error::other)?;
                    device::copy(here.view_mut(weights.dtype(), 0, weights.len()), weights);
                    put(here.view(weights.dtype(), 0, weights.len()))
                })
            }
            Weights::Ranks(reader) => {
                let (dtype, most) = (reader.dtype(), if whole { elements.len() } else { PIECE });
                let mut part = Buffer::new(Device::Cpu, most.min(elements.len()).max(1) * dtype.size_bytes())
                    .map_err(io::Error::other)?;
                for first in elements.clone().step_by(most.max(1)) {
                    let len = most.min(elements.end - first);
                    let bytes = part.view_mut(dtype, 0, len).bytes();
                    reader.weights(first, bytes).map_err(io::Error::other)?;
                    put(part.view(dtype, 0, len))?;
                }
                Ok(())
            }
        }
    }
}

/// Elements that ranks are asked for at once.
const PIECE: usize = 4 << 20;

/// Write config, weights, tokenizer, generation config and model card into the run's folder. They
/// are written whole aside first, then moved in one by one, the weights last.
pub(crate) fn write(
    folder: &RunFolder,
    recipe: &Recipe,
    prepared: &Prepared,
    mut weights: Weights<'_, '_>,
    step: u64,
) -> Result<(), TrainError> {
    let aside = folder.path().join(".export");
    let (dtype, stored) = (weights.dtype(), weights.stored());
    let tensors: Vec<OutTensor> = stored
        .iter()
        .map(|weight| OutTensor { name: weight.name.clone(), shape: weight.shape.clone(), dtype })
        .collect();
    let mut files = prepared.tokenizer.files()?;
    let config = prepared.config.to_json(prepared.precision(recipe));
    let mut generation = json!({ "do_sample": true, "temperature": 0.8, "top_p": 0.95 });
    if let Some(bos) = prepared.tokenizer.bos() {
        generation["bos_token_id"] = json!(bos);
    }
    if let [first, rest @ ..] = prepared.tokenizer.eos_ids() {
        generation["eos_token_id"] =
            if rest.is_empty() { json!(first) } else { json!(prepared.tokenizer.eos_ids()) };
        generation["pad_token_id"] = json!(first);
    }
    let mut config = config;
    for key in ["bos_token_id", "eos_token_id"] {
        config[key] = generation.get(key).cloned().unwrap_or(serde_json::Value::Null);
    }
    files.push(("config.json".into(), pretty(&config)));
    files.push(("generation_config.json".into(), pretty(&generation)));
    files.push(("README.md".into(), card(recipe, prepared, weights.parameter_count(), step).into_bytes()));
    // A folder left by a run that was killed right here.
    std::fs::remove_dir_all(&aside).ok();
    save_folder(
        &aside,
        &tensors,
        |index, out| write_tensor(&mut weights, &stored[index], out),
        &files,
        SHARD_BYTES,
    )?;
    move_in(folder, &aside).map_err(|source| TrainError::Folder { path: folder.path().to_path_buf(), source })
}

fn pretty(json: &serde_json::Value) -> Vec<u8> {
    format!("{json:#}\n").into_bytes()
}

fn write_tensor(weights: &mut Weights<'_, '_>, weight: &StoredWeight, out: &mut dyn Write) -> io::Result<()> {
    let param = weights.range(weight.param);
    // What lies as in the file goes piece by piece; what must be turned is brought whole.
    if weight.transposed {
        return weights.each(param, true, |view| write_turned(weight, view, out));
    }
    let start = param.start + weight.first;
    weights.each(start..start + weight.len(), false, |view| out.write_all(view.bytes()))
}

const EXPORT: About = About { phase: Phase::Optimizer, op: "export", layer: 0 };

fn write_turned(weight: &StoredWeight, param: View<'_>, out: &mut dyn Write) -> io::Result<()> {
    let widened: Vec<f32> = match param.floats() {
        device::Slice::F32(values) => values.to_vec(),
        device::Slice::Bf16(values) => values.iter().map(|x| x.to_f32()).collect(),
    };
    for x in weight.to_stored(&widened) {
        match param.dtype() {
            DType::F32 => out.write_all(&x.to_le_bytes())?,
            _ => out.write_all(&bf16::from_f32(x).to_le_bytes())?,
        }
    }
    Ok(())
}

fn move_in(folder: &RunFolder, aside: &std::path::Path) -> io::Result<()> {
    let mut names = Vec::new();
    for entry in std::fs::read_dir(aside)? {
        names.push(entry?.file_name());
    }
    // Weights last: until then a reader finds the weights of the former export.
    names.sort_by_key(|name| name.to_string_lossy().ends_with(".safetensors"));
    for name in names {
        std::fs::rename(aside.join(&name), folder.path().join(&name))?;
    }
    std::fs::remove_dir(aside)?;
    std::fs::File::open(folder.path())?.sync_all()
}

fn card(recipe: &Recipe, prepared: &Prepared, parameters: usize, step: u64) -> String {
    let config = &prepared.config;
    let (n, k, h) = config.heads();
    let data =
        recipe.data.path.iter().map(|path| format!("`{}`", path.display())).collect::<Vec<_>>().join(", ");
    let origin = match &recipe.model {
        ModelRecipe::From(path) => format!("fine-tuned from `{}`", path.display()),
        ModelRecipe::New(_) => "trained from random weights".into(),
    };
    let name = folder_name(&recipe.run.dir);
    format!(
        "---\nlibrary_name: transformers\npipeline_tag: text-generation\ntags:\n- trilith\n---\n\n# {name}\n\n\
         A {} model, {origin} with Trilith.\n\n\
         | | |\n|---|---|\n| parameters | {} |\n| layers | {} |\n| width | {} |\n\
         | query heads, kv heads, head dim | {n}, {k}, {h} |\n| vocabulary | {} |\n\
         | data | {data} |\n| steps | {step} of {} |\n| tokens per step | {} |\n| precision | {} |\n\n\
         The recipe is in `recipe.toml`, the log in `metrics.jsonl`.\n\n\
         ```\ntrilith chat {}\n```\n",
        config.family(),
        parameters,
        config.layers(),
        config.width(),
        config.vocab(),
        recipe.train.steps,
        recipe.train.batch * recipe.train.accumulate * recipe.train.context,
        prepared.precision(recipe),
        recipe.run.dir.display(),
    )
}

fn folder_name(dir: &std::path::Path) -> String {
    dir.file_name().map_or_else(|| "model".into(), |name| name.to_string_lossy().into_owned())
}
