//! A real model: SmolLM2-135M-Instruct, a GGUF of 4-bit blocks that scripts/fetch_smollm2.sh
//! downloads (98 MB). Where it cannot be had these tests say so and pass; CI fetches it first.

mod common;

use common::{Place, REPOSITORY};
use std::path::PathBuf;
use std::process::Command;
use std::sync::OnceLock;

fn model() -> Option<&'static str> {
    static MODEL: OnceLock<Option<String>> = OnceLock::new();
    let fetched = MODEL.get_or_init(|| {
        let path = PathBuf::from(REPOSITORY).join("target/models/smollm2-135m-instruct-q4_1.gguf");
        let script = format!("{REPOSITORY}/scripts/fetch_smollm2.sh");
        let fetched = Command::new("bash").arg(script).output().is_ok_and(|done| done.status.success());
        fetched.then(|| path.to_str().unwrap().to_string())
    });
    if fetched.is_none() {
        eprintln!("skipped: scripts/fetch_smollm2.sh could not fetch the model");
    }
    fetched.as_deref()
}

#[test]
fn it_knows_the_capital_of_france() {
    let (place, Some(model)) = (Place::new(), model()) else { return };
    let ask = ["--prompt", "What is the capital of France?", "--temperature", "0", "--max-tokens", "16"];
    for dtype in ["bf16", "f32"] {
        let said = place.succeeds(&[&["chat", model, "--dtype", dtype][..], &ask].concat());
        assert!(said.contains("Paris"), "{dtype}: {said}");
    }
}

#[test]
fn it_finds_shakespeare_less_surprising_than_noise() {
    let (place, Some(model)) = (Place::new(), model()) else { return };
    let text = String::from_utf8(place.read("corpus.txt")).unwrap();
    place.write("play.txt", &text[..2000]);
    let backwards: String = text[..2000].chars().rev().collect();
    place.write("noise.txt", backwards);
    let bits = |file: &str| {
        let measured = place.succeeds(&["eval", model, "--data", file, "--json", "--context", "256"]);
        let measured: serde_json::Value = serde_json::from_str(&measured).unwrap();
        measured["bits_per_byte"].as_f64().unwrap()
    };
    let (play, noise) = (bits("play.txt"), bits("noise.txt"));
    assert!(play < 2.2 && noise > 2.0 * play, "{play} and {noise} bits per byte");
}

#[test]
fn it_can_be_fine_tuned_and_saved() {
    let (place, Some(model)) = (Place::new(), model()) else { return };
    place.write("talk.jsonl", "{\"messages\": [{\"role\": \"user\", \"content\": \"What is the secret word?\"}, {\"role\": \"assistant\", \"content\": \"The secret word is trilith.\"}]}\n");
    place.write(
        "tune.toml",
        format!(
            "run = {{ dir = \"tuned\" }}\nmodel = {{ from = \"{model}\" }}\ndata = {{ path = \"talk.jsonl\" }}\n\
             train = {{ steps = 12, batch = 1, context = 64, lr = 1e-4, warmup = 2 }}\n\
             checkpoint = {{ every = 0, background = false }}\n"
        ),
    );
    place.succeeds(&["train", "tune.toml"]);
    let ask =
        ["chat", "tuned", "--prompt", "What is the secret word?", "--temperature", "0", "--max-tokens", "16"];
    let said = place.succeeds(&ask);
    assert!(said.contains("trilith"), "{said}");
}
