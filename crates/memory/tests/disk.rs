//! The disk tier as its users see it, with either engine: the same bytes as a vector, every
//! failure at every operation, damaged files, closing.

use memory::disk::{
    Block, Disk, DiskError, Failed, Fault, Faults, Options, PAGE_BYTES, Point, Region, Request, Ticket,
};
use proptest::prelude::*;
use rustix::io::Errno;
use std::os::fd::{AsFd, AsRawFd};
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::Arc;

/// Small operations, so that a request is many.
const BLOCK_BYTES: usize = 2 * PAGE_BYTES;
const REGION_PAGES: usize = 5;
const REGION_BYTES: usize = REGION_PAGES * PAGE_BYTES;
const NAMES: [&str; 3] = ["master", "m", "v"];

fn open(dir: &Path, ring: bool, faults: Option<Arc<Faults>>) -> Disk {
    let layout = NAMES.map(|name| (name, REGION_BYTES as u64));
    Disk::create(dir, &layout, Options { depth: 4, block_bytes: BLOCK_BYTES, ring, faults }).unwrap()
}

fn filled(disk: &Disk, bytes: usize, seed: u8) -> Block {
    let mut block = disk.block(bytes).unwrap();
    fill(block.bytes_mut(), seed);
    block
}

/// Bytes that differ from page to page, and never repeat over a region.
fn fill(bytes: &mut [u8], seed: u8) {
    let words = bytes.chunks_exact_mut(2).enumerate();
    words.for_each(|(i, word)| word.copy_from_slice(&((i as u16) ^ ((seed as u16) << 8)).to_le_bytes()));
}

fn whole(region: usize, block: Block) -> Request {
    let range = 0..block.len();
    Request { region: Region(region), offset: 0, block, range, deadline: region as u64 }
}

type Ended = Vec<Result<Block, Failed>>;

/// Writes every region, then reads every region: (results of writes, results of reads).
fn workload(disk: &Disk) -> (Ended, Ended) {
    let write = |region| disk.submit_write(whole(region, filled(disk, REGION_BYTES, 10 + region as u8)));
    let tickets: Vec<Ticket> = (0..NAMES.len()).map(write).collect();
    let writes = tickets.into_iter().map(Ticket::wait).collect();
    let read = |region| disk.submit_read(whole(region, filled(disk, REGION_BYTES, 99)));
    let tickets: Vec<Ticket> = (0..NAMES.len()).map(read).collect();
    (writes, tickets.into_iter().map(Ticket::wait).collect())
}

fn holds(block: &Block, region: usize) -> bool {
    let mut want = vec![0; REGION_BYTES];
    fill(&mut want, 10 + region as u8);
    block.bytes() == want
}

#[test]
fn every_operation_may_be_interrupted_put_off_or_cut_short() {
    let passing =
        [Fault::Errno(Errno::INTR), Fault::Errno(Errno::AGAIN), Fault::Short(PAGE_BYTES), Fault::Short(1)];
    for_every_operation(&passing, |disk, _, case| {
        let (writes, reads) = workload(disk);
        assert!(writes.iter().all(Result::is_ok), "{case}");
        for (region, read) in reads.iter().enumerate() {
            assert!(holds(read.as_ref().unwrap(), region), "{case}");
        }
    });
}

#[test]
fn every_operation_may_fail_and_no_wrong_byte_gets_out() {
    let hard = [Fault::Errno(Errno::IO), Fault::Errno(Errno::NOSPC)];
    for_every_operation(&hard, |disk, point, case| {
        let (writes, reads) = workload(disk);
        let failed: Vec<usize> =
            (0..NAMES.len()).filter(|i| writes[*i].is_err() || reads[*i].is_err()).collect();
        assert_eq!(failed.len(), 1, "{case}");
        for (region, read) in reads.iter().enumerate() {
            match read {
                Ok(block) => assert!(holds(block, region), "{case}"),
                Err(failed) => {
                    let block = failed.block.as_ref().unwrap();
                    assert!(
                        block.bytes().iter().all(|byte| *byte == 0xff),
                        "{case}: half-read bytes got out"
                    );
                }
            }
        }
        let region = failed[0];
        if point == Point::Write {
            let block = writes[region].as_ref().unwrap_err().block.as_ref().unwrap();
            assert!(holds(block, region), "{case}: the data comes back");
            let after = &reads[region].as_ref().unwrap_err().error;
            assert!(matches!(after, DiskError::Damaged { .. }), "{case}: {after}");
        }
        check_message(&writes, &reads, region, case);
        // The fault is over: writing again heals what it left.
        let (writes, reads) = workload(disk);
        assert!(writes.iter().all(Result::is_ok), "{case}");
        assert!(reads.iter().enumerate().all(|(i, read)| holds(read.as_ref().unwrap(), i)), "{case}");
    });
}

fn check_message(
    writes: &[Result<Block, Failed>],
    reads: &[Result<Block, Failed>],
    region: usize,
    case: &str,
) {
    let first = writes[region].as_ref().err().or(reads[region].as_ref().err()).unwrap();
    let message = first.to_string();
    assert!(message.contains(&format!("region `{}`", NAMES[region])), "{case}: {message}");
    let full = case.contains("StorageFull") && case.contains("Write");
    assert_eq!(matches!(first.error, DiskError::Full { .. }), full, "{case}: {message}");
}

/// Runs `test` with each fault at each operation of the workload, with each engine.
fn for_every_operation(faults: &[Fault], test: impl Fn(&Disk, Point, &str)) {
    let dir = tempfile::tempdir().unwrap();
    for ring in [true, false] {
        for point in [Point::Write, Point::Read] {
            let counting = Arc::new(Faults::none());
            workload(&open(dir.path(), ring, Some(counting.clone())));
            let operations = counting.passed(point);
            assert!(operations >= 9, "a workload of {operations} operations");
            for nth in 0..operations {
                for fault in faults {
                    let disk = open(dir.path(), ring, Some(Arc::new(Faults::none().at(point, nth, *fault))));
                    test(&disk, point, &format!("{}, {point:?} {nth}: {fault:?}", disk.engine()));
                }
            }
        }
    }
}

#[test]
fn a_system_that_never_answers_well_is_given_up_with_its_word() {
    let dir = tempfile::tempdir().unwrap();
    for ring in [true, false] {
        let faults = Faults::none().from(Point::Read, 0, Fault::Errno(Errno::INTR));
        let disk = open(dir.path(), ring, Some(Arc::new(faults)));
        let failed = disk.submit_read(whole(0, filled(&disk, REGION_BYTES, 0))).wait().unwrap_err();
        assert!(matches!(failed.error, DiskError::Io { cause: Errno::INTR, .. }), "{failed}");
    }
}

/// The offload file as another program with rights on it sees it.
fn behind_the_back(disk: &Disk) -> std::fs::File {
    let path = format!("/proc/self/fd/{}", disk.as_fd().as_raw_fd());
    std::fs::File::options().read(true).write(true).open(path).unwrap()
}

#[test]
fn damaged_stale_swapped_and_missing_bytes_are_named() {
    let dir = tempfile::tempdir().unwrap();
    for ring in [true, false] {
        let disk = open(dir.path(), ring, None);
        assert!(workload(&disk).1.iter().all(Result::is_ok));
        let file = behind_the_back(&disk);
        let page = PAGE_BYTES as u64;
        let (m, v) = (REGION_BYTES as u64, 2 * REGION_BYTES as u64);
        let mut byte = [0];
        file.read_exact_at(&mut byte, m + 3 * page + 17).unwrap();
        file.write_all_at(&[byte[0] ^ 4], m + 3 * page + 17).unwrap();
        let failed = disk.submit_read(whole(1, filled(&disk, REGION_BYTES, 0))).wait().unwrap_err();
        let DiskError::Damaged { place, found, want } = &failed.error else { panic!("{failed}") };
        assert_eq!((place.region.as_str(), place.offset, place.dir.as_path()), ("m", 3 * page, dir.path()));
        assert_ne!(found, want);
        // A page in the place of another, whole in itself.
        let mut other = vec![0; PAGE_BYTES];
        file.read_exact_at(&mut other, v + page).unwrap();
        file.write_all_at(&other, v).unwrap();
        let failed = disk.submit_read(whole(2, filled(&disk, REGION_BYTES, 0))).wait().unwrap_err();
        assert!(failed.to_string().contains("region `v`, 4096 bytes at 0"), "{failed}");
        file.set_len(v + page).unwrap();
        let failed = disk.submit_read(whole(2, filled(&disk, REGION_BYTES, 0))).wait().unwrap_err();
        assert!(matches!(failed.error, DiskError::Truncated { .. } | DiskError::Damaged { .. }), "{failed}");
        let fine = disk.submit_read(whole(0, filled(&disk, REGION_BYTES, 0))).wait().unwrap();
        assert!(holds(&fine, 0));
    }
}

#[test]
fn requests_that_no_layout_allows_come_back_with_the_rule() {
    let dir = tempfile::tempdir().unwrap();
    let disk = open(dir.path(), true, None);
    let cases = [
        (3, 0, 0..PAGE_BYTES, "no such region"),
        (0, 0, 0..0, "empty"),
        (0, 512, 0..PAGE_BYTES, "multiples of 4096"),
        (0, 0, 0..512, "multiples of 4096"),
        (0, 0, 0..3 * PAGE_BYTES, "beyond its block"),
        (0, REGION_BYTES as u64, 0..PAGE_BYTES, "beyond the region"),
        (0, u64::MAX - 4095, 0..PAGE_BYTES, "beyond the region"),
    ];
    for (region, offset, range, rule) in cases {
        let block = disk.block(2 * PAGE_BYTES).unwrap();
        let request = Request { region: Region(region), offset, block, range, deadline: 0 };
        let failed = disk.submit_read(request).wait().unwrap_err();
        assert!(failed.block.is_some() && failed.to_string().contains(rule), "{failed}");
    }
    assert!(Disk::create(dir.path(), &[("all", u64::MAX)], Options::default()).is_err());
}

#[test]
fn closing_ends_every_ticket_and_forgotten_tickets_do_no_harm() {
    let dir = tempfile::tempdir().unwrap();
    for ring in [true, false] {
        let disk = open(dir.path(), ring, None);
        let submit = |i: usize| disk.submit_write(whole(i % 3, filled(&disk, REGION_BYTES, i as u8)));
        let tickets: Vec<Ticket> = (0..60).map(submit).collect();
        drop(submit(60));
        drop(disk);
        for ticket in tickets {
            match ticket.wait() {
                Ok(block) => assert_eq!(block.len(), REGION_BYTES),
                Err(failed) => assert!(failed.error == DiskError::Closed && failed.block.is_some()),
            }
        }
    }
}

#[test]
fn blocks_come_go_and_outlive_their_disk() {
    let dir = tempfile::tempdir().unwrap();
    let disk = open(dir.path(), true, None);
    let mut kept = Vec::new();
    // More blocks than the ring has places, of changing sizes, so that places are taken again.
    for i in 0..1500usize {
        let pages = 1 + i % REGION_PAGES;
        let mut block = filled(&disk, pages * PAGE_BYTES, i as u8);
        block = disk.submit_write(whole(i % 3, block)).wait().unwrap();
        let want = block.bytes().to_vec();
        block.bytes_mut().fill(0);
        block = disk.submit_read(whole(i % 3, block)).wait().unwrap();
        assert!(block.bytes() == want, "block {i}");
        if i % 7 == 0 {
            kept.push(block);
        }
    }
    let other = open(dir.path(), true, None);
    let block = other.submit_write(whole(0, kept.pop().unwrap())).wait().unwrap();
    drop(disk);
    drop(other.submit_write(whole(1, block)).wait().unwrap().into_buffer());
}

#[derive(Clone, Debug)]
struct Step {
    write: bool,
    page: usize,
    pages: usize,
    deadline: u64,
}

fn steps() -> impl Strategy<Value = Vec<Step>> {
    let step = (any::<bool>(), 0..REGION_PAGES, 1..=REGION_PAGES, 0..4u64).prop_map(
        |(write, page, pages, deadline)| {
            let pages = pages.min(REGION_PAGES - page);
            Step { write, page, pages, deadline }
        },
    );
    prop::collection::vec(step, 1..60)
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(40))]

    /// Whatever is submitted without waiting, in whatever order deadlines say, with operations cut
    /// short and interrupted: each read sees the writes submitted before it, as with a vector.
    #[test]
    fn the_file_is_a_vector(steps in steps(), ring in any::<bool>(), every in 1u64..9) {
        let dir = tempfile::tempdir().unwrap();
        let rough = (0..30).fold(Faults::none(), |faults, i| {
            let fault = if i % 2 == 0 { Fault::Short(PAGE_BYTES) } else { Fault::Errno(Errno::INTR) };
            faults.at(Point::Read, i * every, fault).at(Point::Write, i * every + 1, fault)
        });
        let disk = open(dir.path(), ring, Some(Arc::new(rough)));
        let mut model = vec![0u8; REGION_BYTES];
        let mut pending = Vec::new();
        for (i, step) in steps.iter().enumerate() {
            let bytes = step.page * PAGE_BYTES..(step.page + step.pages) * PAGE_BYTES;
            // The range lies inside a larger block, which must stay as it was around it.
            let mut block = disk.block((step.pages + 1) * PAGE_BYTES).unwrap();
            fill(block.bytes_mut(), i as u8);
            let offset = bytes.start as u64;
            let range = PAGE_BYTES..block.len();
            let write = step.write.then(|| block.bytes()[range.clone()].to_vec());
            let request = Request { region: Region(1), offset, block, range, deadline: step.deadline };
            match write {
                Some(data) => {
                    model[bytes].copy_from_slice(&data);
                    pending.push((disk.submit_write(request), data, i));
                }
                None => pending.push((disk.submit_read(request), model[bytes].to_vec(), i)),
            }
        }
        for (ticket, want, i) in pending {
            let block = ticket.wait().unwrap();
            prop_assert!(block.bytes()[PAGE_BYTES..] == want, "step {}", i);
            let mut head = vec![0; PAGE_BYTES];
            fill(&mut head, i as u8);
            prop_assert!(block.bytes()[..PAGE_BYTES] == head, "step {}", i);
        }
    }
}
