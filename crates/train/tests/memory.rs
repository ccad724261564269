//! The memory a run is predicted to need, beside what it takes.

mod common;

use common::Place;
use train::Start;

/// One test: what is measured belongs to the whole process.
#[test]
fn predicted_memory_is_what_a_run_takes() {
    let place = Place::new();
    let model = ["model.layers=4", "model.width=128", "train.batch=8", "train.context=128", "train.steps=3"];
    for more in [
        &["train.precision=f32"][..],
        &["train.precision=bf16"],
        &["train.recompute=always"],
        &["model.family=gpt2", "model.kv_heads=0"],
        &["model.family=mixtral", "model.experts=8", "model.expert_ffn=192"],
        &["model.family=qwen2_moe", "model.experts=8", "model.expert_ffn=96", "train.precision=f32"],
        &["checkpoint.background=false", "model.width=384", "train.batch=1"],
    ] {
        let sets = [&model[..], more].concat();
        let settings = place.settings("run", &sets);
        let recipe = settings.recipe().unwrap();
        let (predicted, taken) = device::Threads::new(2).unwrap().run(|| {
            let prepared = train::Prepared::new(&recipe, false, &mut |_| {}).unwrap();
            let predicted = prepared.estimate(&recipe);
            device::reset_peak();
            let before = device::memory_use().live_bytes;
            let resolved = settings.resolved();
            let mut trainer =
                train::Trainer::new(recipe.clone(), &resolved, prepared, Start::Overwrite, 100.0).unwrap();
            while trainer.advance().unwrap().is_some() {}
            // Copies for background saves are plain vectors, which are not counted here.
            let predicted = predicted.state_bytes + predicted.activation_bytes;
            (predicted as f64, (device::memory_use().peak_bytes - before) as f64)
        });
        let ratio = predicted / taken;
        println!("{more:?}: predicted {predicted:.3e} bytes, taken {taken:.3e}: {ratio:.2}");
        assert!((0.9..1.35).contains(&ratio), "{more:?}: predicted {predicted:.3e}, taken {taken:.3e}");
    }
}
