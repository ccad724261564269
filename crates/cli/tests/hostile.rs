//! Bad input: one error that names the thing and the remedy, exit code 1, nothing lost.

mod common;

use common::{Draws, Place};

/// A place with a finished run in `run`.
fn trained() -> Place {
    let place = Place::new();
    place.succeeds(&["train", "tiny.toml"]);
    place
}

#[track_caller]
fn says(said: &str, parts: &[&str]) {
    for part in parts {
        assert!(said.contains(part), "`{part}` is not in: {said}");
    }
}

#[test]
fn recipes() {
    let place = Place::new();
    says(&place.fails(&["train", "none.toml"]), &["none.toml"]);
    place.write("syntax.toml", "run = {");
    says(&place.fails(&["train", "syntax.toml"]), &["syntax.toml"]);
    let set = |argument: &str| place.fails(&["train", "tiny.toml", "--set", argument]);
    says(&set("train.lrr=1e-3"), &["train.lrr", "train.lr"]);
    says(&set("train.lr=fast"), &["train.lr", "fast"]);
    says(&set("train.steps=-1"), &["train.steps", "-1"]);
    says(&set("model.heads=5"), &["model.heads"]);
    says(&set("train.context=1"), &["train.context"]);
    says(&set("data.path=nowhere.txt"), &["nowhere.txt"]);
    says(&set("tokenizer.file=nowhere.json"), &["nowhere.json"]);
    says(&set("model.from=nowhere"), &["nowhere"]);
    assert!(!place.path("run").join("model.safetensors").exists());
}

#[test]
fn corpora() {
    let place = Place::new();
    place.write("empty.txt", "");
    let train = |path: &str| place.fails(&["train", "tiny.toml", "--set", &format!("data.path={path}")]);
    says(&train("empty.txt"), &["0 tokens", "data.path"]);
    place.write("latin1.txt", b"caf\xe9 au lait, every day of the week".repeat(30));
    says(&train("latin1.txt"), &["latin1.txt", "UTF-8"]);
    place.write("bad.jsonl", "{\"text\": \"fine\"}\n{\"text\": 5}\n");
    says(&train("bad.jsonl"), &["bad.jsonl", "line 2"]);
}

#[test]
fn weights_that_lie() {
    let place = trained();
    let whole = place.read("run/model.safetensors");
    let header = u64::from_le_bytes(whole[..8].try_into().unwrap()) as usize;
    let text = String::from_utf8(whole[8..8 + header].to_vec()).unwrap();
    let with_header = |text: &str| {
        let mut bytes = (text.len() as u64).to_le_bytes().to_vec();
        bytes.extend_from_slice(text.as_bytes());
        bytes.extend_from_slice(&whole[8 + header..]);
        bytes
    };
    let lies: Vec<(&str, Vec<u8>)> = vec![
        ("empty", Vec::new()),
        ("truncated", whole[..whole.len() / 2].to_vec()),
        ("cut in the header", whole[..header / 2].to_vec()),
        ("a header of 2^60 bytes", [&(1u64 << 60).to_le_bytes()[..], &whole[8..]].concat()),
        ("no JSON", with_header(&text.replace('{', "["))),
        ("another shape", with_header(&text.replace("[32,32]", "[32,31]"))),
        ("a missing weight", with_header(&text.replace("model.norm.weight", "model.morn.weight"))),
    ];
    for (what, bytes) in lies {
        place.write("run/model.safetensors", bytes);
        for args in [&["chat", "run", "--prompt", "x"][..], &["eval", "run", "--data", "corpus.txt"]] {
            let said = place.fails(args);
            assert!(
                said.contains("model.safetensors") || said.contains("model.norm.weight"),
                "{what}: {said}"
            );
        }
    }
    // Any 200 flips of the header: an orderly error, or an intact model.
    let mut draws = Draws(3);
    for _ in 0..60 {
        let mut bytes = whole.clone();
        bytes[draws.below(8 + header as u64) as usize] ^= 1 << draws.below(8);
        place.write("run/model.safetensors", bytes);
        let output = place.run(&["inspect", "run/model.safetensors"]);
        assert!(matches!(output.status.code(), Some(0 | 1)), "{output:?}");
        assert!(!String::from_utf8_lossy(&output.stderr).contains("panicked"), "{output:?}");
    }
}

#[test]
fn gguf_files_that_lie() {
    let place = Place::new();
    place.write("empty.gguf", "");
    place.write("magic.gguf", "GGML and then something");
    place.write("counts.gguf", [&b"GGUF\x03\0\0\0"[..], &[0xff; 16]].concat());
    for name in ["empty.gguf", "magic.gguf", "counts.gguf"] {
        says(&place.fails(&["inspect", name]), &[name]);
        says(&place.fails(&["chat", name, "--prompt", "x"]), &[name]);
    }
}

#[test]
fn models_and_tokenizers_that_do_not_match() {
    let place = trained();
    place.succeeds(&["tokenizer", "train", "--data", "corpus.txt", "--vocab", "500", "--out", "large"]);
    let kept = place.read("run/tokenizer.json");
    std::fs::copy(place.path("large/tokenizer.json"), place.path("run/tokenizer.json")).unwrap();
    says(&place.fails(&["chat", "run", "--prompt", "x"]), &["500", "300"]);
    place.write("run/tokenizer.json", kept);
    let tune = ["train", "tiny.toml", "--set", "run.dir=tuned", "--set", "tokenizer.file=large"];
    place.write(
        "tune.toml",
        "run = { dir = \"tuned\" }\nmodel = { from = \"run\" }\ntokenizer = { file = \"large\" }\n\
         data = { path = \"corpus.txt\" }\ntrain = { context = 32 }\n",
    );
    says(&place.fails(&["train", "tune.toml"]), &["500", "300"]);
    place.succeeds(&tune);
    place.write("run/config.json", "{\"model_type\": \"mamba\"}");
    says(&place.fails(&["chat", "run", "--prompt", "x"]), &["mamba", "llama"]);
}

#[test]
fn a_model_too_large_for_memory() {
    let place = Place::new();
    let sets = ["--set", "model.width=65536", "--set", "model.heads=512", "--set", "model.layers=96"];
    let said = place.fails(&[&["train", "tiny.toml"][..], &sets].concat());
    says(&said, &["memory", "available", "smaller model"]);
    let plan = place.succeeds(&[&["train", "tiny.toml", "--dry-run"][..], &sets].concat());
    says(&plan, &["It does not fit"]);
}

#[test]
fn damaged_states() {
    let place = trained();
    let log = place.read("run/metrics.jsonl");
    let weights = place.read("run/model.safetensors");
    for step in [20, 24] {
        let name = format!("run/state/step-{step:08}/state.bin");
        let mut bytes = place.read(&name);
        let middle = bytes.len() / 2;
        bytes[middle] ^= 4;
        place.write(&name, bytes);
    }
    let verified = place.run(&["inspect", "run", "--verify"]);
    assert_eq!(verified.status.code(), Some(1));
    says(&String::from_utf8_lossy(&verified.stdout), &["state.bin"]);
    let said = place.fails(&["train", "tiny.toml", "--resume"]);
    says(&said, &["no whole state", "state.bin", "--overwrite"]);
    assert!(log == place.read("run/metrics.jsonl") && weights == place.read("run/model.safetensors"));
    says(&place.fails(&["train", "tiny.toml"]), &["--overwrite"]);
}

#[test]
fn a_run_that_is_there_is_not_overwritten() {
    let place = trained();
    let weights = place.read("run/model.safetensors");
    says(&place.fails(&["train", "tiny.toml"]), &["--resume", "--overwrite"]);
    assert_eq!(weights, place.read("run/model.safetensors"));
}

/// A file system of 300 KiB, mounted in a mount namespace of the child; needs user namespaces.
fn on_a_small_disk(place: &Place, script: &str) -> Option<std::process::Output> {
    let script = format!("mkdir -p disk && mount -t tmpfs -o size=300k tmpfs disk || exit 99\n{script}");
    let output = std::process::Command::new("unshare")
        .args(["--user", "--map-root-user", "--mount", "sh", "-c", &script])
        .env("TRILITH", env!("CARGO_BIN_EXE_trilith"))
        .current_dir(place.path("."))
        .output();
    match output {
        Ok(output) if !matches!(output.status.code(), Some(99)) && !unshare_failed(&output) => Some(output),
        _ => {
            eprintln!("skipped: this machine allows no mount namespace");
            None
        }
    }
}

fn unshare_failed(output: &std::process::Output) -> bool {
    String::from_utf8_lossy(&output.stderr).contains("unshare:")
}

#[test]
fn a_full_disk() {
    let place = Place::new();
    // Room for the first save, not for the next beside it.
    let script =
        "\"$TRILITH\" train tiny.toml --set run.dir=disk/run; echo code $?; ls -A disk/run disk/run/state";
    let Some(output) = on_a_small_disk(&place, script) else { return };
    let said =
        String::from_utf8_lossy(&output.stderr).into_owned() + &String::from_utf8_lossy(&output.stdout);
    says(&said, &["code 1", "error: ", "saving needs", "disk/run/state", "free some space"]);
    assert!(!said.contains("panicked"), "{said}");
    assert!(!said.lines().any(|line| line.starts_with('.') && line != ".lock"), "leftovers: {said}");
}

#[test]
fn a_read_only_folder() {
    let place = Place::new();
    let script =
        "mount -o remount,ro disk; \"$TRILITH\" train tiny.toml --set run.dir=disk/run; echo code $?";
    let Some(output) = on_a_small_disk(&place, script) else { return };
    let said =
        String::from_utf8_lossy(&output.stderr).into_owned() + &String::from_utf8_lossy(&output.stdout);
    says(&said, &["code 1", "error: ", "disk/run", "ead-only", "run.dir"]);
}
