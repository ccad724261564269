//! The flat arrays of a model, one a class, all of the same number of elements: the one place that
//! knows where a weight, a gradient or a moment lies. Over tiers one more array holds what is filed
//! on the way forth for the way back.
//!
//! Without a pager everything is here for good. With one, chunks come and go behind addresses that
//! stay, and whoever opens a window has said so before with `visit`.

use crate::pager::{About, Filed, Pager, PagerError, Setup, TierReport};
use crate::plan::Budgets;
use crate::trace::{Access, ChunkId, Trace};
use crate::{CLASSES, Class, Stripes, Tier};
use device::{DType, Device, OutOfMemory, Region, Stretch, View, ViewMut};
use std::ops::Range;

struct Array {
    dtype: DType,
    /// By depth of memory, fastest first; one where everything stays.
    regions: Vec<Region>,
}

impl Array {
    fn view(&self, depth: usize, elements: &Range<usize>) -> View<'_> {
        self.regions[depth].view(self.dtype, elements.start, elements.len())
    }

    fn open(&mut self, depth: usize, elements: &Range<usize>) -> ViewMut<'_> {
        self.regions[depth].view_mut(self.dtype, elements.start, elements.len())
    }
}

/// A chunk in one memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct At {
    /// Which array.
    pub class: usize,
    /// Which memory, fastest first.
    pub depth: usize,
    /// Which chunk.
    pub i: usize,
}

/// The regions by class.
#[derive(Default)]
pub(crate) struct Regions([Option<Array>; CLASSES]);

impl Regions {
    fn region(&mut self, at: At) -> &mut Region {
        &mut self.0[at.class].as_mut().expect("a chunk of a class that was added").regions[at.depth]
    }

    pub fn is_here(&self, at: At) -> bool {
        self.0[at.class].as_ref().is_some_and(|array| array.regions[at.depth].is_here(at.i))
    }

    pub fn is_lent(&self, at: At) -> bool {
        self.0[at.class].as_ref().is_some_and(|array| array.regions[at.depth].is_lent(at.i))
    }

    pub fn lend(&mut self, at: At) -> device::Loan {
        self.region(at).lend(at.i)
    }
}

impl Shared {
    fn region(
        &self,
        device: Device,
        len: usize,
        (class, dtype): (Class, DType),
    ) -> Result<Region, OutOfMemory> {
        let Shared { stripes, away } = self;
        let size = dtype.size_bytes();
        // Whole stripes, so that the pieces of every collective are equal.
        let (count, granule) = (stripes.count(len), stripes.granule * size);
        let bytes = count * stripes.stripe() * size;
        if !away.contains(&class) || stripes.ranks == 1 {
            return Region::standing(device, bytes, granule);
        }
        let mut region = Region::reserve(device, bytes, granule)?;
        (0..count).for_each(|stripe| region.bring(stripes.granules(stripe).start + stripes.index));
        Ok(region)
    }
}

/// A run of elements of one class that a moment needs.
#[derive(Clone, Debug, PartialEq)]
pub struct Need {
    /// Which array.
    pub class: Class,
    /// Which elements.
    pub elements: Range<usize>,
    /// For what.
    pub access: Access,
}

/// Windows on the same elements of every class, for one optimizer update.
pub struct Update<'a> {
    /// Weights in the compute type.
    pub param: ViewMut<'a>,
    /// f32, or bf16 where gradients are rounded into an array of their own
    pub grad: View<'a>,
    /// u16, where weights are no f32.
    pub master: Option<ViewMut<'a>>,
    /// f32
    pub m: ViewMut<'a>,
    /// f32
    pub v: ViewMut<'a>,
}

/// Arrays that ranks share in stripes.
struct Shared {
    stripes: Stripes,
    /// Classes of which the granules of other ranks come and go.
    away: Vec<Class>,
}

/// Weights, gradients and optimizer state.
pub struct Arrays {
    device: Device,
    len: usize,
    regions: Regions,
    /// Depth of the memory in which the present moment computes: there its windows open.
    depth: usize,
    pager: Option<Pager>,
    shared: Option<Shared>,
    /// The list of a visit, kept so that no visit allocates.
    scratch: Vec<(ChunkId, Access)>,
}

impl Arrays {
    /// No array yet; each will have `len` elements and stay in memory.
    pub fn new(device: Device, len: usize) -> Arrays {
        Arrays {
            device,
            len,
            regions: Regions::default(),
            depth: 0,
            pager: None,
            shared: None,
            scratch: Vec::new(),
        }
    }

    /// The same as one of the ranks that share them: of the classes in `away` only our own granules
    /// are here, until others are brought.
    pub fn striped(device: Device, len: usize, stripes: Stripes, away: &[Class]) -> Arrays {
        let shared = Some(Shared { stripes, away: away.to_vec() });
        Arrays { shared, ..Arrays::new(device, len) }
    }

    /// The same over tiers, with all its arrays. With `stripes` chunks are granules, and those of other
    /// ranks are no chunks: they come as buffers.
    pub fn paged(
        len: usize,
        setup: Setup,
        classes: &[(Class, DType)],
        stripes: Option<Stripes>,
    ) -> Result<Arrays, PagerError> {
        let mut arrays = Arrays::new(setup.device, len);
        if let Some(stripes) = stripes {
            let chunk = setup.chunk_elements;
            assert_eq!(stripes.granule, chunk, "chunks of {stripes:?}");
            arrays.shared = Some(Shared { stripes, away: Vec::new() });
        }
        let shared = stripes.filter(|stripes| stripes.ranks > 1);
        // Whole stripes, so that the pieces of every collective are equal.
        let reserved = shared.map_or(len, |stripes| stripes.count(len) * stripes.stripe());
        let is_ours = |i: usize| shared.is_none_or(|stripes| stripes.has(i) && i * stripes.granule < len);
        let mut sizes = Vec::new();
        let state = classes.iter().map(|(class, dtype)| (*class, *dtype, reserved));
        let filed = setup.filed.map(|filed| (Class::Activation, filed.dtype, filed.elements));
        let all: Vec<(Class, DType, usize)> = state.chain(filed).collect();
        let narrowest = all.iter().map(|(_, dtype, _)| dtype.size_bytes()).min().unwrap_or(1);
        let frame_bytes = setup.chunk_elements * narrowest;
        for (class, dtype, len) in all {
            let size = dtype.size_bytes();
            let memories = setup.budgets.tiers().into_iter().filter(|tier| *tier != Tier::Nvme);
            let (bytes, granule_bytes) = (len * size, setup.chunk_elements * size);
            let reserve = memories.enumerate().map(|(depth, _)| match (depth, setup.device) {
                (0, Device::Cuda) => Region::in_frames(bytes, granule_bytes, frame_bytes),
                // What stays of those that left is within the budget: it holds all of them.
                (_, Device::Cuda) if setup.budgets.nvme.is_none() => Region::pinned(bytes, granule_bytes),
                _ => Region::reserve(Device::Cpu, bytes, granule_bytes),
            });
            let is_chunk = |i: usize| class == Class::Activation || is_ours(i);
            let regions: Vec<Region> = reserve
                .map(|region| Ok(region?.with_buffers(|i| !is_chunk(i))))
                .collect::<Result<_, OutOfMemory>>()?;
            let bytes = |i| if is_chunk(i) { regions[0].granule_bytes(i) } else { 0 };
            sizes.push((class, (0..regions[0].granules()).map(bytes).collect()));
            arrays.regions.0[class as usize] = Some(Array { dtype, regions });
        }
        arrays.pager = Some(Pager::new(setup, &sizes)?);
        Ok(arrays)
    }

    /// Reserve an array of zeros; nothing happens when it is there.
    pub fn add(&mut self, class: Class, dtype: DType) -> Result<(), OutOfMemory> {
        if !self.has(class) {
            assert!(self.pager.is_none(), "arrays over tiers have all classes from the beginning");
            let region = match &self.shared {
                None => Region::zeroed(self.device, self.len * dtype.size_bytes())?,
                Some(shared) => shared.region(self.device, self.len, (class, dtype))?,
            };
            self.regions.0[class as usize] = Some(Array { dtype, regions: vec![region] });
        }
        Ok(())
    }

    /// Whether an array was added.
    pub fn has(&self, class: Class) -> bool {
        self.regions.0[class as usize].is_some()
    }

    /// Elements of every array of the state.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Where windows open.
    pub fn device(&self) -> Device {
        self.device
    }

    fn array(&self, class: Class) -> &Array {
        let array = self.regions.0[class as usize].as_ref();
        array.unwrap_or_else(|| panic!("an array of class {class} was never added"))
    }

    /// Read elements of a class.
    pub fn view(&self, class: Class, elements: Range<usize>) -> View<'_> {
        self.array(class).view(self.depth, &elements)
    }

    /// Write elements of a class.
    pub fn view_mut(&mut self, class: Class, elements: Range<usize>) -> ViewMut<'_> {
        let array = self.regions.0[class as usize].as_mut();
        array
            .unwrap_or_else(|| panic!("an array of class {class} was never added"))
            .open(self.depth, &elements)
    }

    /// Read elements of `read`, write the same ones of `write`.
    pub fn view_and_mut(
        &mut self,
        read: Class,
        write: Class,
        elements: Range<usize>,
    ) -> (View<'_>, ViewMut<'_>) {
        let pair = self.regions.0.get_disjoint_mut([read as usize, write as usize]);
        let Ok([Some(read), Some(write)]) = pair else { panic!("arrays {read} and {write} were added") };
        (read.view(self.depth, &elements), write.open(self.depth, &elements))
    }

    /// Write the same elements of two classes.
    pub fn views_mut(&mut self, classes: [Class; 2], elements: Range<usize>) -> [ViewMut<'_>; 2] {
        let pair = self.regions.0.get_disjoint_mut(classes.map(|class| class as usize));
        let Ok([Some(a), Some(b)]) = pair else { panic!("arrays {classes:?} were added") };
        [a.open(self.depth, &elements), b.open(self.depth, &elements)]
    }

    /// Element type of a class.
    pub fn dtype(&self, class: Class) -> DType {
        self.array(class).dtype
    }

    /// Bytes of a class.
    pub fn bytes(&self, class: Class) -> usize {
        self.len_of(class) * self.array(class).dtype.size_bytes()
    }

    fn len_of(&self, class: Class) -> usize {
        self.pager.as_ref().map_or(self.len, |pager| elements_of(pager, class, self.len))
    }

    /// Room for values that are filed on the way forth, and elements of a chunk; none where they stay
    /// in memory as they are.
    pub fn filed(&self) -> Option<(Filed, usize)> {
        let pager = self.pager.as_ref()?;
        pager.filed().map(|filed| (filed, pager.chunk_elements()))
    }

    /// Bytes of a class that were moved so far, over all links and both ways.
    pub fn moved_bytes(&self, class: Class) -> u64 {
        self.pager.as_ref().map_or(0, |pager| pager.moved_bytes(class))
    }

    /// Bytes of memory that stand behind a class now.
    pub fn resident_bytes(&self, class: Class) -> usize {
        self.array(class).regions.iter().map(Region::resident_bytes).sum()
    }

    /// How ranks share them, if they do.
    pub fn stripes(&self) -> Option<Stripes> {
        self.shared.as_ref().map(|shared| shared.stripes)
    }

    /// Lend a stripe of a class to a collective, in the memory of the present moment. Over tiers our granule
    /// is a chunk which that moment needs, and the loan ends before the next.
    pub fn lend_stripe(&mut self, class: Class, stripe: usize) -> Stretch {
        let granules = self.stripes().expect("ranks share the arrays").granules(stripe);
        let at = At { class: class as usize, depth: self.depth, i: granules.start };
        self.regions.region(at).lend_run(granules)
    }

    /// Room for the granules of a stripe that are others', where ops compute; zeros in what was not here.
    pub fn open_stripe(&mut self, class: Class, stripe: usize) {
        self.each_of_others(class, stripe, |region, i| {
            if !region.is_here(i) {
                region.bring(i);
            }
        });
    }

    /// Give it back; the bytes are lost.
    pub fn close_stripe(&mut self, class: Class, stripe: usize) {
        self.each_of_others(class, stripe, |region, i| {
            if region.is_here(i) {
                region.send_away(i);
            }
        });
    }

    fn each_of_others(&mut self, class: Class, stripe: usize, mut act: impl FnMut(&mut Region, usize)) {
        let stripes = self.stripes().expect("ranks share the arrays");
        for i in stripes.granules(stripe) {
            // Of a last stripe even ours may lie beyond the last element: then it is no chunk.
            let stays = match &self.pager {
                Some(pager) => pager.has(pager.id(class, i)),
                None => stripes.has(i),
            };
            if !stays {
                act(self.regions.region(At { class: class as usize, depth: 0, i }), i);
            }
        }
    }

    /// Windows on the same elements of every class.
    pub fn update(&mut self, elements: Range<usize>) -> Update<'_> {
        let [param, grad, rounded, master, m, v, _] = &mut self.regions.0;
        let (Some(param), Some(grad), Some(m), Some(v)) = (param, grad, m, v) else {
            panic!("weights, gradients and moments were added")
        };
        let depth = self.depth;
        Update {
            param: param.open(depth, &elements),
            grad: rounded.as_ref().unwrap_or(grad).view(depth, &elements),
            master: master.as_mut().map(|master| master.open(depth, &elements)),
            m: m.open(depth, &elements),
            v: v.open(depth, &elements),
        }
    }

    /// Runs of `elements` that lie in one chunk each; of arrays that ranks share, the runs that are
    /// ours.
    pub fn pieces(&self, elements: Range<usize>) -> impl Iterator<Item = Range<usize>> + use<> {
        let owned = self.stripes().map(|stripes| stripes.owned(elements.clone()));
        let all = self.chunks(if owned.is_some() { 0..0 } else { elements });
        owned.into_iter().flatten().chain(all)
    }

    fn chunks(&self, elements: Range<usize>) -> impl Iterator<Item = Range<usize>> + use<> {
        let chunk = self.pager.as_ref().map_or(usize::MAX, Pager::chunk_elements);
        let mut start = elements.start;
        std::iter::from_fn(move || {
            let end = (start / chunk + 1).saturating_mul(chunk).min(elements.end);
            let piece = start..end;
            start = end;
            (!piece.is_empty()).then_some(piece)
        })
    }

    /// All elements of the chunks that hold some of `elements`.
    pub fn whole_chunks(&self, elements: &Range<usize>) -> Range<usize> {
        let chunk = self.pager.as_ref().map_or(self.len, Pager::chunk_elements);
        let chunks = self.chunks_of(elements);
        (chunks.start * chunk).min(self.len)..(chunks.end * chunk).min(self.len)
    }

    /// Those of `pieces` of everything, by their count, that hold some of `elements`, or lie in one stripe with
    /// some.
    pub fn pieces_of(&self, elements: &Range<usize>) -> Range<usize> {
        self.stripes().map_or_else(|| self.chunks_of(elements), |stripes| stripes.of(elements))
    }

    /// The chunks of everything that hold some of `elements`, by their count.
    fn chunks_of(&self, elements: &Range<usize>) -> Range<usize> {
        let chunk = self.pager.as_ref().map_or(usize::MAX, Pager::chunk_elements);
        if elements.is_empty() { 0..0 } else { elements.start / chunk..(elements.end - 1) / chunk + 1 }
    }

    /// An op is about to run: make what it needs resident.
    pub fn visit(&mut self, about: About, needs: &[Need]) -> Result<(), PagerError> {
        let Some(pager) = &mut self.pager else { return Ok(()) };
        list_chunks(pager, self.len, needs, &mut self.scratch);
        self.depth = pager.visit(&mut self.regions, about, &self.scratch)?;
        Ok(())
    }

    /// A visit of the usual step falls out in this one: nothing is brought, and what comes after it
    /// is as well known as ever.
    pub fn pass_over(&mut self, about: About, needs: &[Need]) -> Result<(), PagerError> {
        let Some(pager) = &mut self.pager else { return Ok(()) };
        list_chunks(pager, self.len, needs, &mut self.scratch);
        pager.pass_over(&mut self.regions, about, &self.scratch)
    }

    /// Elements `elements` of a class are worth nothing any more. Chunks that lie in them whole are
    /// forgotten; the others keep what they have.
    pub fn discard(&mut self, class: Class, elements: Range<usize>) -> Result<(), PagerError> {
        let len = self.len_of(class);
        let Some(pager) = &mut self.pager else { return Ok(()) };
        let chunk = pager.chunk_elements();
        let last = if elements.end == len { len.div_ceil(chunk) } else { elements.end / chunk };
        for i in elements.start.div_ceil(chunk)..last {
            let id = pager.id(class, i);
            pager.discard(&mut self.regions, id)?;
        }
        Ok(())
    }

    /// Other budgets from now on, those of the whole process; the tiers stay those there are. Chunks
    /// leave where there is less, and the step is planned anew. Not within a step.
    ///
    /// Errors: `PagerError::Budget` where the recorded step cannot run; everything stays as it was.
    pub fn set_budget(&mut self, budgets: Budgets) -> Result<(), PagerError> {
        match &mut self.pager {
            Some(pager) => pager.set_budget(&mut self.regions, budgets),
            None => Err(PagerError::Tiers { asked: budgets.tiers(), tiers: Vec::new() }),
        }
    }

    /// The budgets there are; none where everything stays in memory.
    pub fn budgets(&self) -> Option<Budgets> {
        self.pager.as_ref().map(Pager::budgets)
    }

    /// Whether chunks come and go.
    pub fn is_paged(&self) -> bool {
        self.pager.is_some()
    }

    /// A training step begins.
    pub fn begin_step(&mut self) -> Result<(), PagerError> {
        self.pager.as_mut().map_or(Ok(()), |pager| pager.begin_step(&mut self.regions))
    }

    /// A training step has ended.
    pub fn end_step(&mut self) -> Result<(), PagerError> {
        self.pager.as_mut().map_or(Ok(()), |pager| pager.end_step(&mut self.regions))
    }

    /// What was moved since the last report; none without a pager.
    pub fn report(&mut self) -> Option<TierReport> {
        self.pager.as_mut().map(Pager::report)
    }

    /// The training step as it was last recorded; none without a pager.
    pub fn trace(&self) -> Option<Trace> {
        self.pager.as_ref().map(Pager::trace)
    }
}

/// Elements of a class, where arrays of the state have `len`.
fn elements_of(pager: &Pager, class: Class, len: usize) -> usize {
    let filed = pager.filed().filter(|_| class == Class::Activation);
    filed.map_or(len, |filed| filed.elements)
}

/// The chunks of `needs`, each once. What is written in part only keeps what it has.
fn list_chunks(pager: &Pager, len: usize, needs: &[Need], list: &mut Vec<(ChunkId, Access)>) {
    list.clear();
    for need in needs.iter().filter(|need| !need.elements.is_empty()) {
        let chunk = pager.chunk_elements();
        for i in need.elements.start / chunk..(need.elements.end - 1) / chunk + 1 {
            let id = pager.id(need.class, i);
            // A buffer, which whoever gathered it keeps here.
            if !pager.has(id) {
                continue;
            }
            let whole = i * chunk..((i + 1) * chunk).min(elements_of(pager, need.class, len));
            let covered = need.elements.start <= whole.start && whole.end <= need.elements.end;
            let access = if covered { need.access } else { need.access.in_part() };
            match list.iter_mut().find(|(known, _)| *known == id) {
                Some((_, known)) => *known = known.then(access),
                None => list.push((id, access)),
            }
        }
    }
}
