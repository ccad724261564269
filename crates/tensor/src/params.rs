//! Parameters: handles outside, flat memory inside.
//!
//! Layers and the tape hold `ParamRef`s; this file knows which elements of the flat arrays each one
//! is. Weights are one flat array in the compute type, gradients one flat f32 array, in the order of
//! the handles, so that the optimizer, the checkpoint and the memory tiers see runs of bytes, not
//! tensors.

use crate::init::{Init, fill};
use crate::piece::Piece;
use crate::tape::Moment;
use crate::{Fault, Tensor};
use device::{Buffer, DType, Device, OutOfMemory, View, ViewMut};
use memory::pager::{About, PagerError, Setup};
use memory::trace::Access;
use memory::{Arrays, Class, Need, Stripes};
use std::collections::BTreeMap;
use std::ops::Range;
use std::sync::Mutex;

/// Handle of one parameter.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct ParamRef(u32);

impl ParamRef {
    /// Position in the store's order.
    pub fn index(self) -> usize {
        self.0 as usize
    }
}

/// What a parameter is, before it has storage.
#[derive(Clone, Debug, PartialEq)]
pub struct ParamSpec {
    /// Unique name, as in `layers.3.qkv.weight`.
    pub name: String,
    /// Sizes; matrices are [out, in].
    pub shape: Vec<usize>,
    /// Initial values.
    pub init: Init,
    /// Whether weight decay applies (by default to matrices, not to norms and biases).
    pub decay: bool,
}

impl ParamSpec {
    /// Number of elements.
    pub fn len(&self) -> usize {
        self.shape.iter().product()
    }

    /// Whether it has no elements.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }
}

/// The parameters of a model being built, in the order they are added.
#[derive(Clone, Debug, Default)]
pub struct ParamList {
    specs: Vec<ParamSpec>,
    /// Of the parameters that are part of a larger matrix.
    pieces: BTreeMap<ParamRef, Piece>,
}

impl ParamList {
    /// Add one; the handle is valid in the store made of this list.
    pub fn add(&mut self, spec: ParamSpec) -> ParamRef {
        self.specs.push(spec);
        ParamRef(self.specs.len() as u32 - 1)
    }

    /// Add one that holds a piece of a larger matrix; `spec.shape` is what is held, padding
    /// included.
    pub fn add_piece(&mut self, spec: ParamSpec, piece: Piece) -> ParamRef {
        let param = self.add(spec);
        self.pieces.insert(param, piece);
        param
    }

    /// The piece a parameter holds; `None` where it is whole.
    pub fn piece(&self, param: ParamRef) -> Option<&Piece> {
        self.pieces.get(&param)
    }

    /// Where a store of this list begins each parameter in its flat arrays, and how long they are.
    pub fn layout(&self) -> (Vec<usize>, usize) {
        lay_out(&self.specs)
    }

    /// Handles in order.
    pub fn refs(&self) -> impl Iterator<Item = ParamRef> + use<> {
        (0..self.specs.len() as u32).map(ParamRef)
    }

    /// What was added, in order.
    pub fn specs(&self) -> &[ParamSpec] {
        &self.specs
    }

    /// Initial values of every parameter from `seed`, handed to `put(param, first element, values)`
    /// in pieces, so that whoever keeps a finer master can keep the full f32 value.
    /// A piece gets the values its elements have in the whole, so that every mesh starts alike.
    pub fn initial_values<E>(
        &self,
        seed: u64,
        mut put: impl FnMut(ParamRef, usize, &[f32]) -> Result<(), E>,
    ) -> Result<(), E> {
        const PIECE: usize = 1 << 20;
        const FILL: usize = 1 << 14;
        let mut values = vec![0f32; PIECE];
        for (index, spec) in self.specs.iter().enumerate() {
            if let Some(piece) = self.pieces.get(&ParamRef(index as u32)) {
                put(ParamRef(index as u32), 0, &piece_values(spec, piece, seed))?;
                continue;
            }
            for first in (0..spec.len()).step_by(PIECE) {
                let count = PIECE.min(spec.len() - first);
                let chunks: Vec<_> = values[..count].chunks_mut(FILL).map(Mutex::new).collect();
                device::for_each_index(chunks.len(), |i| {
                    if let Ok(mut chunk) = chunks[i].lock() {
                        fill(spec.init, seed, &spec.name, (first + i * FILL) as u64, &mut chunk);
                    }
                });
                drop(chunks);
                put(ParamRef(index as u32), first, &values[..count])?;
            }
        }
        Ok(())
    }
}

/// Initial values of a piece: what its elements have in the whole, zero in the padding.
fn piece_values(spec: &ParamSpec, piece: &Piece, seed: u64) -> Vec<f32> {
    let ld = spec.shape[1..].iter().product::<usize>().max(1);
    let mut values = vec![0f32; spec.len()];
    let mut stretches = Vec::new();
    piece.stretches(ld, |at, from, len| stretches.push((at, from, len)));
    let (mut rest, mut passed) = (values.as_mut_slice(), 0);
    let mut cut = Vec::with_capacity(stretches.len());
    for (at, from, len) in stretches {
        let (_, tail) = rest.split_at_mut(at - passed);
        let (here, tail) = tail.split_at_mut(len);
        cut.push(Mutex::new((from as u64, here)));
        (rest, passed) = (tail, at + len);
    }
    device::for_each_chunk(cut.len(), 16, |range| {
        for stretch in &cut[range] {
            if let Ok(mut stretch) = stretch.lock() {
                let (from, here) = &mut *stretch;
                fill(spec.init, seed, &spec.name, *from, here);
            }
        }
    });
    drop(cut);
    values
}

/// Every parameter starts on a multiple of this many elements, so that vector loads of one never
/// straddle a cache line with another, and no block of 8-bit moments holds some of two.
const ALIGN: usize = BLOCK;

/// Elements of 8-bit moments that share an exponent.
pub const BLOCK: usize = 128;

/// All parameters of a model: specs, weights, and gradients while training.
pub struct ParamStore {
    dtype: DType,
    specs: Vec<ParamSpec>,
    starts: Vec<usize>,
    pub(crate) arrays: Arrays,
    /// A byte for each block of first and second moments, where those have 8 bits. They stay in
    /// memory: a 64th of a byte a parameter is not worth a journey.
    pub(crate) exponents: Option<[Buffer; 2]>,
    /// Whether a gradient was written since the last `clear_grads`; until then its bytes are stale.
    pub(crate) touched: Vec<bool>,
    /// Whether gradients are rounded to bf16 once they are final.
    pub(crate) rounds: bool,
}

/// First element of each parameter, and elements of all.
fn lay_out(specs: &[ParamSpec]) -> (Vec<usize>, usize) {
    let mut total = 0usize;
    let place = |spec: &ParamSpec| {
        let start = total;
        total = (total + spec.len()).next_multiple_of(ALIGN);
        start
    };
    (specs.iter().map(place).collect(), total)
}

impl ParamStore {
    /// Storage for `list` in `dtype` (f32 or bf16), zeroed.
    pub fn new(device: Device, dtype: DType, list: &ParamList) -> Result<ParamStore, OutOfMemory> {
        let (starts, total) = lay_out(&list.specs);
        let mut arrays = Arrays::new(device, total);
        arrays.add(Class::Param, dtype)?;
        Ok(Self::of(list, dtype, starts, arrays))
    }

    /// Storage that `ranks` ranks share, of whom we are number `index`: of the classes in `away` only
    /// our own granules are here, until others are brought.
    pub fn striped(
        device: Device,
        dtype: DType,
        list: &ParamList,
        (ranks, index): (usize, usize),
        away: &[Class],
    ) -> Result<ParamStore, OutOfMemory> {
        let (starts, total) = lay_out(&list.specs);
        let mut arrays = Arrays::striped(device, total, Stripes::new(total, ranks, index), away);
        arrays.add(Class::Param, dtype)?;
        Ok(Self::of(list, dtype, starts, arrays))
    }

    /// Storage over tiers, for weights, final gradients (f32, or bf16: rounded) and optimizer state,
    /// whose moments are `moments` (f32 or u8). That of a rank among others is shared by so many, of whom we
    /// are number so.
    pub fn paged(
        (dtype, grads, moments): (DType, DType, DType),
        list: &ParamList,
        mut setup: Setup,
        share: Option<(usize, usize)>,
    ) -> Result<ParamStore, PagerError> {
        let (starts, total) = lay_out(&list.specs);
        let stripes = share.map(|(ranks, index)| Stripes::new(total, ranks, index));
        if let Some(stripes) = stripes {
            setup.chunk_elements = stripes.granule;
        }
        let mut classes = vec![(Class::Param, dtype), (Class::Grad, DType::F32)];
        if grads != DType::F32 {
            classes.push((Class::Grad16, grads));
        }
        if dtype != DType::F32 {
            classes.push((Class::Master, DType::U16));
        }
        classes.extend([(Class::M, moments), (Class::V, moments)]);
        let arrays = Arrays::paged(total, setup, &classes, stripes)?;
        Ok(Self::of(list, dtype, starts, arrays))
    }

    fn of(list: &ParamList, dtype: DType, starts: Vec<usize>, arrays: Arrays) -> ParamStore {
        let specs = list.specs.clone();
        let touched = vec![false; specs.len()];
        ParamStore { dtype, specs, starts, arrays, exponents: None, touched, rounds: false }
    }

    /// Reserve gradients; from now on ops on a recording tape may accumulate into them.
    pub fn enable_grads(&mut self) -> Result<(), OutOfMemory> {
        self.arrays.add(Class::Grad, DType::F32)
    }

    /// The flat arrays, for the optimizer and for files.
    pub fn arrays(&self) -> &Arrays {
        &self.arrays
    }

    /// The same to be changed.
    pub fn arrays_mut(&mut self) -> &mut Arrays {
        &mut self.arrays
    }

    /// An op is about to run: make the weights of its parameters resident, and their gradients where it
    /// writes them.
    pub(crate) fn visit(&mut self, moment: &Moment<'_>) -> Result<(), Fault> {
        if !self.arrays.is_paged() {
            return Ok(());
        }
        let mut needs = Vec::with_capacity(2 * moment.params.len());
        for param in moment.params {
            let elements = self.range(*param);
            if moment.writes_grads {
                needs.push(self.need_of_grad(*param));
            }
            if moment.reads_weights {
                needs.push(Need { class: Class::Param, elements, access: Access::Read });
            }
        }
        self.bring(moment.about(moment.op), &needs)
    }

    /// What writing the gradient of a parameter needs. The first to write in a chunk finds nothing there
    /// that anybody will look at, and needs no zeros either.
    fn need_of_grad(&self, param: ParamRef) -> Need {
        let mut elements = self.range(param);
        if self.touched[param.index()] {
            return Need { class: Class::Grad, elements, access: Access::ReadWrite };
        }
        let whole = self.arrays.whole_chunks(&elements);
        let is_blank = |run: Range<usize>| self.params_in(&run).all(|other| !self.touched[other.index()]);
        if is_blank(whole.start..elements.start) {
            elements.start = whole.start;
        }
        if is_blank(elements.end..whole.end) {
            elements.end = whole.end;
        }
        Need { class: Class::Grad, elements, access: Access::Write }
    }

    /// Elements behind a parameter that belong to none, in the chunk in which it ends.
    pub(crate) fn padding_behind(&self, param: ParamRef) -> Range<usize> {
        let range = self.range(param);
        let next = self.starts.get(param.index() + 1).copied().unwrap_or(usize::MAX);
        range.end..next.min(self.arrays.whole_chunks(&range).end)
    }

    /// Make runs of the flat arrays resident until the next call of this or the next moment.
    pub fn bring(&mut self, about: About, needs: &[Need]) -> Result<(), Fault> {
        self.arrays.visit(about, needs).map_err(Fault::outside)
    }

    /// Parameters that have elements in `elements`, in order.
    pub fn params_in(&self, elements: &Range<usize>) -> impl Iterator<Item = ParamRef> + use<> {
        let first = self.starts.partition_point(|start| *start <= elements.start).saturating_sub(1);
        let last = self.starts.partition_point(|start| *start < elements.end);
        (first as u32..last as u32).map(ParamRef)
    }

    /// Handles in order.
    pub fn refs(&self) -> impl Iterator<Item = ParamRef> + use<> {
        (0..self.specs.len() as u32).map(ParamRef)
    }

    /// What a parameter is.
    pub fn spec(&self, param: ParamRef) -> &ParamSpec {
        &self.specs[param.index()]
    }

    /// Handle of a name.
    pub fn find(&self, name: &str) -> Option<ParamRef> {
        self.specs.iter().position(|spec| spec.name == name).map(|i| ParamRef(i as u32))
    }

    /// Elements of the flat arrays a parameter covers.
    pub fn range(&self, param: ParamRef) -> Range<usize> {
        let start = self.starts[param.index()];
        start..start + self.specs[param.index()].len()
    }

    /// Pieces of the flat arrays a parameter lies in, or shares a stripe with; one of everything where nothing
    /// is cut.
    pub fn pieces_of(&self, param: ParamRef) -> Range<usize> {
        self.arrays.pieces_of(&self.range(param))
    }

    /// Elements of the flat arrays, padding included.
    pub fn flat_len(&self) -> usize {
        self.arrays.len()
    }

    /// Elements that are parameters.
    pub fn parameter_count(&self) -> usize {
        self.specs.iter().map(ParamSpec::len).sum()
    }

    /// Compute type of the weights.
    pub fn dtype(&self) -> DType {
        self.dtype
    }

    /// Where the weights live.
    pub fn device(&self) -> Device {
        self.arrays.device()
    }

    /// Weights of one parameter.
    pub fn weight(&self, param: ParamRef) -> View<'_> {
        self.arrays.view(Class::Param, self.range(param))
    }

    /// Weights of one parameter, for loading.
    pub fn weight_mut(&mut self, param: ParamRef) -> ViewMut<'_> {
        let range = self.range(param);
        self.arrays.view_mut(Class::Param, range)
    }

    /// Weights of one parameter from element `first` on, rounded to the store's type.
    pub fn set_weights(
        &mut self,
        param: ParamRef,
        first: usize,
        values: View<'_>,
    ) -> Result<(), OutOfMemory> {
        let (dtype, len) = (self.dtype, values.len());
        if self.device() == Device::Cpu || values.dtype() == dtype {
            let weights = self.weight_mut(param).narrow(first, len);
            match values.dtype() == dtype {
                true => device::copy(weights, values),
                false => kernels::elementwise::copy(weights, values),
            }
            return Ok(());
        }
        let mut rounded = Tensor::new(Device::Cpu, dtype, &[len])?;
        kernels::elementwise::copy(rounded.view_mut(), values);
        device::copy(self.weight_mut(param).narrow(first, len), rounded.view());
        Ok(())
    }
}
