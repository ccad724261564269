//! What crosses the host link in a training step: weights up in their compute type, each gradient
//! down once, optimizer state never.
//!
//! One test after the other: what is held is counted for the whole process.

use device::{DType, Device};
use memory::pager::{About, LinkCount, Policy, Setup};
use memory::plan::Budgets;
use memory::trace::{Access, Phase};
use memory::{Arrays, Class, Need, Tier};
use std::ops::Range;
use std::sync::Mutex;

const CHUNK: usize = 2048;
const LAYERS: usize = 24;
const LEN: u64 = (LAYERS * CHUNK) as u64;
const CLASSES: [(Class, DType); 5] = [
    (Class::Param, DType::Bf16),
    (Class::Grad, DType::F32),
    (Class::Master, DType::U16),
    (Class::M, DType::F32),
    (Class::V, DType::F32),
];
/// Bytes of a layer's weights and gradients, and of all its state.
const ON_DEVICE: u64 = 6 * CHUNK as u64;
const STATE: u64 = 16 * CHUNK as u64;

static ALONE: Mutex<()> = Mutex::new(());

/// A budget that leaves chunks `bytes`.
fn budget(bytes: u64) -> Option<u64> {
    Some(bytes * 64 / 63 + 64)
}

fn arrays(dir: &std::path::Path, policy: Policy, budgets: Budgets) -> Arrays {
    let setup = Setup {
        device: Device::Cpu,
        budgets,
        ranks: 1,
        dir: dir.to_path_buf(),
        drive: None,
        policy,
        other_bytes: 0,
        chunk_elements: CHUNK,
        filed: None,
    };
    Arrays::paged(LEN as usize, setup, &CLASSES, None).unwrap()
}

fn visit(arrays: &mut Arrays, phase: Phase, op: &'static str, needs: &[(Class, Access)], layer: usize) {
    let elements = elements(layer);
    let need = |(class, access): &(Class, Access)| Need {
        class: *class,
        elements: elements.clone(),
        access: *access,
    };
    let needs: Vec<Need> = needs.iter().map(need).collect();
    arrays.visit(About { phase, op, layer: layer as u32 }, &needs).unwrap();
}

fn elements(layer: usize) -> Range<usize> {
    layer * CHUNK..(layer + 1) * CHUNK
}

/// There, back with the norm, and the updates at the end; values are checked on the way.
fn step(arrays: &mut Arrays, count: u16) {
    use Access::{Read, ReadWrite};
    arrays.begin_step().unwrap();
    for layer in 0..LAYERS {
        visit(arrays, Phase::Forward, "op", &[(Class::Param, Read)], layer);
        let byte = arrays.view(Class::Param, elements(layer)).bytes()[7];
        assert_eq!(u16::from(byte), count, "weights of layer {layer}");
    }
    for layer in (0..LAYERS).rev() {
        visit(arrays, Phase::Backward, "op", &[(Class::Grad, ReadWrite), (Class::Param, Read)], layer);
        arrays.view_mut(Class::Grad, elements(layer)).f32().fill(f32::from(count) + layer as f32);
        visit(arrays, Phase::Optimizer, "norm", &[(Class::Grad, Read)], layer);
    }
    for layer in 0..LAYERS {
        let needs = CLASSES.map(|(class, _)| (class, if class == Class::Grad { Read } else { ReadWrite }));
        visit(arrays, Phase::Optimizer, "update", &needs, layer);
        let update = arrays.update(elements(layer));
        assert_eq!(update.grad.f32()[0], f32::from(count) + layer as f32);
        let (m, v) = (update.m.f32(), update.v.f32());
        assert_eq!((m[1], v[2]), (f32::from(count), f32::from(count)), "moments of layer {layer}");
        m.iter_mut().chain(v).for_each(|x| *x += 1.0);
        update.param.bytes().fill(count as u8 + 1);
        arrays.discard(Class::Grad, elements(layer)).unwrap();
    }
    arrays.end_step().unwrap();
}

/// Links of the last of so many steps.
fn links(arrays: &mut Arrays, steps: Range<u16>) -> Vec<LinkCount> {
    let last = steps.end - 1;
    for count in steps {
        if count == last {
            arrays.report();
        }
        step(arrays, count);
    }
    arrays.report().unwrap().links
}

#[test]
fn optimizer_state_never_crosses_the_host_link_and_a_gradient_crosses_once() {
    let _alone = ALONE.lock();
    let dir = tempfile::tempdir().unwrap();
    for policy in [Policy::Dynamic, Policy::Belady, Policy::Lru] {
        let budgets = Budgets { hbm: budget(4 * ON_DEVICE), dram: budget(LAYERS as u64 * STATE), nvme: None };
        let mut arrays = arrays(dir.path(), policy, budgets);
        let links = links(&mut arrays, 0..5);
        let [link] = links[..] else { panic!("{links:?}") };
        assert_eq!((link.upper, link.lower), (Tier::Hbm, Tier::Dram));
        // Two bytes there, at most two back, four of gradient.
        assert!(link.up_bytes >= 2 * LEN && link.up_bytes <= 4 * LEN, "{policy:?} {link:?}");
        assert_eq!(link.down_bytes, 4 * LEN, "{policy:?} {link:?}");
    }
}

#[test]
fn a_drive_behind_the_host_reads_and_writes_the_state_at_most_once_a_step() {
    let _alone = ALONE.lock();
    let dir = tempfile::tempdir().unwrap();
    let budgets = Budgets { hbm: budget(4 * ON_DEVICE), dram: budget(8 * STATE), nvme: Some(1 << 30) };
    let mut arrays = arrays(dir.path(), Policy::Dynamic, budgets);
    let links = links(&mut arrays, 0..6);
    assert_eq!(links.len(), 2, "{links:?}");
    assert_eq!(links[0].down_bytes, 4 * LEN, "{links:?}");
    assert!(links[0].up_bytes <= 4 * LEN, "{links:?}");
    assert!(links[1].up_bytes > 0 && links[1].down_bytes > 0, "{links:?}");
    println!("{links:?}");
}

#[test]
fn budgets_change_between_steps_and_what_cannot_work_is_refused() {
    let _alone = ALONE.lock();
    let dir = tempfile::tempdir().unwrap();
    let of = |device: u64, host: u64| Budgets {
        hbm: budget(device * ON_DEVICE),
        dram: budget(host * STATE),
        nvme: Some(1 << 30),
    };
    let mut arrays = arrays(dir.path(), Policy::Dynamic, of(8, 30));
    links(&mut arrays, 0..3);
    arrays.set_budget(of(3, 6)).unwrap();
    let less = links(&mut arrays, 3..6);
    let peaks = arrays.report().unwrap().tiers;
    assert!(peaks[0].peak_bytes <= 3 * ON_DEVICE + 64 && peaks[1].peak_bytes <= 6 * STATE + 64, "{peaks:?}");
    let said = arrays.set_budget(of(0, 6)).unwrap_err().to_string();
    assert!(said.contains("memory.simulate_device") && said.contains("too little"), "{said}");
    assert_eq!(arrays.budgets(), Some(of(3, 6)));
    let said = arrays.set_budget(Budgets { hbm: None, ..of(3, 6) }).unwrap_err().to_string();
    assert!(said.contains("tiers are set up when a run begins"), "{said}");
    arrays.set_budget(of(20, 40)).unwrap();
    let more = links(&mut arrays, 6..9);
    assert!(more[1].up_bytes < less[1].up_bytes, "{less:?} {more:?}");
}
