//! Ranks of a mesh that share a GPU: they learn what one rank on it learns, bit for bit where ranks of the CPU do,
//! and their states know neither mesh nor device. The GPU is played by the CPU, which runs the text of the kernels;
//! with `TRILITH_GPU=real` it is the machine's own.

mod common;

use common::Place;
use common::meshes::{states_are_gone_on_with, steps_are_those_of_one_rank};
use common::runs::{F32, begin, losses, run};
use common::shards::{KEPT, on_ranks, resident};
use device::cuda;
use dist::cost::Zero;
use train::{Prepared, Start};

const ON_GPU: &str = "train.device=cuda";

type Run = (Vec<u8>, Vec<u8>, Vec<serde_json::Value>);

fn outcome(place: &Place, dir: &str, sets: &[&[&str]]) -> Run {
    let sets: Vec<&str> = sets.concat().into_iter().chain([ON_GPU]).collect();
    run(place, dir, &sets, Start::Overwrite, false);
    place.result(dir)
}

fn assert_same(got: &Run, want: &Run, what: &str) {
    assert_eq!(got.2, want.2, "log of {what}");
    assert!(got.0 == want.0, "weights of {what}");
    assert!(got.1 == want.1, "state of {what}");
}

/// Evaluation and samples among them.
#[test]
fn every_stage_of_shards_has_the_bits_of_replicas() {
    let _gpu = cuda::for_a_test();
    let place = Place::new();
    let base: &[&str] = &["train.batch=4", "train.steps=3", "eval.every=2", "sample.every=2"];
    for more in
        [&["train.precision=f32", "train.clip=0.1"][..], &["train.moments=8bit", "train.gradients=bf16"]]
    {
        let want = outcome(&place, "replicas", &[base, more, &["mesh.dp=2"]]);
        for zero in ["mesh.zero=1", "mesh.zero=2", "mesh.zero=3"] {
            let got = outcome(&place, "shards", &[base, more, &["mesh.fsdp=2", zero]]);
            assert_same(&got, &want, &format!("{more:?} {zero}"));
        }
    }
    let solo = outcome(&place, "solo", &[base, &["train.steps=1"]]);
    let two = outcome(&place, "two", &[base, &["train.steps=1", "mesh.dp=2"]]);
    assert_eq!(losses(&place.path("solo")), losses(&place.path("two")), "{:?} {:?}", solo.2, two.2);
}

/// Two microbatches on shards, whose sums wait on the GPU between them.
#[test]
fn sums_of_several_microbatches_do_not_depend_on_overlap() {
    let _gpu = cuda::for_a_test();
    let place = Place::new();
    let base: &[&str] = &["train.batch=2", "train.accumulate=2", "train.steps=2", "eval.every=0"];
    let of = |zero: &str, overlap: &str| outcome(&place, "run", &[base, &["mesh.fsdp=2", zero, overlap]]);
    let want = of("mesh.zero=2", "mesh.overlap=true");
    assert_same(&of("mesh.zero=3", "mesh.overlap=true"), &want, "stage 3");
    assert_same(&of("mesh.zero=3", "mesh.overlap=false"), &want, "stage 3 in the foreground");
}

#[test]
fn pipelines_have_the_bits_of_one_rank() {
    let _gpu = cuda::for_a_test();
    let place = Place::new();
    let base: &[&str] =
        &["model.tied=false", "train.accumulate=3", "train.steps=2", "eval.every=2", "train.precision=f32"];
    let want = outcome(&place, "solo", &[base]);
    for schedule in ["mesh.schedule=1f1b", "mesh.schedule=zero-bubble"] {
        assert_same(&outcome(&place, "stages", &[base, &["mesh.pp=2", schedule]]), &want, schedule);
    }
}

#[test]
fn a_step_on_any_mesh_is_the_step_of_one_rank() {
    let _gpu = cuda::for_a_test();
    let base: Vec<&str> = F32.iter().copied().chain([ON_GPU]).collect();
    let meshes: &[&[&str]] = &[
        &["mesh.dp=2"],
        &["mesh.fsdp=2", "mesh.zero=1"],
        &["mesh.fsdp=2", "mesh.zero=2", "train.accumulate=2", "train.batch=2"],
        &["mesh.fsdp=2"],
        &["mesh.x=2", "mesh.scheme=1d"],
        &["mesh.x=2", "mesh.scheme=1d-sequence"],
        &["mesh.x=2", "mesh.y=2", "mesh.scheme=summa"],
        &["mesh.x=2", "mesh.y=2", "mesh.scheme=weight-stationary"],
        &["mesh.x=1", "mesh.y=2", "mesh.z=2", "mesh.scheme=2.5d"],
        &["mesh.x=2", "mesh.y=2", "mesh.z=2", "mesh.scheme=3d"],
        &["mesh.cp=2", "mesh.attention=ring"],
        &["mesh.cp=2", "mesh.attention=all-to-all"],
        &["mesh.pp=2"],
        &[
            "mesh.pp=2",
            "mesh.fsdp=2",
            "mesh.x=2",
            "mesh.schedule=zero-bubble",
            "train.accumulate=2",
            "train.batch=2",
        ],
    ];
    steps_are_those_of_one_rank(&base, meshes);
}

/// LayerNorm, biases, positions that are learned: cut along columns and rows.
#[test]
fn gpt2_on_grids_takes_the_steps_of_one_rank() {
    let _gpu = cuda::for_a_test();
    let gpt2 = ["model.family=gpt2", "model.kv_heads=0", ON_GPU];
    let base: Vec<&str> = F32.iter().chain(&gpt2).copied().collect();
    let meshes: &[&[&str]] =
        &[&["mesh.x=2", "mesh.y=2", "mesh.scheme=summa"], &["mesh.x=3", "mesh.scheme=1d-sequence"]];
    steps_are_those_of_one_rank(&base, meshes);
}

#[test]
fn experts_on_ranks_learn_what_one_rank_learns() {
    let _gpu = cuda::for_a_test();
    let place = Place::new();
    let fixed = ["train.batch=4", "train.steps=3", "train.precision=f32", "eval.every=0"];
    let mixtral: &[&str] = &["model.family=mixtral", "model.experts=4", "model.expert_ffn=48"];
    let qwen: &[&str] =
        &["model.family=qwen2_moe", "model.experts=5", "model.expert_ffn=28", "model.shared_ffn=44"];
    let meshes: [(&[&str], &[&str]); 3] = [
        (mixtral, &["mesh.ep=2"]),
        (mixtral, &["mesh.ep=2", "mesh.fsdp=2", "mesh.x=2", "mesh.scheme=1d-sequence"]),
        (qwen, &["mesh.ep=2", "mesh.x=2", "mesh.y=2"]),
    ];
    for (family, mesh) in meshes {
        outcome(&place, "solo", &[&fixed, family]);
        outcome(&place, "ranks", &[&fixed, family, mesh]);
        let (got, want) = (losses(&place.path("ranks")), losses(&place.path("solo")));
        assert_eq!(got.len(), 3);
        for (got, want) in got.iter().zip(&want) {
            assert!((got / want - 1.0).abs() < 2e-4, "{family:?} {mesh:?}: {got} on ranks, {want} on one");
        }
    }
}

#[test]
fn the_same_run_twice_has_the_same_bits() {
    let _gpu = cuda::for_a_test();
    let place = Place::new();
    let meshes: [&[&str]; 3] = [
        &["mesh.dp=2", "mesh.fsdp=2", "mesh.x=2"],
        &["mesh.cp=2", "mesh.x=2", "mesh.attention=ring"],
        &["mesh.pp=2", "mesh.ep=2", "model.family=mixtral", "model.experts=4"],
    ];
    for mesh in meshes {
        let base: &[&str] = &["train.batch=4", "train.steps=2"];
        let once = outcome(&place, "once", &[base, mesh]);
        assert_same(&outcome(&place, "again", &[base, mesh]), &once, &format!("{mesh:?}"));
    }
}

/// From mesh to mesh and from device to device, a step on each.
#[test]
fn a_state_of_ranks_on_a_gpu_is_gone_on_with_anywhere() {
    let _gpu = cuda::for_a_test();
    let on_cpu = "train.device=cpu";
    let chain: [&[&str]; 7] = [
        &[ON_GPU, "mesh.fsdp=2"],
        &[on_cpu],
        &[ON_GPU, "mesh.x=2", "mesh.y=2"],
        &[on_cpu, "mesh.dp=2"],
        &[ON_GPU, "mesh.pp=2", "mesh.fsdp=2", "mesh.zero=1"],
        &[ON_GPU],
        &[ON_GPU, "mesh.cp=2", "mesh.dp=2"],
    ];
    states_are_gone_on_with(&["train.batch=4"], &chain);
}

/// Granules of others leave the GPU's memory, too.
#[test]
fn shared_state_is_nowhere_twice() {
    let _gpu = cuda::for_a_test();
    let place = Place::new();
    let begin = begin(&place, "run", &["train.batch=4", "model.width=64", ON_GPU], Start::New);
    let whole = on_ranks(&begin, "dp=2", Zero::Three, |learner, _| resident(learner))[0];
    let shares = on_ranks(&begin, "fsdp=2", Zero::Three, |learner, step| {
        assert_eq!(learner.store.device(), device::Device::Cuda);
        step(learner, 0);
        step(learner, 1);
        resident(learner)
    });
    for ((class, share), whole) in KEPT.into_iter().zip(shares[0]).zip(whole) {
        // But for the last stripe, which reaches beyond the end.
        assert!(share * 2 < whole + whole / 4, "{class}: {share} of {whole}");
    }
}

#[test]
fn auto_takes_the_gpu_and_tiers_over_ranks_are_refused() {
    let _gpu = cuda::for_a_test();
    let place = Place::new();
    let device_of = |sets: &[&str]| place.settings("probe", sets).recipe().map(|recipe| recipe.train.device);
    assert_eq!(device_of(&["mesh.dp=2"]).unwrap(), device::Device::Cuda);
    let tiers = ["mesh.dp=2", "memory.dram=1GiB", "sample.every=0"];
    assert_eq!(device_of(&tiers).unwrap(), device::Device::Cpu);
    let said = device_of(&[&tiers[..], &[ON_GPU]].concat()).unwrap_err().to_string();
    assert!(said.contains("memory.dram for a mesh of 2 ranks") && said.contains("mesh.zero = 3"), "{said}");
    // All ranks of a process need the memory of its GPU.
    let large = ["mesh.dp=2", "model.width=2048", "model.layers=8", "model.heads=32", ON_GPU];
    let recipe = place.settings("probe", &large).recipe().unwrap();
    let said = Prepared::new(&recipe, false, &mut |_| {}).unwrap().check_memory(&recipe, 2);
    assert!(said.unwrap_err().to_string().contains("mesh.fsdp"));
}
