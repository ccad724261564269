//! The keys of a new mixture of experts, as its `config.json` has them.

use super::values::impossible;
use super::{RecipeError, Settings};
use serde_json::{Value, json};

/// Keys that only mixtures have.
pub(super) const KEYS: [&str; 5] =
    ["model.experts", "model.experts_per_token", "model.expert_ffn", "model.shared_ffn", "model.balance"];

/// What to add to the config of a model of `family`, whose feed-forward parts are `ffn` wide.
pub(super) fn keys(
    settings: &Settings,
    family: &str,
    ffn: usize,
) -> Result<Vec<(&'static str, Value)>, RecipeError> {
    let qwen = matches!(family, "qwen2_moe" | "qwen3_moe");
    let given = KEYS.iter().find(|key| settings.gives(key));
    match (qwen || family == "mixtral", given) {
        (true, _) => {}
        (false, None) => return Ok(Vec::new()),
        (false, Some(key)) => {
            return impossible(
                format!("{key} is given but model.family = \"{family}\""),
                "experts belong to families mixtral, qwen2_moe and qwen3_moe",
            );
        }
    }
    if settings.gives("model.shared_ffn") && family != "qwen2_moe" {
        return impossible(
            format!("model.shared_ffn is given but model.family = \"{family}\""),
            "an expert for every token belongs to family \"qwen2_moe\"",
        );
    }
    let int = |key, absent| {
        let value = settings.get(key).and_then(|value| value.as_integer());
        value.map_or(absent, |value| value as usize)
    };
    let (experts, choices) = (int("model.experts", 8), int("model.experts_per_token", 2));
    if choices > experts {
        return impossible(
            format!("model.experts_per_token = {choices} of model.experts = {experts}"),
            "a token goes to at most all experts",
        );
    }
    let width = int("model.expert_ffn", ffn);
    let balance = settings
        .get("model.balance")
        .and_then(|value| value.as_float().or(value.as_integer().map(|whole| whole as f64)));
    let mut keys = vec![
        ("num_experts_per_tok", json!(choices)),
        ("router_aux_loss_coef", json!(balance.unwrap_or(0.01))),
    ];
    if qwen {
        keys.push(("num_experts", json!(experts)));
        keys.push(("moe_intermediate_size", json!(width)));
        keys.push(("norm_topk_prob", json!(family == "qwen3_moe")));
    } else {
        keys.push(("num_local_experts", json!(experts)));
        keys.push(("intermediate_size", json!(width)));
    }
    if family == "qwen2_moe" {
        let shared = int("model.shared_ffn", choices * width);
        keys.push(("shared_expert_intermediate_size", json!(shared)));
    }
    Ok(keys)
}
