//! Values kept for the way back that need not stay in memory: over tiers they are *filed*, copied into an
//! array of the pager chunk by chunk, and come back when the tape is walked back. What was filed last comes
//! back first. Where the chunks are in between, the plan of the step decides. No bit changes.

use crate::ops::Op;
use crate::tape::Node;
use crate::{Fault, Tape, Tensor, Var};
use memory::pager::About;
use memory::trace::Access;
use memory::{Class, Need};
use std::ops::Range;

/// A value kept for the way back.
pub(crate) enum Saved {
    /// In memory.
    Here(Tensor),
    /// In the tiers.
    Filed(Filed),
}

/// Values that lie in the tiers one after the other, from a chunk's first element on.
pub(crate) struct Filed {
    start: usize,
    shapes: Vec<Vec<usize>>,
}

/// Values of ops that are filed together until the way back comes to where they were.
pub(crate) struct PutAway {
    filed: Filed,
    /// By value: who holds it, as node and as which of the node's values.
    holders: Vec<Vec<(usize, usize)>>,
}

impl Tape<'_> {
    /// Run `body` on `input` and keep its values for the way back; over tiers they are filed when it is
    /// done. Same bits as running it plainly.
    pub fn keep(
        &mut self,
        input: Var,
        body: impl FnOnce(&mut Tape<'_>, Var) -> Result<Var, Fault>,
    ) -> Result<Var, Fault> {
        let first = self.nodes.len();
        let output = body(self, input)?;
        if self.is_recording() && self.params.arrays().filed().is_some() {
            self.put_away(first)?;
        }
        Ok(output)
    }

    /// Files what nobody holds but the nodes from `first` on.
    fn put_away(&mut self, first: usize) -> Result<(), Fault> {
        let mut held: Vec<(Tensor, Vec<(usize, usize)>)> = Vec::new();
        for (at, node) in self.nodes.iter_mut().enumerate().skip(first) {
            for (nth, value) in node.op.kept().into_iter().enumerate() {
                match held.iter_mut().find(|(other, _)| other.is_same(value)) {
                    Some((_, holders)) => holders.push((at, nth)),
                    None => held.push((value.clone(), vec![(at, nth)])),
                }
            }
        }
        let dtype = self.params.dtype();
        // One handle more is the list's.
        held.retain(|(value, holders)| value.dtype() == dtype && value.handles() == holders.len() + 1);
        let (values, holders): (Vec<Tensor>, Vec<_>) = held.into_iter().unzip();
        let Some(filed) = self.store(&values)? else { return Ok(()) };
        drop(values);
        let nothing = Tensor::new(self.params.device(), dtype, &[0])?;
        put_back(&mut self.nodes, &holders, |_| nothing.clone());
        let put_away = PutAway { filed, holders };
        let output = self.input(nothing).id;
        let layer = self.layer();
        self.nodes.push(Node { op: Op::PutAway(put_away), inputs: Vec::new(), output, layer });
        Ok(())
    }

    /// The way back has come to where values were put away, whose nodes are `nodes`.
    pub(crate) fn take_up(&mut self, put_away: PutAway, nodes: &mut [Node]) -> Result<(), Fault> {
        let values = self.restore(put_away.filed)?;
        put_back(nodes, &put_away.holders, |i| values[i].clone());
        Ok(())
    }

    /// Keep a value: filed, where there is room.
    pub(crate) fn file(&mut self, value: &Tensor) -> Result<Saved, Fault> {
        let filed = self.store(std::slice::from_ref(value))?;
        Ok(filed.map_or_else(|| Saved::Here(value.clone()), Saved::Filed))
    }

    /// The value again.
    pub(crate) fn take_back(&mut self, saved: Saved) -> Result<Tensor, Fault> {
        match saved {
            Saved::Here(value) => Ok(value),
            Saved::Filed(filed) => Ok(self.restore(filed)?.remove(0)),
        }
    }

    /// Copies values into the tiers; none, and nothing is done, where there is no room for them.
    fn store(&mut self, values: &[Tensor]) -> Result<Option<Filed>, Fault> {
        let Some((room, chunk)) = self.params.arrays().filed() else { return Ok(None) };
        let (start, len) = (self.filed_elements, values.iter().map(Tensor::len).sum::<usize>());
        let end = start + len.next_multiple_of(chunk);
        if len == 0 || end > room.elements || values.iter().any(|value| value.dtype() != room.dtype) {
            return Ok(None);
        }
        self.filed_elements = end;
        for piece in pieces((start, chunk), values) {
            self.bring_filed(piece.chunk.clone(), "file", Access::Write)?;
            for (i, here, there) in piece.parts {
                let from = values[i].view().narrow(here.start, here.len());
                let to = self.params.arrays_mut().view_mut(Class::Activation, there);
                kernels::elementwise::copy(to, from);
            }
        }
        Ok(Some(Filed { start, shapes: values.iter().map(|value| value.shape().to_vec()).collect() }))
    }

    /// The values again; what lay in the tiers is worth nothing any more.
    fn restore(&mut self, filed: Filed) -> Result<Vec<Tensor>, Fault> {
        let (room, chunk) =
            self.params.arrays().filed().expect("values were filed where there is room for them");
        let device = self.params.device();
        let made = filed.shapes.iter().map(|shape| Tensor::new(device, room.dtype, shape));
        let mut values = made.collect::<Result<Vec<Tensor>, _>>()?;
        for piece in pieces((filed.start, chunk), &values) {
            self.bring_filed(piece.chunk.clone(), "take back", Access::Read)?;
            for (i, here, there) in piece.parts {
                let from = self.params.arrays().view(Class::Activation, there);
                kernels::elementwise::copy(values[i].view_mut().narrow(here.start, here.len()), from);
            }
            self.params.arrays_mut().discard(Class::Activation, piece.chunk).map_err(Fault::outside)?;
        }
        self.filed_elements = filed.start;
        Ok(values)
    }

    fn bring_filed(&mut self, elements: Range<usize>, op: &'static str, access: Access) -> Result<(), Fault> {
        let about = About { phase: self.phase().into(), op, layer: self.layer() as u32 };
        self.params.bring(about, &[Need { class: Class::Activation, elements, access }])
    }
}

/// Gives every holder of the `i`-th value what `value(i)` says.
fn put_back(nodes: &mut [Node], holders: &[Vec<(usize, usize)>], value: impl Fn(usize) -> Tensor) {
    for (i, holders) in holders.iter().enumerate() {
        for (at, nth) in holders {
            if let Some(place) = nodes[*at].op.kept().into_iter().nth(*nth) {
                *place = value(i);
            }
        }
    }
}

/// A chunk of the tiers and what lies in it.
struct Piece {
    /// All its elements.
    chunk: Range<usize>,
    /// Which value, its elements in the value, and in the array of the tiers.
    parts: Vec<(usize, Range<usize>, Range<usize>)>,
}

/// The chunks of `values` one after the other, from `start` on.
fn pieces((start, chunk): (usize, usize), values: &[Tensor]) -> Vec<Piece> {
    let mut pieces: Vec<Piece> = Vec::new();
    let mut at = start;
    for (i, value) in values.iter().enumerate() {
        let mut done = 0;
        while done < value.len() {
            let first = start + (at - start) / chunk * chunk;
            let len = (first + chunk - at).min(value.len() - done);
            if at == first {
                pieces.push(Piece { chunk: first..first + chunk, parts: Vec::new() });
            }
            let piece = pieces.last_mut().expect("the first value begins a chunk");
            piece.parts.push((i, done..done + len, at..at + len));
            (at, done) = (at + len, done + len);
        }
    }
    pieces
}
