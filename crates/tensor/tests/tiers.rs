//! Gradients over tiers, whose chunks begin as whatever lay in their pages, against gradients in memory.

use memory::pager::{About, Policy, Setup};
use memory::plan::Budgets;
use memory::trace::{Access, Phase};
use memory::{Class, Need};
use std::sync::Arc;
use tensor::{DType, Device, Init, Norm, ParamList, ParamRef, ParamSpec, ParamStore, Tape, Targets};

const V: usize = 1201;
const D: usize = 701;
const M: usize = 9;
/// Whole huge pages: who leaves hands them on.
const CHUNK: usize = 1 << 20;
const ABOUT: About = About { phase: Phase::Forward, op: "test", layer: 0 };

/// No parameter ends where a chunk or a cache line does; nobody uses the last one.
fn list() -> (ParamList, [ParamRef; 4]) {
    let mut list = ParamList::default();
    let mut add = |name: &str, shape: &[usize]| {
        let (name, init) = (name.to_string(), Init::Normal(0.05));
        list.add(ParamSpec { name, shape: shape.to_vec(), init, decay: true })
    };
    let params = [add("embedding", &[V, D]), add("norm", &[D]), add("inner", &[D, D]), add("head", &[V, D])];
    add("unused", &[D, 3]);
    (list, params)
}

fn bring(store: &mut ParamStore, class: Class, elements: std::ops::Range<usize>, access: Access) {
    store.bring(ABOUT, &[Need { class, elements, access }]).unwrap();
}

fn fill(store: &mut ParamStore) {
    for (nth, param) in store.refs().enumerate() {
        let range = store.range(param);
        bring(store, Class::Param, range.clone(), Access::ReadWrite);
        let value = |i: usize| ((i * 37 + nth) % 101) as f32 / 400.0 - 0.12;
        store.weight_mut(param).f32().iter_mut().enumerate().for_each(|(i, x)| *x = value(i));
    }
}

/// Leaves pages that hold no zeros to whoever comes next.
fn litter(store: &mut ParamStore) {
    let all = 0..store.flat_len();
    for piece in store.arrays().pieces(all.clone()) {
        bring(store, Class::M, piece.clone(), Access::Write);
        store.arrays_mut().view_mut(Class::M, piece).f32().fill(7.0);
    }
    store.arrays_mut().discard(Class::M, all).unwrap();
}

/// Bits of all gradients of a step, padding included.
fn step(store: &mut ParamStore, [embedding, norm, inner, head]: [ParamRef; 4]) -> Vec<u32> {
    store.clear_grads().unwrap();
    let ids: Arc<[u32]> = (0..M as u32).map(|i| i * 7 % V as u32).collect();
    let targets: Vec<u32> = (0..M as u32).map(|i| i * 5 % V as u32).collect();
    let mut tape = Tape::recording(store);
    let x = tape.embedding(&[(ids, embedding)]).unwrap();
    let x = tape.norm(&x, Norm::Rms { weight: norm, eps: 1e-5 }).unwrap();
    let x = tape.linear(&x, inner, None, Some(&x)).unwrap();
    tape.head_loss(&x, head, Targets { ids: &targets, scale: 1.0 }).unwrap();
    tape.backward().unwrap();
    drop(tape);
    store.settle_grads().unwrap();
    let mut bits = Vec::new();
    for piece in store.arrays().pieces(0..store.flat_len()) {
        bring(store, Class::Grad, piece.clone(), Access::Read);
        bits.extend(store.arrays().view(Class::Grad, piece).f32().iter().map(|x| x.to_bits()));
    }
    bits
}

#[test]
fn gradients_that_begin_in_pages_of_others_have_the_bits_of_those_in_memory() {
    let (list, params) = list();
    let mut plain = ParamStore::new(Device::Cpu, DType::F32, &list).unwrap();
    plain.enable_grads().unwrap();
    fill(&mut plain);
    let expected = step(&mut plain, params);
    let dir = tempfile::tempdir().unwrap();
    let setup = Setup {
        device: Device::Cpu,
        // Four chunks beside 32 MiB: weights and gradients are three each.
        budgets: Budgets { hbm: None, dram: Some((32 << 20) + 17 * CHUNK as u64), nvme: Some(1 << 30) },
        ranks: 1,
        dir: dir.path().to_path_buf(),
        drive: None,
        policy: Policy::Lru,
        other_bytes: 32 << 20,
        chunk_elements: CHUNK,
        filed: None,
    };
    let types = (DType::F32, DType::F32, DType::F32);
    let mut paged = ParamStore::paged(types, &list, setup, None).unwrap();
    fill(&mut paged);
    for nth in 0..3 {
        litter(&mut paged);
        let bits = step(&mut paged, params);
        let differ = bits.iter().zip(&expected).position(|(a, b)| a != b);
        assert_eq!((bits.len(), differ), (expected.len(), None), "step {nth}");
    }
}
