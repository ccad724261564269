//! Places among the ring's registered buffers. The kernel keeps a registered buffer's pages pinned
//! and mapped, so a transfer skips that work; a place belongs to one block while the block lives.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// Places in the ring's table; blocks beyond it work unregistered.
pub(super) const SLOTS: u16 = 1024;

#[derive(Default)]
struct Table {
    /// Handed out never so far: everything from here on.
    fresh: u16,
    free: Vec<u16>,
    /// Given back by dropped blocks, still known to the kernel.
    stale: Vec<u16>,
}

/// Who has which place. Shared by the engine's thread and every block that has one.
#[derive(Default)]
pub(super) struct Slots(Mutex<Table>);

impl Slots {
    fn table(&self) -> MutexGuard<'_, Table> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A place for a new block; `None` when all are taken.
    pub(super) fn take(self: &Arc<Slots>) -> Option<Slot> {
        let mut table = self.table();
        let index = table.free.pop().or_else(|| {
            (table.fresh < SLOTS).then(|| {
                table.fresh += 1;
                table.fresh - 1
            })
        })?;
        Some(Slot { index, known: false, home: self.clone() })
    }

    /// Places to forget: the kernel must drop them before they are handed out again.
    pub(super) fn stale(&self) -> Vec<u16> {
        std::mem::take(&mut self.table().stale)
    }

    /// The kernel forgot these.
    pub(super) fn recycle(&self, forgotten: Vec<u16>) {
        self.table().free.extend(forgotten);
    }
}

/// One place, of one block.
pub(super) struct Slot {
    /// Index in the ring's table.
    pub(super) index: u16,
    /// Whether the kernel has been told.
    pub(super) known: bool,
    home: Arc<Slots>,
}

impl Slot {
    /// Whether the place is in this table.
    pub(super) fn is_of(&self, slots: &Arc<Slots>) -> bool {
        Arc::ptr_eq(&self.home, slots)
    }
}

impl Drop for Slot {
    fn drop(&mut self) {
        let mut table = self.home.table();
        match self.known {
            true => table.stale.push(self.index),
            false => table.free.push(self.index),
        }
    }
}
