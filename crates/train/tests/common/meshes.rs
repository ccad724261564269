//! How far steps on meshes of threads may lie from those of one rank, and states that know no mesh.

use super::runs::{begin, losses, run, state};
use super::{Place, log};
use dist::Flow;
use train::Start;

/// Relative to the largest of a tensor, a gradient of this model may be off by one rounding of each
/// product on its longest path, 4 products and 8 on the way back a layer, 2 layers, and the head's 3,
/// each by at most (length of its sum + ranks) units: the longest sum is over the 300 words. Around a
/// ring attention's sums, over at most 24 keys, are joined with 4 roundings a rank: far fewer.
const GRADIENT: f32 = (2.0 * 12.0 + 3.0) * (300.0 + 12.0) / (1u64 << 24) as f32;

/// Two steps on every mesh beside those of one rank.
pub fn steps_are_those_of_one_rank(base: &[&str], meshes: &[&[&str]]) {
    let place = Place::new();
    let steps = ["train.steps=2", "train.clip=0"];
    let base: Vec<&str> = base.iter().chain(&steps).copied().collect();
    run(&place, "solo", &base, Start::New, false);
    let solo = place.path("solo");
    let (_, one) = state(&solo, 1);
    let begin = begin(&place, "solo", &base, Start::Resume);
    let flow = Flow::solo();
    let built = model::Model::build_on(&begin.prepared.config, begin.recipe.train.context, &flow).unwrap();
    let (starts, _) = built.params.layout();
    let lr = begin.recipe.train.schedule.at(1) as f32;
    let wanted = losses(&solo);
    for (i, mesh) in meshes.iter().enumerate() {
        let dir = format!("mesh-{i}");
        let sets: Vec<&str> = base.iter().chain(*mesh).copied().collect();
        run(&place, &dir, &sets, Start::New, false);
        let (_, got) = state(&place.path(&dir), 1);
        let mut apart = 0f64;
        for (spec, start) in built.params.specs().iter().zip(&starts) {
            let at = *start..*start + spec.len();
            // weights, m, v: after one step m is a tenth of the gradient.
            let (w, m) = (&one[0][at.clone()], &one[1][at.clone()]);
            let top = m.iter().fold(0f32, |top, x| top.max(x.abs()));
            for (j, (w, m)) in w.iter().zip(m).enumerate() {
                let (w2, m2) = (got[0][start + j], got[1][start + j]);
                let bound = GRADIENT * top;
                let name = &spec.name;
                assert!((m - m2).abs() <= bound, "{mesh:?} {name}[{j}]: gradient {m} and {m2} +- {bound}");
                // AdamW's first step is lr g / (|g| + eps): it turns an error d of g into at most
                // lr min(2, 2 d / |g|), and a rounding of the weight.
                let step = lr * (2.0 * bound / m.abs().max(1e-20)).min(2.0) + 1e-6 * w.abs();
                assert!((w - w2).abs() <= step, "{mesh:?} {name}[{j}]: weight {w} and {w2} +- {step}");
                apart += f64::from(w - w2).powi(2);
            }
        }
        let found = losses(&place.path(&dir));
        let norm = log(&solo)[1]["grad_norm"].as_f64().unwrap();
        let first = wanted[0] * f64::from(GRADIENT);
        assert!((found[0] - wanted[0]).abs() <= first, "{mesh:?}: loss {} and {}", found[0], wanted[0]);
        // Along the way from one set of weights to the other the loss changes by |gradient| |way| to
        // first order; half as much again for the rest.
        let second = 1.5 * norm * apart.sqrt() + first;
        assert!((found[1] - wanted[1]).abs() <= second, "{mesh:?}: loss {} and {}", found[1], wanted[1]);
    }
}

/// A run that goes from mesh to mesh, a step on each: the state put together is the state saved, byte for
/// byte, and the run goes on with the next samples.
pub fn states_are_gone_on_with(base: &[&str], meshes: &[&[&str]]) {
    let place = Place::new();
    let with = |mesh: &[&str], steps: usize| -> Vec<String> {
        let more =
            ["checkpoint.keep_last=2", "eval.every=0", "train.schedule=constant", "train.warmup=1"].iter();
        let sets = base.iter().chain(more).chain(mesh).map(|set| set.to_string());
        sets.chain([format!("train.steps={steps}")]).collect()
    };
    let go = |dir: &str, sets: Vec<String>, start: Start, stop: bool| {
        run(&place, dir, &sets.iter().map(String::as_str).collect::<Vec<_>>(), start, stop);
    };
    let dir = place.path("run");
    for (i, mesh) in meshes.iter().enumerate() {
        if i > 0 {
            // Taken over and saved again without a step: every byte comes back.
            let before = state(&dir, i as u64).0;
            std::fs::remove_dir_all(dir.join(format!("state/step-{:08}", i + 1))).ok();
            go("run", with(mesh, i + 1), Start::Resume, true);
            assert!(state(&dir, i as u64).0 == before, "{:?} taken over by {mesh:?}", meshes[i - 1]);
        }
        go("run", with(mesh, i + 1), Start::Resume, false);
    }
    // The same steps on one rank see the same samples: the losses follow each other closely, while
    // those of other samples differ by tenths.
    go("solo", with(&[], meshes.len()), Start::New, false);
    for (step, (a, b)) in losses(&dir).iter().zip(losses(&place.path("solo"))).enumerate() {
        assert!((a - b).abs() < 0.02, "step {}: loss {a} across meshes, {b} on one", step + 1);
    }
}
