//! Accounting of what buffers hold, and the cache that keeps a training step free of allocation.
//!
//! Freed blocks wait on lists by size class; a warmed-up step takes from the lists what it put
//! there and never calls the system allocator.

use crate::{Device, cuda};
use std::alloc::{Layout, alloc, dealloc};
use std::collections::{BTreeMap, VecDeque};
use std::ptr::NonNull;
use std::sync::{LazyLock, Mutex, MutexGuard, PoisonError};

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

/// A parked block, and when it was parked.
struct Block(NonNull<u8>, u64);
// SAFETY: a parked block is owned by the cache alone.
unsafe impl Send for Block {}

struct Cache {
    /// Whose memory.
    device: Device,
    /// By size class; the one parked last is last.
    parked: BTreeMap<usize, VecDeque<Block>>,
    /// Blocks parked so far.
    clock: u64,
    usage: MemoryUse,
    /// Buffers, live and parked, should not hold more.
    limit_bytes: Option<usize>,
}

impl Default for Cache {
    fn default() -> Cache {
        Cache {
            device: Device::Cpu,
            parked: BTreeMap::new(),
            clock: 0,
            usage: MemoryUse::default(),
            limit_bytes: None,
        }
    }
}

static HOST: LazyLock<Mutex<Cache>> = LazyLock::new(Mutex::default);
static CARD: LazyLock<Mutex<Cache>> =
    LazyLock::new(|| Mutex::new(Cache { device: Device::Cuda, ..Cache::default() }));

fn cache(device: Device) -> MutexGuard<'static, Cache> {
    let cache = match device {
        Device::Cpu => &HOST,
        Device::Cuda => &CARD,
    };
    cache.lock().unwrap_or_else(PoisonError::into_inner)
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

/// A parked block may be given to who asks for this many times less, where there is a limit. All of it
/// counts as live then: blocks that are much too large would use the limit up.
const MOST_TIMES: usize = 2;

/// A block of at least `bytes`, from the cache or the system, and its size; contents are unspecified.
/// `None` when the system refuses.
pub(crate) fn take(device: Device, bytes: usize) -> Option<(NonNull<u8>, usize)> {
    let taken = cache(device).take(bytes);
    if device == Device::Cuda && taken.is_some() {
        cuda::took();
    }
    taken
}

/// Park a block that `take` gave, of the size it said.
pub(crate) fn give(device: Device, ptr: NonNull<u8>, class: usize) {
    if device == Device::Cuda {
        cuda::gives();
    }
    cache(device).give(ptr, class);
}

/// Granules of a region have come.
pub(crate) fn count_committed(device: Device, bytes: usize) {
    let usage = &mut cache(device).usage;
    usage.region_bytes += bytes;
    usage.grow(bytes);
}

/// The same of granules that are buffers: they count as such.
pub(crate) fn count_taken(device: Device, bytes: usize) {
    cache(device).usage.grow(bytes);
}

/// Granules that are buffers have gone.
pub(crate) fn count_given(device: Device, bytes: usize) {
    cache(device).usage.live_bytes -= bytes;
}

/// Granules of a region have gone.
pub(crate) fn count_returned(device: Device, bytes: usize) {
    let usage = &mut cache(device).usage;
    usage.region_bytes -= bytes;
    usage.live_bytes -= bytes;
}

/// Where memory of the host stands now.
pub fn memory_use() -> MemoryUse {
    memory_use_of(Device::Cpu)
}

/// Where memory of a device stands now.
pub fn memory_use_of(device: Device) -> MemoryUse {
    cache(device).usage
}

/// Start a new peak from what is live now.
pub fn reset_peak() {
    Device::ALL.into_iter().for_each(reset_peak_of);
}

fn reset_peak_of(device: Device) {
    let mut cache = cache(device);
    cache.usage.peak_bytes = cache.usage.live_bytes;
    cache.usage.peak_held_bytes = 0;
    cache.usage.peak_other_bytes = 0;
    cache.usage.grow(0);
}

/// Hand every parked block back to the system; returns how many bytes that was.
pub fn release_cached() -> usize {
    Device::ALL.into_iter().map(|device| cache(device).release(usize::MAX)).sum()
}

/// From now on parked blocks are handed back where buffers on a device would otherwise hold more than
/// `bytes`.
pub fn limit_parked(device: Device, bytes: Option<usize>) {
    cache(device).limit_bytes = bytes;
}

impl Cache {
    fn take(&mut self, bytes: usize) -> Option<(NonNull<u8>, usize)> {
        let class = size_class(bytes)?;
        let held = self.usage.live_bytes - self.usage.region_bytes + self.usage.cached_bytes;
        let over = self.limit_bytes.map_or(0, |limit| (held + class).saturating_sub(limit));
        let most = if over > 0 { class.saturating_mul(MOST_TIMES) } else { class };
        let (ptr, class) = match self.unpark(class, most) {
            Some(block) => block,
            None => {
                self.release(over);
                let ptr = self.ask(class)?;
                self.usage.system_allocations += 1;
                (ptr, class)
            }
        };
        self.usage.grow(class);
        Some((ptr, class))
    }

    /// A new block of the system.
    fn ask(&mut self, class: usize) -> Option<NonNull<u8>> {
        match self.device {
            Device::Cpu => {
                let layout = layout_of(class)?;
                // SAFETY: the size is not zero.
                let ptr = NonNull::new(unsafe { alloc(layout) })?;
                ask_for_huge_pages(ptr, layout);
                // Fresh pages are touched here, so that every element is initialised memory and the
                // first step, not a random later one, pays for the page faults.
                // SAFETY: the block has `class` bytes.
                unsafe { ptr.as_ptr().write_bytes(0, class) };
                Some(ptr)
            }
            Device::Cuda => {
                let driver = cuda::present().driver();
                let at = driver.allocate(class).or_else(|| {
                    // Blocks of other sizes may be in the way.
                    self.release(usize::MAX);
                    driver.allocate(class)
                })?;
                NonNull::new(at as *mut u8)
            }
        }
    }

    /// A block that nobody holds, back to the system.
    fn give_back(&self, ptr: NonNull<u8>, class: usize) {
        match self.device {
            Device::Cpu => {
                let layout = layout_of(class).expect("a block was allocated with this layout");
                // SAFETY: parked blocks were allocated with this very layout and nobody holds them.
                unsafe { dealloc(ptr.as_ptr(), layout) };
            }
            Device::Cuda => cuda::present().driver().release(ptr.as_ptr() as cuda::Address),
        }
    }

    fn give(&mut self, ptr: NonNull<u8>, class: usize) {
        self.usage.live_bytes -= class;
        self.usage.cached_bytes += class;
        self.clock += 1;
        self.parked.entry(class).or_default().push_back(Block(ptr, self.clock));
    }

    /// The smallest parked block of `least` to `most` bytes, and its size.
    fn unpark(&mut self, least: usize, most: usize) -> Option<(NonNull<u8>, usize)> {
        let mut fitting = self.parked.range_mut(least..=most);
        let (class, block) = fitting.find_map(|(class, blocks)| Some((*class, blocks.pop_back()?)))?;
        self.usage.cached_bytes -= class;
        Some((block.0, class))
    }

    /// Hands parked blocks back until they were `bytes` at least or there are none; those parked longest
    /// ago go first. Returns how many bytes it was.
    fn release(&mut self, bytes: usize) -> usize {
        let mut released = 0;
        while released < bytes {
            let oldest = self.parked.iter().filter_map(|(class, blocks)| Some((blocks.front()?.1, *class)));
            let Some((_, class)) = oldest.min() else { break };
            let Some(block) = self.parked.get_mut(&class).and_then(VecDeque::pop_front) else { break };
            self.give_back(block.0, class);
            released += class;
        }
        self.usage.cached_bytes -= released;
        released
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

    #[test]
    fn within_a_limit_parked_blocks_serve_smaller_requests_before_the_system_is_asked() {
        const MIB: usize = 1 << 20;
        let mut cache = Cache::default();
        let (large, held) = cache.take(5 * MIB).unwrap();
        cache.give(large, held);
        // Without a limit each size has its own list.
        let (small, held) = cache.take(3 * MIB).unwrap();
        assert_eq!((held, cache.usage.system_allocations), (3 * MIB, 2));
        cache.give(small, held);
        cache.limit_bytes = Some(8 * MIB);
        let (smallest, held) = cache.take(2 * MIB).unwrap();
        assert_eq!((smallest, held), (small, 3 * MIB), "the smallest that fits");
        let (larger, held) = cache.take(3 * MIB).unwrap();
        assert_eq!((larger, held), (large, 5 * MIB));
        cache.give(smallest, 3 * MIB);
        cache.give(larger, 5 * MIB);
        assert_eq!((cache.usage.live_bytes, cache.usage.system_allocations), (0, 2));
        // More than twice what is asked for is too good, and 6 MiB are in no block: who was
        // parked longest ago goes, and no more than that.
        let (tiny, held) = cache.take(MIB / 2).unwrap();
        assert_eq!((held, cache.usage.cached_bytes), (MIB / 2, 5 * MIB));
        cache.give(tiny, held);
        let (other, held) = cache.take(6 * MIB).unwrap();
        assert_eq!((cache.usage.cached_bytes, cache.usage.peak_held_bytes), (MIB / 2, 8 * MIB));
        cache.give(other, held);
        assert_eq!(cache.release(usize::MAX), 6 * MIB + MIB / 2);
    }
}
