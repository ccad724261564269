//! Learners whose ranks share the state, and what they hold.

use dist::cost::Zero;
use dist::{Axis, Options, launch};
use memory::Class;
use train::{Begin, Learner, Sharding, StepPlan, TrainError};

/// Arrays of a run in memory.
pub const KEPT: [Class; 5] = [Class::Param, Class::Grad, Class::Master, Class::M, Class::V];

/// Bytes of memory behind each of them.
pub fn resident(learner: &Learner) -> [usize; 5] {
    KEPT.map(|class| learner.store.arrays().resident_bytes(class))
}

/// Run `body` on every rank of `mesh` with a learner of `zero`, which takes steps of microbatches of 4 rows.
pub fn on_ranks<R: Send>(
    begin: &Begin,
    mesh: &str,
    zero: Zero,
    body: impl Fn(&mut Learner, &dyn Fn(&mut Learner, u64)) -> R + Sync,
) -> Vec<R> {
    let mut recipe = begin.recipe.clone();
    recipe.mesh.shape = mesh.parse().unwrap();
    recipe.mesh.sharding = Sharding { zero, overlap: true };
    let samples = data::Samples::new(begin.prepared.train.clone(), recipe.train.context).unwrap();
    let loader = data::Loader::new(samples, 1, true);
    launch(&recipe.mesh.shape, &Options::default(), |mesh| {
        let mut learner = begin.prepared.learner(&recipe, &recipe.mesh.flow(mesh)?)?;
        learner.initialise(1)?;
        let (replica, replicas) = (mesh.coord(Axis::Fsdp), mesh.size(Axis::Fsdp));
        let step = |learner: &mut Learner, step: u64| {
            let of = |i| loader.batch(16 * step + 4 * i, 4 / replicas, replica, replicas);
            let batches: Vec<_> = (0..recipe.train.accumulate as u64).map(of).collect();
            learner.step(&batches, StepPlan { lr: 1e-2, clip: 1.0 }).unwrap();
        };
        Ok::<_, TrainError>(body(&mut learner, &step))
    })
    .unwrap()
}
