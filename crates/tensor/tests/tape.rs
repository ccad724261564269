//! The tape as a machine: what accumulates, what is recomputed, what is told to whom, and that none
//! of it depends on the number of threads.

mod common;

use common::{Batch, D, IGNORE, Keep, Net, V, assert_grads, grad};
use tensor::{
    AttentionShape, DType, Device, GeluKind, KvCache, Moment, ParamStore, Phase, RopeScaling, RopeTable,
    Tape, Targets, Tensor, normal,
};

/// Sums in f32 taken in another order; over the largest gradient of a parameter.
const REORDERED: f32 = 1e-5;

fn bits(losses: &[f32], store: &ParamStore) -> (Vec<u32>, Vec<u8>) {
    (losses.iter().map(|loss| loss.to_bits()).collect(), store.all_grads().bytes().to_vec())
}

#[test]
fn a_weight_used_twice_accumulates() {
    let (tied, untied) = (Net::new(GeluKind::Tanh, true), Net::new(GeluKind::Tanh, false));
    let (mut once, mut twice) = (untied.store(DType::F32), tied.store(DType::F32));
    let table = once.weight(untied.tokens).f32().to_vec();
    common::set(&mut once, untied.head, &table);
    let batch = Batch::random(2, 20, 1);
    let losses = untied.train(&mut once, &batch, 0.1, Keep::All);
    assert_eq!(tied.train(&mut twice, &batch, 0.1, Keep::All), losses);
    let sum = grad(&once, untied.tokens).iter().zip(grad(&once, untied.head)).map(|(a, b)| a + b).collect();
    let both: Vec<f32> = sum;
    for (found, expected) in grad(&twice, tied.tokens).iter().zip(&both) {
        assert!((found - expected).abs() <= 1e-5 * expected.abs().max(0.1), "{found} beside {expected}");
    }
}

#[test]
fn recomputing_gives_the_same_bits() {
    let (net, batch) = (Net::new(GeluKind::Tanh, true), Batch::random(2, 20, 2).cut(&[9, 6]));
    for dtype in [DType::F32, DType::Bf16] {
        let run = |keep| {
            let mut store = net.store(dtype);
            let losses = net.train(&mut store, &batch, 0.1, keep);
            bits(&losses, &store)
        };
        let plain = run(Keep::All);
        for keep in [Keep::Blocks, Keep::Nested] {
            assert!(run(keep) == plain, "{dtype} {keep:?}");
        }
    }
}

#[test]
fn any_number_of_threads_gives_the_same_bits() {
    // More than one slice of the head's tokens, more rows than workers.
    let batch = Batch::random(6, 70, 3).cut(&[40, 11]);
    for dtype in [DType::F32, DType::Bf16] {
        let run = |threads| {
            device::Threads::new(threads).unwrap().run(|| {
                assert_eq!(device::num_threads(), threads);
                let net = Net::new(GeluKind::Tanh, false);
                let mut store = net.store(dtype);
                let losses = net.train(&mut store, &batch, 0.1, Keep::Blocks);
                bits(&losses, &store)
            })
        };
        let alone = run(1);
        for threads in [2, 5] {
            assert!(run(threads) == alone, "{dtype} on {threads} threads");
        }
    }
}

#[test]
fn microbatches_accumulate_to_the_whole_batch() {
    let (net, batch) = (Net::new(GeluKind::Erf, true), Batch::random(4, 20, 4));
    let (mut whole, mut parts) = (net.store(DType::F32), net.store(DType::F32));
    let losses = net.train(&mut whole, &batch, 0.05, Keep::All);
    let positions: std::sync::Arc<[u32]> = (0..40).map(|i| i % 20).collect();
    for half in 0..2 {
        let part = Batch { b: 2, positions: positions.clone(), ..batch.only(40 * half, 40 * half + 40) };
        let found = net.train(&mut parts, &part, 0.05, Keep::All);
        assert_eq!(found, losses[40 * half..40 * half + 40]);
    }
    assert_grads(&parts, &whole, REORDERED);
}

#[test]
fn packed_documents_equal_separate_sequences() {
    let net = Net::new(GeluKind::Tanh, true);
    let lengths = [9, 1, 13, 7, 40];
    let batch = Batch::random(1, lengths.iter().sum(), 5).cut(&lengths);
    let (mut packed, mut separate) = (net.store(DType::F32), net.store(DType::F32));
    let losses = net.train(&mut packed, &batch, 0.1, Keep::All);
    let (mut found, mut first) = (Vec::new(), 0);
    for length in lengths {
        let document = batch.only(first, first + length);
        found.extend(net.train(&mut separate, &document, 0.1, Keep::All));
        first += length;
    }
    for (a, b) in losses.iter().zip(&found) {
        assert!((a - b).abs() < 1e-5, "{a} packed, {b} alone");
    }
    assert_grads(&packed, &separate, REORDERED);
}

#[test]
fn the_first_write_of_a_step_replaces_the_last_step() {
    let (net, batch) = (Net::new(GeluKind::Tanh, false), Batch::random(1, 20, 6));
    let mut store = net.store(DType::F32);
    let losses = net.train(&mut store, &batch, 0.1, Keep::All);
    let first = bits(&losses, &store);
    store.clear_grads().unwrap();
    let losses = net.train(&mut store, &batch, 0.1, Keep::All);
    assert!(bits(&losses, &store) == first);
}

#[test]
fn gradients_nobody_wrote_settle_to_zero() {
    let (net, batch) = (Net::new(GeluKind::Tanh, false), Batch::random(1, 20, 7));
    let mut store = net.store(DType::F32);
    net.train(&mut store, &batch, 0.1, Keep::All);
    store.clear_grads().unwrap();
    let mut tape = Tape::recording(&mut store);
    let x = tape.embedding(&[(batch.ids.clone(), net.tokens)]).unwrap();
    tape.head_loss(&x, net.head, Targets { ids: &batch.targets, scale: 1.0 }).unwrap();
    tape.backward().unwrap();
    store.settle_grads().unwrap();
    for param in store.refs() {
        let written = grad(&store, param).iter().any(|g| *g != 0.0);
        assert_eq!(written, param == net.tokens || param == net.head, "{}", store.spec(param).name);
    }
}

#[test]
fn ignored_targets_cost_nothing_and_teach_nothing() {
    let (net, mut batch) = (Net::new(GeluKind::Tanh, false), Batch::random(2, 20, 8));
    batch.targets.fill(IGNORE);
    let mut store = net.store(DType::F32);
    assert!(net.train(&mut store, &batch, 1.0, Keep::All).iter().all(|loss| *loss == 0.0));
    assert!(store.all_grads().f32().iter().all(|g| *g == 0.0));
}

#[test]
fn a_running_tape_gives_the_same_losses_and_no_gradients() {
    let (net, batch) = (Net::new(GeluKind::Tanh, false), Batch::random(2, 20, 9));
    let mut store = net.store(DType::F32);
    let losses = net.evaluate(&mut store, &batch);
    store.settle_grads().unwrap();
    assert!(store.all_grads().f32().iter().all(|g| *g == 0.0));
    store.clear_grads().unwrap();
    assert_eq!(net.train(&mut store, &batch, 1.0, Keep::All), losses);
}

#[test]
fn attention_rotates_a_shared_value_in_a_copy() {
    let net = Net::new(GeluKind::Tanh, false);
    let mut store = net.store(DType::F32);
    let mut tape = Tape::running(&mut store);
    let values: Vec<f32> = (0..5 * 12).map(|i| normal(1, "qkv", i)).collect();
    let qkv = tape.input(Tensor::from_f32(&values, DType::F32, &[5, 12]).unwrap());
    let rope = std::sync::Arc::new(RopeTable::new(4, 100.0, &RopeScaling::None, 5));
    let positions = (0..5).collect();
    let shape = AttentionShape {
        b: 1,
        n: 1,
        k: 1,
        h: 4,
        scale: 0.5,
        window: None,
        rope: Some(rope),
        positions,
        starts: None,
    };
    let shared = tape.attention(qkv.clone(), &shape).unwrap().value.to_f32();
    assert_eq!(qkv.value.to_f32(), values);
    let mut cache = KvCache::new(Device::Cpu, DType::F32, 5, 4).unwrap();
    let cached = tape.attention_cached(qkv, &shape, &mut cache).unwrap().value.to_f32();
    assert!(shared.iter().zip(&cached).all(|(a, b)| (a - b).abs() < 1e-6), "{shared:?} {cached:?}");
}

/// One moment a line: phase, layer, op, parameters.
fn transcript(net: &Net, keep: Keep) -> String {
    let mut store = net.store(DType::F32);
    let names: Vec<String> = net.list.specs().iter().map(|spec| spec.name.clone()).collect();
    let (mut lines, mut clock) = (Vec::new(), 0);
    let mut watch = |moment: &Moment<'_>, _: &mut ParamStore| {
        assert_eq!(moment.index, clock, "moments are counted without a gap");
        clock += 1;
        let phase = match moment.phase {
            Phase::Forward => "F",
            Phase::Backward => "B",
            Phase::Recompute => "R",
        };
        let params: Vec<&str> = moment.params.iter().map(|param| names[param.index()].as_str()).collect();
        lines.push(
            format!("{phase}{} {} {}", moment.layer, moment.op, params.join(" ")).trim_end().to_string(),
        );
        Ok(())
    };
    let batch = Batch::random(1, 20, 10);
    let mut tape = Tape::recording(&mut store).watched_by(&mut watch);
    net.losses(&mut tape, &batch, 1.0, keep).unwrap();
    tape.backward().unwrap();
    lines.join("\n")
}

const FORWARD: &str = "\
F0 embedding tokens positions
F0 rms_norm 0.norm.scale
F0 linear 0.qkv.weight 0.qkv.bias
F0 head_norm 0.q.scale 0.k.scale
F0 attention
F0 linear 0.out.weight
F0 rms_norm 0.mlp_norm.scale
F0 linear 0.gate_up.weight
F0 swiglu_linear 0.down.weight
F1 layer_norm 1.norm.scale 1.norm.bias
F1 linear 1.qkv.weight 1.qkv.bias
F1 attention
F1 linear 1.out.weight 1.out.bias
F1 layer_norm 1.mlp_norm.scale 1.mlp_norm.bias
F1 linear_gelu 1.up.weight 1.up.bias
F1 linear 1.down.weight 1.down.bias
F2 rms_norm norm.scale
F2 head_loss head";

/// The lines of a layer's way forward, turned into those of another phase.
fn layer_lines(layer: char, phase: char) -> Vec<String> {
    let of_layer = FORWARD.lines().filter(|line| line.as_bytes()[1] == layer as u8);
    of_layer.map(|line| format!("{phase}{}", &line[1..])).collect()
}

fn reversed(mut lines: Vec<String>) -> Vec<String> {
    lines.reverse();
    lines
}

#[test]
fn a_watch_is_told_of_every_moment_and_of_its_way_back() {
    let found = transcript(&Net::new(GeluKind::Tanh, false), Keep::All);
    let backward = ['2', '1', '0'].map(|layer| reversed(layer_lines(layer, 'B'))).concat();
    // The head's gradient is formed on the way there: its way back touches no parameter.
    let backward = backward.join("\n").replace("head_loss head", "head_loss");
    assert_eq!(found, format!("{FORWARD}\n{backward}"));
}

#[test]
fn a_recomputed_block_is_told_of_again_just_before_its_way_back() {
    let found = transcript(&Net::new(GeluKind::Tanh, false), Keep::Blocks);
    let (mut expected, embedding) = (vec![FORWARD.to_string()], "B0 embedding tokens positions".to_string());
    expected.extend(["B2 head_loss".to_string(), "B2 rms_norm norm.scale".to_string()]);
    for layer in ['1', '0'] {
        expected.extend(layer_lines(layer, 'R').into_iter().filter(|line| !line.contains("embedding")));
        expected.extend(reversed(layer_lines(layer, 'B')));
    }
    assert_eq!(expected.last(), Some(&embedding));
    assert_eq!(found, expected.join("\n"));
}

#[test]
fn every_parameter_is_named_on_the_way_back_by_who_writes_its_gradient() {
    let net = Net::new(GeluKind::Tanh, true);
    let found = transcript(&net, Keep::Nested);
    for spec in net.list.specs() {
        let named = |line: &&str| line.starts_with('B') && line.split(' ').any(|word| word == spec.name);
        assert_eq!(found.lines().filter(named).count(), 1, "{}", spec.name);
    }
}

#[test]
fn logits_are_what_the_loss_is_taken_of() {
    let net = Net::new(GeluKind::Tanh, false);
    let mut store = net.store(DType::F32);
    let mut tape = Tape::running(&mut store);
    let values: Vec<f32> = (0..3 * D as u64).map(|i| normal(2, "x", i)).collect();
    let x = tape.input(Tensor::from_f32(&values, DType::F32, &[3, D]).unwrap());
    let logits = tape.logits(&x.value, net.head).unwrap().to_f32();
    let targets = [4, IGNORE, V as u32 - 1];
    let losses = tape.head_loss(&x, net.head, Targets { ids: &targets, scale: 1.0 }).unwrap().to_f32();
    for (row, target) in targets.iter().enumerate() {
        let row_logits = &logits[row * V..(row + 1) * V];
        let sum: f64 = row_logits.iter().map(|l| (*l as f64).exp()).sum();
        let expected = if *target == IGNORE { 0.0 } else { sum.ln() - row_logits[*target as usize] as f64 };
        assert!((losses[row] as f64 - expected).abs() < 1e-5, "row {row}: {} and {expected}", losses[row]);
    }
}
