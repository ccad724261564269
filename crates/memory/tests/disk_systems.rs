//! The disk tier on systems that refuse: io_uring forbidden by seccomp, file systems without
//! O_DIRECT or too small, limits on file size, and a run that is killed.

use memory::disk::{
    Block, Disk, DiskError, Engine, Fault, Faults, Options, PAGE_BYTES, Point, Region, Request,
};
use rustix::io::Errno;
use seccompiler::{BpfProgram, SeccompAction, SeccompFilter};
use std::collections::BTreeMap;
use std::io::{BufRead, BufReader, Write};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::time::Duration;

const BYTES: usize = 64 * PAGE_BYTES;

fn options() -> Options {
    Options { block_bytes: 4 * PAGE_BYTES, ..Options::default() }
}

fn whole(block: Block) -> Request {
    let range = 0..block.len();
    Request { region: Region(0), offset: 0, block, range, deadline: 0 }
}

/// Writes a pattern, reads it into other memory, and gives what was read.
fn round_trip(disk: &Disk) -> Vec<u8> {
    let mut block = disk.block(BYTES).unwrap();
    block.bytes_mut().iter_mut().enumerate().for_each(|(i, byte)| *byte = (i * 7 / 3) as u8);
    disk.submit_write(whole(block)).wait().unwrap();
    disk.submit_read(whole(disk.block(BYTES).unwrap())).wait().unwrap().bytes().to_vec()
}

fn why_threads(disk: &Disk) -> &str {
    match disk.engine() {
        Engine::Threads { why } => why,
        Engine::Ring => panic!("the ring works although it is forbidden"),
    }
}

/// Answers EPERM to `calls` in this thread and its children, for good.
fn forbid(calls: &[i64]) {
    let rules: BTreeMap<i64, Vec<_>> = calls.iter().map(|call| (*call, Vec::new())).collect();
    let refuse = SeccompAction::Errno(Errno::PERM.raw_os_error() as u32);
    let arch = std::env::consts::ARCH.try_into().unwrap();
    let filter = SeccompFilter::new(rules, SeccompAction::Allow, refuse, arch).unwrap();
    let program: BpfProgram = filter.try_into().unwrap();
    seccompiler::apply_filter(&program).unwrap();
}

#[test]
fn where_seccomp_forbids_io_uring_threads_give_the_same_bytes() {
    let dir = tempfile::tempdir().unwrap();
    let want = round_trip(&Disk::create(dir.path(), &[("all", BYTES as u64)], options()).unwrap());
    // io_uring_setup, _enter, _register, as container defaults do; then only what comes after setup.
    for calls in [&[425, 426, 427][..], &[426], &[427]] {
        let path = dir.path().to_path_buf();
        let confined = std::thread::spawn(move || {
            forbid(calls);
            let disk = Disk::create(&path, &[("all", BYTES as u64)], options()).unwrap();
            (why_threads(&disk).to_string(), round_trip(&disk))
        });
        let (why, bytes) = confined.join().unwrap();
        assert!(why.contains("Operation not permitted"), "{why}");
        assert!(bytes == want, "forbidden {calls:?}");
    }
}

#[test]
fn whatever_setting_up_the_ring_answers_threads_take_over() {
    let dir = tempfile::tempdir().unwrap();
    for errno in [Errno::PERM, Errno::NOSYS, Errno::NOMEM, Errno::INVAL, Errno::ACCESS] {
        let faults = Faults::none().at(Point::Ring, 0, Fault::Errno(errno));
        let options = Options { faults: Some(Arc::new(faults)), ..options() };
        let disk = Disk::create(dir.path(), &[("all", BYTES as u64)], options).unwrap();
        assert!(why_threads(&disk).contains(&errno.to_string()));
        round_trip(&disk);
    }
}

/// A file system of our own, gone with this value; `None` (and the reason printed) without rights.
struct Mounted(tempfile::TempDir);

impl Mounted {
    fn new(kind: &str, options: &str) -> Option<Mounted> {
        let dir = tempfile::tempdir().unwrap();
        let mount = Command::new("mount").args(["-t", kind, "-o", options, "none"]).arg(dir.path()).output();
        match mount {
            Ok(output) if output.status.success() => Some(Mounted(dir)),
            Ok(output) => {
                println!("skipped: cannot mount {kind}: {}", String::from_utf8_lossy(&output.stderr).trim());
                None
            }
            Err(error) => {
                println!("skipped: cannot mount {kind}: {error}");
                None
            }
        }
    }

    fn path(&self) -> &Path {
        self.0.path()
    }

    fn free_bytes(&self) -> u64 {
        let stat = rustix::fs::statvfs(self.path()).unwrap();
        stat.f_bavail * stat.f_frsize
    }
}

impl Drop for Mounted {
    fn drop(&mut self) {
        // Lazily: a killed child's ring may still hold its file.
        Command::new("umount").arg("--lazy").arg(self.path()).status().ok();
    }
}

/// Either engine in `dir`: whether it went past the page cache, and the bytes.
fn both_engines(dir: &Path, faults: Option<Arc<Faults>>) -> Vec<(bool, Vec<u8>)> {
    let run = |ring| {
        let options = Options { ring, faults: faults.clone(), ..options() };
        let disk = Disk::create(dir, &[("all", BYTES as u64)], options).unwrap();
        (disk.is_direct(), round_trip(&disk))
    };
    vec![run(true), run(false)]
}

#[test]
fn without_o_direct_transfers_go_through_the_page_cache() {
    let dir = tempfile::tempdir().unwrap();
    let want = both_engines(dir.path(), None);
    let refused = Faults::none().from(Point::Direct, 0, Fault::Errno(Errno::INVAL));
    for (direct, bytes) in both_engines(dir.path(), Some(Arc::new(refused))) {
        assert!(!direct && bytes == want[0].1);
    }
    // ramfs takes no O_DIRECT and reserves no space: both fallbacks at once, for real.
    if let Some(ramfs) = Mounted::new("ramfs", "mode=700") {
        for (direct, bytes) in both_engines(ramfs.path(), None) {
            assert!(!direct && bytes == want[0].1);
        }
    }
    let shm = Path::new("/dev/shm");
    match shm.is_dir() {
        true => assert!(both_engines(shm, None).iter().all(|(_, bytes)| *bytes == want[0].1)),
        false => println!("skipped: no /dev/shm"),
    }
}

#[test]
fn a_full_drive_is_told_before_the_run_with_the_bytes_missing() {
    let Some(tmpfs) = Mounted::new("tmpfs", "size=4m") else { return };
    let free = tmpfs.free_bytes();
    let error = Disk::create(tmpfs.path(), &[("m", 6 << 20), ("v", 6 << 20)], options()).err().unwrap();
    let DiskError::NoSpace { need_bytes, free_bytes, .. } = error else { panic!("{error}") };
    assert_eq!((need_bytes, free_bytes), (12 << 20, free));
    assert!(error.to_string().contains("4.0 MiB are free: 8.0 MiB are missing"), "{error}");
    assert_eq!(tmpfs.free_bytes(), free, "a refused reservation gives everything back");
    let disk = Disk::create(tmpfs.path(), &[("m", 3 << 20)], options());
    drop(disk.unwrap_or_else(|error| panic!("3 MiB fit into 4: {error}")));
    assert_eq!(tmpfs.free_bytes(), free);
}

/// Runs one of the tests marked `ignore` below in a process of its own.
fn child(name: &str) -> Command {
    let mut command = Command::new(std::env::current_exe().unwrap());
    command.args(["--exact", name, "--ignored", "--nocapture"]).stdin(Stdio::piped()).stdout(Stdio::piped());
    command
}

/// The folder a child works in arrives on its standard input.
fn tell(child: &mut Child, dir: &Path) {
    writeln!(child.stdin.as_mut().unwrap(), "{}", dir.display()).unwrap();
}

fn told() -> String {
    let mut line = String::new();
    std::io::stdin().lock().read_line(&mut line).unwrap();
    line.trim().to_string()
}

#[test]
#[ignore = "run by a_limit_on_file_sizes_is_an_error_and_no_signal"]
fn child_with_a_limit_on_file_sizes() {
    use rustix::process::{Resource, Rlimit, setrlimit};
    let dir = told();
    setrlimit(Resource::Fsize, Rlimit { current: Some(1 << 20), maximum: Some(1 << 20) }).unwrap();
    let error = Disk::create(Path::new(&dir), &[("all", 2 << 20)], options()).err().unwrap();
    assert!(
        matches!(error, DiskError::FileLimit { need_bytes: 0x20_0000, limit_bytes: 0x10_0000 }),
        "{error}"
    );
    round_trip(&Disk::create(Path::new(&dir), &[("all", 1 << 20)], options()).unwrap());
}

#[test]
fn a_limit_on_file_sizes_is_an_error_and_no_signal() {
    let dir = tempfile::tempdir().unwrap();
    let mut child = child("child_with_a_limit_on_file_sizes").spawn().unwrap();
    tell(&mut child, dir.path());
    let output = child.wait_with_output().unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stdout));
}

#[test]
#[ignore = "run by a_killed_run_leaves_nothing_behind"]
fn child_that_is_killed() {
    let dir = told();
    let disk = Disk::create(Path::new(&dir), &[("all", 2 << 20)], options()).unwrap();
    let block = disk.block(2 << 20).unwrap();
    println!("\nready");
    let mut block = block;
    loop {
        // Killed while transfers are in flight.
        block = disk.submit_write(whole(block)).wait().unwrap();
    }
}

#[test]
fn a_killed_run_leaves_nothing_behind() {
    let tmpfs = Mounted::new("tmpfs", "size=4m");
    let plain = tempfile::tempdir().unwrap();
    let dir = tmpfs.as_ref().map_or(plain.path(), |tmpfs| tmpfs.path());
    let before = tmpfs.as_ref().map(Mounted::free_bytes);
    let mut child = child("child_that_is_killed").spawn().unwrap();
    tell(&mut child, dir);
    let mut lines = BufReader::new(child.stdout.take().unwrap()).lines();
    assert!(lines.any(|line| line.unwrap() == "ready"));
    let during = tmpfs.as_ref().map(Mounted::free_bytes);
    assert!(
        during.zip(before).is_none_or(|(during, before)| during + (2 << 20) <= before),
        "space is reserved"
    );
    child.kill().unwrap();
    child.wait().unwrap();
    // The kernel puts the rings of dead processes away in its own time.
    let freed = || tmpfs.as_ref().map(Mounted::free_bytes) == before;
    assert!(
        (0..1000).any(|_| freed() || (std::thread::sleep(Duration::from_millis(10)), false).1),
        "space is free"
    );
    assert_eq!(std::fs::read_dir(dir).unwrap().count(), 0);
}
