//! What holds for every trace: random steps, random machines.

use memory::plan::{
    Aim, Ask, Budgets, LinkRate, Plan, Rates, Refusal, Rule, StateLayout, Transformer, Updates, plan_with,
    replay, stretches,
};
use memory::trace::{Access, ChunkId, Moment, Phase, Runs, Trace};
use memory::{Class, Tier};
use proptest::prelude::*;

const RATES: Rates = Rates {
    host: LinkRate { up_per_s: 300.0, down_per_s: 250.0 },
    nvme: LinkRate { up_per_s: 60.0, down_per_s: 90.0 },
};

/// What a moment does, as numbers: seconds, other bytes, where it runs, and uses.
type Op = (u32, u64, u8, Vec<(u32, u8)>);

fn step(chunks: Vec<(u64, bool)>, ops: Vec<Op>) -> Trace {
    let mut trace = Trace::default();
    for (bytes, recompute) in &chunks {
        let chunk = trace.add_chunk(if *recompute { Class::Activation } else { Class::Param }, *bytes);
        trace.chunks[chunk.0 as usize].recompute_s = recompute.then_some(*bytes as f64 / 100.0);
    }
    for (seconds, other_bytes, runs, uses) in ops {
        let seconds = f64::from(seconds) / 10.0;
        let runs = match runs {
            0..6 => Runs::Fastest,
            6..8 => Runs::Host,
            _ => Runs::Either { host_s: 3.0 * seconds },
        };
        let (phase, op, layer) = (Phase::Forward, "op".to_owned(), 0);
        trace.add_moment(Moment { phase, op, layer, seconds, other_bytes, runs });
        for (chunk, access) in uses {
            let access = [Access::Read, Access::Write, Access::ReadWrite][access as usize % 3];
            trace.add_use(ChunkId(chunk % chunks.len() as u32), access);
        }
    }
    trace
}

fn traces(chunks: usize, moments: usize) -> impl Strategy<Value = Trace> {
    let op = (0u32..8, 0u64..10, 0u8..10, prop::collection::vec((0u32..64, 0u8..3), 0..4));
    let chunk = (1u64..40, prop::bool::weighted(0.2));
    (prop::collection::vec(chunk, 1..chunks), prop::collection::vec(op, 1..moments))
        .prop_map(|(chunks, ops)| step(chunks, ops))
}

/// Machines of two or three tiers whose fast tiers hold a share of everything.
fn machine(trace: &Trace, tiers: u8, hbm: u8, dram: u8) -> Budgets {
    let all: u64 = trace.chunks.iter().map(|chunk| chunk.bytes).sum::<u64>() + 10;
    let share = |percent: u8| Some(all * u64::from(percent) / 100);
    match tiers {
        0 => Budgets { hbm: None, dram: share(dram), nvme: Some(1 << 40) },
        1 => Budgets { hbm: share(hbm), dram: Some(2 * all), nvme: None },
        _ => Budgets { hbm: share(hbm), dram: share(dram), nvme: Some(1 << 40) },
    }
}

fn ask(rule: Rule, aim: Aim) -> Ask {
    Ask { rule, aim, recompute: false }
}

/// The machine as it is, or with the remedies of its refusals taken: each names one tier and one moment.
fn remedied(trace: &Trace, mut budgets: Budgets, ask: &Ask) -> Result<(Budgets, Plan), String> {
    for _ in 0..8 {
        match plan_with(trace, &budgets, &RATES, ask) {
            Ok(plan) => return Ok((budgets, plan)),
            Err(Refusal::DoesNotFit(short)) => {
                let had = budgets.of(short.tier).unwrap_or(0);
                if short.least_bytes <= had {
                    return Err(format!("a remedy that is none: {short}"));
                }
                budgets = budgets.with(short.tier, Some(short.least_bytes));
            }
            Err(error) => return Err(error.to_string()),
        }
    }
    Err(format!("eight remedies did not help: {budgets:?}"))
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(400))]

    #[test]
    fn promises_hold(
        trace in traces(14, 30),
        tiers in 0u8..3,
        (hbm, dram) in (5u8..110, 5u8..110),
        recompute in any::<bool>(),
        fast in any::<bool>(),
    ) {
        let budgets = machine(&trace, tiers, hbm, dram);
        let aim = if fast { Aim::Time } else { Aim::Bytes };
        let wish = Ask { recompute, ..ask(Rule::Dynamic, aim) };
        let (budgets, plan) = remedied(&trace, budgets, &wish).map_err(TestCaseError::fail)?;
        // Replayed again from outside: within budget at every moment, every use finds its chunk.
        let replayed = replay(&trace, &budgets, &RATES, &plan).map_err(|e| TestCaseError::fail(e.to_string()))?;
        prop_assert_eq!(&replayed.peaks, &plan.peaks);
        for link in &plan.links {
            prop_assert!(link.bound_bytes <= link.moved_bytes(), "{:?}", link);
        }
        for (tier, peak) in &plan.peaks {
            prop_assert!(Some(*peak) <= budgets.of(*tier));
        }
        prop_assert_eq!(&plan_with(&trace, &budgets, &RATES, &wish), &Ok(plan.clone()), "the same every time");
        for rule in [Rule::Lru, Rule::Static, Rule::Gemini, Rule::Belady] {
            if let Ok(other) = plan_with(&trace, &budgets, &RATES, &ask(rule, aim)) {
                let (fewer, shorter) =
                    (plan.moved_bytes() <= other.moved_bytes(), plan.step_s() < other.step_s());
                prop_assert!(fewer || (fast && shorter), "{:?} moves less", rule);
                // A rule that moves much more than the fewest bytes may be quicker.
                let frugal = other.moved_bytes() <= plan.moved_bytes();
                let quick = plan.step_s() <= other.step_s() * 1.02 + 1e-9;
                prop_assert!(!fast || !frugal || quick, "{:?} is quicker", rule);
            }
        }
    }
}

/// Seconds that the order of a step asks for.
fn ordered_s(trace: &Trace, budgets: &Budgets) -> Option<f64> {
    Some(stretches(trace, budgets)?.iter().map(|stretch| stretch.seconds(RATES.nvme)).sum())
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(400))]

    /// With any run of moments as the backward pass.
    #[test]
    fn no_plan_is_quicker_than_its_order_allows(
        mut trace in traces(14, 30),
        three in any::<bool>(),
        (hbm, dram) in (5u8..80, 5u8..80),
        (first, len) in (0usize..30, 1usize..12),
    ) {
        let moments = trace.moments.len();
        let backward = trace.moments.iter_mut().skip(first % moments).take(len);
        backward.for_each(|moment| moment.phase = Phase::Backward);
        let budgets = machine(&trace, if three { 2 } else { 0 }, hbm, dram);
        let (budgets, plan) = remedied(&trace, budgets, &Ask::default()).map_err(TestCaseError::fail)?;
        let least = ordered_s(&trace, &budgets).expect("a drive and a backward pass");
        prop_assert!(least <= plan.step_s() * (1.0 + 1e-9), "{} above {}", least, plan.step_s());
    }
}

/// Steps of transformers whose chunks are small beside the budget.
fn transformers() -> impl Strategy<Value = Transformer> {
    let sizes = (4u32..12, 2u32..6, 1u32..4, 0u64..3000, 0u64..2000);
    let rest = (any::<bool>(), 0u8..3, 0u8..3, 1u32..50);
    (sizes, rest).prop_map(
        |((layers, parts, accumulate, kept_bytes, embed_params), (tied, updates, state, speed))| {
            let updates =
                [Updates::AfterBackward, Updates::InBackward, Updates::BeforeForward][updates as usize];
            let state = [StateLayout::SPLIT, StateLayout::MIXED, StateLayout::F32][state as usize];
            Transformer {
                layers,
                layer_params: 600,
                embed_params,
                head_params: if tied { 0 } else { embed_params },
                state,
                parts,
                updates,
                accumulate,
                kept_bytes,
                input_bytes: kept_bytes / 10,
                recompute: false,
                other_bytes: 100,
                layer_forward_s: f64::from(speed),
                update_s: 0.001,
                host_update_s: None,
            }
        },
    )
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(100))]

    /// How near the bound plans come: within a twentieth, or within what two chunks out of place move
    /// in a step.
    #[test]
    fn transformers_move_little_more_than_the_bound(model in transformers(), percent in 15u64..95) {
        let trace = model.trace();
        let all: u64 = trace.chunks.iter().map(|chunk| chunk.bytes).sum();
        let largest = trace.chunks.iter().map(|chunk| chunk.bytes).max().unwrap_or(0);
        let budgets = Budgets { hbm: None, dram: Some(all * percent / 100 + 8 * largest), nvme: Some(1 << 40) };
        let plan = plan_with(&trace, &budgets, &RATES, &ask(Rule::Dynamic, Aim::Bytes));
        let link = plan.map_err(|error| TestCaseError::fail(error.to_string()))?.links[0];
        // A chunk out of place goes down and comes back once in every pass.
        let slack = 2 * 2 * largest * u64::from(2 * model.accumulate + 1);
        let over = link.moved_bytes() - link.bound_bytes;
        prop_assert!(over <= slack.max(link.bound_bytes / 20), "{:?}, chunks of {}", link, largest);
        let quick = plan_with(&trace, &budgets, &RATES, &Ask::default()).expect("fits");
        let least = ordered_s(&trace, &budgets).expect("a drive and a backward pass");
        prop_assert!(least <= quick.step_s() * (1.0 + 1e-9), "{} above {}", least, quick.step_s());
    }
}

#[test]
fn nvme_alone_is_no_machine() {
    let trace = step(vec![(1, false)], vec![(1, 0, 0, vec![(0, 0)])]);
    let budgets = Budgets { nvme: Some(1), ..Budgets::default() };
    let refused = plan_with(&trace, &budgets, &RATES, &Ask::default());
    assert_eq!(refused, Err(Refusal::NoTier { tiers: vec![Tier::Nvme] }));
}
