//! Models speak on a GPU as they speak on the CPU. The GPU is played by the CPU, which runs the text of the kernels;
//! built with `TRILITH_GPU=real` the test takes the machine's own.

use device::cuda;
use device::{DType, Device, View};
use dist::Mesh;
use infer::{Generation, Sampling, Session};
use model::{Built, Config, Model};
use serde_json::json;
use tensor::ParamStore;

fn config(family: serde_json::Value) -> Config {
    let mut config = json!({
        "model_type": "llama", "vocab_size": 60, "hidden_size": 32, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 48,
        "max_position_embeddings": 64, "rms_norm_eps": 1e-5, "tie_word_embeddings": true,
    });
    family.as_object().unwrap().iter().for_each(|(key, value)| config[key] = value.clone());
    Config::from_json(&config).unwrap()
}

/// Logits after a prompt in two parts, and the tokens that follow it.
fn spoken(config: &Config, device: Device, dtype: DType) -> (Vec<f32>, Vec<u32>) {
    let Built { model, params, .. } = Model::build(config, 64, &Mesh::solo()).unwrap();
    let mut store = ParamStore::new(device, dtype, &params).unwrap();
    let set = |param, first, values: &[f32]| store.set_weights(param, first, View::of_f32(values));
    params.initial_values(7, set).unwrap();
    let mut session = Session::new(config, &store, 64).unwrap();
    let prompt: Vec<u32> = (0..21).map(|i| (i * 7 + 3) % 60).collect();
    session.logits(&model, &mut store, &prompt[..17]).unwrap();
    let logits = session.logits(&model, &mut store, &prompt).unwrap();
    let speaking = (&model, &mut store, &mut session);
    let mut words = Generation::new(speaking, &prompt, Sampling::GREEDY, &[], 8).unwrap();
    let mut tokens = Vec::new();
    while let Some(token) = words.next_token().unwrap() {
        tokens.push(token);
    }
    (logits, tokens)
}

#[test]
fn logits_and_words_are_those_of_the_cpu() {
    let _gpu = cuda::for_a_test();
    device::Threads::new(2).unwrap().run(|| {
        let qwen3 = json!({"model_type": "qwen3", "head_dim": 16});
        for (family, dtype, most) in
            [(json!({}), DType::F32, 1e-4), (qwen3, DType::F32, 1e-4), (json!({}), DType::Bf16, 3e-2)]
        {
            let config = config(family);
            let (got, want) = (spoken(&config, Device::Cuda, dtype), spoken(&config, Device::Cpu, dtype));
            let size = want.0.iter().fold(0f32, |most, x| most.max(x.abs()));
            let apart = got.0.iter().zip(&want.0).map(|(got, want)| (got - want).abs());
            assert!(apart.fold(0f32, f32::max) < most * size, "{dtype} {:?} {:?}", got.0, want.0);
            // Likeliest tokens may change places where logits are rounded.
            assert!(dtype == DType::Bf16 || got.1 == want.1, "{:?} {:?}", got.1, want.1);
            assert_eq!(got.1.len(), 8);
        }
    });
}
