//! What one rank writes for all: the log, the states, and the folder both lie in.

use crate::TrainError;
use crate::learner::Learner;
use crate::metrics::Metrics;
use crate::run_folder::{Identity, RunFolder, StateMeta};
use checkpoint::{Array, Saver, StateDir, StateError};

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

/// Named arrays of a state.
type Arrays = Vec<(String, Vec<u8>)>;

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

    /// Save the state of a learner that holds all of it.
    pub fn save(&mut self, step: u64, meta: &mut StateMeta, learner: &mut Learner) -> Result<(), TrainError> {
        let meta = self.meta(meta)?;
        let Learner { optimizer, store, .. } = learner;
        let arrays = optimizer.arrays(store);
        match &mut self.saver {
            Writer::Inline(states) => {
                let mut cause = None;
                let read = |array: usize, first: u64, out: &mut [u8]| {
                    let read = optimizer.read(store, arrays[array].0, first, out);
                    read.map_err(|error| {
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
                for ((name, bytes), (array, length)) in buffers.iter_mut().zip(&arrays) {
                    *name = array.to_string();
                    bytes.resize(*length as usize, 0);
                    optimizer.read(store, array, 0, bytes)?;
                }
                saver.save(step, meta, buffers)?;
            }
        }
        Ok(())
    }

    /// Save arrays that were put together from several ranks.
    pub fn save_arrays(&mut self, step: u64, meta: &mut StateMeta, arrays: Arrays) -> Result<(), TrainError> {
        let meta = self.meta(meta)?;
        match &mut self.saver {
            Writer::Inline(states) => {
                let arrays: Vec<_> =
                    arrays.iter().map(|(name, bytes)| Array::new(name.as_str(), bytes)).collect();
                states.save(step, &meta, &arrays)?;
            }
            Writer::Background(saver) => {
                saver.poll()?;
                saver.save(step, meta, arrays)?;
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
