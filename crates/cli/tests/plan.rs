//! `trilith plan` as someone with a laptop uses it.

mod common;

use common::{Place, REPOSITORY};

fn gpt3() -> String {
    format!("{REPOSITORY}/recipes/gpt3-175b.toml")
}

#[test]
fn ten_thousand_devices_for_gpt3() {
    let place = Place::new();
    let plan = place.succeeds(&["plan", &gpt3(), "--devices", "10000"]);
    for part in [
        "175G parameters",
        "9999",
        "99 + 99 = 198",
        "predicted",
        "the choice",
        "memory of the fullest rank",
        "2D weight-stationary",
        "recompute always",
    ] {
        assert!(plan.contains(part), "{part}: {plan}");
    }
    assert!(!place.path("runs").exists());
}

#[test]
fn what_ranks_exchange_is_counted_on_request() {
    let place = Place::new();
    let small = ["--set", "model.width=768", "--set", "model.heads=96", "--set", "tokenizer.vocab=512"];
    let recipe = gpt3();
    let arguments = ["plan", &recipe, "--devices", "64", "--count"];
    let plan = place.succeeds(&[&arguments[..], &small].concat());
    assert!(plan.contains("Counted: one rank") && plan.matches("7 + 7 = 14").count() == 4, "{plan}");
}

#[test]
fn a_mesh_can_be_pinned() {
    let place = Place::new();
    let plan = place.succeeds(&["plan", &gpt3(), "--mesh", "pp=8,fsdp=8,x=2,y=4"]);
    assert!(plan.contains("512 in nodes of 8") && plan.contains("pp=8,fsdp=8,x=2,y=4"), "{plan}");
}

#[test]
fn a_model_is_planned_from_its_config_alone() {
    let place = Place::new();
    place.write(
        "big/config.json",
        r#"{"model_type": "llama", "vocab_size": 128256, "hidden_size": 8192, "intermediate_size": 28672,
            "num_hidden_layers": 80, "num_attention_heads": 64, "num_key_value_heads": 8,
            "max_position_embeddings": 8192}"#,
    );
    place.write(
        "big.toml",
        "[run]\ndir = \"r\"\n[model]\nfrom = \"big\"\n[data]\npath = \"d\"\n\
         [train]\nbatch = 4\naccumulate = 128\ncontext = 4096\n",
    );
    let plan = place.succeeds(&["plan", "big.toml", "--devices", "256"]);
    assert!(plan.contains("70.6G parameters") && plan.contains("the choice"), "{plan}");
}

#[test]
fn experts_are_planned() {
    let place = Place::new();
    let mixtral = format!("{REPOSITORY}/recipes/mixtral-8x7b.toml");
    let plan = place.succeeds(&["plan", &mixtral]);
    for part in ["46.7G parameters", "2 of 8 experts of 14336", "the choice", "expert messages"] {
        assert!(plan.contains(part), "{part}: {plan}");
    }
    let plan = place.succeeds(&["plan", &mixtral, "--mesh", "pp=4,fsdp=2,ep=8"]);
    assert!(plan.contains("pp=4,fsdp=2,ep=8") && plan.contains("pp=4,fsdp=4,ep=4"), "{plan}");
    let small = ["--set", "model.width=512", "--set", "model.expert_ffn=256", "--set", "tokenizer.vocab=512"];
    let plan = place.succeeds(&[&["plan", &mixtral, "--devices", "16", "--count"][..], &small].concat());
    assert!(plan.contains("Counted: one rank") && plan.contains("3 + 3 = 6"), "{plan}");
    let many = place.fails(&["plan", &mixtral, "--mesh", "ep=16"]);
    assert!(many.contains("more pieces than there are"), "{many}");
}

#[test]
fn what_cannot_be_is_refused_with_a_remedy() {
    let place = Place::new();
    let gpt3 = gpt3();
    for (arguments, want) in [
        (&["--devices", "8", "--no-offload"][..], "does not fit on 8 devices"),
        (&["--devices", "8", "--no-offload"], "take devices of"),
        (&["--devices", "2003"], "pass --devices"),
        (&["--devices", "0"], "--devices 0"),
        (&["--mesh", "x=2", "--devices", "4"], "--mesh has 2 ranks"),
        (&["--mesh", "x=128"], "no plan can be run on this mesh"),
        (&["--mesh", "ep=2"], "rows or experts into more pieces than there are"),
        (&["--mesh", "x=1048576,y=2"], "a plan is for 1 to 1048576 devices"),
        (&["--set", "train.context=4096", "--set", "model.from=nowhere"], "model.from"),
    ] {
        let said = place.fails(&[&["plan", &gpt3], arguments].concat());
        assert!(said.contains(want), "{arguments:?}: {said}");
    }
}

#[test]
fn budgets_of_the_recipe_are_planned_with_and_flags_override_them() {
    let place = Place::new();
    let budgets = ["--set", "memory.dram=300MiB", "--set", "memory.nvme=2GiB", "--tflops", "1"];
    let plan = |flags: &[&str]| place.succeeds(&[&["plan", "tiny.toml"], &budgets[..], flags].concat());
    let text = plan(&[]);
    assert!(text.contains("dram 300.0 MiB, nvme 2.0 GiB"), "{text}");
    let text = plan(&["--dram", "400MiB"]);
    assert!(text.contains("dram 400.0 MiB, nvme 2.0 GiB"), "{text}");
}

#[test]
fn moments_of_8_bits_are_planned() {
    let place = Place::new();
    let text = place.succeeds(&["plan", "tiny.toml", "--tflops", "1", "--set", "train.moments=8bit"]);
    assert!(text.contains("10 B a parameter (2 param + 4 grad + 2 master + 1 m + 1 v)"), "{text}");
}

#[test]
fn a_missing_recipe_is_said_once() {
    let place = Place::new();
    for command in ["plan", "train"] {
        let said = place.run(&[command, "none.toml"]).stderr;
        let said = String::from_utf8(said).unwrap();
        assert!(said.contains("none.toml"), "{said}");
        assert_eq!(said.matches("No such file").count(), 1, "{said}");
    }
}
