//! The step of a pipeline as text, before anything has run.

use ::train::Recipe;
use dist::Axis;
use dist::pipeline::{Pipeline, Times, Transport, simulate};

/// Longest timeline that is shown, in columns.
const COLUMNS: usize = 240;

/// Who does what when, one line a stage; nothing where there is one stage. A backward takes twice as long as
/// a forward here, and messages take no time.
pub fn timeline(recipe: &Recipe) -> String {
    let (stages, microbatches) = (recipe.mesh.shape.size(Axis::Pp), recipe.train.accumulate);
    let Ok(pipeline) = Pipeline::new(stages, microbatches, recipe.mesh.schedule) else {
        return String::new();
    };
    if stages == 1 {
        return String::new();
    }
    let held: Vec<String> = (0..stages).map(|stage| pipeline.peak_live(stage).to_string()).collect();
    let bubble = 100.0 * pipeline.bubble(Times::USUAL);
    let title = format!(
        "{} on {stages} stages, {microbatches} microbatches: bubble {bubble:.1} % (simulated), holds {}",
        pipeline.schedule(),
        held.join(", ")
    );
    let walk = simulate(&pipeline.actions(), Times::USUAL, Transport::Buffered).ok();
    let lines = walk.map(|walk| walk.to_string()).unwrap_or_default();
    match lines.lines().all(|line| line.len() <= COLUMNS) {
        true => format!("{title}\n{lines}\n"),
        false => format!("{title}\n\n"),
    }
}
