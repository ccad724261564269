//! Accounting of what buffers hold, and the cache that keeps a training step free of allocation.
//!
//! Freed blocks wait on lists by size class; a warmed-up step takes from the lists what it put
//! there and never calls the system allocator.

use std::alloc::{Layout, alloc, dealloc};
use std::collections::HashMap;
use std::ptr::NonNull;
use std::sync::{LazyLock, Mutex};

/// Every block starts on a page: O_DIRECT and SIMD both like it.
pub(crate) const ALIGN_BYTES: usize = 4096;

/// Bytes in use by live buffers and regions, the peak since `reset_peak`, and bytes parked for reuse.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct MemoryUse {
    /// Held by live buffers and regions.
    pub live_bytes: usize,
    /// Highest `live_bytes` since start or `reset_peak`.
    pub peak_bytes: usize,
    /// Part of `live_bytes` that stands behind granules of regions.
    pub region_bytes: usize,
    /// Freed and kept for reuse.
    pub cached_bytes: usize,
    /// Highest sum of `live_bytes` and `cached_bytes` since start or `reset_peak`: what the system
    /// was really asked for.
    pub peak_held_bytes: usize,
    /// Highest part of that sum that stood behind no region.
    pub peak_other_bytes: usize,
    /// Times the system allocator was asked; constant over a warmed-up step.
    pub system_allocations: u64,
}

impl MemoryUse {
    fn grow(&mut self, bytes: usize) {
        self.live_bytes += bytes;
        self.peak_bytes = self.peak_bytes.max(self.live_bytes);
        let held = self.live_bytes + self.cached_bytes;
        self.peak_held_bytes = self.peak_held_bytes.max(held);
        self.peak_other_bytes = self.peak_other_bytes.max(held - self.region_bytes);
    }
}

struct Block(NonNull<u8>);
// SAFETY: a parked block is owned by the cache alone.
unsafe impl Send for Block {}

#[derive(Default)]
struct Cache {
    parked: HashMap<usize, Vec<Block>>,
    usage: MemoryUse,
    /// Buffers, live and parked, should not hold more.
    limit_bytes: Option<usize>,
}

static CACHE: LazyLock<Mutex<Cache>> = LazyLock::new(Mutex::default);

fn cache() -> std::sync::MutexGuard<'static, Cache> {
    CACHE.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
}

/// Bytes really reserved for a request: an eighth of the leading power of two, at least a page,
/// so that at most 1/8 is wasted and near-equal requests share a list.
fn size_class(bytes: usize) -> Option<usize> {
    let bytes = bytes.max(1);
    let step = (bytes.checked_next_power_of_two()? / 16).max(ALIGN_BYTES);
    bytes.checked_next_multiple_of(step)
}

/// From this size on a block is made of huge pages where the system has them: panels of a product
/// touch more small pages than the TLB holds.
pub(crate) const HUGE_PAGE_BYTES: usize = 2 << 20;

fn layout_of(class: usize) -> Option<Layout> {
    let align = if class >= HUGE_PAGE_BYTES { HUGE_PAGE_BYTES } else { ALIGN_BYTES };
    Layout::from_size_align(class, align).ok()
}

fn ask_for_huge_pages(ptr: NonNull<u8>, layout: Layout) {
    #[cfg(target_os = "linux")]
    if layout.align() == HUGE_PAGE_BYTES {
        // SAFETY: advice on our own fresh block; a refusal changes nothing.
        unsafe { libc::madvise(ptr.as_ptr().cast(), layout.size(), libc::MADV_HUGEPAGE) };
    }
    let _ = (ptr, layout);
}

/// A block of at least `bytes`, from the cache or the system; contents are unspecified.
/// `None` when the system refuses.
pub(crate) fn take(bytes: usize) -> Option<NonNull<u8>> {
    let class = size_class(bytes)?;
    let mut cache = cache();
    let parked = cache.parked.get_mut(&class).and_then(Vec::pop);
    let ptr = match parked {
        Some(block) => {
            cache.usage.cached_bytes -= class;
            block.0
        }
        None => {
            let held = cache.usage.live_bytes - cache.usage.region_bytes + cache.usage.cached_bytes;
            if cache.limit_bytes.is_some_and(|limit| held + class > limit) {
                cache.release();
            }
            let layout = layout_of(class)?;
            // SAFETY: the size is not zero.
            let ptr = NonNull::new(unsafe { alloc(layout) })?;
            ask_for_huge_pages(ptr, layout);
            // Fresh pages are touched here, so that every element is initialised memory and the
            // first step, not a random later one, pays for the page faults.
            // SAFETY: the block has `class` bytes.
            unsafe { ptr.as_ptr().write_bytes(0, class) };
            cache.usage.system_allocations += 1;
            ptr
        }
    };
    cache.usage.grow(class);
    Some(ptr)
}

/// Park a block that `take(bytes)` gave.
pub(crate) fn give(ptr: NonNull<u8>, bytes: usize) {
    let class = size_class(bytes).unwrap_or(bytes);
    let mut cache = cache();
    cache.usage.live_bytes -= class;
    cache.usage.cached_bytes += class;
    cache.parked.entry(class).or_default().push(Block(ptr));
}

/// Granules of a region have come.
pub(crate) fn count_committed(bytes: usize) {
    let usage = &mut cache().usage;
    usage.region_bytes += bytes;
    usage.grow(bytes);
}

/// Granules of a region have gone.
pub(crate) fn count_returned(bytes: usize) {
    let usage = &mut cache().usage;
    usage.region_bytes -= bytes;
    usage.live_bytes -= bytes;
}

/// Where memory stands now.
pub fn memory_use() -> MemoryUse {
    cache().usage
}

/// Start a new peak from what is live now.
pub fn reset_peak() {
    let mut cache = cache();
    cache.usage.peak_bytes = cache.usage.live_bytes;
    cache.usage.peak_held_bytes = 0;
    cache.usage.peak_other_bytes = 0;
    cache.usage.grow(0);
}

/// Hand every parked block back to the system; returns how many bytes that was.
pub fn release_cached() -> usize {
    cache().release()
}

/// From now on parked blocks are handed back where buffers would otherwise hold more than `bytes`.
pub fn limit_parked(bytes: Option<usize>) {
    cache().limit_bytes = bytes;
}

impl Cache {
    fn release(&mut self) -> usize {
        for (class, blocks) in self.parked.drain() {
            for block in blocks {
                let Some(layout) = layout_of(class) else { continue };
                // SAFETY: parked blocks were allocated with this very layout and nobody holds them.
                unsafe { dealloc(block.0.as_ptr(), layout) };
            }
        }
        std::mem::take(&mut self.usage.cached_bytes)
    }
}

fn proc_kib(file: &str, key: &str) -> Option<usize> {
    let text = std::fs::read_to_string(file).ok()?;
    let line = text.lines().find(|line| line.starts_with(key))?;
    line.split_whitespace().nth(1)?.parse::<usize>().ok()
}

/// Resident set of this process in bytes: (now, highest). `None` where /proc is absent.
pub fn resident_bytes() -> Option<(usize, usize)> {
    let now = proc_kib("/proc/self/status", "VmRSS:")?;
    let peak = proc_kib("/proc/self/status", "VmHWM:")?;
    Some((now * 1024, peak * 1024))
}

/// DRAM this process may still take: what the system has free or can free, cut by the limit of
/// its control group (v1 or v2). `None` where neither can be read.
pub fn available_bytes() -> Option<usize> {
    let system = proc_kib("/proc/meminfo", "MemAvailable:").map(|kib| kib * 1024);
    match (system, group_headroom_bytes()) {
        (Some(system), Some(group)) => Some(system.min(group)),
        (system, group) => system.or(group),
    }
}

fn group_headroom_bytes() -> Option<usize> {
    let groups = std::fs::read_to_string("/proc/self/cgroup").ok()?;
    let read = |path: String| std::fs::read_to_string(path).ok()?.trim().parse::<usize>().ok();
    groups
        .lines()
        .filter_map(|line| {
            let mut parts = line.splitn(3, ':');
            let (_, controllers, path) = (parts.next()?, parts.next()?, parts.next()?);
            let (limit, used) = if controllers.is_empty() {
                let dir = format!("/sys/fs/cgroup{path}");
                (read(format!("{dir}/memory.max"))?, read(format!("{dir}/memory.current"))?)
            } else if controllers.split(',').any(|name| name == "memory") {
                let dir = format!("/sys/fs/cgroup/memory{path}");
                (read(format!("{dir}/memory.limit_in_bytes"))?, read(format!("{dir}/memory.usage_in_bytes"))?)
            } else {
                return None;
            };
            Some(limit.saturating_sub(used))
        })
        .min()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_size_class_holds_the_request_and_wastes_at_most_an_eighth_or_a_page() {
        for bytes in [0, 1, 4095, 4096, 4097, 65_537, 1_000_000, 123_456_789] {
            let class = size_class(bytes).unwrap();
            assert!(class >= bytes && class.is_multiple_of(ALIGN_BYTES));
            assert!(class - bytes <= (bytes / 8).max(ALIGN_BYTES), "{bytes} -> {class}");
        }
        assert_eq!(size_class(usize::MAX), None);
    }
}
