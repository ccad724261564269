//! `[model]`: the sizes of a new model as its `config.json` has them, and what they exclude.

use super::values::{Get, impossible, need};
use super::{ModelRecipe, RecipeError, Settings, TrainRecipe, experts};
use serde_json::json;

/// Keys that describe a new model; beside `model.from` they would contradict it.
const SIZES: [&str; 11] = [
    "model.family",
    "model.layers",
    "model.width",
    "model.heads",
    "model.kv_heads",
    "model.head_dim",
    "model.ffn",
    "model.tied",
    "model.rope_theta",
    "model.norm_eps",
    "model.window",
];

/// The model a recipe names: one to load, or the sizes of a new one.
pub(super) fn model(
    settings: &Settings,
    get: &Get<'_>,
    train: &TrainRecipe,
) -> Result<ModelRecipe, RecipeError> {
    if let Some(from) = get.text("model.from") {
        return match SIZES.iter().chain(&experts::KEYS).find(|key| settings.gives(key)) {
            None => Ok(ModelRecipe::From(from.into())),
            Some(key) => impossible(
                format!("{key} stands beside model.from = \"{from}\""),
                "a loaded model brings its own sizes; remove one of the two",
            ),
        };
    }
    let int = |key| need(get.int(key), key).map(|n| n as usize);
    let (d, n, h) = (int("model.width")?, int("model.heads")?, int("model.head_dim")?);
    if h == 0 && d % n != 0 {
        return impossible(
            format!("model.width = {d} does not divide by model.heads = {n}"),
            "choose a multiple, or give model.head_dim",
        );
    }
    let h = if h == 0 { d / n } else { h };
    let k = match int("model.kv_heads")? {
        0 => n,
        k => k,
    };
    if n % k != 0 {
        return impossible(
            format!("model.heads = {n} does not divide by model.kv_heads = {k}"),
            "every kv head serves the same number of query heads",
        );
    }
    let family = get.text("model.family").unwrap_or_default();
    let gpt2 = family == "gpt2";
    let f = match int("model.ffn")? {
        0 if gpt2 => 4 * d,
        0 => (8 * d).div_ceil(3).next_multiple_of(32),
        f => f,
    };
    let experts = experts::keys(settings, &family, f)?;
    let tied = get.flag("model.tied");
    if gpt2 {
        let usual = k == n && h * n == d && tied;
        return if usual { gpt2_config(get, train, (d, n, f)) } else { unusual_gpt2() };
    }
    let window = match int("model.window")? {
        0 => None,
        _ if family != "mistral" => {
            return impossible(
                format!("model.window is given but model.family = \"{family}\""),
                "sliding windows belong to family \"mistral\"",
            );
        }
        window => Some(window),
    };
    let mut config = json!({
        "model_type": family, "num_hidden_layers": int("model.layers")?, "hidden_size": d,
        "num_attention_heads": n, "num_key_value_heads": k, "head_dim": h, "intermediate_size": f,
        "max_position_embeddings": train.context, "rms_norm_eps": get.float("model.norm_eps"),
        "rope_theta": get.float("model.rope_theta"), "tie_word_embeddings": tied, "hidden_act": "silu",
        "sliding_window": window,
    });
    experts.into_iter().for_each(|(key, value)| config[key] = value);
    Ok(ModelRecipe::New(config))
}

fn unusual_gpt2() -> Result<ModelRecipe, RecipeError> {
    impossible(
        "model.family = \"gpt2\" has one kv head per head, width / heads per head and a tied head".into(),
        "drop model.kv_heads, model.head_dim and model.tied, or take family \"llama\"",
    )
}

/// Width d, n heads, ffn width f.
fn gpt2_config(
    get: &Get<'_>,
    train: &TrainRecipe,
    (d, n, f): (usize, usize, usize),
) -> Result<ModelRecipe, RecipeError> {
    let layers = need(get.int("model.layers"), "model.layers")?;
    Ok(ModelRecipe::New(json!({
        "model_type": "gpt2", "n_layer": layers, "n_embd": d, "n_head": n, "n_inner": f,
        "n_positions": train.context, "layer_norm_epsilon": get.float("model.norm_eps"),
        "activation_function": "gelu_new",
    })))
}
