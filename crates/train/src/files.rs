//! What one rank writes for all: the log, the states, and the folder both lie in.

use crate::TrainError;
use crate::learner::Learner;
use crate::metrics::Metrics;
use crate::run_folder::{Identity, RunFolder, StateMeta};
use crate::whole::Reader;
use checkpoint::{Saver, StateDir, StateError};
use tensor::Fault;

/// Files of a run.
pub(crate) struct Files {
    pub folder: RunFolder,
    pub metrics: Metrics,
    saver: Writer,
    identity: Identity,
}

/// Who writes states.
enum Writer {
    Background(Saver),
    Inline(StateDir),
}

/// Bytes that are copied at once: ranks send each other no more.
const PART_BYTES: usize = 16 << 20;

/// Whose state is saved.
pub(crate) enum Source<'a, 'b> {
    /// Of a learner that holds all of it.
    One(&'a mut Learner),
    /// Of all ranks.
    Ranks(&'a mut Reader<'b>),
}

impl Source<'_, '_> {
    fn arrays(&self) -> Vec<(&'static str, u64)> {
        match self {
            Source::One(learner) => learner.optimizer.arrays(&learner.store),
            Source::Ranks(reader) => reader.arrays(),
        }
    }

    fn read(&mut self, array: usize, first: u64, out: &mut [u8]) -> Result<(), Fault> {
        match self {
            Source::One(learner) => {
                let Learner { optimizer, store, .. } = learner;
                let name = optimizer.arrays(store)[array].0;
                optimizer.read(store, name, first, out)
            }
            Source::Ranks(reader) => reader.read(array, first, out),
        }
    }
}

impl Files {
    pub fn new(
        folder: RunFolder,
        metrics: Metrics,
        states: StateDir,
        background: bool,
        identity: Identity,
    ) -> Result<Files, TrainError> {
        let saver = match background {
            true => Writer::Background(Saver::start(states)?),
            false => Writer::Inline(states),
        };
        Ok(Files { folder, metrics, saver, identity })
    }

    /// The meta of a state about to be saved.
    fn meta(&mut self, meta: &mut StateMeta) -> Result<serde_json::Value, TrainError> {
        meta.metrics_bytes = self.metrics.sync()?;
        meta.identity = self.identity.clone();
        Ok(serde_json::json!(meta))
    }

    /// Save the state that `source` has.
    pub fn save(
        &mut self,
        step: u64,
        meta: &mut StateMeta,
        mut source: Source<'_, '_>,
    ) -> Result<(), TrainError> {
        let meta = self.meta(meta)?;
        let arrays = source.arrays();
        match &mut self.saver {
            Writer::Inline(states) => {
                let mut cause = None;
                let read = |array: usize, first: u64, out: &mut [u8]| {
                    source.read(array, first, out).map_err(|error| {
                        let what = error.to_string();
                        cause = Some(error);
                        StateError::Source { what }
                    })
                };
                let saved = states.save_from(step, &meta, &arrays, read);
                if let Some(cause) = cause {
                    return Err(cause.into());
                }
                saved?;
            }
            Writer::Background(saver) => {
                // The former save's failure must not wait for the next one.
                saver.poll()?;
                let mut buffers = saver.take_buffers();
                buffers.resize_with(arrays.len(), Default::default);
                for (i, ((name, bytes), (array, length))) in buffers.iter_mut().zip(&arrays).enumerate() {
                    *name = array.to_string();
                    bytes.resize(*length as usize, 0);
                    for (part, out) in bytes.chunks_mut(PART_BYTES).enumerate() {
                        source.read(i, (part * PART_BYTES) as u64, out)?;
                    }
                }
                saver.save(step, meta, buffers)?;
            }
        }
        Ok(())
    }

    /// Wait for the state in flight: a run ends with it on disk.
    pub fn finish(&mut self) -> Result<(), TrainError> {
        if let Writer::Background(saver) = &mut self.saver {
            saver.take_buffers();
            saver.poll()?;
        }
        Ok(())
    }
}
