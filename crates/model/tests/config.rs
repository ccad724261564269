//! Configs: what is read is what is written back, and what cannot be built is refused by an error
//! that names the key, never by a panic.

mod common;

use common::{FAMILIES, config_json};
use dist::Mesh;
use model::{Config, Model};
use serde_json::{Value, json};
use tensor::RopeScaling;

/// The config of a family with some keys set, or removed by null.
fn mutated(family: &str, changes: Value) -> Value {
    let mut config = config_json(family);
    for (key, value) in changes.as_object().unwrap() {
        config[key.as_str()] = value.clone();
    }
    config
}

/// From `from_json`, or from `build` where only that can tell.
fn refusal(config: &Value) -> Option<String> {
    match Config::from_json(config) {
        Err(error) => Some(error.to_string()),
        Ok(config) => Model::build(&config, 16, &Mesh::solo()).err().map(|e| e.to_string()),
    }
}

#[track_caller]
fn assert_refused(config: &Value, says: &str) {
    let error = refusal(config).unwrap_or_else(|| panic!("accepted; expected an error naming {says}"));
    assert!(error.contains(says), "`{error}` does not name {says}");
}

/// Sizes a model cannot do without.
fn required(family: &str) -> &'static [&'static str] {
    match family {
        "gpt2" => &["vocab_size", "n_embd", "n_layer", "n_head", "n_positions"],
        "qwen2_moe" => &["num_experts", "num_experts_per_tok", "moe_intermediate_size", "hidden_size"],
        _ => &["vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"],
    }
}

/// Sizes with a default.
fn optional(family: &str) -> &'static [&'static str] {
    match family {
        "gpt2" => &["n_inner"],
        "mistral" => &["num_key_value_heads", "head_dim", "max_position_embeddings", "sliding_window"],
        _ => &["num_key_value_heads", "head_dim", "max_position_embeddings"],
    }
}

#[test]
fn configs_survive_a_round_trip() {
    let more = [
        mutated(
            "qwen2",
            json!({"use_sliding_window": true, "sliding_window": 9, "max_window_layers": 1, "layer_types": null}),
        ),
        mutated(
            "qwen3",
            json!({"sliding_window": 5, "layer_types": ["sliding_attention", "full_attention"]}),
        ),
        mutated("qwen3_moe", json!({"decoder_sparse_step": 2, "norm_topk_prob": false})),
        mutated(
            "llama3",
            json!({"attention_bias": true, "tie_word_embeddings": true, "eos_token_id": [7, 8]}),
        ),
        mutated(
            "llama2",
            json!({"rope_parameters": null, "rope_scaling": {"type": "linear", "factor": 2.5}}),
        ),
        mutated("mistral", json!({"sliding_window": null, "bos_token_id": null})),
        mutated("gpt2", json!({"n_inner": null, "activation_function": "gelu", "layer_norm_epsilon": 1e-6})),
    ];
    for json in FAMILIES.map(config_json).into_iter().chain(more) {
        let config = Config::from_json(&json).unwrap();
        let written = config.to_json("float32");
        assert_eq!(Config::from_json(&written).unwrap(), config, "{written:#}");
    }
}

#[test]
fn what_the_goldens_say_is_read() {
    let read = |family| Config::from_json(&config_json(family)).unwrap();
    let names = FAMILIES.map(|family| read(family).family());
    let experts = ["mixtral", "qwen2_moe", "qwen3_moe"];
    assert_eq!(names[..7], ["llama", "llama", "llama", "mistral", "qwen2", "qwen3", "gpt2"]);
    assert_eq!(names[7..], experts);
    assert_eq!(experts.map(|family| read(family).experts()), [4, 5, 6]);
    assert_eq!(read("llama2").heads(), (4, 4, 12));
    assert_eq!(read("qwen3").heads(), (4, 2, 16));
    let Config::Llama(llama3) = read("llama3") else { panic!("a Llama") };
    assert!(matches!(llama3.rope_scaling, RopeScaling::Llama3 { original_max_positions: 64, .. }));
    assert_eq!((llama3.rope_theta, llama3.tied), (5000.0, false));
    let Config::Llama(smollm2) = read("smollm2") else { panic!("a Llama") };
    assert_eq!((smollm2.rope_theta, smollm2.tied, smollm2.eos), (100_000.0, true, Some(2)));
    let Config::Llama(mistral) = read("mistral") else { panic!("a Llama") };
    assert_eq!(mistral.windows, [Some(7), Some(7)]);
    let Config::Llama(qwen2) = read("qwen2") else { panic!("a Llama") };
    assert_eq!((qwen2.qkv_bias, qwen2.out_bias, qwen2.window_of(1)), (true, false, None));
    let Config::Gpt2(gpt2) = read("gpt2") else { panic!("a GPT-2") };
    assert_eq!((gpt2.ffn, gpt2.exact_gelu, gpt2.max_positions), (80, false, 32));
}

#[test]
fn bad_sizes_are_refused_by_key() {
    let wrong = [json!("12"), json!(-4), json!(1.5), json!([4]), json!({}), json!(true), json!(1u64 << 40)];
    for family in FAMILIES {
        for key in required(family) {
            for value in wrong.iter().chain(&[json!(null), json!(0)]) {
                assert_refused(&mutated(family, json!({*key: value})), key);
            }
            let mut absent = config_json(family);
            absent.as_object_mut().unwrap().remove(*key);
            assert_refused(&absent, key);
        }
        for key in optional(family) {
            for value in wrong.iter().chain(&[json!(0)]) {
                assert_refused(&mutated(family, json!({*key: value})), key);
            }
        }
    }
}

#[test]
fn bad_values_are_refused_by_key() {
    let llama3 = |key: &str, value: Value| {
        let mut rope = config_json("llama3")["rope_parameters"].clone();
        rope[key] = value;
        mutated("llama3", json!({"rope_parameters": rope}))
    };
    let kinds = |kinds: Value| mutated("qwen2", json!({"sliding_window": 8, "layer_types": kinds}));
    let cases = [
        (json!(null), "model_type"),
        (json!([1, 2]), "model_type"),
        (mutated("llama2", json!({"model_type": null})), "model_type"),
        (mutated("llama2", json!({"model_type": 3})), "model_type"),
        (mutated("llama2", json!({"model_type": "mamba"})), "mamba"),
        (mutated("llama2", json!({"num_attention_heads": 5, "head_dim": null})), "hidden_size"),
        (mutated("llama3", json!({"num_key_value_heads": 3})), "num_key_value_heads"),
        (mutated("llama3", json!({"num_key_value_heads": 8})), "num_key_value_heads"),
        (mutated("qwen3", json!({"head_dim": 15})), "head_dim"),
        (mutated("llama2", json!({"hidden_act": "gelu"})), "hidden_act"),
        (mutated("llama2", json!({"hidden_act": 1})), "hidden_act"),
        (mutated("llama2", json!({"mlp_bias": true})), "mlp_bias"),
        (mutated("llama2", json!({"attention_bias": "yes"})), "attention_bias"),
        (mutated("llama2", json!({"tie_word_embeddings": 1})), "tie_word_embeddings"),
        (mutated("llama2", json!({"rms_norm_eps": "small"})), "rms_norm_eps"),
        (mutated("llama2", json!({"rms_norm_eps": -1e-5})), "rms_norm_eps"),
        (mutated("llama2", json!({"eos_token_id": "</s>"})), "eos_token_id"),
        (mutated("llama2", json!({"bos_token_id": -1})), "bos_token_id"),
        (mutated("smollm2", json!({"rope_theta": 0})), "rope_theta"),
        (mutated("smollm2", json!({"rope_theta": 1e300})), "rope_theta"),
        (mutated("smollm2", json!({"rope_scaling": "linear"})), "rope_scaling"),
        (mutated("smollm2", json!({"rope_scaling": {"type": "linear"}})), "factor"),
        (mutated("smollm2", json!({"rope_scaling": {"type": "linear", "factor": 0}})), "factor"),
        (mutated("smollm2", json!({"rope_scaling": {"type": "dynamic", "factor": 2}})), "rope_type"),
        (mutated("llama3", json!({"rope_parameters": [1]})), "rope_parameters"),
        (llama3("rope_type", json!("yarn")), "rope_type"),
        (llama3("rope_type", json!(3)), "rope_type"),
        (llama3("factor", json!(null)), "factor"),
        (llama3("low_freq_factor", json!("low")), "low_freq_factor"),
        (llama3("high_freq_factor", json!(1.0)), "high_freq_factor"),
        (llama3("original_max_position_embeddings", json!(-8)), "original_max_position_embeddings"),
        (kinds(json!("full_attention")), "layer_types"),
        (kinds(json!(["full_attention"])), "layer_types"),
        (kinds(json!(["full_attention", "chunked_attention"])), "layer_types"),
        (
            mutated("qwen2", json!({"use_sliding_window": 1, "sliding_window": 8, "layer_types": null})),
            "use_sliding_window",
        ),
        (mutated("gpt2", json!({"n_head": 5})), "n_embd"),
        (mutated("gpt2", json!({"n_positions": 8})), "n_positions"),
        (mutated("gpt2", json!({"activation_function": "relu"})), "activation_function"),
        (mutated("gpt2", json!({"layer_norm_epsilon": []})), "layer_norm_epsilon"),
        (mutated("gpt2", json!({"scale_attn_weights": false})), "scale_attn_weights"),
        (
            mutated("gpt2", json!({"scale_attn_by_inverse_layer_idx": true})),
            "scale_attn_by_inverse_layer_idx",
        ),
        (mutated("gpt2", json!({"tie_word_embeddings": false})), "tie_word_embeddings"),
    ];
    for (config, says) in cases {
        assert_refused(&config, says);
    }
}

/// Whatever stands under any key: an answer, and sizes whose products hold.
#[test]
fn no_single_value_makes_a_config_panic() {
    let junk = [
        json!(null),
        json!(true),
        json!(0),
        json!(1),
        json!(3),
        json!(-1),
        json!(0.5),
        json!(1e308),
        json!(u64::MAX),
        json!(""),
        json!("x".repeat(1000)),
        json!([]),
        json!([null]),
        json!({}),
        json!({"rope_type": {}}),
    ];
    for family in FAMILIES {
        for key in config_json(family).as_object().unwrap().keys() {
            for value in &junk {
                let config = mutated(family, json!({key.as_str(): value}));
                if let Ok(config) = Config::from_json(&config) {
                    assert!(config.flops().per_token(16).is_finite());
                    let _ = Model::build(&config, 16, &Mesh::solo());
                }
            }
        }
    }
}

#[test]
fn experts_that_cannot_be_are_refused() {
    for (family, change, key) in [
        ("mixtral", json!({"num_experts_per_tok": 5}), "num_experts_per_tok"),
        ("mixtral", json!({"num_local_experts": 4096, "intermediate_size": 4096}), "num_experts"),
        ("qwen3_moe", json!({"mlp_only_layers": [2]}), "mlp_only_layers"),
        ("qwen3_moe", json!({"router_aux_loss_coef": -1.0}), "router_aux_loss_coef"),
        ("qwen2_moe", json!({"shared_expert_intermediate_size": null}), "shared_expert_intermediate_size"),
    ] {
        assert_refused(&mutated(family, change), key);
    }
}

#[test]
fn flops_count_the_experts_a_token_meets() {
    let Config::Llama(config) = Config::from_json(&config_json("qwen2_moe")).unwrap() else {
        panic!("a Llama")
    };
    let flops = Config::Llama(config).flops();
    // Attention 40 x (40 + 2 x 20 + 40), one dense layer, one of router, 3 experts of 16, a shared of 24
    // with its gate, head.
    let (attention, dense) = (40 * 120, 3 * 40 * 56);
    let sparse = 5 * 40 + 3 * 3 * 40 * 16 + 3 * 40 * 24 + 40;
    assert_eq!(flops.matmul_params, 2 * attention + dense + sparse + 96 * 40);
}

/// The largest sizes that pass one by one, together: bytes of parameters with gradients and
/// optimizer state still fit in 64 bits.
#[test]
fn the_largest_config_does_not_overflow() {
    let llama = mutated(
        "qwen3",
        json!({
            "vocab_size": 1u64 << 31, "hidden_size": 1 << 20, "intermediate_size": 1 << 20, "head_dim": 1 << 10,
            "num_attention_heads": 1 << 12, "num_key_value_heads": 1 << 12, "num_hidden_layers": 1 << 14,
            "layer_types": null,
        }),
    );
    let gpt2 = mutated(
        "gpt2",
        json!({
            "vocab_size": 1u64 << 31, "n_positions": 1u64 << 31, "n_embd": 1 << 20, "n_inner": 1 << 20,
            "n_head": 1 << 12, "n_layer": 1 << 14,
        }),
    );
    for json in [llama, gpt2] {
        let config = Config::from_json(&json).unwrap();
        assert!(config.flops().per_token(16).is_finite());
        let built = Model::build(&config, 16, &Mesh::solo()).unwrap();
        let elements: u128 = built.params.specs().iter().map(|spec| spec.len() as u128).sum();
        assert!(elements * 16 < u64::MAX as u128);
    }
}

#[test]
fn learnt_positions_do_not_stretch() {
    let config = Config::from_json(&config_json("gpt2")).unwrap();
    assert!(Model::build(&config, 32, &Mesh::solo()).is_ok());
    let refused = Model::build(&config, 33, &Mesh::solo()).err().unwrap().to_string();
    assert!(refused.contains("n_positions") && refused.contains("33"), "{refused}");
}
