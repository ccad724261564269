//! `trilith doctor`: what this machine has, what is missing, and the remedy.

use crate::show;
use anyhow::{Context, Result};
use device::Isa;
use std::fs::File;
use std::io::{Read, Write};
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::Instant;

/// Written and read back to measure a disk; large enough to outweigh its start.
const DISK_BYTES: usize = 256 << 20;

#[derive(clap::Args)]
pub struct Args {
    /// Folder whose disk is measured
    #[arg(long, default_value = ".")]
    disk: PathBuf,
}

pub fn run(args: Args) -> Result<ExitCode> {
    let cores = device::cores();
    let pool = device::Threads::new(cores).context("cannot start the worker threads")?;
    let (f32_peak, bf16_peak) = pool.run(|| (kernels::peak::gflops_f32(), kernels::peak::gflops_bf16()));
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
    let disk = disk_speed(&args.disk);
    let disk = match &disk {
        Ok((write, read)) => {
            format!("{write:.0} MB/s write, {read:.0} MB/s read (measured in {})", args.disk.display())
        }
        Err(error) => format!("not measured: {error:#}"),
    };
    facts.push(("disk", disk));
    facts.push(("GPU", gpu()));
    print!("{}", show::facts(&facts));
    for remedy in remedies(isa, &args.disk) {
        println!("  note: {remedy}");
    }
    Ok(ExitCode::SUCCESS)
}

fn processor() -> String {
    let text = std::fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let name = text
        .lines()
        .find_map(|line| line.strip_prefix("model name")?.split_once(':').map(|(_, name)| name.trim()));
    name.unwrap_or(std::env::consts::ARCH).to_string()
}

fn remedies(isa: Isa, disk: &Path) -> Vec<String> {
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
    if !disk.is_dir() {
        notes.push(format!("{} is no folder: give one that exists with --disk", disk.display()));
    }
    notes
}

/// (write, read) in MB/s, through the page cache's back: written data is synced, read data was
/// dropped from the cache.
fn disk_speed(dir: &Path) -> Result<(f64, f64)> {
    let path = dir.join(format!(".trilith-doctor-{}", std::process::id()));
    let measured = measure_disk(&path);
    std::fs::remove_file(&path).ok();
    measured.with_context(|| format!("cannot write {}", path.display()))
}

fn measure_disk(path: &Path) -> Result<(f64, f64)> {
    // Not all zeros: some file systems keep none of those.
    let block: Vec<u8> = (0..4usize << 20).map(|i| ((i * 2_654_435_761) >> 13) as u8).collect();
    let mut file = File::create(path)?;
    let started = Instant::now();
    for _ in 0..DISK_BYTES / block.len() {
        file.write_all(&block)?;
    }
    file.sync_all()?;
    let write = DISK_BYTES as f64 / started.elapsed().as_secs_f64() / 1e6;
    rustix::fs::fadvise(&file, 0, None, rustix::fs::Advice::DontNeed)?;
    let mut file = File::open(path)?;
    let mut block = block;
    let started = Instant::now();
    while file.read(&mut block)? > 0 {}
    Ok((write, DISK_BYTES as f64 / started.elapsed().as_secs_f64() / 1e6))
}

/// The CUDA driver's answer, or why there is none. This version computes on the CPU either way.
fn gpu() -> String {
    // `nvidia-smi` comes with every driver; loading the driver ourselves would need unsafe code.
    let asked = std::process::Command::new("nvidia-smi")
        .args(["--query-gpu=name,memory.total,driver_version", "--format=csv,noheader"])
        .output();
    match asked {
        Ok(answer) if answer.status.success() => {
            let names = String::from_utf8_lossy(&answer.stdout).trim().replace('\n', "; ");
            format!("{names}; not used: this version computes on the CPU")
        }
        Ok(answer) => format!("none: nvidia-smi says {}", String::from_utf8_lossy(&answer.stdout).trim()),
        Err(_) => "none: no NVIDIA driver is installed; everything runs on the CPU".into(),
    }
}
