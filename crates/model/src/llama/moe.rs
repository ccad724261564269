//! A mixture of experts in the place of a layer's feed-forward part: Mixtral, Qwen2-MoE, Qwen3-MoE.

use super::config::LlamaConfig;
use super::{Family, INIT_STD, residual_std};
use crate::ConfigError;
use crate::config::Keys;
use crate::layers::{Linear, LinearSpec};
use crate::names::{Builder, Place};
use dist::cost::Pair;
use dist::{Dim, Experts, Mixture};
use serde_json::{Value, json};
use std::sync::Arc;
use tensor::{Fault, Order, ParamRef, Real, Router, Tape, Var};

/// Sizes and switches of the experts.
#[derive(Clone, Debug, PartialEq)]
pub struct MoeConfig {
    /// Experts E of a layer.
    pub experts: usize,
    /// Experts a token goes to, k.
    pub choices: usize,
    /// FFN width of an expert.
    pub ffn: usize,
    /// Whether the weights of a token's choices add up to 1.
    pub normalise: bool,
    /// FFN width of the expert every token goes to, where there is one.
    pub shared_ffn: Option<usize>,
    /// Factor of the load-balancing loss, taken as its mean over the layers that have experts.
    pub balance: f32,
    /// Layers with a plain feed-forward part.
    pub dense_layers: Vec<usize>,
}

impl MoeConfig {
    pub(super) fn from_keys(
        family: Family,
        keys: &Keys<'_>,
        layers: usize,
    ) -> Result<Option<MoeConfig>, ConfigError> {
        let mixtral = match family {
            Family::Mixtral => true,
            Family::Qwen2Moe | Family::Qwen3Moe => false,
            _ => return Ok(None),
        };
        // Qwen3-MoE folders have either name.
        let experts = keys.positive("num_experts")?.or(keys.positive("num_local_experts")?);
        let missing = if mixtral { "num_local_experts" } else { "num_experts" };
        let experts = experts.ok_or(ConfigError::Missing(missing))?;
        let choices = keys.required("num_experts_per_tok")?;
        if choices > experts {
            let remedy = format!("a token cannot go to more than the {experts} experts there are");
            let (key, value) = ("num_experts_per_tok", choices.to_string());
            return Err(ConfigError::Unsupported { key, value, remedy });
        }
        let ffn = keys.required(if mixtral { "intermediate_size" } else { "moe_intermediate_size" })?;
        check_sizes(experts, ffn, layers)?;
        let every = keys.positive("decoder_sparse_step")?.unwrap_or(1);
        let mut dense_layers: Vec<usize> = (0..layers).filter(|i| !(i + 1).is_multiple_of(every)).collect();
        for layer in keys.list("mlp_only_layers")?.into_iter().flatten() {
            let number = layer.as_u64().and_then(|i| usize::try_from(i).ok()).filter(|i| *i < layers);
            dense_layers
                .push(number.ok_or_else(|| Keys::wrong("mlp_only_layers", layer, "a layer's number"))?);
        }
        dense_layers.sort_unstable();
        dense_layers.dedup();
        Ok(Some(MoeConfig {
            experts,
            choices,
            ffn,
            normalise: mixtral || keys.flag("norm_topk_prob")?.unwrap_or(false),
            shared_ffn: match family {
                Family::Qwen2Moe => Some(keys.required("shared_expert_intermediate_size")?),
                _ => None,
            },
            balance: balance(keys)?,
            dense_layers,
        }))
    }

    pub(super) fn write(&self, family: Family, json: &mut Value) {
        json["num_experts_per_tok"] = json!(self.choices);
        json["router_aux_loss_coef"] = json!(super::config::tidy(self.balance));
        if family == Family::Mixtral {
            json["num_local_experts"] = json!(self.experts);
            return;
        }
        json["num_experts"] = json!(self.experts);
        json["moe_intermediate_size"] = json!(self.ffn);
        json["norm_topk_prob"] = json!(self.normalise);
        json["decoder_sparse_step"] = json!(1);
        json["mlp_only_layers"] = json!(self.dense_layers);
        if let Some(ffn) = self.shared_ffn {
            json["shared_expert_intermediate_size"] = json!(ffn);
        }
    }

    /// Whether a layer has experts.
    pub fn applies_to(&self, layer: usize) -> bool {
        !self.dense_layers.contains(&layer)
    }

    /// Matrix parameters of a layer with experts that one token meets.
    pub fn active_params(&self, width: usize) -> usize {
        let shared = self.shared_ffn.map_or(0, |ffn| 3 * width * ffn + width);
        width * self.experts + self.choices * 3 * width * self.ffn + shared
    }
}

/// Sizes that multiply: far above any model, and parameters with their bytes stay inside 64 bits,
/// names of tensors inside memory.
fn check_sizes(experts: usize, ffn: usize, layers: usize) -> Result<(), ConfigError> {
    let refuse = |remedy: &str| {
        let (key, value) = ("num_experts", experts.to_string());
        Err(ConfigError::Unsupported { key, value, remedy: remedy.to_string() })
    };
    match (experts * ffn > 1 << 22, experts * layers > 1 << 16) {
        (true, _) => refuse("experts times their ffn width must be at most 2^22"),
        (_, true) => refuse("experts times layers must be at most 2^16"),
        _ => Ok(()),
    }
}

/// The factor of the load-balancing loss; 0 turns it off.
fn balance(keys: &Keys<'_>) -> Result<f32, ConfigError> {
    let key = "router_aux_loss_coef";
    match keys.number(key)? {
        None => Ok(0.001),
        Some(factor) if (0.0..=1e6).contains(&factor) => Ok(factor as f32),
        Some(factor) => Err(Keys::wrong(key, &json!(factor), "a number from 0 to 10^6")),
    }
}

/// The experts of one layer.
#[derive(Clone)]
pub(super) struct Moe {
    experts: Experts,
    mixture: Mixture,
    shared: Option<Shared>,
}

/// The expert every token goes to, and its gate.
#[derive(Clone)]
struct Shared {
    gate_up: Linear,
    down: Linear,
    gate: ParamRef,
}

impl Moe {
    /// Refuses more ranks along `ep` than experts.
    pub(super) fn build(
        config: &LlamaConfig,
        moe: &MoeConfig,
        layer: usize,
        builder: &mut Builder,
    ) -> Result<Moe, ConfigError> {
        let sparse = (0..config.layers).filter(|layer| moe.applies_to(*layer)).count().max(1);
        let (d, e) = (config.width, moe.experts);
        let experts = Experts::new(&builder.flow, e)?;
        let mixtral = config.family == Family::Mixtral;
        let room = if mixtral { "block_sparse_moe" } else { "mlp" };
        let stored = format!("model.layers.{layer}.{room}");
        let names = if mixtral { ["w1", "w3", "w2"] } else { ["gate_proj", "up_proj", "down_proj"] };
        let each: Vec<String> = (0..e).map(|i| format!("{stored}.experts.{i}")).collect();
        let parts = Parts { layer, d, std: residual_std(config) };
        let gate = vec![(format!("{stored}.gate"), e)];
        let route = builder.across(&parts.matrix("router", d, INIT_STD, gate));
        let (gate_up, down) = parts.experts("experts", &each, names, moe.ffn);
        let gate_up = builder.experts(&gate_up, &experts, experts.gate_up(d, moe.ffn));
        let down = builder.experts(&down, &experts, experts.down(d, moe.ffn));
        let shared = moe.shared_ffn.map(|ffn| Shared::build(&parts, &stored, ffn, builder)).transpose()?;
        let router = Router {
            experts: e,
            choices: moe.choices,
            normalise: moe.normalise,
            balance: moe.balance / sparse as f32,
        };
        let mixture = Mixture { router, route, experts: (gate_up, down) };
        Ok(Moe { experts, mixture, shared })
    }

    /// h [M, D], the normed input, and residual [M, D] -> [M, D]; rows that are not in `real` are padding.
    pub(super) fn forward(
        &self,
        tape: &mut Tape<'_>,
        h: &Var,
        residual: &Var,
        real: &Real,
    ) -> Result<Var, Fault> {
        let y = self.experts.forward(tape, (h, residual), &self.mixture, real)?;
        let Some(shared) = &self.shared else { return Ok(y) };
        let gate = self.experts.gate(tape, h, shared.gate)?;
        let gate_up = shared.gate_up.forward(tape, h, None)?;
        let act = tape.swiglu(&gate_up)?;
        drop(gate_up);
        let rows = shared.down.forward(tape, &act, None)?;
        tape.combine(&rows, &gate, &Arc::new(Order::all(h.value.rows())), Some(&y))
    }
}

impl Shared {
    fn build(parts: &Parts, stored: &str, ffn: usize, builder: &mut Builder) -> Result<Shared, ConfigError> {
        let names = ["gate_proj", "up_proj", "down_proj"];
        let (mut gate_up, down) =
            parts.experts("shared_expert", &[format!("{stored}.shared_expert")], names, ffn);
        gate_up.outputs = Dim::of_parts(&[(ffn, 1), (ffn, 1)]);
        let gate_up = Linear::opening(&gate_up, builder)?;
        let down = Linear::closing(&down, builder)?;
        let gate = vec![(format!("{stored}.shared_expert_gate"), 1)];
        let gate = builder.across(&parts.matrix("shared_expert_gate", parts.d, INIT_STD, gate));
        Ok(Shared { gate_up, down, gate })
    }
}

/// Describes the matrices of one layer.
struct Parts {
    layer: usize,
    d: usize,
    /// Of matrices that lead back into the residual stream.
    std: f32,
}

impl Parts {
    /// [rows of all parts, inputs].
    fn matrix(&self, name: &str, inputs: usize, std: f32, parts: Vec<(String, usize)>) -> LinearSpec {
        let (name, place) = (format!("layers.{}.{name}", self.layer), Place::Rows);
        let (inputs, outputs) = (Dim::plain(inputs), Dim::plain(parts.iter().map(|(_, rows)| rows).sum()));
        LinearSpec { name, inputs, outputs, bias: false, std, parts, place, pair: Pair::Mlp }
    }

    /// Gate and up of every expert [E 2F, D], and down [E D, F].
    fn experts(
        &self,
        name: &str,
        folders: &[String],
        names: [&str; 3],
        f: usize,
    ) -> (LinearSpec, LinearSpec) {
        let [gate, up, down] = names;
        let gate_up: Vec<_> = folders
            .iter()
            .flat_map(|folder| [(format!("{folder}.{gate}"), f), (format!("{folder}.{up}"), f)])
            .collect();
        let downs: Vec<_> = folders.iter().map(|folder| (format!("{folder}.{down}"), self.d)).collect();
        let gate_up = self.matrix(&format!("{name}.gate_up"), self.d, INIT_STD, gate_up);
        (gate_up, self.matrix(&format!("{name}.down"), f, self.std, downs))
    }
}
