//! Ranks that share the state: every ZeRO stage gives the bits of plain replicas, keeps what it says,
//! and sends what the formulas of docs/parallelism.md say.

mod common;

use common::Place;
use common::runs::{begin, run};
use common::shards::{KEPT, on_ranks, resident};
use dist::cost::Zero;
use dist::{Axis, Counts};
use memory::Class;
use train::{Begin, Learner, Start};

const BASE: [&str; 5] =
    ["train.batch=4", "train.steps=3", "eval.every=2", "eval.batches=3", "checkpoint.every=3"];

type Run = (Vec<u8>, Vec<u8>, Vec<serde_json::Value>);

fn outcome(place: &Place, sets: &[&[&str]]) -> Run {
    let sets: Vec<&str> = BASE.iter().chain(sets.iter().copied().flatten()).copied().collect();
    run(place, "run", &sets, Start::Overwrite, false);
    place.result("run")
}

fn assert_same(got: &Run, want: &Run, what: &str) {
    assert_eq!(got.2, want.2, "log of {what}");
    assert!(got.0 == want.0, "weights of {what}");
    assert!(got.1 == want.1, "state of {what}");
}

const STAGES: [&str; 3] = ["mesh.zero=1", "mesh.zero=2", "mesh.zero=3"];

#[test]
fn every_stage_has_the_bits_of_plain_replicas() {
    let place = Place::new();
    let more: [&[&str]; 3] = [
        &["train.precision=f32", "train.clip=0.1"],
        &["train.recompute=always", "model.tied=false"],
        &["model.family=gpt2", "model.kv_heads=0", "train.recompute_layers=1"],
    ];
    for (i, more) in more.into_iter().enumerate() {
        for ranks in if i == 0 { &[2, 4][..] } else { &[2] } {
            let (dp, fsdp) = (format!("mesh.dp={ranks}"), format!("mesh.fsdp={ranks}"));
            let want = outcome(&place, &[more, &[&dp]]);
            for stage in STAGES {
                let got = outcome(&place, &[more, &[&fsdp, stage]]);
                assert_same(&got, &want, &format!("{more:?} {fsdp} {stage}"));
            }
        }
    }
}

/// With other axes, whose copies are summed after replicas, the same.
#[test]
fn stages_compose_with_other_axes() {
    let place = Place::new();
    let grids: [&[&str]; 5] = [
        &["mesh.x=2"],
        &["mesh.x=2", "mesh.scheme=1d-sequence"],
        &["mesh.x=2", "mesh.y=2"],
        &["mesh.cp=2", "mesh.x=2"],
        &["mesh.ep=2", "model.family=mixtral", "model.experts=4"],
    ];
    for grid in grids {
        let want = outcome(&place, &[grid, &["mesh.dp=2"]]);
        for stage in STAGES {
            assert_same(
                &outcome(&place, &[grid, &["mesh.fsdp=2", stage]]),
                &want,
                &format!("{grid:?} {stage}"),
            );
        }
    }
    let three: &[&str] = &["mesh.dp=2", "mesh.fsdp=2", "mesh.x=2"];
    let want = outcome(&place, &[three, &STAGES[..1]]);
    for stage in &STAGES[1..] {
        assert_same(&outcome(&place, &[three, &[stage]]), &want, &format!("{three:?} {stage}"));
    }
}

/// What travels beside computation is what travels in the foreground; and over microbatches stage 1
/// adds up as plain replicas do, 2 and 3 alike.
#[test]
fn overlap_changes_no_bit_and_microbatches_have_two_orders() {
    let place = Place::new();
    let more: &[&str] = &["train.accumulate=3", "train.batch=2", "train.clip=0.5"];
    let plain = outcome(&place, &[more, &["mesh.dp=2"]]);
    let stages = STAGES.map(|stage| outcome(&place, &[more, &["mesh.fsdp=2", stage]]));
    assert_same(&stages[0], &plain, "stage 1");
    assert_same(&stages[2], &stages[1], "stage 3 and 2");
    for (stage, want) in STAGES.iter().zip(&stages) {
        let got = outcome(&place, &[more, &["mesh.fsdp=2", stage, "mesh.overlap=false"]]);
        assert_same(&got, want, &format!("{stage} in the foreground"));
    }
}

/// A step's line says what travelled over each axis and how long nobody computed for it.
#[test]
fn a_step_says_what_it_exchanged_and_how_long_it_waited() {
    let place = Place::new();
    outcome(&place, &[&["mesh.dp=2", "mesh.fsdp=2"]]);
    let text = std::fs::read_to_string(place.path("run/metrics.jsonl")).unwrap();
    let lines = text.lines().map(|line| serde_json::from_str::<serde_json::Value>(line).unwrap());
    let steps: Vec<_> = lines.filter(|line| line["kind"] == "step").collect();
    assert_eq!(steps.len(), 3);
    for step in steps {
        for axes in ["dp", "fsdp"] {
            let messages = step["messages"].as_array().unwrap();
            let of_axes = messages.iter().find(|of| of["axes"] == axes).unwrap();
            assert!(of_axes["sent_bytes"].as_u64() > Some(0), "{of_axes}");
            assert_eq!(of_axes["sent_bytes"], of_axes["received_bytes"]);
            let seconds = |key: &str| of_axes[key].as_f64().unwrap();
            assert!(seconds("exposed_s") > 0.0 && seconds("exposed_s") <= step["seconds"].as_f64().unwrap());
            assert!(seconds("beside_s") > 0.0);
        }
    }
}

/// Beside whole stripes at the end, a rank has 1/F of what its stage shares and all of the rest,
/// before and after steps.
#[test]
fn resident_state_falls_as_one_over_the_ranks_that_share_it() {
    let place = Place::new();
    let begin = begin(&place, "run", &["train.batch=4", "model.width=64", "model.layers=4"], Start::New);
    for (zero, shared) in [
        (Zero::One, &[Class::Master, Class::M, Class::V][..]),
        (Zero::Two, &[Class::Grad, Class::Master, Class::M, Class::V]),
        (Zero::Three, &KEPT),
    ] {
        for ranks in [2, 4] {
            let resident = on_ranks(&begin, &format!("fsdp={ranks}"), zero, |learner, step| {
                let before = resident(learner);
                step(learner, 0);
                step(learner, 1);
                assert_eq!(resident(learner), before, "{zero:?} on {ranks}");
                let arrays = learner.store.arrays();
                let stripes = arrays.stripes().unwrap();
                let padded = stripes.count(arrays.len()) * stripes.stripe();
                assert!(padded - arrays.len() < stripes.stripe());
                (before, KEPT.map(|class| padded * arrays.dtype(class).size_bytes()))
            });
            for (resident, whole) in resident {
                for ((class, resident), whole) in KEPT.into_iter().zip(resident).zip(whole) {
                    let part = if shared.contains(&class) { ranks } else { 1 };
                    assert_eq!(resident * part, whole, "{class} of {zero:?} on {ranks}");
                }
            }
        }
    }
}

#[test]
fn the_estimate_counts_what_each_stage_shares() {
    let place = Place::new();
    let state = |sets: &[&str]| {
        let begin =
            begin(&place, "run", &[&["train.batch=4", "train.precision=f32"][..], sets].concat(), Start::New);
        let estimate = begin.prepared.estimate(&begin.recipe);
        estimate.state_bytes / estimate.params as u64
    };
    assert_eq!(state(&["mesh.x=2"]), 16);
    assert_eq!(state(&["mesh.dp=4"]), 64);
    let stages = STAGES.map(|stage| state(&["mesh.fsdp=4", stage]));
    assert_eq!(stages, [4 * 8 + 8, 4 * 4 + 12, 16]);
    assert_eq!(state(&["mesh.dp=2", "mesh.fsdp=2", "mesh.zero=3"]), 32);
    // Sums of the microbatches before.
    let several = STAGES.map(|stage| state(&["mesh.fsdp=4", "train.accumulate=4", stage]));
    assert_eq!(several, [4 * 8 + 8, 4 * 4 + 12 + 4, 16 + 4]);
    let staged = |stage| state(&["mesh.pp=2", "mesh.fsdp=4", "model.tied=false", stage]);
    assert_eq!(STAGES.map(staged), several);
}

/// Bytes over `fsdp` of the second step on each rank, with what there is to send.
struct Sent {
    counts: Counts,
    /// Elements of a granule, stripes.
    granule: u64,
    stripes: u64,
    weight_bytes: u64,
    /// Stripes of each layer, of the embedding with the first, of the head behind the last.
    layers: Vec<Vec<usize>>,
}

fn sent(begin: &Begin, ranks: u64, zero: Zero) -> Vec<Sent> {
    on_ranks(begin, &format!("fsdp={ranks}"), zero, |learner, step| {
        step(learner, 0);
        let before = learner.mesh.group(Axis::Fsdp).counts();
        step(learner, 1);
        let mut counts = learner.mesh.group(Axis::Fsdp).counts();
        counts.bytes_sent -= before.bytes_sent;
        counts.bytes_received -= before.bytes_received;
        let store = &learner.store;
        let stripes = store.arrays().stripes().unwrap();
        let mut layers = vec![Vec::new(); begin.prepared.config.layers() + 1];
        for param in store.refs() {
            let name = &store.spec(param).name;
            let last = layers.len() - 1;
            let layer = match name.strip_prefix("layers.") {
                Some(rest) => rest.split('.').next().unwrap().parse().unwrap(),
                None if name.contains("embed") => 0,
                None => last,
            };
            layers[layer].extend(stripes.of(&store.range(param)));
        }
        Sent {
            counts,
            granule: stripes.granule as u64,
            stripes: stripes.count(store.flat_len()) as u64,
            weight_bytes: store.dtype().size_bytes() as u64,
            layers,
        }
    })
}

/// Stripes gathered in a step of stage 3: walking down and up, each layer finds what it shares with
/// the two before in place, and the next one's under way.
fn gathered(layers: &[Vec<usize>], microbatches: usize) -> u64 {
    let down = 0..layers.len();
    let walk: Vec<usize> = down.clone().chain(down.rev().skip(1)).collect();
    let mut here = std::collections::BTreeSet::new();
    let mut count = 0;
    for _ in 0..microbatches {
        for at in 0..walk.len() {
            let window: std::collections::BTreeSet<usize> =
                walk[at..].iter().take(2).flat_map(|layer| layers[*layer].iter().copied()).collect();
            count += window.difference(&here).count() as u64;
            here = window;
        }
    }
    count
}

#[test]
fn bytes_of_every_stage_are_those_of_the_formulas() {
    let place = Place::new();
    for (accumulate, precision) in [(1, "f32"), (2, "bf16")] {
        let sets = [
            "train.batch=4",
            "model.layers=5",
            "model.tied=false",
            &format!("train.accumulate={accumulate}"),
            &format!("train.precision={precision}"),
        ];
        let begin = begin(&place, "run", &sets, Start::New);
        for (ranks, zero) in
            [2, 4].into_iter().flat_map(|n| [Zero::One, Zero::Two, Zero::Three].map(|z| (n, z)))
        {
            for sent in sent(&begin, ranks, zero) {
                let others = ranks - 1;
                // Of whole arrays of P parameters, padded to stripes, (F - 1)/F P travel.
                let part = others * sent.granule * sent.stripes;
                let per_stripe = others * sent.granule * sent.weight_bytes;
                let a = accumulate as u64;
                let (scatters, gathers) = match zero {
                    Zero::One => (1, sent.stripes),
                    Zero::Two => (a, sent.stripes),
                    Zero::Three => (a, gathered(&sent.layers, accumulate)),
                };
                assert!(gathers <= 2 * a * sent.stripes);
                // Learned targets, losses of a microbatch's tokens, squares of granules.
                let tokens = 4 / ranks * begin.recipe.train.context as u64;
                let scalars = others * (8 + a * 4 * tokens + 8 * sent.stripes);
                let want = scatters * part * 4 + gathers * per_stripe + scalars;
                let what = format!("{zero:?} on {ranks}, {accumulate} microbatches, {precision}");
                assert_eq!((sent.counts.bytes_sent, sent.counts.bytes_received), (want, want), "{what}");
            }
        }
    }
}

#[test]
fn a_gradient_that_is_not_finite_on_one_rank_changes_nothing_on_any() {
    let place = Place::new();
    let begin = begin(&place, "run", &["train.batch=4"], Start::New);
    for zero in [Zero::One, Zero::Two, Zero::Three] {
        on_ranks(&begin, "fsdp=2", zero, |learner, step| {
            step(learner, 0);
            let steps = learner.optimizer.steps;
            let own = learner.store.arrays().stripes().unwrap().own(1);
            let good = learner.store.arrays().view(Class::Param, own.start..own.start + 1).bytes().to_vec();
            let put = |learner: &mut Learner, bytes: &[u8]| {
                let weight = learner.store.arrays_mut().view_mut(Class::Param, own.start..own.start + 1);
                weight.bytes().copy_from_slice(bytes);
            };
            if learner.mesh.rank() == 1 {
                put(learner, &half::bf16::NAN.to_ne_bytes());
            }
            let read = |learner: &mut Learner| {
                let names = learner.optimizer.arrays(&learner.store);
                names
                    .into_iter()
                    .map(|(name, bytes)| {
                        let mut out = vec![0; bytes as usize];
                        learner.optimizer.read(&mut learner.store, name, 0, &mut out).unwrap();
                        out
                    })
                    .collect::<Vec<_>>()
            };
            let before = read(learner);
            step(learner, 1);
            assert!(read(learner) == before, "{zero:?}");
            assert_eq!(learner.optimizer.steps, steps);
            put(learner, &good);
            step(learner, 2);
            assert_eq!(learner.optimizer.steps, steps + 1, "{zero:?} goes on");
        });
    }
}
