//! Between the layout of the residual stream and that of a part of a layer with another scheme. Each
//! step moves one axis from one side of the matrix to the other: an all-to-all among its ranks, bits
//! unchanged. The way back takes the same steps in reverse.

use crate::matmul::finish;
use crate::moves::{column_pieces, copy_into, gather};
use crate::scheme::turned;
use crate::{Axis, Flow, FlowError, Layout, Mesh, MeshShape, Scheme, Side};
use kernels::gemm::Mat;
use tensor::{Fault, Tape, Tensor, Var};

const MOMENT: &str = "redistribute";

/// Most steps a pair of schemes may need: more would cost what the other scheme saves.
const MOST_STEPS: usize = 2;

/// One step between two layouts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Step {
    /// The axis stops cutting this side and cuts the other: an all-to-all.
    Exchange { axis: Axis, from: Side },
    /// The axis stops cutting: every rank gets all.
    Gather { axis: Axis, side: Side },
    /// The axis begins to cut: every rank keeps its piece.
    Narrow { axis: Axis, side: Side },
}

impl Side {
    fn other(self) -> Side {
        match self {
            Side::Rows => Side::Cols,
            Side::Cols => Side::Rows,
        }
    }
}

impl Step {
    /// The step that undoes this one.
    fn undone(self) -> Step {
        match self {
            Step::Exchange { axis, from } => Step::Exchange { axis, from: from.other() },
            Step::Gather { axis, side } => Step::Narrow { axis, side },
            Step::Narrow { axis, side } => Step::Gather { axis, side },
        }
    }

    /// The axis that moves.
    pub(crate) fn axis(self) -> Axis {
        match self {
            Step::Exchange { axis, .. } | Step::Gather { axis, .. } | Step::Narrow { axis, .. } => axis,
        }
    }

    /// What `layout` becomes; the axis of a gather is the innermost of its side.
    fn after(self, mut layout: Layout) -> Layout {
        let mut take = |side| match side {
            Side::Rows => layout.rows = layout.rows.outer(),
            Side::Cols => layout.cols = layout.cols.outer(),
        };
        match self {
            Step::Exchange { from, .. } => take(from),
            Step::Gather { side, .. } => take(side),
            Step::Narrow { .. } => {}
        }
        match self {
            Step::Exchange { axis, from: Side::Cols } | Step::Narrow { axis, side: Side::Rows } => {
                layout.rows = layout.rows.inside(axis);
            }
            Step::Exchange { axis, from: Side::Rows } | Step::Narrow { axis, side: Side::Cols } => {
                layout.cols = layout.cols.inside(axis);
            }
            Step::Gather { .. } => {}
        }
        layout
    }

    fn run(self, mesh: &Mesh, x: &Tensor) -> Result<Tensor, Fault> {
        match self {
            Step::Exchange { axis, from } => exchange(mesh, axis, from, x),
            Step::Gather { axis, side } => gather(mesh, axis, side, x),
            Step::Narrow { axis, side } => narrow(mesh, axis, side, x),
        }
    }
}

/// The fewest steps from one layout to another, at most `MOST_STEPS`.
fn steps(from: Layout, to: Layout) -> Option<Vec<Step>> {
    (0..=MOST_STEPS).find_map(|most| within(most, from, to))
}

fn within(most: usize, from: Layout, to: Layout) -> Option<Vec<Step>> {
    if from == to {
        return Some(Vec::new());
    }
    if most == 0 {
        return None;
    }
    candidates(from, to).into_iter().find_map(|step| {
        let rest = within(most - 1, step.after(from), to)?;
        Some(std::iter::once(step).chain(rest).collect())
    })
}

fn candidates(from: Layout, to: Layout) -> Vec<Step> {
    let cuts = |layout: Layout, axis| layout.rows.has(axis) || layout.cols.has(axis);
    let mut all = Vec::new();
    for (side, cut) in [(Side::Rows, from.rows), (Side::Cols, from.cols)] {
        match cut.innermost() {
            Some(axis) if cuts(to, axis) => all.push(Step::Exchange { axis, from: side }),
            Some(axis) => all.push(Step::Gather { axis, side }),
            None => {}
        }
    }
    for (side, cut) in [(Side::Rows, to.rows), (Side::Cols, to.cols)] {
        all.extend(cut.axes().filter(|axis| !cuts(from, *axis)).map(|axis| Step::Narrow { axis, side }));
    }
    all
}

/// The steps from the stream of one scheme into a part of another. Refuses layouts that are too far
/// apart.
pub(crate) fn steps_into(mesh: &MeshShape, stream: Scheme, part: Scheme) -> Result<Vec<Step>, FlowError> {
    let (from, _) = stream.layouts(mesh, false);
    let (to, _) = part.layouts(mesh, turned(mesh, stream, part));
    steps(from, to).ok_or(FlowError::Apart { stream: stream.name(), part: part.name(), from, to })
}

/// Refuses a width whose pieces do not lie inside each other: an exchange moves whole pieces.
pub(crate) fn expect_width(
    mesh: &MeshShape,
    stream: Scheme,
    part: Scheme,
    width: usize,
) -> Result<(), FlowError> {
    let (mut layout, _) = stream.layouts(mesh, false);
    let pieces = |layout: &Layout| layout.cols.axes().map(|axis| mesh.size(axis)).product::<usize>();
    for step in steps_into(mesh, stream, part)? {
        let next = step.after(layout);
        let most = pieces(&layout).max(pieces(&next));
        if pieces(&layout) != pieces(&next) && !width.is_multiple_of(most) {
            let (stream, part) = (stream.name(), part.name());
            return Err(FlowError::Width { stream, part, width, pieces: most });
        }
        layout = next;
    }
    Ok(())
}

/// The way from the residual stream into a part of a layer and back.
#[derive(Clone, Debug)]
pub struct Redistribution {
    mesh: Mesh,
    there: Vec<Step>,
    back: Vec<Step>,
}

impl Redistribution {
    /// Between the stream of `flow` and its part `part`; none where both lie alike. Refuses a `width` of
    /// the stream that the steps cannot cut.
    pub fn new(flow: &Flow, part: &Flow, width: usize) -> Result<Option<Redistribution>, FlowError> {
        let shape = flow.mesh.shape();
        let there = steps_into(shape, flow.scheme, part.scheme)?;
        expect_width(shape, flow.scheme, part.scheme, width)?;
        let back: Vec<Step> = there.iter().rev().map(|step| step.undone()).collect();
        Ok((!there.is_empty()).then(|| Redistribution { mesh: flow.mesh.clone(), there, back }))
    }

    /// h as the stream lies -> as the part lies.
    pub fn enter(&self, tape: &mut Tape<'_>, h: &Var) -> Result<Var, Fault> {
        tape.moment(MOMENT, &[])?;
        let value = walk(&self.mesh, &self.there, &h.value)?;
        let way = self.clone();
        Ok(tape.outside(&[h], value, move |tape, dh| {
            tape.moment(MOMENT, &[])?;
            Ok(vec![Some(walk(&way.mesh, &way.back, &dh)?)])
        }))
    }

    /// y as the part lies (+ residual as the stream lies) -> as the stream lies.
    pub fn leave(&self, tape: &mut Tape<'_>, y: &Var, residual: Option<&Var>) -> Result<Var, Fault> {
        tape.moment(MOMENT, &[])?;
        let value = walk(&self.mesh, &self.back, &y.value)?;
        let dtype = y.value.dtype();
        let value = finish(tape, value, None, residual.map(|residual| &residual.value), dtype)?;
        let (way, given) = (self.clone(), residual.is_some());
        let inputs: Vec<&Var> = std::iter::once(y).chain(residual).collect();
        Ok(tape.outside(&inputs, value, move |tape, dx| {
            tape.moment(MOMENT, &[])?;
            let dy = Some(walk(&way.mesh, &way.there, &dx)?);
            Ok(if given { vec![dy, Some(dx)] } else { vec![dy] })
        }))
    }
}

fn walk(mesh: &Mesh, steps: &[Step], x: &Tensor) -> Result<Tensor, Fault> {
    steps.iter().try_fold(x.clone(), |x, step| step.run(mesh, &x))
}

/// x [m, k] cut over `axis` along `from` -> cut over it along the other side: [n m, k / n] from rows,
/// [m / n, n k] from columns.
fn exchange(mesh: &Mesh, axis: Axis, from: Side, x: &Tensor) -> Result<Tensor, Fault> {
    let ranks = mesh.size(axis);
    let (m, k) = (x.rows(), x.cols());
    let each = m * k / ranks;
    let runs = vec![each; ranks];
    let group = mesh.group(axis);
    match from {
        Side::Rows => {
            let mine = column_pieces(x, ranks)?;
            let mut out = Tensor::new(x.device(), x.dtype(), mine.shape())?;
            group.all_to_all((mine.view(), &runs), (out.view_mut(), &runs))?;
            Ok(out)
        }
        Side::Cols => {
            assert!(m.is_multiple_of(ranks), "{m} rows over {ranks} ranks");
            let rows = m / ranks;
            let mut pieces = Tensor::new(x.device(), x.dtype(), &[m, k])?;
            group.all_to_all((x.view(), &runs), (pieces.view_mut(), &runs))?;
            let mut out = Tensor::new(x.device(), x.dtype(), &[rows, ranks * k])?;
            for rank in 0..ranks {
                let piece = Mat::new(pieces.view().narrow(rank * each, each), k);
                copy_into(&mut out, rank * k, (rows, k), piece);
            }
            Ok(out)
        }
    }
}

/// This rank's piece of x along `side`.
fn narrow(mesh: &Mesh, axis: Axis, side: Side, x: &Tensor) -> Result<Tensor, Fault> {
    let (ranks, at) = (mesh.size(axis), mesh.coord(axis));
    let (m, k) = (x.rows(), x.cols());
    match side {
        Side::Rows => Ok(x.narrow_rows(at * (m / ranks), m / ranks)),
        Side::Cols => {
            let width = k / ranks;
            let mut out = Tensor::new(x.device(), x.dtype(), &[m, width])?;
            let piece = Mat::new(x.view().narrow(at * width, x.len() - at * width), k);
            copy_into(&mut out, 0, (m, width), piece);
            Ok(out)
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn said(mesh: &str, stream: Scheme, part: Scheme) -> String {
        let mesh = mesh.parse().unwrap();
        steps_into(&mesh, stream, part).map_or_else(
            |error| error.to_string(),
            |steps| {
                let word = |step: &Step| match step {
                    Step::Exchange { axis, .. } => format!("exchange {}", axis.name()),
                    Step::Gather { axis, .. } => format!("gather {}", axis.name()),
                    Step::Narrow { axis, .. } => format!("narrow {}", axis.name()),
                };
                steps.iter().map(word).collect::<Vec<_>>().join(", ")
            },
        )
    }

    #[test]
    fn pairs_of_schemes_take_as_few_steps_as_there_are() {
        use Scheme::*;
        for (mesh, stream, part, want) in [
            ("x=2,y=3", Summa, WeightStationary, "exchange x"),
            ("x=2,y=3", WeightStationary, Summa, "exchange y"),
            ("x=2,y=3", Summa, ThreeD, "exchange y"),
            ("x=2,y=3", TwoPointFiveD, Summa, ""),
            ("x=2,y=3", WeightStationary, ThreeD, "exchange y, exchange x"),
            ("x=2,y=3", ThreeD, WeightStationary, "exchange y, exchange x"),
            ("x=4", OneDSequence, OneD, "gather x"),
            ("x=4", OneD, OneDSequence, "narrow x"),
            ("x=4", OneD, WeightStationary, "narrow x"),
            ("x=4", OneDSequence, WeightStationary, "exchange x"),
            ("x=4", OneDSequence, Summa, ""),
            ("solo", OneD, ThreeD, ""),
            ("x=2,y=2,z=2", TwoPointFiveD, ThreeD, "lies as [rows over z,x; columns over y]"),
            (
                "x=2,y=2,z=2",
                ThreeD,
                TwoPointFiveD,
                "that of scheme `2.5d` as [rows over z,x; columns over y]",
            ),
        ] {
            let said = said(mesh, stream, part);
            let found = if mesh == "x=2,y=2,z=2" { said.contains(want) } else { said == want };
            assert!(found, "{stream} to {part} on {mesh}: {said}");
        }
    }

    #[test]
    fn every_way_leads_back() {
        for mesh in ["x=3", "y=3", "z=2", "x=2,y=3", "x=3,y=2"] {
            let mesh: MeshShape = mesh.parse().unwrap();
            for stream in Scheme::ALL.into_iter().filter(|scheme| scheme.check(&mesh).is_ok()) {
                for part in Scheme::ALL.into_iter().filter(|scheme| scheme.check(&mesh).is_ok()) {
                    let (from, _) = stream.layouts(&mesh, false);
                    let Ok(steps) = steps_into(&mesh, stream, part) else {
                        panic!("{stream} and {part} on {mesh} are apart");
                    };
                    let there = steps.iter().fold(from, |layout, step| step.after(layout));
                    let back = steps.iter().rev().fold(there, |layout, step| step.undone().after(layout));
                    assert_eq!(back, from, "{stream} and {part} on {mesh}");
                }
            }
        }
    }

    #[test]
    fn a_width_whose_pieces_do_not_nest_is_refused() {
        let mesh: MeshShape = "x=2,y=3".parse().unwrap();
        let width = |width| expect_width(&mesh, Scheme::Summa, Scheme::WeightStationary, width);
        assert_eq!(width(48), Ok(()));
        let refused = width(40).unwrap_err().to_string();
        assert!(refused.contains("width 40") && refused.contains("6 pieces"), "{refused}");
    }
}
