//! Arrays over tiers hold what was written into them, whatever is visited in whatever order, and
//! chunks never hold more than they may.

use device::{Buffer, DType, Device};
use memory::pager::{About, PagerError, Policy, Setup};
use memory::plan::Budgets;
use memory::trace::{Access, Phase};
use memory::{Arrays, Class, Need};
use proptest::prelude::*;
use std::sync::{LazyLock, Mutex};

const CHUNK: usize = 2048;
const LEN: usize = 10 * CHUNK + 777;
const CLASSES: [Class; 3] = [Class::Param, Class::Grad, Class::M];

/// What is no chunk is counted for the whole process: it is this buffer alone.
const OTHERS: usize = 1 << 20;
static HELD: LazyLock<Mutex<Buffer>> =
    LazyLock::new(|| Mutex::new(Buffer::new(Device::Cpu, OTHERS).unwrap()));

/// Room for `chunks` chunks of f32, each of 8 KiB.
fn arrays(dir: &std::path::Path, policy: Policy, chunks: u64) -> Arrays {
    let setup = Setup {
        device: Device::Cpu,
        // A 64th of the budget stays free.
        budgets: Budgets { hbm: None, dram: Some(budget(OTHERS as u64, chunks)), nvme: Some(1 << 30) },
        ranks: 1,
        dir: dir.to_path_buf(),
        drive: None,
        policy,
        other_bytes: 0,
        chunk_elements: CHUNK,
        filed: None,
    };
    Arrays::paged(LEN, setup, &CLASSES.map(|class| (class, DType::F32)), None).unwrap()
}

/// A budget that leaves room for `chunks` beside `others`.
fn budget(others: u64, chunks: u64) -> u64 {
    (others + chunks * 8192) * 64 / 63 + 64
}

const ABOUT: About = About { phase: Phase::Forward, op: "op", layer: 0 };

/// One thing done to the arrays.
#[derive(Clone, Debug)]
enum Act {
    /// Visit elements of some classes and, where writing, add to each of them.
    Visit { first: usize, len: usize, classes: usize, write: bool },
    /// Forget a class.
    Discard(usize),
}

fn act() -> impl Strategy<Value = Act> {
    let visit =
        (0..LEN - 1, 1..2 * CHUNK, 1..8usize, any::<bool>()).prop_map(|(first, len, classes, write)| {
            Act::Visit { first, len: len.min(LEN - first), classes, write }
        });
    prop_oneof![12 => visit, 1 => (0..3usize).prop_map(Act::Discard)]
}

/// Do it to the arrays and to plain vectors; every element seen must be the same.
fn perform(arrays: &mut Arrays, plain: &mut [Vec<f32>], act: &Act) -> Result<(), PagerError> {
    match act {
        Act::Discard(class) => {
            arrays.discard(CLASSES[*class], 0..LEN)?;
            plain[*class].fill(0.0);
        }
        Act::Visit { first, len, classes, write } => {
            let elements = *first..first + len;
            let access = if *write { Access::ReadWrite } else { Access::Read };
            let chosen: Vec<usize> = (0..3).filter(|class| classes >> class & 1 == 1).collect();
            let need = |class: &usize| Need { class: CLASSES[*class], elements: elements.clone(), access };
            arrays.visit(ABOUT, &chosen.iter().map(need).collect::<Vec<_>>())?;
            for class in chosen {
                let plain = &mut plain[class][elements.clone()];
                assert_eq!(arrays.view(CLASSES[class], elements.clone()).f32(), plain);
                if *write {
                    let ours = arrays.view_mut(CLASSES[class], elements.clone()).f32();
                    let both = ours.iter_mut().zip(plain.iter_mut()).enumerate();
                    both.for_each(|(i, (a, b))| {
                        (*a, *b) = (*a + (i % 7) as f32, *b + (i % 7) as f32);
                    });
                }
            }
        }
    }
    Ok(())
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 24, ..ProptestConfig::default() })]

    #[test]
    fn what_was_written_is_read(
        step in prop::collection::vec(act(), 1..25),
        between in prop::collection::vec(act(), 0..6),
        policy in prop::sample::select(&[Policy::Dynamic, Policy::Belady, Policy::Static, Policy::Lru][..]),
        chunks in 10u64..40,
        change in 0..20usize,
    ) {
        let _others = HELD.lock();
        let dir = tempfile::tempdir().unwrap();
        let mut arrays = arrays(dir.path(), policy, chunks);
        let mut plain = vec![vec![0.0; LEN]; 3];
        // The same step over and over, things between steps, and one step that is another.
        for round in 0..6 {
            arrays.begin_step().unwrap();
            let skipped = if round == 4 { change } else { usize::MAX };
            for (_, act) in step.iter().enumerate().filter(|(i, _)| *i != skipped) {
                perform(&mut arrays, &mut plain, act).unwrap();
            }
            arrays.end_step().unwrap();
            let report = arrays.report().unwrap();
            prop_assert!(report.tiers[0].peak_bytes <= chunks * 8192 + 64, "{report:?}");
            for act in &between {
                perform(&mut arrays, &mut plain, act).unwrap();
            }
        }
        perform(&mut arrays, &mut plain, &Act::Discard(1)).unwrap();
        for first in (0..LEN).step_by(CHUNK) {
            let act = Act::Visit { first, len: CHUNK.min(LEN - first), classes: 7, write: false };
            perform(&mut arrays, &mut plain, &act).unwrap();
        }
    }
}

#[test]
fn clean_chunks_are_dropped_and_never_written_back() {
    let _others = HELD.lock();
    let dir = tempfile::tempdir().unwrap();
    let mut arrays = arrays(dir.path(), Policy::Lru, 4);
    let visit = |arrays: &mut Arrays, i: usize, access| {
        let need = Need { class: Class::Param, elements: i * CHUNK..(i + 1) * CHUNK, access };
        arrays.visit(ABOUT, &[need]).unwrap();
    };
    (0..10).for_each(|i| visit(&mut arrays, i, Access::ReadWrite));
    (0..10).for_each(|i| visit(&mut arrays, i, Access::Read));
    let link = arrays.report().unwrap().links[0];
    for _ in 0..3 {
        (0..10).for_each(|i| visit(&mut arrays, i, Access::Read));
    }
    let clean = arrays.report().unwrap().links[0];
    assert!(link.down_bytes > 0 && clean.up_bytes > 0, "{link:?} {clean:?}");
    assert_eq!(clean.down_bytes, 0);
}

#[test]
fn what_one_moment_needs_beyond_the_budget_is_an_error() {
    let _others = HELD.lock();
    let dir = tempfile::tempdir().unwrap();
    let mut arrays = arrays(dir.path(), Policy::Dynamic, 4);
    let need = Need { class: Class::M, elements: 0..LEN, access: Access::Read };
    let error = arrays.visit(About { op: "wide", ..ABOUT }, &[need]).unwrap_err();
    assert!(matches!(error, PagerError::TooSmall { op: "wide", .. }), "{error}");
    assert!(error.to_string().contains("raise memory.dram"));
}

#[test]
fn what_is_written_in_part_begins_as_zeros_whatever_lay_there() {
    let _others = HELD.lock();
    let dir = tempfile::tempdir().unwrap();
    // Whole huge pages, which are handed on from who leaves to who comes.
    let chunk = 1 << 20;
    let dram = Some((OTHERS as u64 + 9 * chunk as u64) * 64 / 63);
    let setup = Setup {
        device: Device::Cpu,
        budgets: Budgets { hbm: None, dram, nvme: Some(1 << 30) },
        ranks: 1,
        dir: dir.path().to_path_buf(),
        drive: None,
        policy: Policy::Dynamic,
        other_bytes: 0,
        chunk_elements: chunk,
        filed: None,
    };
    let classes = [(Class::Param, DType::F32), (Class::Grad, DType::F32)];
    let mut arrays = Arrays::paged(4 * chunk + 2048, setup, &classes, None).unwrap();
    let mut write = |elements: std::ops::Range<usize>, value: f32| {
        let need = Need { class: Class::Grad, elements: elements.clone(), access: Access::Write };
        arrays.visit(ABOUT, &[need]).unwrap();
        arrays.view_mut(Class::Grad, elements.clone()).f32().fill(value);
        let first = elements.start / chunk * chunk;
        let whole = first..(first + chunk).min(arrays.len());
        let seen = arrays.view(Class::Grad, whole.clone()).f32().to_vec();
        arrays.discard(Class::Grad, whole).unwrap();
        let inside = |i: usize| elements.contains(&(first + i));
        assert!(seen.iter().enumerate().all(|(i, x)| *x == if inside(i) { value } else { 0.0 }));
    };
    for round in 0..3 {
        write(round * chunk..(round + 1) * chunk, 7.0);
        write(chunk + 5..2 * chunk, 3.0);
        write(0..chunk - 1, 4.0);
        write(4 * chunk..4 * chunk + 2048, 5.0);
        write(4 * chunk..4 * chunk + 2047, 6.0);
    }
}
