//! Memory of the GPU that comes and goes behind addresses that stay. Frames that are taken away wait, still
//! mapped, for whoever needs one next: nobody waits for kernels but who takes another's frame.

use super::driver::{Address, Driver, Frame, Mark, Stream};
use super::{Gpu, lock};
use std::collections::{HashMap, VecDeque};
use std::ops::Range;
use std::sync::PoisonError;

/// What was taken away.
struct Waiting {
    frame: Frame,
    /// Where it is still mapped.
    at: Address,
    /// Behind what may still use it.
    mark: Mark,
}

/// All frames of a GPU.
#[derive(Default)]
pub(super) struct Frames {
    /// By size; the one taken away first is first.
    waiting: HashMap<usize, VecDeque<Waiting>>,
    mapped: HashMap<Address, Frame>,
    /// Where frames are still mapped that somebody is about to take elsewhere.
    leaving: Vec<Address>,
}

impl Gpu {
    /// Memory behind `bytes` of reserved addresses from `at` on, its contents anything; false, and nothing
    /// done, where the card has none. Copies up that begin now find it free.
    pub(crate) fn bring(&self, at: Address, bytes: usize) -> bool {
        let driver = self.driver();
        let mut frames = lock(&self.frames);
        let waiting = frames.waiting.entry(bytes).or_default();
        if let Some(same) = waiting.iter().position(|waiting| waiting.at == at) {
            let same = waiting.remove(same).expect("it was just seen");
            frames.mapped.insert(at, same.frame);
            driver.follow(Stream::Up, same.mark);
            return true;
        }
        let first = waiting.pop_front();
        frames.leaving.extend(first.iter().map(|waiting| waiting.at));
        drop(frames);
        let frame = match first {
            Some(Waiting { frame, at, mark }) => {
                driver.wait_for(mark);
                driver.unmap(at, bytes);
                self.has_left(&[at]);
                frame
            }
            None => match driver.create(bytes).or_else(|| self.create_in_place_of_others(bytes)) {
                Some(frame) => frame,
                None => return false,
            },
        };
        driver.map(at, frame, bytes);
        lock(&self.frames).mapped.insert(at, frame);
        true
    }

    /// The memory there is no more needed once all that was launched so far has run.
    pub(crate) fn take_away(&self, at: Address, bytes: usize) {
        let mark = self.driver().mark(super::stream());
        let mut frames = lock(&self.frames);
        let frame = frames.mapped.remove(&at).expect("memory that was brought");
        frames.waiting.entry(bytes).or_default().push_back(Waiting { frame, at, mark });
    }

    /// What was mapped there is so no more.
    fn has_left(&self, addresses: &[Address]) {
        lock(&self.frames).leaving.retain(|at| !addresses.contains(at));
        self.left.notify_all();
    }

    /// Nothing stands behind these addresses any more.
    pub(crate) fn clear(&self, addresses: Range<Address>) {
        let driver = self.driver();
        driver.wait(Stream::Compute);
        let mut frames = lock(&self.frames);
        // Another rank may be about to take a frame from here.
        while frames.leaving.iter().any(|at| addresses.contains(at)) {
            frames = self.left.wait(frames).unwrap_or_else(PoisonError::into_inner);
        }
        for (bytes, waiting) in &mut frames.waiting {
            let (ours, others) = waiting.drain(..).partition(|waiting| addresses.contains(&waiting.at));
            *waiting = others;
            destroy(driver, *bytes, ours);
        }
    }

    /// Frames of other sizes that wait may be in the way.
    fn create_in_place_of_others(&self, bytes: usize) -> Option<Frame> {
        let driver = self.driver();
        let mut frames = lock(&self.frames);
        let waiting = std::mem::take(&mut frames.waiting);
        let places: Vec<Address> = waiting.values().flatten().map(|waiting| waiting.at).collect();
        frames.leaving.extend(&places);
        drop(frames);
        waiting.into_iter().for_each(|(bytes, waiting)| destroy(driver, bytes, waiting));
        self.has_left(&places);
        driver.create(bytes)
    }
}

fn destroy(driver: &dyn Driver, bytes: usize, frames: VecDeque<Waiting>) {
    for Waiting { frame, at, mark } in frames {
        driver.wait_for(mark);
        driver.unmap(at, bytes);
        driver.destroy(frame);
    }
}
