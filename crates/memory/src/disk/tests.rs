//! The engine as its users see it.

use super::piece::PAUSE;
use super::*;

fn filled(disk: &Disk, bytes: usize, value: u8) -> Block {
    let mut block = disk.block(bytes).unwrap();
    block.bytes_mut().fill(value);
    block
}

fn whole(region: Region, offset: u64, block: Block) -> Request {
    let range = 0..block.len();
    Request { region, offset, block, range, deadline: 0 }
}

fn engines() -> [Options; 2] {
    [Options::default(), Options { ring: false, ..Options::default() }]
}

#[test]
fn what_is_written_is_read_and_regions_begin_as_zeros() {
    for options in engines() {
        written_is_read(options);
    }
}

fn written_is_read(options: Options) {
    let dir = tempfile::tempdir().unwrap();
    let disk = Disk::create(dir.path(), &[("m", 5000), ("v", 3 << 20)], options).unwrap();
    println!("{}", disk.engine());
    let (m, v) = (disk.region("m").unwrap(), disk.region("v").unwrap());
    let wrote = disk.submit_write(whole(v, 0, filled(&disk, 3 << 20, 7)));
    let zeros = disk.submit_read(whole(m, 0, filled(&disk, 8192, 9))).wait().unwrap();
    assert!(zeros.bytes().iter().all(|x| *x == 0));
    // The read below is urgent and touches the same bytes: it waits for the write all the same.
    let seven = disk.submit_read(whole(v, 1 << 20, filled(&disk, 1 << 20, 0))).wait().unwrap();
    assert!(seven.bytes().iter().all(|x| *x == 7));
    wrote.wait().unwrap();
    let counters = disk.counters();
    assert_eq!(
        (counters.read_bytes, counters.written_bytes, counters.requests),
        ((1 << 20) + 8192, 3 << 20, 3)
    );
    assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 0, "the file has no name");
}

/// The lines in which the kernel lists registered memory of this process' rings that begins at
/// `start`; `None` where it lists none at all.
fn registered_at(start: *const u8) -> Option<usize> {
    let mut listed = None;
    for entry in std::fs::read_dir("/proc/self/fdinfo").ok()? {
        let text = std::fs::read_to_string(entry.ok()?.path()).unwrap_or_default();
        if text.contains("UserBufs:") {
            let here = text.lines().filter(|line| line.contains(&format!("{start:p}/"))).count();
            *listed.get_or_insert(0) += here;
        }
    }
    listed
}

#[test]
fn the_kernel_knows_the_blocks_of_a_disk_while_they_live() {
    let dir = tempfile::tempdir().unwrap();
    let disk = Disk::create(dir.path(), &[("m", 1 << 20)], Options::default()).unwrap();
    let region = disk.region("m").unwrap();
    let block = disk.submit_write(whole(region, 0, filled(&disk, 1 << 20, 1))).wait().unwrap();
    let start = block.bytes().as_ptr();
    // The kernel's listing gives way to a ring at work, so it may take several looks.
    let becomes = |count| {
        (0..1000).any(|_| registered_at(start) == Some(count) || (std::thread::sleep(PAUSE), false).1)
    };
    match registered_at(start) {
        Some(_) if *disk.engine() == Engine::Ring => assert!(becomes(1)),
        _ => return println!("skipped: no ring, or a kernel that lists no registered memory"),
    }
    // Kept, so that no other block begins there.
    let kept = block.into_buffer();
    disk.submit_read(whole(region, 0, filled(&disk, 4096, 1))).wait().unwrap();
    assert!(becomes(0));
    drop(kept);
}
