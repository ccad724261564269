//! The engine as its users see it.

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
