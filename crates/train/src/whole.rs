//! The state of a run of several ranks as the state of one: pieces are put together on rank 0 to be
//! saved and exported, and taken from a saved state. So a state knows no mesh.

use crate::TrainError;
use crate::begin::saved_size;
use crate::learner::Learner;
use crate::moments;
use crate::ranks::is_first_but;
use checkpoint::Checkpoint;
use device::{Buffer, DType, Device};
use dist::{Axis, Communicator, Flow, Mesh};
use memory::{Class, Stripes};
use model::{Built, Config, Model, Spread, StoredWeight};
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

/// One rank of the run: its model, and its share of the flat arrays.
struct There {
    mesh: Mesh,
    built: Built,
    len: usize,
    stripes: Stripes,
}

impl There {
    /// Elements of its granules.
    fn packed(&self) -> usize {
        self.stripes.count(self.len) * self.stripes.granule
    }

    /// Whether it is the first rank that holds its granules of a parameter.
    fn is_first(&self, spread: &Spread) -> bool {
        is_first_but(&self.mesh, spread, Axis::Fsdp)
    }

    /// Whether it is the first to hold anything.
    fn gives(&self) -> bool {
        self.built.spreads.iter().any(|spread| self.is_first(spread))
    }
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
        let size = bytes / learner.store.flat_len().max(1);
        let here = self.as_rank(flow, mesh.rank())?;
        let mut mine = Buffer::new(Device::Cpu, here.packed() * size)?;
        {
            let packed = mine.view_mut(DType::U16, 0, here.packed() * size / 2).bytes();
            let Learner { optimizer, store, .. } = learner;
            for run in store.arrays().pieces(0..store.flat_len()) {
                let at = here.stripes.packed(run.start) * size;
                let out = &mut packed[at..at + run.len() * size];
                optimizer.read(store, name, (run.start * size) as u64, out)?;
            }
        }
        let world = mesh.group_over(&Axis::ALL);
        if mesh.rank() != 0 {
            if here.gives() {
                let words = here.packed() * size / 2;
                world.send(mine.view(DType::U16, 0, words), 0).map_err(Fault::from)?;
            }
            return Ok(None);
        }
        let mut whole = vec![0u8; self.len * size];
        for rank in 0..mesh.world_size() {
            let there = self.as_rank(flow, rank)?;
            if !there.gives() {
                continue;
            }
            let words = there.packed() * size / 2;
            if rank > 0 {
                mine = Buffer::new(Device::Cpu, words * 2)?;
                world.receive(mine.view_mut(DType::U16, 0, words), rank).map_err(Fault::from)?;
            }
            self.place(&there, mine.view(DType::U16, 0, words).bytes(), size, &mut whole);
        }
        Ok(Some(whole))
    }

    fn bytes_here(&self, learner: &Learner, name: &str) -> usize {
        let arrays = learner.optimizer.arrays(&learner.store);
        arrays.iter().find(|(known, _)| *known == name).map_or(0, |(_, bytes)| *bytes as usize)
    }

    /// The model as `rank` has it; nothing is reserved and nobody is asked.
    fn as_rank(&self, flow: &Flow, rank: usize) -> Result<There, TrainError> {
        let shape = *flow.mesh.shape();
        let mesh = Mesh::new(shape, Communicator::null(rank, shape.world_size()))
            .map_err(|error| TrainError::Mesh { what: error.to_string() })?;
        let there = Flow::new(&mesh, flow.scheme).map_err(model::ConfigError::from)?;
        let there = there.scheduled(flow.schedule);
        let built = Model::build_on(&self.config, self.context, &there)?;
        let (_, len) = built.params.layout();
        let stripes = Stripes::new(len, mesh.size(Axis::Fsdp), mesh.coord(Axis::Fsdp));
        Ok(There { mesh, built, len, stripes })
    }

    /// Put what a rank is the first to hold to its places in the whole. `packed` are its granules, one
    /// after the other.
    fn place(&self, there: &There, packed: &[u8], size: usize, whole: &mut [u8]) {
        for (i, stretch) in self.stretches(&there.built.params).enumerate() {
            if !there.is_first(&there.built.spreads[i]) {
                continue;
            }
            for (at, from, len) in stretch {
                for run in there.stripes.owned(at..at + len) {
                    let source = there.stripes.packed(run.start) * size;
                    let target = (from + run.start - at) * size;
                    let bytes = run.len() * size;
                    whole[target..target + bytes].copy_from_slice(&packed[source..source + bytes]);
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
            let saved = saved_size(state, name, self.len as u64, size)?;
            let mut whole = vec![0u8; self.len * saved];
            state.read(name, &mut whole)?;
            let whole = moments::resize(&whole, saved, size);
            let mut here = vec![0u8; bytes as usize];
            for (at, from, len) in self.stretches(&learner.params).flatten() {
                let (at, from, len) = (at * size, from * size, len * size);
                here[at..at + len].copy_from_slice(&whole[from..from + len]);
            }
            learner.optimizer.write(&mut learner.store, name, 0, &here)?;
        }
        Ok(learner.share_weights()?)
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
