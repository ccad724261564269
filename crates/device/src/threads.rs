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
        Threads::pinned(count, if pin { allowed } else { Vec::new() })
    }

    /// The workers of rank `index` of `ranks` that share this process: an equal share of the cores,
    /// each rank's its own, at least one worker. More ranks than cores float.
    pub fn share(index: usize, ranks: usize) -> Result<Threads, rayon::ThreadPoolBuildError> {
        let allowed = allowed_cores();
        let each = allowed.len() / ranks.max(1);
        if each == 0 {
            return Threads::pinned(1, Vec::new());
        }
        Threads::pinned(each, allowed[index * each..(index + 1) * each].to_vec())
    }

    /// `count` workers, worker `i` on `on[i]` if there is one.
    fn pinned(count: usize, on: Vec<usize>) -> Result<Threads, rayon::ThreadPoolBuildError> {
        let pool = rayon::ThreadPoolBuilder::new()
            .num_threads(count.max(1))
            .thread_name(|i| format!("worker-{i}"))
            .start_handler(move |i| {
                if let Some(core) = on.get(i) {
                    pin_to(*core);
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

/// `body(i, part of a, part of b)` for the i-th runs of `a_len` elements of `a` and `b_len` of `b`,
/// in parallel; the last part may be shorter. Pass an empty `b` and 0 for one output.
pub fn for_each_part<A: Send, B: Send>(
    (a, a_len): (&mut [A], usize),
    (b, b_len): (&mut [B], usize),
    body: impl Fn(usize, &mut [A], &mut [B]) + Sync + Send,
) {
    let parts = a.len().div_ceil(a_len.max(1));
    split_parts((0, parts), (a, a_len), (b, b_len), &body);
}

fn split_parts<A: Send, B: Send>(
    (first, count): (usize, usize),
    (a, a_len): (&mut [A], usize),
    (b, b_len): (&mut [B], usize),
    body: &(impl Fn(usize, &mut [A], &mut [B]) + Sync + Send),
) {
    match count {
        0 => {}
        1 => body(first, a, b),
        _ if rayon::current_num_threads() == 1 => {
            let (mut a, mut b) = (a, b);
            for i in first..first + count {
                let (a_here, a_rest) = a.split_at_mut(a_len.min(a.len()));
                let (b_here, b_rest) = b.split_at_mut(b_len.min(b.len()));
                body(i, a_here, b_here);
                (a, b) = (a_rest, b_rest);
            }
        }
        _ => {
            let half = count / 2;
            let (a0, a1) = a.split_at_mut(half * a_len);
            let (b0, b1) = b.split_at_mut(half * b_len);
            rayon::join(
                || split_parts((first, half), (a0, a_len), (b0, b_len), body),
                || split_parts((first + half, count - half), (a1, a_len), (b1, b_len), body),
            );
        }
    }
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
    fn parts_cover_both_arrays_in_step() {
        let (mut a, mut b) = (vec![0; 23], vec![0; 8]);
        for_each_part((&mut a, 3), (&mut b, 1), |i, a, b| {
            a.fill(i);
            b[0] = a.len();
        });
        assert_eq!(a, (0..23).map(|i| i / 3).collect::<Vec<_>>());
        assert_eq!(b, [3, 3, 3, 3, 3, 3, 3, 2]);
    }

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
