//! What a run can do about bytes its drive lost: nothing was learnt from them, so it is set up again
//! from its newest whole state, with a new offload file, and goes on with the same bits.

use crate::{TrainError, Trainer};
use memory::disk::{DiskError, Op, Place};
use memory::pager::PagerError;
use tensor::Fault;

/// How often in a row, without getting past the step of the failure before, a run is set up again.
pub const MOST_RECOVERIES: u32 = 3;

/// Counts the failures of a run.
#[derive(Clone, Copy, Debug, Default)]
pub struct Recovery {
    in_row: u32,
    furthest: u64,
}

/// Bytes that are gone.
#[derive(Clone, Debug, PartialEq)]
pub struct Lost {
    /// What the drive did, and where.
    pub cause: DiskError,
    /// Parameters whose weights, gradients or state were there.
    pub params: Vec<String>,
    /// The step that failed.
    pub step: u64,
    /// Which failure in a row it is, from 1.
    pub nth: u32,
}

impl std::fmt::Display for Lost {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Lost { cause, params, step, .. } = self;
        write!(f, "step {step}: {cause}\n  it held {}; nothing was learnt from it", params.join(", "))
    }
}

impl Recovery {
    /// What was lost when `trainer` failed with `error`, if a run set up from its newest state
    /// (`Start::Resume`) once `trainer` is dropped can go on. Errors: `error` itself where the drive
    /// lost nothing; `TrainError::Lost` where it did too often in a row.
    pub fn after(&mut self, error: TrainError, trainer: &Trainer) -> Result<Lost, TrainError> {
        let Some((cause, place)) = lost(&error) else { return Err(error) };
        let step = trainer.step() + 1;
        if step > self.furthest {
            (self.in_row, self.furthest) = (0, step);
        }
        self.in_row += 1;
        let (cause, params) = (cause.clone(), trainer.params_at(place));
        let lost = Lost { cause, params, step, nth: self.in_row };
        if self.in_row > MOST_RECOVERIES {
            return Err(TrainError::Lost(Box::new(lost)));
        }
        Ok(lost)
    }
}

/// The failure of the drive behind an error, where bytes that were written cannot be read.
fn lost(error: &TrainError) -> Option<(&DiskError, &Place)> {
    let disk = match error {
        TrainError::Fault(Fault::Outside(cause)) => match cause.downcast_ref::<PagerError>()? {
            PagerError::Disk(disk) => disk,
            _ => return None,
        },
        TrainError::Tiers(PagerError::Disk(disk)) => disk,
        _ => return None,
    };
    match disk {
        DiskError::Damaged { place, .. }
        | DiskError::Truncated { op: Op::Read, place }
        | DiskError::Io { op: Op::Read, place, .. } => Some((disk, place)),
        _ => None,
    }
}
