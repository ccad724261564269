//! How work beside computation keeps its place between two points of the compute stream: it begins behind what
//! was launched when it was started, and whoever finishes it goes on behind it. Elsewhere than on a GPU nothing
//! of this is needed.

use crate::beside::Array;
use crate::error::CommError;
use device::cuda::{self, Driver, Mark, Stream};

pub(super) fn driver() -> &'static dyn Driver {
    cuda::gpu().expect("memory of a GPU was made by one").driver()
}

/// Of work that is started and runs on another thread.
#[derive(Default)]
pub(crate) struct Ticket {
    /// Its stream, and where that begins.
    start: Option<(Stream, Mark)>,
}

impl Ticket {
    /// Behind what this thread has launched so far.
    pub(crate) fn on(stream: Stream) -> Ticket {
        Ticket { start: Some((stream, driver().mark(cuda::stream()))) }
    }

    /// Runs work that gives an array, and hands it on as soon as it is on its stream.
    pub(crate) fn landing(
        self,
        work: impl FnOnce() -> Result<Array, CommError>,
        hand_on: impl FnOnce(Result<Landed, CommError>),
    ) {
        let Some((stream, mark)) = self.start else {
            return hand_on(work().map(|array| Landed { array: Some(array), mark: None }));
        };
        cuda::on_stream(stream, || {
            driver().follow(stream, mark);
            hand_on(work().map(|array| Landed::on(stream, array)));
        });
    }

    /// Runs work that gives anything, until it is done.
    pub(crate) fn whole<R>(self, work: impl FnOnce() -> R) -> R {
        let Some((stream, mark)) = self.start else { return work() };
        cuda::on_stream(stream, || {
            driver().follow(stream, mark);
            let result = work();
            driver().wait(stream);
            result
        })
    }
}

/// An array that is whole when its stream has come so far.
pub(crate) struct Landed {
    array: Option<Array>,
    mark: Option<Mark>,
}

impl Landed {
    /// What `stream` was given so far makes it whole.
    pub(crate) fn on(stream: Stream, array: Array) -> Landed {
        Landed { array: Some(array), mark: Some(driver().mark(stream)) }
    }

    /// For whatever is launched next.
    pub(crate) fn take(mut self) -> Array {
        self.follow();
        self.array.take().expect("it is taken once")
    }

    fn follow(&mut self) {
        if let Some(mark) = self.mark.take() {
            driver().follow(cuda::stream(), mark);
        }
    }
}

impl Drop for Landed {
    /// Its memory goes to whoever asks next in the order of the compute stream.
    fn drop(&mut self) {
        self.follow();
    }
}
