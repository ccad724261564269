//! Lending windows of memory to other threads for as long as a function runs.
//!
//! Ranks that share a process read each other's buffers in place instead of passing copies. The
//! lender gives its windows to a closure's time; a borrower holds a guard while it looks. When the
//! closure ends the windows are withdrawn, which waits for the guards that are out and refuses new
//! ones. So no window outlives its memory, whoever fails and whenever.

use crate::{View, ViewMut};
use std::sync::{Mutex, MutexGuard, PoisonError, RwLock, RwLockReadGuard};

/// A place where one thread lends windows to others.
#[derive(Default)]
pub struct Window {
    slot: RwLock<Option<Lent>>,
}

/// The lifetimes are a fiction that `lend` ends and guards hide.
struct Lent {
    shared: Vec<View<'static>>,
    exclusive: Vec<Mutex<ViewMut<'static>>>,
}

impl Window {
    /// Lends `shared` windows to read and `exclusive` ones to write while `body` runs. Returns when
    /// `body` has and no borrower looks any more. A borrower that keeps its guard keeps the lender
    /// waiting; a second loan in the same place at the same time is our bug and panics.
    pub fn lend<R>(&self, shared: &[View<'_>], exclusive: Vec<ViewMut<'_>>, body: impl FnOnce() -> R) -> R {
        struct Withdraw<'a>(&'a Window);
        impl Drop for Withdraw<'_> {
            fn drop(&mut self) {
                *self.0.slot.write().unwrap_or_else(PoisonError::into_inner) = None;
            }
        }
        // SAFETY: the windows leave the slot before this function returns or unwinds (`Withdraw`),
        // when no guard is out (the write lock waits for them); guards give windows out for their
        // own lifetime only. Within that time the arguments are borrowed by this call.
        let lent = unsafe {
            Lent {
                shared: shared.iter().map(|v| std::mem::transmute::<View<'_>, View<'static>>(*v)).collect(),
                exclusive: exclusive
                    .into_iter()
                    .map(|v| Mutex::new(std::mem::transmute::<ViewMut<'_>, ViewMut<'static>>(v)))
                    .collect(),
            }
        };
        {
            let mut slot = self.slot.write().unwrap_or_else(PoisonError::into_inner);
            assert!(slot.is_none(), "a loan is already out of this place");
            *slot = Some(lent);
        }
        let _withdraw = Withdraw(self);
        body()
    }

    /// Look at what is lent now; it stays lent while the guard lives.
    pub fn borrow(&self) -> Borrowed<'_> {
        Borrowed { slot: self.slot.read().unwrap_or_else(PoisonError::into_inner) }
    }
}

/// Holds a loan open for reading and writing.
pub struct Borrowed<'a> {
    slot: RwLockReadGuard<'a, Option<Lent>>,
}

impl Borrowed<'_> {
    /// The i-th shared window; `None` when nothing such is lent.
    pub fn shared(&self, i: usize) -> Option<View<'_>> {
        self.slot.as_ref()?.shared.get(i).copied()
    }

    /// The i-th exclusive window, once whoever holds it lets go; `None` when nothing such is lent.
    pub fn exclusive(&self, i: usize) -> Option<Exclusive<'_>> {
        let window = self.slot.as_ref()?.exclusive.get(i)?;
        Some(Exclusive { window: window.lock().unwrap_or_else(PoisonError::into_inner) })
    }
}

/// One exclusive window, ours while this lives.
pub struct Exclusive<'a> {
    window: MutexGuard<'a, ViewMut<'static>>,
}

impl Exclusive<'_> {
    /// The window.
    pub fn view(&mut self) -> ViewMut<'_> {
        self.window.reborrow()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::Barrier;

    #[test]
    fn two_threads_swap_halves_in_place() {
        let loans = [Window::default(), Window::default()];
        let barrier = Barrier::new(2);
        let mut data = [vec![1f32; 100], vec![2f32; 100]];
        std::thread::scope(|scope| {
            for (me, data) in data.iter_mut().enumerate() {
                let (loans, barrier) = (&loans, &barrier);
                scope.spawn(move || {
                    let (a, b) = data.split_at_mut(50);
                    let parts = vec![ViewMut::of_f32(a), ViewMut::of_f32(b)];
                    loans[me].lend(&[], parts, || {
                        barrier.wait();
                        {
                            let guards = [loans[0].borrow(), loans[1].borrow()];
                            let mut mine: Vec<_> = guards.iter().map(|g| g.exclusive(me).unwrap()).collect();
                            let sum = mine[0].view().f32()[0] + mine[1].view().f32()[0];
                            mine.iter_mut().for_each(|part| part.view().f32().fill(sum));
                        }
                        barrier.wait();
                    });
                });
            }
        });
        assert!(data.iter().flatten().all(|x| *x == 3.0));
    }

    #[test]
    fn what_was_lent_is_gone_afterwards_also_after_a_panic() {
        let loan = Window::default();
        let data = [1f32, 2.0];
        loan.lend(&[View::of_f32(&data)], vec![], || {
            assert_eq!(loan.borrow().shared(0).unwrap().f32(), data);
            assert!(loan.borrow().shared(1).is_none() && loan.borrow().exclusive(0).is_none());
        });
        assert!(loan.borrow().shared(0).is_none());
        let panicked = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
            loan.lend(&[View::of_f32(&data)], vec![], || panic!("on purpose"));
        }));
        assert!(panicked.is_err() && loan.borrow().shared(0).is_none());
    }
}
