//! The training loop: recipe, schedule, step, metrics.
//!
//! `Recipe` says what is wanted, `Prepared` is what a run is made of, `Learner` does a step,
//! `Trainer` owns the sequence of effects. Knows no HTTP and draws nothing on a screen.
#![forbid(unsafe_code)]

mod balance;
mod begin;
mod budget;
mod dry;
mod error;
mod estimate;
mod export;
mod files;
mod finals;
mod here;
mod learner;
mod metrics;
mod moments;
mod optimizer;
mod outlook;
mod pending;
mod predicted;
mod prepare;
mod ranks;
pub mod recipe;
mod recovery;
mod rerun;
mod run_folder;
mod schedule;
mod shards;
mod stages;
mod step;
mod tensorboard;
mod tiers;
mod trainer;
mod whole;

pub use balance::Balance;
pub use begin::{Begin, Start};
pub use budget::{BudgetChange, BudgetFile};
pub use dry::{DryLayer, dry_layer};
pub use error::TrainError;
pub use estimate::Estimate;
pub use here::measure_here;
pub use learner::{Learner, LearnerError, LearnerOptions, loss_of};
pub use metrics::{Messages, MetricsError, StepMetrics};
pub use moments::Moments;
pub use optimizer::{AdamW, AdamWConfig};
pub use outlook::{Speeds, outlook};
pub use predicted::{Predicted, PredictedLink};
pub use prepare::{Prepared, Report, Stage};
pub use recipe::{Recipe, RecipeError, Settings};
pub use recovery::{Lost, MOST_RECOVERIES, Recovery};
pub use rerun::{Candidate, NOMINAL_RATES, Rerun};
pub use schedule::{Decay, Schedule};
pub use shards::Sharding;
pub use step::{HalfApplied, StepDone, StepPlan};
pub use tiers::Links;
pub use trainer::{Progress, Trainer};

/// A number of bytes for people: "3.1 GiB".
pub fn bytes(count: u64) -> String {
    const UNITS: [&str; 5] = ["B", "KiB", "MiB", "GiB", "TiB"];
    let mut value = count as f64;
    let mut unit = 0;
    while value >= 1024.0 && unit + 1 < UNITS.len() {
        value /= 1024.0;
        unit += 1;
    }
    if unit == 0 { format!("{count} B") } else { format!("{value:.1} {}", UNITS[unit]) }
}
