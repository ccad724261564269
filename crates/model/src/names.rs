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
/// values)` takes it.
pub fn fill<E>(
    stored: &[StoredWeight],
    mut read: impl FnMut(&str, &[usize]) -> Result<Vec<f32>, E>,
    mut put: impl FnMut(ParamRef, usize, &[f32]) -> Result<(), E>,
) -> Result<(), E> {
    for weight in stored {
        let values = weight.to_ours(read(&weight.name, &weight.shape)?);
        put(weight.param, weight.first, &values)?;
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
