//! What a run leaves behind, and what it does with numbers that are none.

mod common;

use common::{Place, log};
use train::{Progress, Start, TrainError};

#[test]
fn losses_fall_and_the_log_says_so() {
    let place = Place::new();
    place.run("run", &["train.steps=40"], Start::New, None).unwrap();
    let log = log(&place.path("run"));
    let losses: Vec<f64> =
        log.iter().filter(|line| line["kind"] == "step").map(|line| line["loss"].as_f64().unwrap()).collect();
    assert_eq!(losses.len(), 40);
    // A fresh model knows nothing: the loss is that of a uniform guess over 300 tokens.
    assert!((losses[0] - 300f64.ln()).abs() < 0.2, "{}", losses[0]);
    assert!(losses[39] < losses[0] - 0.8, "{losses:?}");
    let valid: Vec<&serde_json::Value> = log.iter().filter(|line| line["kind"] == "validation").collect();
    assert_eq!(valid.len(), 10);
}

#[test]
fn fine_tuning_begins_where_the_folder_ends() {
    let place = Place::new();
    for family in ["llama", "mistral", "qwen2", "qwen3", "gpt2"] {
        let family_is = format!("model.family={family}");
        let sets = [family_is.as_str(), "model.kv_heads=0", "train.precision=f32"];
        place.run(family, &sets, Start::New, None).unwrap();
        let end = log(&place.path(family)).last().unwrap()["loss"].as_f64().unwrap();
        let from = format!("model.from={}", place.path(family).display());
        let sets = [from.as_str(), "train.precision=f32", "train.lr=0", "train.steps=1", "eval.every=1"];
        let mut trainer = place.trainer(&format!("{family}-tuned"), &sets, Start::New).unwrap();
        let mut begin = None;
        while let Some(progress) = trainer.advance().unwrap() {
            if let Progress::Validated { loss, .. } = progress {
                begin = Some(loss);
            }
        }
        assert_eq!(begin, Some(end), "{family}");
    }
}

#[test]
fn a_gradient_that_is_not_finite_changes_nothing_and_names_its_samples() {
    let place = Place::new();
    // A learning rate of 10 in a model without clipping runs away within a few steps.
    let sets = [
        "train.lr=10",
        "train.clip=0",
        "train.warmup=0",
        "train.precision=f32",
        "train.steps=400",
        "train.eps=1e-30",
        "train.weight_decay=10",
        "train.max_skipped=2",
    ];
    match place.run("run", &sets, Start::New, None) {
        Err(TrainError::NotFinite { count, samples, .. }) => {
            assert_eq!((count, samples.len()), (3, 2));
            let log = log(&place.path("run"));
            let skipped: Vec<_> = log.iter().filter(|line| line["applied"] == false).collect();
            assert_eq!(skipped.len(), 3);
            assert!(skipped.iter().all(|line| !line["loss"].is_f64() || !line["grad_norm"].is_f64()));
        }
        other => panic!("the run did not run away: {other:?}"),
    }
}
