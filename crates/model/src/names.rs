//! Where each parameter lies in a Hugging Face folder. Ours are fused (q|k|v, gate|up) so that one
//! GEMM serves them; files keep the separate tensors every other tool expects.

use crate::Stage;
use crate::layers::LinearSpec;
use dist::cost::Pair;
use dist::{Axis, Cut, Dim, Experts, Flow, Held, Table, Weighted, crossing};
use tensor::{Init, ParamList, ParamRef, ParamSpec, Piece};

/// One tensor of a model folder and the run of a parameter it fills.
#[derive(Clone, Debug, PartialEq)]
pub struct StoredWeight {
    /// Name in the folder.
    pub name: String,
    /// Shape in the folder.
    pub shape: Vec<usize>,
    /// The parameter it is part of.
    pub param: ParamRef,
    /// First element of the parameter it fills.
    pub first: usize,
    /// Whether the folder holds the transpose (GPT-2's `Conv1D` is [in, out]). When the folder's
    /// tensor fuses several of ours side by side this still covers it whole.
    pub transposed: bool,
}

impl StoredWeight {
    /// Elements.
    pub fn len(&self) -> usize {
        self.shape.iter().product()
    }

    /// Whether it has no elements.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }
}

impl StoredWeight {
    /// Elements as a folder holds them, in the order of our parameter.
    pub fn to_ours(&self, values: Vec<f32>) -> Vec<f32> {
        if self.transposed { transpose(&values, self.shape[0], self.shape[1]) } else { values }
    }

    /// The run of our parameter that this tensor is, in the order of a folder.
    pub fn to_stored(&self, param: &[f32]) -> Vec<f32> {
        let ours = &param[self.first..self.first + self.len()];
        if self.transposed { transpose(ours, self.shape[1], self.shape[0]) } else { ours.to_vec() }
    }
}

/// [rows, cols] to [cols, rows].
fn transpose(values: &[f32], rows: usize, cols: usize) -> Vec<f32> {
    (0..rows * cols).map(|i| values[i % rows * cols + i / rows]).collect()
}

/// Fill every parameter: `read(name, shape)` gives a tensor of a folder, `put(param, first element,
/// values)` takes it. A parameter that holds a piece gets its elements of the whole.
pub fn fill<E>(
    params: &ParamList,
    stored: &[StoredWeight],
    mut read: impl FnMut(&str, &[usize]) -> Result<Vec<f32>, E>,
    mut put: impl FnMut(ParamRef, usize, &[f32]) -> Result<(), E>,
) -> Result<(), E> {
    for tensors in stored.chunk_by(|a, b| a.param == b.param) {
        let param = tensors[0].param;
        let mut whole = params.piece(param).map(|piece| vec![0f32; piece.whole_len()]);
        for weight in tensors {
            let values = weight.to_ours(read(&weight.name, &weight.shape)?);
            match &mut whole {
                None => put(param, weight.first, &values)?,
                Some(whole) => whole[weight.first..weight.first + values.len()].copy_from_slice(&values),
            }
        }
        if let (Some(whole), Some(piece)) = (whole, params.piece(param)) {
            let shape = &params.specs()[param.index()].shape;
            let mut here = vec![0f32; shape.iter().product()];
            piece.take(&whole, &mut here, shape.get(1).copied().unwrap_or(1));
            put(param, 0, &here)?;
        }
    }
    Ok(())
}

/// How a matrix lies in files.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Place {
    /// [out, in], as ours.
    Rows,
    /// [in, out].
    Transposed,
}

/// How a parameter lies among the ranks of a mesh. Ranks that differ in no axis of `cut` hold
/// copies.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Spread {
    /// Axes along which ranks hold different pieces.
    pub cut: Vec<Axis>,
    /// Axes along which the gradients of ranks are summands of the whole one, after the way back.
    pub sums: Vec<Axis>,
    /// Whether the first and the last stage of a pipeline both have it, as a tied embedding: their
    /// gradients are summands too.
    pub both_ends: bool,
}

/// Collects parameters and their names in files while a model is built.
pub struct Builder {
    pub(crate) flow: Flow,
    pub(crate) params: ParamList,
    pub(crate) stored: Vec<StoredWeight>,
    pub(crate) spreads: Vec<Spread>,
    /// The layers that are built.
    pub(crate) stage: Stage,
}

impl Builder {
    pub(crate) fn new(flow: &Flow, stage: Stage) -> Builder {
        let (params, stored, spreads) = Default::default();
        Builder { flow: flow.clone(), params, stored, spreads, stage }
    }

    /// The parameter added last is on the first and on the last stage.
    pub(crate) fn on_both_ends(&mut self) {
        if let Some(spread) = self.spreads.last_mut().filter(|_| self.flow.mesh.size(Axis::Pp) > 1) {
            spread.cut.retain(|axis| *axis != Axis::Pp);
            spread.both_ends = true;
        }
    }

    /// Add a parameter of which ranks hold `rows` and `cols`; a vector has no columns.
    fn add(&mut self, spec: ParamSpec, rows: &Held, cols: Option<&Held>, sums: Vec<Axis>) -> ParamRef {
        let mesh = self.flow.mesh.clone();
        let one = Held::plainly(Dim::plain(1), Cut::WHOLE);
        let piece = crossing(&mesh, rows, cols.unwrap_or(&one));
        let shape = std::iter::once(rows).chain(cols).map(|held| held.stored_len(&mesh)).collect();
        let cuts = [Some(rows.cut), Some(rows.stored), cols.map(|cols| cols.cut)];
        let cut = cuts.into_iter().flatten().flat_map(|cut| cut.axes()).collect();
        self.add_piece(spec, (piece, shape), Spread { cut, sums, both_ends: false })
    }

    /// Add a parameter of which this rank holds `piece` as a matrix of `shape`.
    fn add_piece(
        &mut self,
        mut spec: ParamSpec,
        (piece, shape): (Piece, Vec<usize>),
        mut spread: Spread,
    ) -> ParamRef {
        spec.shape = shape;
        if self.flow.mesh.size(Axis::Pp) > 1 {
            // Stages have different parameters.
            spread.cut.insert(0, Axis::Pp);
        }
        self.spreads.push(spread);
        match is_whole(&piece, &spec) {
            true => self.params.add(spec),
            false => self.params.add_piece(spec, piece),
        }
    }

    /// A vector that lies as the columns of the residual stream do, or whole for the heads.
    pub(crate) fn vector(&mut self, name: String, stored: String, of: Vector) -> ParamRef {
        let (outer, inner) = (self.flow.outer, self.flow.part(Pair::Attention).inner);
        let (width, init, held, sums) = match of {
            Vector::Outer(width, init) => {
                let held = Held::plainly(Dim::plain(width), outer.cols);
                (width, init, held, outer.rows.axes().collect())
            }
            Vector::Head(width, init) => {
                let held = Held::plainly(Dim::plain(width), Cut::WHOLE);
                (width, init, held, inner.rows.axes().chain(inner.cols.axes()).collect())
            }
        };
        let spec = ParamSpec { name, shape: vec![width], init, decay: false };
        let param = self.add(spec, &held, None, sums);
        self.whole(stored, vec![width], param);
        param
    }

    /// A table of `rows` rows as wide as the residual stream.
    pub(crate) fn table(&mut self, spec: ParamSpec, stored: String) -> (ParamRef, Table) {
        let [rows, width] = [spec.shape[0], spec.shape[1]];
        let table = Table::new(&self.flow, rows, width);
        let param = self.add(spec, &table.rows, Some(&table.cols), Vec::new());
        self.whole(stored, vec![rows, width], param);
        (param, table)
    }

    fn whole(&mut self, name: String, shape: Vec<usize>, param: ParamRef) {
        self.stored.push(StoredWeight { name, shape, param, first: 0, transposed: false });
    }

    pub(crate) fn matrix(&mut self, spec: &LinearSpec, weighted: &Weighted) -> ParamRef {
        let sums = weighted.product.weight_sums().collect();
        self.weight(spec, &weighted.rows, &weighted.cols, sums)
    }

    /// A matrix that lies along the columns of the residual stream and is whole along its rows.
    pub(crate) fn across(&mut self, spec: &LinearSpec) -> ParamRef {
        let outer = self.flow.outer;
        let rows = Held::plainly(spec.outputs.clone(), Cut::WHOLE);
        let cols = Held::plainly(spec.inputs.clone(), outer.cols);
        self.weight(spec, &rows, &cols, outer.rows.axes().collect())
    }

    /// The matrices of all experts of a layer under each other; `held` is what this rank has of them.
    pub(crate) fn experts(
        &mut self,
        spec: &LinearSpec,
        experts: &Experts,
        held: (Piece, Vec<usize>),
    ) -> ParamRef {
        let (cut, sums) = (experts.cut().collect(), experts.sums().collect());
        let spread = Spread { cut, sums, both_ends: false };
        let param = self.add_piece(whole(spec), held, spread);
        self.parts(spec, "weight", param, spec.inputs.len());
        param
    }

    fn weight(&mut self, spec: &LinearSpec, rows: &Held, cols: &Held, sums: Vec<Axis>) -> ParamRef {
        let param = self.add(whole(spec), rows, Some(cols), sums);
        self.parts(spec, "weight", param, spec.inputs.len());
        param
    }

    pub(crate) fn bias(&mut self, spec: &LinearSpec, weighted: &Weighted) -> ParamRef {
        let (name, shape) = (format!("{}.bias", spec.name), vec![spec.outputs.len()]);
        let whole = ParamSpec { name, shape, init: Init::Zeros, decay: false };
        let sums = weighted.product.y.rows.axes().collect();
        let param = self.add(whole, &weighted.bias, None, sums);
        self.parts(spec, "bias", param, 0);
        param
    }

    /// `inputs` is 0 for a bias.
    fn parts(&mut self, spec: &LinearSpec, kind: &str, param: ParamRef, inputs: usize) {
        let mut row = 0;
        for (name, rows) in &spec.parts {
            let transposed = inputs > 0 && spec.place == Place::Transposed;
            let shape = match (inputs, transposed) {
                (0, _) => vec![*rows],
                (_, true) => vec![inputs, *rows],
                (_, false) => vec![*rows, inputs],
            };
            let name = format!("{name}.{kind}");
            self.stored.push(StoredWeight { name, shape, param, first: row * inputs.max(1), transposed });
            row += rows;
        }
    }
}

/// The weight of a linear layer as one rank would hold it.
fn whole(spec: &LinearSpec) -> ParamSpec {
    let (name, shape) = (format!("{}.weight", spec.name), vec![spec.outputs.len(), spec.inputs.len()]);
    ParamSpec { name, shape, init: Init::Normal(spec.std), decay: true }
}

/// Whether a piece is the whole, in its order and without padding.
fn is_whole(piece: &Piece, spec: &ParamSpec) -> bool {
    let all = |runs: &[tensor::Run], len: usize| matches!(runs, [run] if run.at == 0 && run.from == 0 && run.len == len);
    let [rows, cols] = piece.whole;
    all(&piece.rows, rows) && all(&piece.cols, cols) && spec.len() == piece.whole_len()
}

/// What a vector parameter belongs to: (elements, initial values).
pub(crate) enum Vector {
    /// The columns of the residual stream.
    Outer(usize, Init),
    /// Every head alike.
    Head(usize, Init),
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn stored_and_ours_are_inverse() {
        let mut params = ParamList::default();
        let init = Init::Zeros;
        let param = params.add(ParamSpec { name: "w".into(), shape: vec![4, 3], init, decay: true });
        // Rows 1 and 2 of a [4, 3] parameter, kept as [3, 2] in files.
        let weight = StoredWeight { name: "w".into(), shape: vec![3, 2], param, first: 3, transposed: true };
        let ours: Vec<f32> = (0..12).map(|i| i as f32).collect();
        let stored = weight.to_stored(&ours);
        assert_eq!(stored, [3.0, 6.0, 4.0, 7.0, 5.0, 8.0]);
        assert_eq!(weight.to_ours(stored), ours[3..9]);
    }
}
