//! `trilith doctor`: what this machine has, what is missing, and the remedy.

use crate::show;
use anyhow::{Context, Result};
use comfy_table::Table;
use device::{DType, Device, Isa, cuda};
use memory::disk::{self, DiskError, DriveFigures, Effort, Engine, Options, Trial};
use std::path::{Path, PathBuf};
use std::process::ExitCode;

#[derive(clap::Args)]
pub struct Args {
    /// Folder whose drive is measured
    #[arg(long, default_value = ".")]
    disk: PathBuf,
}

pub fn run(args: Args) -> Result<ExitCode> {
    let cores = device::cores();
    let pool = device::Threads::new(cores).context("cannot start the worker threads")?;
    let (f32_peak, bf16_peak) = pool.run(|| {
        let reached = |dtype| kernels::peak::gflops(Device::Cpu, dtype);
        (reached(DType::F32), reached(DType::Bf16))
    });
    let isa = Isa::active();
    let mut facts = vec![
        ("processor", processor()),
        ("cores for trilith", cores.to_string()),
        ("instruction set in use", format!("{isa:?} (of {:?})", Isa::available())),
        ("measured peak", format!("{f32_peak:.0} GFLOP/s f32, {bf16_peak:.0} GFLOP/s bf16")),
    ];
    facts.push((
        "memory available",
        device::available_bytes().map_or("unknown".into(), |b| show::bytes(b as u64)),
    ));
    let drive = disk::measure(&args.disk, Effort::default(), &Options::default());
    facts.push(("drive", drive_line(&drive, &args.disk)));
    facts.push(("GPU", gpu()));
    if cuda::gpu().is_ok() {
        facts
            .push(("between GPUs", cuda::peers().map_or_else(|none| none.to_string(), |found| found.name())));
    }
    print!("{}", show::facts(&facts));
    if let Ok(figures) = &drive {
        println!("{}", drive_table(figures));
    }
    for remedy in remedies(isa, drive.as_ref().ok()) {
        println!("  note: {remedy}");
    }
    Ok(ExitCode::SUCCESS)
}

fn drive_line(drive: &Result<DriveFigures, DiskError>, dir: &Path) -> String {
    match drive {
        Ok(figures) => {
            let best = figures.best();
            let (read, write) = (megabytes(best.read_bytes_per_s), megabytes(best.write_bytes_per_s));
            let cache = if figures.direct { "past the page cache" } else { "through the page cache" };
            let (dir, engine) = (dir.display(), &figures.engine);
            let both = megabytes(figures.both_bytes_per_s);
            format!(
                "{read} MB/s read, {write} MB/s write, {both} MB/s both at once in {dir}, by {engine}, {cache}"
            )
        }
        Err(error) => format!("not measured: {error}"),
    }
}

fn processor() -> String {
    let text = std::fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let name = text
        .lines()
        .find_map(|line| line.strip_prefix("model name")?.split_once(':').map(|(_, name)| name.trim()));
    name.unwrap_or(std::env::consts::ARCH).to_string()
}

fn remedies(isa: Isa, drive: Option<&DriveFigures>) -> Vec<String> {
    let mut notes = Vec::new();
    if isa == Isa::Portable {
        notes.push(
            "no AVX2 here: kernels run portable code, several times slower than on a processor with AVX2"
                .into(),
        );
    }
    if let Some(free) = device::available_bytes().filter(|free| *free < 2 << 30) {
        notes.push(format!(
            "only {} of memory are free: close other programs or train a smaller model",
            show::bytes(free as u64)
        ));
    }
    if let Some(Engine::Threads { why }) = drive.map(|figures| &figures.engine) {
        notes.push(format!(
            "the drive is used without io_uring ({why}): fast drives give less; allow the system calls \
             io_uring_setup, io_uring_enter and io_uring_register in the container's seccomp profile"
        ));
    }
    if drive.is_some_and(|figures| !figures.direct) {
        notes.push(
            "the file system of this folder knows no O_DIRECT: the page cache takes memory beside the \
             run's budget; name a folder of a local drive with --disk"
                .into(),
        );
    }
    notes
}

/// The drive by size and number of operations, as the disk tier would use it.
fn drive_table(figures: &DriveFigures) -> Table {
    let best = figures.best();
    let row = |trial: &Trial| {
        vec![
            show::bytes(trial.block_bytes as u64),
            trial.depth.to_string(),
            megabytes(trial.read_bytes_per_s),
            megabytes(trial.write_bytes_per_s),
            if *trial == best { "chosen".into() } else { String::new() },
        ]
    };
    let mut trials = figures.trials.clone();
    trials.sort_by_key(|trial| (trial.block_bytes, trial.depth));
    let header = ["operation", "in flight", "read MB/s", "write MB/s", ""];
    show::table(&header, trials.iter().map(row).collect(), &[0, 1, 2, 3])
}

fn megabytes(bytes_per_s: f64) -> String {
    format!("{:.0}", bytes_per_s / 1e6)
}

/// The CUDA driver's answer, or why there is none. This version computes on the CPU either way.
/// What the GPU is and reaches, or why there is none.
fn gpu() -> String {
    let card = match cuda::gpu() {
        Ok(gpu) => gpu.card(),
        Err(none) => return none.to_string(),
    };
    let ((major, minor), (driver, point)) = (card.capability, card.driver);
    let what = format!(
        "{}, {}, compute capability {major}.{minor}, driver for CUDA {driver}.{point}",
        card.name,
        show::bytes(card.memory_bytes as u64)
    );
    if let Err(error) = kernels::cuda::load() {
        return format!("{what}; not usable: {error}");
    }
    let reached = |dtype| kernels::peak::gflops(Device::Cuda, dtype) / 1e3;
    let (f32_peak, bf16_peak) = (reached(DType::F32), reached(DType::Bf16));
    let (up, down) = cuda::copied_per_s(true);
    format!(
        "{what}; measured {f32_peak:.0} TFLOP/s f32, {bf16_peak:.0} TFLOP/s bf16, {:.1} GB/s up and {:.1} GB/s down its link from pinned memory",
        up / 1e9,
        down / 1e9
    )
}
