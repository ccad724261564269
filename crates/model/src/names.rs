//! Where each parameter lies in a Hugging Face folder. Ours are fused (q|k|v, gate|up) so that one
//! GEMM serves them; files keep the separate tensors every other tool expects.

use crate::layers::LinearSpec;
use tensor::{Init, ParamList, ParamRef, ParamSpec};

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

/// How a matrix lies in files.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Place {
    /// [out, in], as ours.
    Rows,
    /// [in, out].
    Transposed,
}

/// Collects parameters and their names in files while a model is built.
#[derive(Default)]
pub struct Builder {
    pub(crate) params: ParamList,
    pub(crate) stored: Vec<StoredWeight>,
}

impl Builder {
    /// A parameter that is one tensor in files.
    pub(crate) fn whole(&mut self, spec: ParamSpec, name: String, shape: Vec<usize>) -> ParamRef {
        let param = self.params.add(spec);
        self.stored.push(StoredWeight { name, shape, param, first: 0, transposed: false });
        param
    }

    pub(crate) fn matrix(&mut self, spec: &LinearSpec<'_>) -> ParamRef {
        let shape = vec![spec.outputs, spec.inputs];
        let name = format!("{}.weight", spec.name);
        let param = self.params.add(ParamSpec { name, shape, init: Init::Normal(spec.std), decay: true });
        self.parts(spec, "weight", param, spec.inputs);
        param
    }

    pub(crate) fn bias(&mut self, spec: &LinearSpec<'_>) -> ParamRef {
        let (name, shape) = (format!("{}.bias", spec.name), vec![spec.outputs]);
        let param = self.params.add(ParamSpec { name, shape, init: Init::Zeros, decay: false });
        self.parts(spec, "bias", param, 0);
        param
    }

    /// `inputs` is 0 for a bias.
    fn parts(&mut self, spec: &LinearSpec<'_>, kind: &str, param: ParamRef, inputs: usize) {
        let mut row = 0;
        for (name, rows) in spec.parts {
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
