//! Runs on a GPU: they learn what runs on the CPU learn, and tiers behind the GPU change no bit of them. The GPU is
//! played by the CPU, which runs the text of the kernels; with `TRILITH_GPU=real` it is the machine's own.

mod common;

use common::{MODEL, Place, budget, log, moved};
use device::cuda;
use train::{Prepared, Start};

/// What a GPU that is played by the CPU runs in a second.
const SMALL: [&str; 5] =
    ["model.layers=2", "model.width=32", "train.batch=2", "train.context=24", "train.steps=4"];

/// A model whose state has chunks to move: those of a real GPU are larger.
fn model() -> Vec<&'static str> {
    let real = ["model.layers=4", "model.width=768", "model.heads=12", "train.batch=4"];
    let played = ["train.batch=2", "train.context=24"];
    let is_real = cuda::gpu().expect("there is one").driver().granularity() > 1 << 20;
    [&MODEL[..], if is_real { &real } else { &played }, &["train.device=cuda", "train.steps=5"]].concat()
}

fn losses(place: &Place, dir: &str) -> Vec<f64> {
    log(&place.path(dir)).iter().filter_map(|line| line.get("lr").and(line["loss"].as_f64())).collect()
}

#[test]
fn runs_learn_what_they_learn_on_the_cpu() {
    let _gpu = cuda::for_a_test();
    let place = Place::new();
    let variants: &[(&[&str], f64)] = &[
        (&["train.precision=f32"], 2e-4),
        (&[], 1e-2),
        (&["train.precision=f32", "train.accumulate=2", "train.recompute=always"], 2e-4),
        (&["model.family=gpt2", "model.kv_heads=0", "train.precision=f32"], 2e-4),
        (&["model.family=qwen3", "model.tied=true", "train.precision=f32", "train.clip=0"], 2e-4),
        (&["model.family=mixtral", "model.experts=4", "train.precision=f32"], 2e-4),
        (&["model.family=qwen2_moe", "model.experts=4", "model.shared_ffn=32"], 1e-2),
        (&["train.moments=8bit", "train.gradients=bf16"], 1e-2),
    ];
    for (variant, most) in variants {
        let sets = [&MODEL[..], &SMALL, variant].concat();
        for device in ["cpu", "cuda"] {
            let on = format!("train.device={device}");
            place.run(device, &[&sets[..], &[&on]].concat(), Start::Overwrite, None).unwrap();
        }
        let (got, want) = (losses(&place, "cuda"), losses(&place, "cpu"));
        assert_eq!(got.len(), 4, "{variant:?}");
        for (got, want) in got.iter().zip(&want) {
            assert!((got / want - 1.0).abs() < *most, "{variant:?}: {got} on the GPU, {want} on the CPU");
        }
    }
}

#[test]
fn tiers_behind_a_gpu_change_no_bit() {
    let _gpu = cuda::for_a_test();
    let place = Place::new();
    let variants: &[&[&str]] = &[
        &["train.clip=0"],
        &["train.accumulate=2", "model.tied=false"],
        &["train.recompute=always", "train.precision=f32"],
        &["train.moments=8bit", "train.gradients=bf16"],
    ];
    for variant in variants {
        let sets = [&model()[..], variant].concat();
        place.run("whole", &sets, Start::Overwrite, None).unwrap();
        let recipe = place.settings("probe", &sets).recipe().unwrap();
        let state = Prepared::new(&recipe, false, &mut |_| {}).unwrap().estimate(&recipe).state_bytes as f64;
        // Of the GPU and of the host, in parts of the state; beyond 1 there is no drive.
        for (policy, upper, host) in
            [("dynamic", 0.3, 1.3), ("dynamic", 0.3, 0.5), ("lru", 0.3, 1.3), ("static", 0.3, 1.3)]
        {
            let what = format!("{variant:?} {policy} {upper} {host}");
            let within = [
                format!("memory.hbm={}B", budget(&place, &sets, upper)),
                format!("memory.dram={}B", (state * host) as u64),
                format!("memory.policy={policy}"),
            ];
            let within: Vec<&str> = within.iter().map(String::as_str).collect();
            device::release_cached();
            device::reset_peak();
            place.run("tiers", &[&sets[..], &within].concat(), Start::Overwrite, None).unwrap();
            let (up, down, bound) = moved(&place.path("tiers"));
            println!("{what}: {up} up, {down} down, bound {bound:?}");
            assert!(up > 0 && down > 0, "{what} moved nothing");
            let (whole, tiers) = (place.result("whole"), place.result("tiers"));
            assert_eq!(tiers.2, whole.2, "log of {what}");
            assert!(tiers.0 == whole.0, "weights of {what}");
            assert!(tiers.1 == whole.1, "state of {what}");
        }
    }
}

#[test]
fn a_run_goes_on_where_it_stopped_on_the_gpu() {
    let _gpu = cuda::for_a_test();
    let place = Place::new();
    let sets = [&MODEL[..], &SMALL, &["train.device=cuda"]].concat();
    place.run("whole", &sets, Start::New, None).unwrap();
    place.run("halves", &sets, Start::New, Some(2)).unwrap();
    place.run("halves", &sets, Start::Resume, None).unwrap();
    assert!(place.result("halves").1 == place.result("whole").1);
    // On the other device it goes on, too.
    place.run("moves", &sets, Start::New, Some(2)).unwrap();
    let elsewhere = [&sets[..], &["train.device=cpu"]].concat();
    place.run("moves", &elsewhere, Start::Resume, None).unwrap();
    for (got, want) in losses(&place, "moves").iter().zip(losses(&place, "whole")) {
        assert!((got / want - 1.0).abs() < 1e-2, "{got} partly on the CPU, {want} on the GPU");
    }
}

#[test]
fn what_a_gpu_cannot_do_is_said_before_anything_begins() {
    let _gpu = cuda::for_a_test();
    let place = Place::new();
    let refused = |sets: &[&str]| {
        place.settings("probe", &[&MODEL[..], sets].concat()).recipe().unwrap_err().to_string()
    };
    assert!(refused(&["train.device=cuda", "mesh.dp=2", "memory.dram=1GiB"]).contains("2 ranks"));
    assert!(refused(&["train.device=cpu", "memory.hbm=1GiB", "memory.dram=1GiB"]).contains("no GPU"));
    let said = refused(&["train.device=cuda", "memory.simulate_device=1MiB", "memory.dram=1GiB"]);
    assert!(said.contains("memory.hbm"), "{said}");
    let sets = [&MODEL[..], &["train.device=cuda", "model.head_dim=512"]].concat();
    let recipe = place.settings("probe", &sets).recipe().unwrap();
    let said = Prepared::new(&recipe, false, &mut |_| {}).err().expect("too wide").to_string();
    assert!(said.contains("heads of 512 columns"), "{said}");
    let sets = [&model()[..], &["memory.hbm=64KiB", "memory.dram=1GiB"]].concat();
    let said = place.run("tiers", &sets, Start::New, None).unwrap_err().to_string();
    assert!(said.contains("raise memory.hbm"), "{said}");
}
