//! Runs on meshes of threads, to the end, and the states they leave.

use super::{Place, log};
use dist::{Options, launch};
use std::path::Path;
use std::sync::Arc;
use train::{Begin, Prepared, Progress, Start, Trainer};

pub fn begin(place: &Place, dir: &str, sets: &[&str], start: Start) -> Begin {
    let settings = place.settings(dir, sets);
    let recipe = settings.recipe().unwrap();
    let prepared = Arc::new(Prepared::new(&recipe, start == Start::Resume, &mut |_| {}).unwrap());
    Begin { recipe, resolved: settings.resolved(), prepared, start, peak_gflops: 100.0 }
}

/// Run every rank to the end; with `stop` they end before the next step.
pub fn run(place: &Place, dir: &str, sets: &[&str], start: Start, stop: bool) {
    let begin = begin(place, dir, sets, start);
    let shape = begin.recipe.mesh.shape;
    // Ranks over tiers cannot tell whose step they saw: for them the most that was ever held counts.
    device::release_cached();
    device::reset_peak();
    launch(&shape, &Options::default(), |mesh| {
        let mut trainer = Trainer::on(mesh, begin.clone())?;
        if stop && mesh.rank() == 0 {
            trainer.stop();
        }
        let mut last = None;
        while let Some(progress) = trainer.advance()? {
            last = Some(progress);
        }
        assert!(matches!(last, Some(Progress::Ended { complete, .. }) if complete != stop || !stop));
        Ok::<_, train::TrainError>(())
    })
    .unwrap();
}

/// The arrays of a state as one file, and its f32 arrays by name.
pub fn state(dir: &Path, step: u64) -> (Vec<u8>, Vec<Vec<f32>>) {
    let folder = dir.join(format!("state/step-{step:08}"));
    let bytes = std::fs::read(folder.join("state.bin")).unwrap();
    // Behind the manifest stands its checksum.
    let text = std::fs::read(folder.join("manifest.json")).unwrap();
    let manifest = serde_json::Deserializer::from_slice(&text).into_iter::<serde_json::Value>().next();
    let manifest = manifest.unwrap().unwrap();
    let array = |array: &serde_json::Value| {
        let (from, len) = (array["offset"].as_u64().unwrap(), array["bytes"].as_u64().unwrap());
        let words = bytes[from as usize..(from + len) as usize].as_chunks().0;
        words.iter().map(|word| f32::from_le_bytes(*word)).collect()
    };
    let arrays = manifest["arrays"].as_array().unwrap().iter().map(array).collect();
    (bytes, arrays)
}

pub fn losses(dir: &Path) -> Vec<f64> {
    log(dir).iter().filter_map(|line| line.get("lr").and(line["loss"].as_f64())).collect()
}

pub const F32: [&str; 5] =
    ["train.precision=f32", "train.batch=4", "checkpoint.every=1", "checkpoint.keep_last=9", "eval.every=0"];
