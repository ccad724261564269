//! Plans of whole steps, replayed: pictures, promises, and the figures the field is measured by.

use memory::plan::{
    Aim, Ask, Budgets, LinkRate, Plan, Rates, Refusal, Replay, Rule, StateLayout, Transformer, link_table,
    picture, plan_with, replay,
};
use memory::trace::Trace;
use memory::{Class, Tier};

const MIB: u64 = 1 << 20;

fn rates() -> Rates {
    let link = |up_per_s, down_per_s| LinkRate { up_per_s, down_per_s };
    Rates { host: link(12e9, 12e9), nvme: link(1e9, 2e9) }
}

/// Four layers of a million parameters, one op each.
fn small() -> Transformer {
    Transformer {
        layers: 4,
        layer_params: MIB,
        embed_params: MIB,
        head_params: 0,
        state: StateLayout::SPLIT,
        parts: 1,
        accumulate: 1,
        kept_bytes: 4 * MIB,
        input_bytes: MIB,
        recompute: false,
        other_bytes: MIB,
        layer_forward_s: 0.02,
        update_s: 2e-9,
        host_update_s: None,
    }
}

fn planned(trace: &Trace, budgets: &Budgets, ask: Ask) -> (Plan, Replay) {
    let plan = plan_with(trace, budgets, &rates(), &ask).unwrap_or_else(|error| panic!("{ask:?}: {error}"));
    let replayed = replay(trace, budgets, &rates(), &plan).expect("the plan keeps its promises");
    (plan, replayed)
}

fn by(rule: Rule) -> Ask {
    Ask { rule, aim: Aim::Bytes, recompute: false }
}

#[test]
fn what_fits_does_not_move() {
    let trace = small().trace();
    let budgets = Budgets { dram: Some(200 * MIB), nvme: Some(1 << 40), ..Budgets::default() };
    let (plan, _) = planned(&trace, &budgets, Ask::default());
    assert_eq!((plan.moved_bytes(), plan.stall_s), (0, 0.0));
    assert!(plan.homes.iter().all(|home| *home == Tier::Dram));
}

#[test]
fn two_tiers() {
    let trace = small().trace();
    let budgets = Budgets { dram: Some(48 * MIB), nvme: Some(1 << 30), ..Budgets::default() };
    for rule in [Rule::Dynamic, Rule::Belady, Rule::Lru, Rule::Static, Rule::Gemini] {
        for aim in [Aim::Bytes, Aim::Time] {
            let (plan, replayed) = planned(&trace, &budgets, Ask { aim, ..by(rule) });
            println!(
                "{rule:?} {aim:?}\n{}{}",
                picture(&trace, &budgets, &plan, &replayed),
                link_table(&plan)
            );
        }
    }
}
