//! What a drive really does, measured with the engine that will use it: bandwidth by size and
//! number of operations in flight. Sets the engine, and feeds the plan and `trilith doctor`.

use super::{Block, Disk, DiskError, Engine, Op, Options, PAGE_BYTES, Region, Request, Ticket};
use crate::plan::LinkRate;
use std::collections::VecDeque;
use std::os::fd::AsFd;
use std::path::Path;
use std::time::{Duration, Instant};

/// Sizes (KiB) and depths tried, the likeliest first: a slow drive has no time for all.
/// In flight are at most 16 MiB.
const TRIALS: [(usize, usize); 9] =
    [(1024, 4), (256, 16), (1024, 16), (4096, 4), (1024, 1), (256, 4), (256, 64), (4096, 1), (256, 1)];

/// Bytes of a request during a trial, less where the scratch space is smaller.
const REQUEST_BYTES: usize = 4 << 20;

/// A setting as good as the best but for this share is preferred when it has less in flight: an
/// urgent request waits for what is in flight.
const TIE: f64 = 0.05;

/// How much a measurement may cost.
#[derive(Clone, Copy, Debug)]
pub struct Effort {
    /// No trial begins after this; a trial under way ends soon after.
    pub time: Duration,
    /// Scratch space. Each of the nine trials writes and reads it once at most.
    pub scratch_bytes: u64,
}

impl Default for Effort {
    fn default() -> Effort {
        Effort { time: Duration::from_secs(2), scratch_bytes: 64 << 20 }
    }
}

/// Bandwidth with one setting.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Trial {
    /// Bytes of one operation.
    pub block_bytes: usize,
    /// Operations in flight.
    pub depth: usize,
    /// Bytes read in a second.
    pub read_bytes_per_s: f64,
    /// Bytes written in a second.
    pub write_bytes_per_s: f64,
}

impl Trial {
    /// Seconds to write a byte and read it back: what offloading costs.
    fn seconds_per_byte(&self) -> f64 {
        1.0 / self.read_bytes_per_s + 1.0 / self.write_bytes_per_s
    }

    fn in_flight_bytes(&self) -> usize {
        self.block_bytes * self.depth
    }
}

/// What was measured in a folder.
#[derive(Clone, Debug, PartialEq)]
pub struct DriveFigures {
    /// What served the requests.
    pub engine: Engine,
    /// Whether transfers went past the page cache. Otherwise writes include the sync, and reads
    /// may have come from memory in spite of the request to forget.
    pub direct: bool,
    /// At least one.
    pub trials: Vec<Trial>,
    /// Bytes read and written in a second, half and half at the same time, with the best setting: many
    /// drives share one speed between both ways.
    pub both_bytes_per_s: f64,
}

impl DriveFigures {
    /// The setting to use.
    pub fn best(&self) -> Trial {
        let least = self.trials.iter().map(Trial::seconds_per_byte).fold(f64::INFINITY, f64::min);
        let good = |trial: &&Trial| trial.seconds_per_byte() <= least * (1.0 + TIE);
        *self
            .trials
            .iter()
            .filter(good)
            .min_by_key(|trial| trial.in_flight_bytes())
            .unwrap_or(&self.trials[0])
    }

    /// What the link to this drive carries while both ways are busy: as a run over tiers uses it.
    pub fn rate(&self) -> LinkRate {
        let (best, half) = (self.best(), self.both_bytes_per_s / 2.0);
        LinkRate { up_per_s: half.min(best.read_bytes_per_s), down_per_s: half.min(best.write_bytes_per_s) }
    }
}

/// Measures the drive behind `dir` with a scratch file that is gone afterwards.
pub fn measure(dir: &Path, effort: Effort, options: &Options) -> Result<DriveFigures, DiskError> {
    let started = Instant::now();
    let pages = (effort.scratch_bytes / PAGE_BYTES as u64).max(1) * PAGE_BYTES as u64;
    let request_bytes = pages.min(REQUEST_BYTES as u64);
    let scratch_bytes = pages - pages % request_bytes;
    let disk = Disk::create(dir, &[("scratch", scratch_bytes)], options.clone())?;
    let mut bench = Bench { disk: &disk, scratch_bytes, request_bytes, free: Vec::new() };
    // Space that was only reserved is slower to write the first time; a run writes it every step.
    bench.run(&[Op::Write], TRIALS[0], effort.time / 4)?;
    let per_run = effort.time / (2 * TRIALS.len() as u32 + 1);
    let mut trials = Vec::new();
    for (kib, depth) in TRIALS {
        if started.elapsed() > effort.time && !trials.is_empty() {
            break;
        }
        let write_bytes_per_s = bench.run(&[Op::Write], (kib, depth), per_run)?;
        let read_bytes_per_s = bench.run(&[Op::Read], (kib, depth), per_run)?;
        trials.push(Trial { block_bytes: kib << 10, depth, read_bytes_per_s, write_bytes_per_s });
    }
    let (engine, direct) = (disk.engine().clone(), disk.is_direct());
    let mut figures = DriveFigures { engine, direct, trials, both_bytes_per_s: 0.0 };
    let Trial { block_bytes, depth, .. } = figures.best();
    // As long as one of each: it is what plans are made with.
    figures.both_bytes_per_s = bench.run(&[Op::Read, Op::Write], (block_bytes >> 10, depth), 2 * per_run)?;
    Ok(figures)
}

struct Bench<'a> {
    disk: &'a Disk,
    scratch_bytes: u64,
    /// Divides the scratch space.
    request_bytes: u64,
    free: Vec<Block>,
}

impl Bench<'_> {
    /// Bytes a second of one setting, `ops` taking turns, over the whole scratch space or `time`.
    fn run(&mut self, ops: &[Op], (kib, depth): (usize, usize), time: Duration) -> Result<f64, DiskError> {
        self.disk.tune(depth, kib << 10);
        if ops.contains(&Op::Read) && !self.disk.is_direct() {
            let file = self.disk.as_fd();
            rustix::fs::fadvise(file, 0, None, rustix::fs::Advice::DontNeed).ok();
        }
        // One more than the drive has keeps it busy while the oldest is taken back.
        let requests = (depth * (kib << 10)).div_ceil(self.request_bytes as usize) + 1;
        let (started, mut next, mut bytes) = (Instant::now(), 0u64, 0u64);
        let mut waiting: VecDeque<Ticket> = VecDeque::new();
        loop {
            let more = next < self.scratch_bytes && started.elapsed() < time;
            if more && waiting.len() < requests {
                let turn = (next / self.request_bytes) as usize % ops.len();
                waiting.push_back(self.submit(ops[turn], next)?);
                next += self.request_bytes;
            } else if let Some(ticket) = waiting.pop_front() {
                self.free.push(ticket.wait()?);
                bytes += self.request_bytes;
            } else {
                break;
            }
        }
        if ops.contains(&Op::Write) && !self.disk.is_direct() {
            rustix::fs::fdatasync(self.disk.as_fd()).ok();
        }
        Ok(bytes as f64 / started.elapsed().as_secs_f64())
    }

    fn submit(&mut self, op: Op, offset: u64) -> Result<Ticket, DiskError> {
        let block = match self.free.pop() {
            Some(block) => block,
            None => self.fresh_block()?,
        };
        let range = 0..block.len();
        let request = Request { region: Region(0), offset, block, range, deadline: 0 };
        Ok(match op {
            Op::Read => self.disk.submit_read(request),
            Op::Write => self.disk.submit_write(request),
        })
    }

    fn fresh_block(&self) -> Result<Block, DiskError> {
        let block = self.disk.block(self.request_bytes as usize);
        let mut block = block.map_err(|refused| DiskError::Memory { refused })?;
        // Not all alike: some drives and file systems keep no zeros.
        let words = block.bytes_mut().chunks_exact_mut(4).enumerate();
        words.for_each(|(i, word)| {
            word.copy_from_slice(&(i as u32).wrapping_mul(2_654_435_761).to_le_bytes())
        });
        Ok(block)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn trial(block_bytes: usize, depth: usize, read: f64, write: f64) -> Trial {
        Trial { block_bytes, depth, read_bytes_per_s: read, write_bytes_per_s: write }
    }

    #[test]
    fn the_best_setting_is_fast_both_ways_and_keeps_little_in_flight() {
        let trials = vec![
            trial(1024, 16, 1000.0, 1000.0),
            trial(1024, 4, 980.0, 990.0),
            trial(4096, 4, 2000.0, 300.0),
            trial(256, 1, 500.0, 500.0),
        ];
        let figures = DriveFigures { engine: Engine::Ring, direct: true, trials, both_bytes_per_s: 1500.0 };
        let LinkRate { up_per_s, down_per_s } = figures.rate();
        assert_eq!((up_per_s, down_per_s), (750.0, 750.0));
        assert_eq!((figures.best().block_bytes, figures.best().depth), (1024, 4));
    }

    #[test]
    fn a_drive_is_measured_by_either_engine_and_nothing_stays_behind() {
        let dir = tempfile::tempdir().unwrap();
        let effort = Effort { time: Duration::from_millis(100), scratch_bytes: 8 << 20 };
        for ring in [true, false] {
            let options = Options { ring, ..Options::default() };
            let figures = measure(dir.path(), effort, &options).unwrap();
            let best = figures.best();
            assert!(best.read_bytes_per_s > 0.0 && best.write_bytes_per_s > 0.0, "{figures:?}");
            assert!(figures.both_bytes_per_s > 0.0, "{figures:?}");
        }
        assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 0);
    }
}
