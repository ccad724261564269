//! One pinned worker per core. The loop that feeds kernels runs inside the pool: from outside,
//! the same kernels took up to twice as long, at random.
//!
//! Work is cut by the size of the problem, never by the number of threads, so a result has the
//! same bits whatever the number of threads.

use std::ops::Range;

/// A pool of pinned workers.
pub struct Threads {
    pool: rayon::ThreadPool,
}

impl Threads {
    /// `count` workers, worker `i` pinned to the `i`-th core this process may use.
    /// Where pinning is refused (or there are more workers than cores) they float.
    pub fn new(count: usize) -> Result<Threads, rayon::ThreadPoolBuildError> {
        let allowed = allowed_cores();
        let pin = count <= allowed.len();
        let pool = rayon::ThreadPoolBuilder::new()
            .num_threads(count.max(1))
            .thread_name(|i| format!("worker-{i}"))
            .start_handler(move |i| {
                if pin {
                    pin_to(allowed[i]);
                }
            })
            .build()?;
        Ok(Threads { pool })
    }

    /// Run `body` on a worker; parallel loops inside it use this pool.
    pub fn run<R: Send>(&self, body: impl FnOnce() -> R + Send) -> R {
        self.pool.install(body)
    }
}

/// Cores this process may use.
pub fn cores() -> usize {
    allowed_cores().len().max(1)
}

/// Workers of the pool the caller runs in.
pub fn num_threads() -> usize {
    rayon::current_num_threads()
}

/// `body(i)` for every `i < count`, in any order, in parallel.
pub fn for_each_index(count: usize, body: impl Fn(usize) + Sync + Send) {
    split(0..count, &body);
}

/// `body(range)` for consecutive ranges of `chunk` indices (the last may be shorter).
pub fn for_each_chunk(count: usize, chunk: usize, body: impl Fn(Range<usize>) + Sync + Send) {
    let chunk = chunk.max(1);
    for_each_index(count.div_ceil(chunk), |i| body(i * chunk..((i + 1) * chunk).min(count)));
}

fn split(range: Range<usize>, body: &(impl Fn(usize) + Sync + Send)) {
    match range.len() {
        0 => {}
        1 => body(range.start),
        len if rayon::current_num_threads() == 1 => (range.start..range.start + len).for_each(body),
        len => {
            let middle = range.start + len / 2;
            rayon::join(|| split(range.start..middle, body), || split(middle..range.end, body));
        }
    }
}

#[cfg(target_os = "linux")]
fn allowed_cores() -> Vec<usize> {
    // SAFETY: an all-zero cpu_set_t is an empty set; the kernel fills it.
    unsafe {
        let mut set: libc::cpu_set_t = std::mem::zeroed();
        if libc::sched_getaffinity(0, size_of::<libc::cpu_set_t>(), &mut set) != 0 {
            return vec![0];
        }
        (0..libc::CPU_SETSIZE as usize).filter(|cpu| libc::CPU_ISSET(*cpu, &set)).collect()
    }
}

#[cfg(target_os = "linux")]
fn pin_to(core: usize) {
    // SAFETY: as above; a refusal is harmless, the worker then floats.
    unsafe {
        let mut set: libc::cpu_set_t = std::mem::zeroed();
        libc::CPU_SET(core, &mut set);
        libc::sched_setaffinity(0, size_of::<libc::cpu_set_t>(), &set);
    }
}

#[cfg(not(target_os = "linux"))]
fn allowed_cores() -> Vec<usize> {
    (0..std::thread::available_parallelism().map_or(1, |n| n.get())).collect()
}

#[cfg(not(target_os = "linux"))]
fn pin_to(_core: usize) {}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::Mutex;

    #[test]
    fn every_index_is_visited_once_on_any_number_of_threads() {
        for threads in [1, 2, 3] {
            let seen = Mutex::new(vec![0; 101]);
            Threads::new(threads).unwrap().run(|| {
                for_each_chunk(101, 7, |range| {
                    range.for_each(|i| seen.lock().unwrap()[i] += 1);
                })
            });
            assert!(seen.into_inner().unwrap().iter().all(|n| *n == 1));
        }
    }
}
