//! The state of a run of several ranks as the state of one: pieces are put together on rank 0 to be
//! saved and exported, and taken from a saved state. So a state knows no mesh.

use crate::TrainError;
use crate::learner::Learner;
use crate::ranks::is_first;
use checkpoint::Checkpoint;
use device::{Buffer, DType, Device};
use dist::{Axis, Communicator, Flow, Mesh};
use memory::Class;
use model::{Built, Config, Model, StoredWeight};
use std::collections::HashMap;
use tensor::{Fault, ParamList, ParamStore};

/// What is needed to put a run together: the model's shape, and how one rank would hold it.
pub(crate) struct Whole {
    config: Config,
    context: usize,
    params: ParamList,
    /// Where each parameter begins in its arrays. Ranks find theirs by name: stages have others.
    starts: HashMap<String, usize>,
    len: usize,
}

/// A model on one rank with the weights of a run.
pub(crate) struct Assembled {
    pub model: Model,
    pub store: ParamStore,
    pub stored: Vec<StoredWeight>,
}

/// Named arrays of a state.
type Arrays = Vec<(String, Vec<u8>)>;

impl Whole {
    pub fn new(config: &Config, context: usize) -> Result<Whole, TrainError> {
        let params = Model::build_on(config, context, &Flow::solo())?.params;
        let (starts, len) = params.layout();
        let starts = params.specs().iter().map(|spec| spec.name.clone()).zip(starts).collect();
        Ok(Whole { config: config.clone(), context, params, starts, len })
    }

    /// Every array of the state of all ranks, on rank 0; elsewhere nothing.
    pub fn gather(&self, learner: &mut Learner, flow: &Flow) -> Result<Option<Arrays>, TrainError> {
        let names = learner.optimizer.arrays(&learner.store);
        let mut all = Arrays::new();
        for (name, _) in names {
            if let Some(array) = self.gather_one(learner, flow, name)? {
                all.push((name.to_string(), array));
            }
        }
        Ok((flow.mesh.rank() == 0).then_some(all))
    }

    /// One array of the state of all ranks, on rank 0.
    fn gather_one(
        &self,
        learner: &mut Learner,
        flow: &Flow,
        name: &'static str,
    ) -> Result<Option<Vec<u8>>, TrainError> {
        let mesh = &flow.mesh;
        let bytes = self.bytes_here(learner, name);
        let mut mine = Buffer::new(Device::Cpu, bytes)?;
        learner.optimizer.read(
            &mut learner.store,
            name,
            0,
            mine.view_mut(DType::U16, 0, bytes / 2).bytes(),
        )?;
        let world = mesh.group_over(&Axis::ALL);
        if mesh.rank() != 0 {
            if learner.spreads.iter().any(|spread| is_first(mesh, spread)) {
                world.send(mine.view(DType::U16, 0, bytes / 2), 0).map_err(Fault::from)?;
            }
            return Ok(None);
        }
        let size = bytes / learner.store.flat_len().max(1);
        let mut whole = vec![0u8; self.len * size];
        for rank in 0..mesh.world_size() {
            let there = self.as_rank(flow, rank)?;
            if !there.1.spreads.iter().any(|spread| is_first(&there.0, spread)) {
                continue;
            }
            let bytes = there.1.params.layout().1 * size;
            if rank > 0 {
                mine = Buffer::new(Device::Cpu, bytes)?;
                world.receive(mine.view_mut(DType::U16, 0, bytes / 2), rank).map_err(Fault::from)?;
            }
            self.place(&there, mine.view(DType::U16, 0, bytes / 2).bytes(), size, &mut whole);
        }
        Ok(Some(whole))
    }

    fn bytes_here(&self, learner: &Learner, name: &str) -> usize {
        let arrays = learner.optimizer.arrays(&learner.store);
        arrays.iter().find(|(known, _)| *known == name).map_or(0, |(_, bytes)| *bytes as usize)
    }

    /// The model as `rank` has it; nothing is reserved and nobody is asked.
    fn as_rank(&self, flow: &Flow, rank: usize) -> Result<(Mesh, Built), TrainError> {
        let shape = *flow.mesh.shape();
        let mesh = Mesh::new(shape, Communicator::null(rank, shape.world_size()))
            .map_err(|error| TrainError::Mesh { what: error.to_string() })?;
        let there = Flow::new(&mesh, flow.scheme).map_err(model::ConfigError::from)?;
        let there = there.scheduled(flow.schedule);
        let built = Model::build_on(&self.config, self.context, &there)?;
        Ok((mesh, built))
    }

    /// Put what a rank is the first to hold to its places in the whole.
    fn place(&self, (mesh, built): &(Mesh, Built), here: &[u8], size: usize, whole: &mut [u8]) {
        for (i, stretch) in self.stretches(&built.params).enumerate() {
            if is_first(mesh, &built.spreads[i]) {
                for (at, from, len) in stretch {
                    let (at, from, len) = (at * size, from * size, len * size);
                    whole[from..from + len].copy_from_slice(&here[at..at + len]);
                }
            }
        }
    }

    /// By parameter: (element of a rank's arrays, element of the whole arrays, how many).
    fn stretches(&self, params: &ParamList) -> impl Iterator<Item = Vec<(usize, usize, usize)>> {
        let (starts, _) = params.layout();
        params.refs().zip(starts).map(|(param, start)| {
            let spec = &params.specs()[param.index()];
            let whole = self.starts[&spec.name];
            let mut found = Vec::new();
            let mut add = |at, from, len| found.push((start + at, whole + from, len));
            match params.piece(param) {
                None => add(0, 0, spec.len()),
                Some(piece) => piece.stretches(spec.shape.get(1).copied().unwrap_or(1), add),
            }
            found
        })
    }

    /// Take this rank's pieces of every array from a saved state.
    pub fn restore(&self, learner: &mut Learner, state: &Checkpoint) -> Result<(), TrainError> {
        let flat_len = learner.store.flat_len().max(1);
        for (name, bytes) in learner.optimizer.arrays(&learner.store) {
            let size = bytes as usize / flat_len;
            let mut whole = vec![0u8; self.len * size];
            state.read(name, &mut whole)?;
            let mut here = vec![0u8; bytes as usize];
            for (at, from, len) in self.stretches(&learner.params).flatten() {
                let (at, from, len) = (at * size, from * size, len * size);
                here[at..at + len].copy_from_slice(&whole[from..from + len]);
            }
            learner.optimizer.write(&mut learner.store, name, 0, &here)?;
        }
        Ok(())
    }

    /// The model of one rank with the weights of all, on rank 0.
    pub fn assemble(&self, learner: &mut Learner, flow: &Flow) -> Result<Option<Assembled>, TrainError> {
        let Some(weights) = self.gather_one(learner, flow, "weights")? else { return Ok(None) };
        let Built { model, stored, .. } = Model::build_on(&self.config, self.context, &Flow::solo())?;
        let mut store = ParamStore::new(Device::Cpu, learner.store.dtype(), &self.params)?;
        store.arrays_mut().view_mut(Class::Param, 0..self.len).bytes().copy_from_slice(&weights);
        Ok(Some(Assembled { model, store, stored }))
    }
}
