//! A worker's own scratch memory, kept from call to call.

use std::cell::RefCell;

/// A cache line: a panel that starts at one is never loaded across two.
#[derive(Clone, Copy)]
#[repr(C, align(64))]
struct Line([f32; LINE]);

const LINE: usize = 16;

thread_local! {
    static SCRATCH: RefCell<Vec<Line>> = const { RefCell::new(Vec::new()) };
}

/// Run `body` on `len` floats of this worker, contents unspecified. The body must not ask again.
pub(crate) fn with_scratch(len: usize, body: impl FnOnce(&mut [f32])) {
    SCRATCH.with_borrow_mut(|scratch| {
        let lines = len.div_ceil(LINE);
        if scratch.len() < lines {
            scratch.resize(lines, Line([0.0; LINE]));
        }
        // SAFETY: a line is 16 floats and nothing else, and `lines` of them hold `len`.
        let floats = unsafe { std::slice::from_raw_parts_mut(scratch.as_mut_ptr().cast(), len) };
        body(floats);
    });
}
