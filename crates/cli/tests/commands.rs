//! The commands as a newcomer uses them.

mod common;

use common::{Place, REPOSITORY};

#[test]
fn train_then_inspect_eval_and_chat() {
    let place = Place::new();
    place.succeeds(&["train", "tiny.toml"]);
    for file in [
        "config.json",
        "model.safetensors",
        "tokenizer.json",
        "generation_config.json",
        "README.md",
        "recipe.toml",
    ] {
        assert!(!place.read(&format!("run/{file}")).is_empty());
    }
    let config: serde_json::Value = serde_json::from_slice(&place.read("run/config.json")).unwrap();
    assert_eq!((&config["model_type"], &config["vocab_size"]), (&"llama".into(), &300.into()));
    let log = String::from_utf8(place.read("run/metrics.jsonl")).unwrap();
    let last: serde_json::Value = serde_json::from_str(log.lines().last().unwrap()).unwrap();

    let shown = place.succeeds(&["inspect", "run", "--verify"]);
    for part in ["llama", "model.layers.*.mlp.down_proj.weight", "[32, 96]", "step"] {
        assert!(shown.contains(part), "{part}: {shown}");
    }
    let measured = place.succeeds(&["eval", "run", "--data", "corpus.txt", "--json", "--context", "32"]);
    let measured: serde_json::Value = serde_json::from_str(&measured).unwrap();
    let (loss, validated) = (measured["loss"].as_f64().unwrap(), last["loss"].as_f64().unwrap());
    assert!((loss - validated).abs() < 0.5, "{loss} beside {validated}");

    let chat = ["chat", "run", "--prompt", "MACBETH:", "--max-tokens", "12", "--seed", "3"];
    let said = place.succeeds(&chat);
    assert_eq!(said, place.succeeds(&chat));
    assert!(!said.trim().is_empty());
}

#[test]
fn a_dry_run_says_what_would_happen_and_writes_nothing() {
    let place = Place::new();
    let plan = place.succeeds(&["train", "tiny.toml", "--dry-run"]);
    for part in ["embed", "parameters", "memory, predicted", "time per step, predicted", "It fits."] {
        assert!(plan.contains(part), "{part}: {plan}");
    }
    assert!(!place.path("run").exists());
}

#[test]
fn a_dry_run_of_a_pipeline_draws_its_timeline() {
    let place = Place::new();
    let stages = ["--set", "mesh.pp=2", "--set", "train.accumulate=2"];
    let plan = place.succeeds(&[&["train", "tiny.toml", "--dry-run"][..], &stages].concat());
    for part in ["1f1b on 2 stages, 2 microbatches: bubble 33.3 %", "stage 0  F0  F1  .   .   B0"] {
        assert!(plan.contains(part), "{part}: {plan}");
    }
}

#[test]
fn a_plan_needs_no_machine_that_could_hold_the_model() {
    let place = Place::new();
    let gpt3 = format!("{REPOSITORY}/recipes/gpt3-175b.toml");
    let five_rows =
        ["--set", "train.batch=5", "--set", "train.accumulate=1", "--set", "train.recompute=always"];
    let gpu = ["plan", &gpt3, "--hbm", "80GB", "--tflops", "400"];
    let planned = |more: &[&str]| place.command(&gpu).args(five_rows).args(more).output().unwrap();
    // Everything it needs is said before it is refused, and the refusal says what would do.
    let refused = planned(&["--dram", "2TB"]);
    assert!(!refused.status.success());
    let (said, error) = (String::from_utf8_lossy(&refused.stdout), String::from_utf8_lossy(&refused.stderr));
    assert!(said.contains("3204.8 GB"), "{said}");
    assert!(error.contains("dram is ") && error.contains("or give nvme a budget"), "{error}");
    let planned = planned(&["--nvme", "4TB", "--dram", "100GB", "--set", "model.layers=8"]);
    let planned = String::from_utf8(planned.stdout).unwrap();
    for part in ["go to nvme", "peak", "dram <-> nvme: moved", "bound", "limited by"] {
        assert!(planned.contains(part), "{part}: {planned}");
    }
    let wrong = place.run(&["plan", "tiny.toml", "--dram", "80 gigs"]);
    let wrong = String::from_utf8_lossy(&wrong.stderr).into_owned();
    assert!(wrong.contains("write it as 80GB"), "{wrong}");
}

#[test]
fn a_tokenizer_is_trained_and_used() {
    let place = Place::new();
    place.succeeds(&["tokenizer", "train", "--data", "corpus.txt", "--vocab", "400", "--out", "tok"]);
    let tokens = place.succeeds(&["tokenizer", "encode", "tok", "Double, double toil and trouble"]);
    assert!(tokens.contains("31 bytes"), "{tokens}");
    place.succeeds(&["train", "tiny.toml", "--set", "tokenizer.file=tok", "--set", "train.steps=1"]);
    assert_eq!(place.read("tok/tokenizer.json"), place.read("run/tokenizer.json"));
}

#[test]
fn a_run_is_fine_tuned() {
    let place = Place::new();
    place.succeeds(&["train", "tiny.toml"]);
    place.write(
        "talk.jsonl",
        "{\"prompt\": \"Who are you?\", \"completion\": \"A ghost.\"}\n{\"text\": \"Out, out, brief candle!\"}\n",
    );
    place.write(
        "tune.toml",
        "run = { dir = \"tuned\" }\nmodel = { from = \"run\" }\ndata = { path = \"talk.jsonl\" }\n\
         train = { steps = 200, batch = 1, context = 32, lr = 1e-2 }\n",
    );
    place.succeeds(&["train", "tune.toml"]);
    let said = place.succeeds(&["chat", "tuned", "--raw", "--prompt", "Who are you?", "--temperature", "0"]);
    assert!(said.contains("A ghost."), "{said}");
}

#[test]
fn the_shakespeare_recipe_is_whole() {
    let place = Place::new();
    let recipe = format!("{REPOSITORY}/recipes/shakespeare.toml");
    let train = format!("data.path={REPOSITORY}/data/shakespeare/train.txt");
    let valid = format!("data.valid={REPOSITORY}/data/shakespeare/valid.txt");
    let sets = ["--set", &train, "--set", &valid, "--set", "tokenizer.vocab=300"];
    let plan = place.succeeds(&[&["train", &recipe, "--dry-run"][..], &sets].concat());
    assert!(plan.contains("35 documents"), "{plan}");
}

#[test]
fn doctor_and_help_speak() {
    let place = Place::new();
    let said = place.succeeds(&["doctor"]);
    for part in ["cores", "instruction set", "memory", "drive", "GPU"] {
        assert!(said.contains(part), "{part}: {said}");
    }
    assert!(place.succeeds(&["--help"]).contains("trilith train recipes/shakespeare.toml"));
    assert!(place.succeeds(&["train", "--keys"]).contains("train"));
}
