//! Rows of a table by token id, plus rows of a position table where the model has one.

use super::Op;
use crate::Fault;
use crate::{ParamRef, Tape, Tensor, Var};
use std::sync::Arc;

pub(crate) struct Saved {
    lookups: Vec<(Arc<[u32]>, ParamRef)>,
}

impl Tape<'_> {
    /// Sum over `lookups` of table[ids]: ids [M], tables [_, D] -> [M, D].
    pub fn embedding(&mut self, lookups: &[(Arc<[u32]>, ParamRef)]) -> Result<Var, Fault> {
        let tables: Vec<ParamRef> = lookups.iter().map(|(_, table)| *table).collect();
        self.moment("embedding", &tables)?;
        let d = self.params.spec(tables[0]).shape[1];
        let mut x = Tensor::new(self.params.device(), self.params.dtype(), &[lookups[0].0.len(), d])?;
        for (i, (ids, table)) in lookups.iter().enumerate() {
            kernels::embedding::forward(ids, self.params.weight(*table), d, x.view_mut(), i > 0);
        }
        let lookups = lookups.to_vec();
        Ok(self.push(&[], x, || Op::Embedding(Saved { lookups })))
    }
}

impl Saved {
    pub(crate) fn backward(self, tape: &mut Tape<'_>, dy: Tensor) -> Result<(), Fault> {
        let tables: Vec<ParamRef> = self.lookups.iter().map(|(_, table)| *table).collect();
        tape.moment("embedding", &tables)?;
        for (ids, table) in &self.lookups {
            let grad = tape.params.added_grad(*table);
            kernels::embedding::backward(ids, dy.view(), dy.cols(), grad);
        }
        Ok(())
    }
}
