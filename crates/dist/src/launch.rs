//! Runs one function as N ranks: threads of this process, each with its share of the cores.

use crate::threads::{Rank, World};
use crate::{Communicator, Mesh, MeshShape};
use std::fmt::Display;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Mutex;
use std::time::Duration;

/// How ranks are run.
#[derive(Clone, Debug)]
pub struct Options {
    /// Longest time a rank waits for another in one call.
    pub deadline: Duration,
}

impl Default for Options {
    /// Ten minutes: longer than any healthy step, shorter than a night.
    fn default() -> Options {
        Options { deadline: Duration::from_secs(600) }
    }
}

/// Why a run of ranks ended.
#[derive(Debug, thiserror::Error)]
pub enum Failure<E: Display> {
    /// A rank returned an error; the others were ended by it.
    #[error("{error}")]
    Rank {
        /// Which rank was first.
        rank: usize,
        /// What it returned.
        error: E,
    },
    /// A rank panicked; the others were ended by it.
    #[error("rank {rank} panicked: {message}")]
    Panic {
        /// Which rank was first.
        rank: usize,
        /// What it said.
        message: String,
    },
    /// Threads could not be started.
    #[error("cannot start the workers of a rank: {0}")]
    Workers(String),
}

/// Runs `body` once for every place of `shape`, each on its own workers, and returns the results
/// in the order of ranks. The first rank that fails ends the run on all; its error is returned.
pub fn launch<R: Send, E: Display + Send>(
    shape: &MeshShape,
    options: &Options,
    body: impl Fn(&Mesh) -> Result<R, E> + Sync,
) -> Result<Vec<R>, Failure<E>> {
    let ranks = shape.world_size();
    let world = World::new(ranks, options.deadline);
    let first: Mutex<Option<Failure<E>>> = Mutex::new(None);
    let keep = |failure: Failure<E>| {
        first.lock().unwrap_or_else(|e| e.into_inner()).get_or_insert(failure);
    };
    let pools = (0..ranks)
        .map(|rank| device::Threads::share(rank, ranks).map_err(|e| Failure::Workers(e.to_string())))
        .collect::<Result<Vec<_>, _>>()?;
    let one = |rank: usize, pool: &device::Threads| -> Option<R> {
        let communicator = Communicator::Threads(Rank::new(world.clone(), rank));
        let mesh = Mesh::new(*shape, communicator).expect("one rank a place");
        match catch_unwind(AssertUnwindSafe(|| pool.run(|| body(&mesh)))) {
            Ok(Ok(result)) => {
                world.end(rank, None);
                Some(result)
            }
            Ok(Err(error)) => {
                let reason = error.to_string();
                keep(Failure::Rank { rank, error });
                world.end(rank, Some(reason));
                None
            }
            Err(panic) => {
                let message = words_of(panic.as_ref());
                keep(Failure::Panic { rank, message: message.clone() });
                world.end(rank, Some(format!("it panicked: {message}")));
                None
            }
        }
    };
    let results: Vec<Option<R>> = std::thread::scope(|scope| {
        let one = &one;
        let running: Vec<_> =
            pools.iter().enumerate().map(|(rank, pool)| scope.spawn(move || one(rank, pool))).collect();
        running.into_iter().map(|thread| thread.join().ok().flatten()).collect()
    });
    match first.into_inner().unwrap_or_else(|e| e.into_inner()) {
        Some(failure) => Err(failure),
        None => Ok(results.into_iter().flatten().collect()),
    }
}

fn words_of(panic: &(dyn std::any::Any + Send)) -> String {
    let words = panic.downcast_ref::<&str>().map(|s| s.to_string());
    words.or_else(|| panic.downcast_ref::<String>().cloned()).unwrap_or_else(|| "no words".to_string())
}
