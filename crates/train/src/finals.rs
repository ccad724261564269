//! When gradients are final in a pass over one microbatch: when every use of their parameter on the way
//! there has had its way back. Counts only, and so known in a first pass, too.

use tensor::{Moment, ParamRef, Phase};

/// Counts of one pass.
pub(crate) struct Finals {
    /// By parameter: uses whose way back is still to come.
    uses: Vec<u32>,
    /// By parameter: whether its gradient is final.
    closed: Vec<bool>,
    /// Gradients the moment at hand writes, and whether it goes back.
    writing: (Vec<ParamRef>, bool),
}

impl Finals {
    /// For so many parameters.
    pub fn new(params: usize) -> Finals {
        Finals { uses: vec![0; params], closed: vec![false; params], writing: Default::default() }
    }

    /// A moment is about to run.
    pub fn enter(&mut self, moment: &Moment<'_>) {
        if moment.writes_grads {
            let late = moment.params.iter().find(|param| self.closed[param.index()]);
            assert!(late.is_none(), "a gradient is written after it was final: {moment:?}");
            self.writing.0.extend(moment.params);
            self.writing.1 = moment.phase == Phase::Backward;
        } else if moment.phase == Phase::Forward {
            moment.params.iter().for_each(|param| self.uses[param.index()] += 1);
        }
    }

    /// The moment at hand has ended: parameters whose gradients are final now.
    pub fn settle(&mut self) -> Vec<ParamRef> {
        let (mut params, back) = std::mem::take(&mut self.writing);
        params.retain(|param| {
            let uses = &mut self.uses[param.index()];
            *uses -= u32::from(back);
            *uses == 0 && !std::mem::replace(&mut self.closed[param.index()], true)
        });
        params
    }
}
