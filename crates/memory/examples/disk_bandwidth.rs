//! Bandwidth of the disk tier beside what others get from the same drive, alternating in one run:
//! our ring, our pool of threads, plain buffered files, and `fio` where it is installed.
//!
//! `cargo run --release -p memory --example disk_bandwidth -- DIR [MiB] [ROUNDS]`
//!
//! Ours includes the checksum of every page, taken and compared; the others take none. Buffered
//! writes include the sync and buffered reads begin with an empty cache: otherwise they would
//! measure memory.

use memory::disk::{Block, Disk, Effort, Options, Region, Request, Ticket, measure};
use rustix::fs::Advice;
use std::collections::VecDeque;
use std::error::Error;
use std::fs::File;
use std::os::fd::AsFd;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Instant;

type Outcome<T> = Result<T, Box<dyn Error>>;

/// What is moved and how.
struct Job {
    dir: PathBuf,
    bytes: u64,
    block_bytes: usize,
    depth: usize,
}

/// Bytes a second (write, read).
type Speed = (f64, f64);
type Contender = (&'static str, fn(&Job) -> Outcome<Speed>);

fn main() -> Outcome<()> {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let dir = PathBuf::from(args.first().ok_or("give the folder of the drive to measure")?);
    let mebibytes: u64 = args.get(1).map_or(Ok(512), |text| text.parse())?;
    let rounds: usize = args.get(2).map_or(Ok(5), |text| text.parse())?;
    let best = measure(&dir, Effort::default(), &Options::default())?.best();
    let job = Job { dir, bytes: mebibytes << 20, block_bytes: best.block_bytes, depth: best.depth };
    println!(
        "{} MiB in {}, {rounds} rounds, operations of {} KiB, {} in flight",
        mebibytes,
        job.dir.display(),
        job.block_bytes >> 10,
        job.depth
    );
    let mut contenders: Vec<Contender> = vec![
        ("ring", |job| ours(job, true, true)),
        ("ring, blocks unregistered", |job| ours(job, true, false)),
        ("threads", |job| ours(job, false, false)),
        ("std::fs, buffered", buffered),
    ];
    match Command::new("fio").arg("--version").output() {
        Ok(_) => contenders.push(("fio, io_uring, direct", fio)),
        Err(error) => println!("fio is left out: {error}"),
    }
    let mut speeds: Vec<Vec<Speed>> = vec![Vec::new(); contenders.len()];
    for _ in 0..rounds {
        for ((_, run), speeds) in contenders.iter().zip(&mut speeds) {
            speeds.push(run(&job)?);
        }
    }
    print_table(&contenders, &speeds);
    Ok(())
}

fn print_table(contenders: &[Contender], speeds: &[Vec<Speed>]) {
    println!(
        "{:28} {:>11} {:>11} {:>16} {:>16}",
        "", "write MB/s", "read MB/s", "ring/it, write", "ring/it, read"
    );
    for ((name, _), theirs) in contenders.iter().zip(speeds) {
        let of = |f: fn(&Speed) -> f64| median(theirs.iter().map(f).collect());
        // The ratio of each round, then its median: drift of the machine cancels.
        let ratio =
            |f: fn(&Speed) -> f64| median(speeds[0].iter().zip(theirs).map(|(a, b)| f(a) / f(b)).collect());
        let (write, read) = (of(|s| s.0) / 1e6, of(|s| s.1) / 1e6);
        println!("{name:28} {write:11.0} {read:11.0} {:16.2} {:16.2}", ratio(|s| s.0), ratio(|s| s.1));
    }
}

fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    let middle = values.len() / 2;
    match values.len() % 2 {
        1 => values[middle],
        _ => (values[middle - 1] + values[middle]) / 2.0,
    }
}

fn pattern(bytes: &mut [u8]) {
    let words = bytes.chunks_exact_mut(4).enumerate();
    words.for_each(|(i, word)| word.copy_from_slice(&(i as u32).wrapping_mul(2_654_435_761).to_le_bytes()));
}

fn ours(job: &Job, ring: bool, registered: bool) -> Outcome<Speed> {
    let options = Options { ring, depth: job.depth, block_bytes: job.block_bytes, faults: None };
    let disk = Disk::create(&job.dir, &[("bench", job.bytes)], options)?;
    let chunk = (16usize << 20).min(job.bytes as usize);
    let mut free: Vec<Block> = Vec::new();
    for _ in 0..3 {
        let mut block = if registered { disk.block(chunk)? } else { Block::new(chunk)? };
        pattern(block.bytes_mut());
        free.push(block);
    }
    // The first write of reserved space costs more; a training run writes it every step.
    pass(&disk, job.bytes, &mut free, Disk::submit_write)?;
    let write = pass(&disk, job.bytes, &mut free, Disk::submit_write)?;
    let read = pass(&disk, job.bytes, &mut free, Disk::submit_read)?;
    Ok((write, read))
}

fn pass(
    disk: &Disk,
    bytes: u64,
    free: &mut Vec<Block>,
    submit: fn(&Disk, Request) -> Ticket,
) -> Outcome<f64> {
    let (started, mut offset) = (Instant::now(), 0);
    let mut waiting: VecDeque<Ticket> = VecDeque::new();
    while offset < bytes || !waiting.is_empty() {
        let block = if offset < bytes { free.pop() } else { None };
        match block {
            Some(block) => {
                let len = (block.len() as u64).min(bytes - offset);
                let request =
                    Request { region: Region(0), offset, block, range: 0..len as usize, deadline: offset };
                waiting.push_back(submit(disk, request));
                offset += len;
            }
            None => free.extend(waiting.pop_front().map(Ticket::wait).transpose()?),
        }
    }
    Ok(bytes as f64 / started.elapsed().as_secs_f64())
}

fn scratch(job: &Job) -> PathBuf {
    job.dir.join(format!("disk-bandwidth-{}", std::process::id()))
}

fn buffered(job: &Job) -> Outcome<Speed> {
    let path = scratch(job);
    let speed = buffered_at(&path, job);
    std::fs::remove_file(&path)?;
    speed
}

fn buffered_at(path: &Path, job: &Job) -> Outcome<Speed> {
    let file = File::options().read(true).write(true).create(true).truncate(true).open(path)?;
    let mut block = vec![0u8; job.block_bytes];
    pattern(&mut block);
    let step = job.block_bytes as u64;
    let mut write = 0.0;
    for _ in 0..2 {
        let started = Instant::now();
        for at in (0..job.bytes).step_by(job.block_bytes) {
            file.write_all_at(&block[..step.min(job.bytes - at) as usize], at)?;
        }
        file.sync_all()?;
        write = job.bytes as f64 / started.elapsed().as_secs_f64();
    }
    rustix::fs::fadvise(file.as_fd(), 0, None, Advice::DontNeed)?;
    let started = Instant::now();
    for at in (0..job.bytes).step_by(job.block_bytes) {
        file.read_exact_at(&mut block[..step.min(job.bytes - at) as usize], at)?;
    }
    Ok((write, job.bytes as f64 / started.elapsed().as_secs_f64()))
}

fn fio(job: &Job) -> Outcome<Speed> {
    let path = scratch(job);
    let run = |kind: &str| -> Outcome<f64> {
        let mut command = Command::new("fio");
        command.args(["--name=bench", "--ioengine=io_uring", "--direct=1", "--output-format=json"]);
        command.arg(format!("--filename={}", path.display())).arg(format!("--rw={kind}"));
        command.arg(format!("--size={}", job.bytes)).arg(format!("--bs={}", job.block_bytes));
        let output = command.arg(format!("--iodepth={}", job.depth)).output()?;
        let report: serde_json::Value = serde_json::from_slice(&output.stdout)
            .map_err(|error| format!("fio: {error}: {}", String::from_utf8_lossy(&output.stderr)))?;
        report["jobs"][0][kind]["bw_bytes"].as_f64().ok_or_else(|| "fio reports no bandwidth".into())
    };
    let speed = run("write").and_then(|_| Ok((run("write")?, run("read")?)));
    std::fs::remove_file(&path).ok();
    speed
}
