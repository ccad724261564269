//! Arrays over tiers that ranks share. Alone in its file: what is held is counted for the whole process.

use device::{DType, Device};
use memory::pager::{About, PagerError, Policy, Setup};
use memory::plan::Budgets;
use memory::trace::{Access, Phase};
use memory::{Arrays, Class, Need, Stripes};

const ABOUT: About = About { phase: Phase::Forward, op: "op", layer: 0 };

#[test]
fn of_shared_arrays_a_rank_has_its_own_granules_in_tiers_and_those_of_others_as_buffers() {
    let dir = tempfile::tempdir().unwrap();
    // Granules of 4096 elements, five of six with elements in them: three of rank 0, two of rank 1.
    let len = 4 * 4096 + 100;
    let paged = |index, nvme_bytes| {
        let setup = Setup {
            device: Device::Cpu,
            budgets: Budgets { hbm: None, dram: Some(64 << 20), nvme: Some(nvme_bytes) },
            ranks: 1,
            dir: dir.path().to_path_buf(),
            drive: None,
            policy: Policy::Dynamic,
            other_bytes: 0,
            chunk_elements: 4096,
            filed: None,
        };
        Arrays::paged(len, setup, &[(Class::Param, DType::F32)], Some(Stripes::new(len, 2, index)))
    };
    let granule = 4096 * 4;
    // The drive has room for our granules, not for all.
    assert!(
        matches!(paged(0, 3 * granule - 1), Err(PagerError::Drive { needs_bytes, .. }) if needs_bytes == 3 * granule)
    );
    let mut arrays = paged(1, 2 * granule).unwrap();
    let held = || {
        let usage = device::memory_use();
        (usage.live_bytes - usage.region_bytes, usage.region_bytes)
    };
    let before = held();
    arrays.visit(ABOUT, &[Need { class: Class::Param, elements: 0..len, access: Access::Write }]).unwrap();
    assert_eq!(held(), (before.0, before.1 + 2 * granule as usize));
    (0..3).for_each(|stripe| arrays.open_stripe(Class::Param, stripe));
    // Of the last stripe both granules: ours has no elements.
    assert_eq!(held(), (before.0 + 4 * granule as usize, before.1 + 2 * granule as usize));
    arrays.view_mut(Class::Param, 0..len).f32().fill(3.0);
    assert_eq!(arrays.lend_stripe(Class::Param, 2).view_mut(DType::F32).len(), 2 * 4096);
    (0..3).for_each(|stripe| arrays.close_stripe(Class::Param, stripe));
    assert_eq!(held(), (before.0, before.1 + 2 * granule as usize));
    let own: Vec<_> = arrays.pieces(0..len).collect();
    assert_eq!(own, [4096..8192, 3 * 4096..4 * 4096]);
    assert!(own.into_iter().all(|own| arrays.view(Class::Param, own).f32().iter().all(|x| *x == 3.0)));
    drop(arrays);
    assert_eq!(held(), before);
}
