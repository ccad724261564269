//! Moments of 8 bits: a run learns with them, goes on with the same bits, and goes on at all on
//! another mesh and with the other kind.

mod common;

use common::Place;
use std::sync::Arc;
use train::{Begin, Prepared, Progress, Start, TrainError, Trainer};

const BITS8: &str = "train.moments=8bit";

fn validation(place: &Place, dir: &str) -> Vec<f64> {
    let log = common::log(&place.path(dir));
    log.iter()
        .filter(|line| line["kind"] == "validation")
        .map(|line| line["loss"].as_f64().unwrap())
        .collect()
}

#[test]
fn a_run_learns_and_goes_on_with_the_same_bits() {
    let place = Place::new();
    place.run("f32", &[], Start::New, None).unwrap();
    for precision in ["bf16", "f32"] {
        let sets = [BITS8, &format!("train.precision={precision}")];
        place.run("whole", &sets, Start::Overwrite, None).unwrap();
        place.run("parts", &sets, Start::Overwrite, Some(4)).unwrap();
        place.run("parts", &sets, Start::Resume, Some(7)).unwrap();
        place.run("parts", &sets, Start::Resume, None).unwrap();
        assert!(place.result("whole") == place.result("parts"), "{precision}");
        let (losses, f32s) = (validation(&place, "whole"), validation(&place, "f32"));
        println!("{precision}: f32 {f32s:?}, 8 bits {losses:?}");
        let learnt = |losses: &[f64]| 300f64.ln() - losses[losses.len() - 1];
        // Most of what f32 moments learn; without moments nothing near it is learnt.
        assert!(learnt(&losses) > 0.9 * learnt(&f32s), "{losses:?} after {f32s:?}");
        assert!(place.result("whole").0 != place.result("f32").0, "8 bits were not used");
    }
    let states = |dir: &str| place.result(dir).1.len();
    assert!(states("whole") * 3 < states("f32") * 2 + 3 * 4096 * 4, "8 bytes a parameter are saved, not 12");
}

#[test]
fn a_state_of_either_kind_goes_on_with_the_other() {
    let place = Place::new();
    for (first, second) in [("8bit", "f32"), ("f32", "8bit")] {
        let (first, second) = (format!("train.moments={first}"), format!("train.moments={second}"));
        place.run("run", &[&first], Start::Overwrite, Some(6)).unwrap();
        place.run("run", &[&second], Start::Resume, None).unwrap();
        place.run("whole", &[&first], Start::Overwrite, None).unwrap();
        let (changed, whole) = (validation(&place, "run"), validation(&place, "whole"));
        assert_eq!(changed[0], whole[0], "before the change");
        let (changed, whole) = (changed[changed.len() - 1], whole[whole.len() - 1]);
        println!("{first} then {second}: {changed}, without a change {whole}");
        // Moments that were read wrongly would undo what was learnt.
        assert!((changed - whole).abs() < 0.1 * (300f64.ln() - whole), "{changed} for {whole}");
    }
}

fn on_mesh(place: &Place, dir: &str, mesh: &str, start: Start, stop: Option<u64>) -> Result<(), TrainError> {
    let sets: Vec<String> =
        mesh.split(',').map(|axis| format!("mesh.{axis}")).chain([BITS8.into()]).collect();
    let sets: Vec<&str> = sets.iter().map(String::as_str).collect();
    let settings = place.settings(dir, &sets);
    let recipe = settings.recipe()?;
    let shape = recipe.mesh.shape;
    let prepared = Arc::new(Prepared::new(&recipe, start == Start::Resume, &mut |_| {})?);
    let begin = Begin { recipe, resolved: settings.resolved(), prepared, start, peak_gflops: 100.0 };
    let ends = dist::launch(&shape, &dist::Options::default(), |mesh| -> Result<(), TrainError> {
        let mut trainer = Trainer::on(mesh, begin.clone())?;
        while let Some(progress) = trainer.advance()? {
            if matches!(&progress, Progress::Step(m) if Some(m.step) == stop) {
                trainer.stop();
            }
        }
        Ok(())
    });
    ends.map(|_| ()).map_err(|failure| TrainError::Mesh { what: format!("{failure:#}") })
}

#[test]
fn states_go_on_bit_for_bit_on_their_mesh_and_at_all_on_another() {
    let place = Place::new();
    for mesh in ["dp=2", "x=2"] {
        on_mesh(&place, "whole", mesh, Start::Overwrite, None).unwrap();
        on_mesh(&place, "parts", mesh, Start::Overwrite, Some(5)).unwrap();
        on_mesh(&place, "parts", mesh, Start::Resume, None).unwrap();
        assert!(place.result("whole") == place.result("parts"), "{mesh}");
        on_mesh(&place, "moved", mesh, Start::Overwrite, Some(5)).unwrap();
        place.run("moved", &[BITS8], Start::Resume, None).unwrap();
        let (moved, whole) = (validation(&place, "moved"), validation(&place, "whole"));
        println!("{mesh}: moved {moved:?}, whole {whole:?}");
        let (moved, whole) = (moved[moved.len() - 1], whole[whole.len() - 1]);
        assert!((moved - whole).abs() < 0.05 * (300f64.ln() - whole), "{mesh}: {moved} for {whole}");
    }
}
