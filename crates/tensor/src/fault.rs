//! Why an op could not run: the world's reasons, not ours.

use device::OutOfMemory;
use std::sync::Arc;

/// What stopped an op. Shapes that do not fit are bugs and panic; these are not.
#[derive(Clone, Debug, thiserror::Error)]
pub enum Fault {
    /// The device has no memory left.
    #[error(transparent)]
    Memory(#[from] OutOfMemory),
    /// A tier, a link or another rank failed: whoever moves bytes on behalf of the tape says why.
    #[error(transparent)]
    Outside(Arc<dyn std::error::Error + Send + Sync>),
}

impl Fault {
    /// A failure of something the tape does not know.
    pub fn outside(error: impl std::error::Error + Send + Sync + 'static) -> Fault {
        Fault::Outside(Arc::new(error))
    }
}
