//! The state of a run of several ranks as the state of one, so that a state knows no mesh. Rank 0 reads
//! any elements of its arrays: it asks, and whoever is the first to hold some of them answers. Nobody
//! ever holds more than the part that is asked for.

use crate::TrainError;
use crate::begin::saved_size;
use crate::learner::Learner;
use crate::moments;
use crate::ranks::{is_first_but, numbers_of, words_of};
use checkpoint::Checkpoint;
use device::{Buffer, DType, Device, ViewMut};
use dist::{Axis, Communicator, Flow, Group, Mesh};
use memory::{Class, Stripes};
use model::{Built, Config, Model, Spread, StoredWeight};
use std::collections::HashMap;
use std::ops::Range;
use tensor::{BLOCK, Fault, ParamList, ParamRef, ParamStore};

/// What is needed to put a run together: the model's shape, and how one rank would hold it.
pub(crate) struct Whole {
    config: Config,
    context: usize,
    params: ParamList,
    stored: Vec<StoredWeight>,
    /// Elements of each parameter in its arrays. Ranks find theirs by name: stages have others.
    ranges: HashMap<String, Range<usize>>,
    len: usize,
}

/// A model on one rank with the weights of a run.
pub(crate) struct Assembled {
    pub model: Model,
    pub store: ParamStore,
}

/// One rank of the run: its model, and its share of the flat arrays.
struct There {
    mesh: Mesh,
    built: Built,
    len: usize,
    stripes: Stripes,
}

impl There {
    /// Whether it is the first rank that holds its granules of a parameter.
    fn is_first(&self, spread: &Spread) -> bool {
        is_first_but(&self.mesh, spread, Axis::Fsdp)
    }

    /// What it is the first to hold of `elements` of the whole.
    fn parts(&self, whole: &Whole, elements: &Range<usize>) -> Vec<Part> {
        let (starts, _) = self.built.params.layout();
        let params = self.built.params.refs().zip(starts).zip(&self.built.spreads);
        let first = params.filter(|(_, spread)| self.is_first(spread));
        first.filter_map(|((param, start), _)| self.part(whole, (param, start), elements)).collect()
    }

    fn part(
        &self,
        whole: &Whole,
        (param, start): (ParamRef, usize),
        elements: &Range<usize>,
    ) -> Option<Part> {
        let mut stretches = Vec::new();
        whole.stretches(&self.built.params, (param, start), |at, from, len| {
            let cut = from.max(elements.start)..(from + len).min(elements.end);
            if !cut.is_empty() {
                stretches.push(Stretch { at: at + cut.start - from, from: cut.start, len: cut.len() });
            }
        });
        let first = stretches.iter().map(|stretch| stretch.at).min()?;
        let end = stretches.iter().map(|stretch| stretch.at + stretch.len).max()?;
        // 8-bit moments are read by whole blocks, of which every parameter has its own.
        let here = first / BLOCK * BLOCK..end.next_multiple_of(BLOCK).min(self.len);
        let runs = self.stripes.owned(here).collect();
        Some(Part { runs, stretches })
    }
}

/// Elements that lie in one run here and in the whole.
struct Stretch {
    /// Of a rank's arrays.
    at: usize,
    /// Of the whole arrays.
    from: usize,
    len: usize,
}

/// What a rank gives of one parameter: runs of its arrays, one after the other, and which stretches are
/// in them.
struct Part {
    runs: Vec<Range<usize>>,
    stretches: Vec<Stretch>,
}

impl Part {
    fn len(&self) -> usize {
        self.runs.iter().map(Range::len).sum()
    }

    /// Put what is asked for to its places; `first` is the element `out` begins with.
    fn place(&self, mut given: &[u8], size: usize, (first, out): (usize, &mut [u8])) {
        for run in &self.runs {
            let (bytes, rest) = given.split_at(run.len() * size);
            for Stretch { at, from, len } in &self.stretches {
                let cut = run.start.max(*at)..run.end.min(at + len);
                if !cut.is_empty() {
                    let source = (cut.start - run.start) * size;
                    let target = (from + cut.start - at - first) * size;
                    let bytes = &bytes[source..source + cut.len() * size];
                    out[target..target + bytes.len()].copy_from_slice(bytes);
                }
            }
            given = rest;
        }
    }
}

/// What rank 0 wants: elements of one of the state's arrays; none: nothing more.
type Ask = Option<(usize, Range<usize>)>;

const ASK_WORDS: usize = 12;

fn said(ask: &Ask) -> Vec<u16> {
    let (array, elements) = ask.clone().unwrap_or((usize::MAX, 0..0));
    words_of(&[array, elements.start, elements.end].map(|number| number as u64))
}

fn heard(words: &[u16]) -> Ask {
    let numbers = numbers_of(words);
    let [array, start, end] = [0, 1, 2].map(|i| numbers[i] as usize);
    (array != usize::MAX).then_some((array, start..end))
}

/// Tell all other ranks of `world`.
fn tell_all(world: &Group, ask: &Ask) -> Result<(), Fault> {
    let mut words = said(ask);
    (1..world.size()).try_for_each(|rank| Ok(world.send(ViewMut::of_u16(&mut words).as_view(), rank)?))
}

/// Reads the state of all ranks, on rank 0.
pub(crate) struct Reader<'a> {
    whole: &'a Whole,
    learner: &'a mut Learner,
    ranks: Vec<There>,
    world: Group,
}

impl<'a> Reader<'a> {
    /// Names of the arrays, and bytes of each.
    pub fn arrays(&self) -> Vec<(&'static str, u64)> {
        self.whole.arrays(self.learner)
    }

    /// Compute type of the weights.
    pub fn dtype(&self) -> DType {
        self.learner.store.dtype()
    }

    /// Parameters as one rank would hold them.
    pub fn params(&self) -> &ParamList {
        &self.whole.params
    }

    /// The same by their names in files.
    pub fn stored(&self) -> &'a [StoredWeight] {
        &self.whole.stored
    }

    /// Elements of a parameter in the arrays.
    pub fn range(&self, param: ParamRef) -> Range<usize> {
        self.whole.ranges[&self.whole.params.specs()[param.index()].name].clone()
    }

    /// Copy weights from element `first` on.
    pub fn weights(&mut self, first: usize, out: &mut [u8]) -> Result<(), Fault> {
        let weights = self.arrays().iter().position(|(name, _)| *name == "weights");
        let weights = weights.expect("a state has weights");
        self.read(weights, (first * self.dtype().size_bytes()) as u64, out)
    }

    /// Copy bytes of one of `arrays` from byte `first` on: whole elements.
    pub fn read(&mut self, array: usize, first: u64, out: &mut [u8]) -> Result<(), Fault> {
        let size = self.whole.size(self.learner, array);
        let first = first as usize / size;
        let elements = first..first + out.len() / size;
        out.fill(0);
        tell_all(&self.world, &Some((array, elements.clone())))?;
        for (rank, there) in self.ranks.iter().enumerate() {
            let parts = there.parts(self.whole, &elements);
            let given = match rank {
                0 => give(self.learner, array, size, &parts)?,
                _ => self.receive(rank, parts.iter().map(Part::len).sum::<usize>() * size)?,
            };
            let mut given = given.as_slice();
            for part in &parts {
                let (bytes, rest) = given.split_at(part.len() * size);
                part.place(bytes, size, (first, &mut *out));
                given = rest;
            }
        }
        Ok(())
    }

    fn receive(&self, rank: usize, bytes: usize) -> Result<Vec<u8>, Fault> {
        if bytes == 0 {
            return Ok(Vec::new());
        }
        let mut given = Buffer::new(Device::Cpu, bytes)?;
        self.world.receive(given.view_mut(DType::U16, 0, bytes / 2), rank)?;
        Ok(given.view(DType::U16, 0, bytes / 2).bytes().to_vec())
    }
}

/// The runs of `parts`, one after the other.
fn give(learner: &mut Learner, array: usize, size: usize, parts: &[Part]) -> Result<Vec<u8>, Fault> {
    let Learner { optimizer, store, .. } = learner;
    let name = optimizer.arrays(store)[array].0;
    let mut bytes = vec![0u8; parts.iter().map(Part::len).sum::<usize>() * size];
    let mut rest = bytes.as_mut_slice();
    for run in parts.iter().flat_map(|part| &part.runs) {
        let (out, after) = rest.split_at_mut(run.len() * size);
        optimizer.read(store, name, (run.start * size) as u64, out)?;
        rest = after;
    }
    Ok(bytes)
}

impl Whole {
    pub fn new(config: &Config, context: usize) -> Result<Whole, TrainError> {
        let Built { params, stored, .. } = Model::build_on(config, context, &Flow::solo())?;
        let (starts, len) = params.layout();
        let ranges = params.specs().iter().zip(starts);
        let ranges = ranges.map(|(spec, start)| (spec.name.clone(), start..start + spec.len())).collect();
        Ok(Whole { config: config.clone(), context, params, stored, ranges, len })
    }

    /// Names of the arrays of the whole state, and bytes of each.
    fn arrays(&self, learner: &Learner) -> Vec<(&'static str, u64)> {
        let names = learner.optimizer.arrays(&learner.store).into_iter().enumerate();
        names.map(|(i, (name, _))| (name, (self.len * self.size(learner, i)) as u64)).collect()
    }

    /// Bytes of an element of an array as it is saved.
    fn size(&self, learner: &Learner, array: usize) -> usize {
        learner.optimizer.arrays(&learner.store)[array].1 as usize / learner.store.flat_len().max(1)
    }

    /// Rank 0 reads what it wants of the whole state; the others answer until it has it. Every rank calls
    /// it; what came of it is known on rank 0.
    pub fn read_by<T>(
        &self,
        learner: &mut Learner,
        flow: &Flow,
        read: impl FnOnce(&mut Reader<'_>) -> Result<T, TrainError>,
    ) -> Result<Option<T>, TrainError> {
        let world = flow.mesh.group_over(&Axis::ALL);
        if flow.mesh.rank() != 0 {
            return self.answer(learner, flow, &world).map(|()| None);
        }
        let ranks =
            (0..flow.mesh.world_size()).map(|rank| self.as_rank(flow, rank)).collect::<Result<_, _>>()?;
        let mut reader = Reader { whole: self, learner, ranks, world };
        let came = read(&mut reader);
        let told = tell_all(&reader.world, &None);
        // What went wrong first is what is told.
        let came = came?;
        told?;
        Ok(Some(came))
    }

    fn answer(&self, learner: &mut Learner, flow: &Flow, world: &Group) -> Result<(), TrainError> {
        let here = self.as_rank(flow, flow.mesh.rank())?;
        loop {
            let mut words = [0u16; ASK_WORDS];
            world.receive(ViewMut::of_u16(&mut words), 0).map_err(Fault::from)?;
            let Some((array, elements)) = heard(&words) else { return Ok(()) };
            let size = self.size(learner, array);
            let bytes = give(learner, array, size, &here.parts(self, &elements))?;
            if !bytes.is_empty() {
                let mut given = Buffer::new(Device::Cpu, bytes.len())?;
                given.view_mut(DType::U16, 0, bytes.len() / 2).bytes().copy_from_slice(&bytes);
                world.send(given.view(DType::U16, 0, bytes.len() / 2), 0).map_err(Fault::from)?;
            }
        }
    }

    /// The model as `rank` has it; nothing is reserved and nobody is asked.
    fn as_rank(&self, flow: &Flow, rank: usize) -> Result<There, TrainError> {
        let shape = *flow.mesh.shape();
        let mesh = Mesh::new(shape, Communicator::null(rank, shape.world_size()))
            .map_err(|error| TrainError::Mesh { what: error.to_string() })?;
        let there = flow.on(&mesh).map_err(model::ConfigError::from)?;
        let built = Model::build_on(&self.config, self.context, &there)?;
        let (_, len) = built.params.layout();
        let stripes = Stripes::new(len, mesh.size(Axis::Fsdp), mesh.coord(Axis::Fsdp));
        Ok(There { mesh, built, len, stripes })
    }

    /// Where elements of a rank's parameter lie: `add(element of the rank's arrays, element of the whole
    /// arrays, how many)`. In the order of both.
    fn stretches(
        &self,
        params: &ParamList,
        (param, start): (ParamRef, usize),
        mut add: impl FnMut(usize, usize, usize),
    ) {
        let spec = &params.specs()[param.index()];
        let whole = self.ranges[&spec.name].start;
        match params.piece(param) {
            None => add(start, whole, spec.len()),
            Some(piece) => piece.stretches(spec.shape.get(1).copied().unwrap_or(1), |at, from, len| {
                add(start + at, whole + from, len)
            }),
        }
    }

    /// Take this rank's pieces of every array from a saved state, parameter by parameter.
    pub fn restore(&self, learner: &mut Learner, state: &Checkpoint) -> Result<(), TrainError> {
        for (array, (name, _)) in learner.optimizer.arrays(&learner.store).into_iter().enumerate() {
            let size = self.size(learner, array);
            let saved = saved_size(state, name, self.len as u64, size)?;
            let mut taking = Taking::new(self, learner, (name, size));
            state.for_each_block(name, |first, bytes| {
                let bytes = moments::resize(bytes, saved, size);
                taking.take(learner, first as usize / saved, &bytes)
            })?;
        }
        Ok(learner.share_weights()?)
    }

    /// The model of one rank with the weights of all, on rank 0.
    pub fn assemble(&self, learner: &mut Learner, flow: &Flow) -> Result<Option<Assembled>, TrainError> {
        let dtype = learner.store.dtype();
        self.read_by(learner, flow, |reader| {
            let model = Model::build_on(&self.config, self.context, &Flow::solo())?.model;
            let mut store = ParamStore::new(Device::Cpu, dtype, &self.params)?;
            // By parameter: nobody packs more than one at a time.
            for param in self.params.refs() {
                let elements = store.range(param);
                let first = elements.start;
                reader.weights(first, store.arrays_mut().view_mut(Class::Param, elements).bytes())?;
            }
            Ok(Assembled { model, store })
        })
    }
}

/// An array of a saved state on its way into a rank's arrays.
struct Taking<'a> {
    whole: &'a Whole,
    /// Its name, and bytes of an element.
    array: (&'static str, usize),
    /// Our parameters in the order of the whole: where they begin in our arrays, their elements of the
    /// whole.
    params: Vec<(ParamRef, usize, Range<usize>)>,
    /// How many of them are done, and what is there of the next.
    done: usize,
    next: Vec<u8>,
}

impl<'a> Taking<'a> {
    fn new(whole: &'a Whole, learner: &Learner, array: (&'static str, usize)) -> Taking<'a> {
        let (starts, _) = learner.params.layout();
        let params = learner.params.refs().zip(starts).map(|(param, start)| {
            let name = &learner.params.specs()[param.index()].name;
            (param, start, whole.ranges[name].clone())
        });
        let mut params: Vec<_> = params.collect();
        params.sort_by_key(|(_, _, range)| range.start);
        Taking { whole, array, params, done: 0, next: Vec::new() }
    }

    /// Elements of the whole array from `first` on: the ones after those of the last call.
    fn take(&mut self, learner: &mut Learner, first: usize, bytes: &[u8]) -> Result<(), TrainError> {
        let (name, size) = self.array;
        let given = first..first + bytes.len() / size;
        while let Some((param, start, range)) = self.params.get(self.done) {
            if range.start >= given.end {
                break;
            }
            let params = &learner.params;
            // Whole blocks of 8-bit moments: no parameter shares one.
            self.next.resize(params.specs()[param.index()].len().next_multiple_of(BLOCK) * size, 0);
            self.whole.stretches(params, (*param, *start), |at, from, len| {
                let cut = from.max(given.start)..(from + len).min(given.end);
                if !cut.is_empty() {
                    let target = (at - start + cut.start - from) * size;
                    let source = &bytes[(cut.start - first) * size..(cut.end - first) * size];
                    self.next[target..target + source.len()].copy_from_slice(source);
                }
            });
            if range.end > given.end {
                break;
            }
            learner.optimizer.write(&mut learner.store, name, (start * size) as u64, &self.next)?;
            self.next.clear();
            self.done += 1;
        }
        Ok(())
    }
}
