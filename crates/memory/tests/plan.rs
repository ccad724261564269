//! Plans of whole steps as pictures, and refusals as a user reads them.

use memory::Tier;
use memory::plan::{
    Aim, Ask, Budgets, LinkRate, Plan, Rates, Refusal, Rule, StateLayout, Transformer, Updates, link_table,
    picture, plan, plan_with, replay,
};
use memory::trace::Trace;

const MIB: u64 = 1 << 20;
const RATES: Rates = Rates {
    host: LinkRate { up_per_s: 12e9, down_per_s: 12e9 },
    nvme: LinkRate { up_per_s: 1e9, down_per_s: 2e9 },
};

/// Eight layers of a million parameters, in two ops each.
fn small() -> Transformer {
    Transformer {
        layers: 8,
        layer_params: MIB,
        embed_params: MIB,
        head_params: 0,
        state: StateLayout::SPLIT,
        parts: 2,
        updates: Updates::AfterBackward,
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

fn shown(trace: &Trace, budgets: &Budgets, ask: Ask) -> (Plan, String) {
    let plan = plan_with(trace, budgets, &RATES, &ask).unwrap_or_else(|error| panic!("{ask:?}: {error}"));
    let replayed = replay(trace, budgets, &RATES, &plan).expect("the plan keeps its promises");
    let text = format!("{}{}", picture(trace, budgets, &plan, &replayed), link_table(&plan));
    (plan, text)
}

fn by(rule: Rule) -> Ask {
    Ask { rule, aim: Aim::Bytes, recompute: false }
}

#[test]
fn what_fits_does_not_move() {
    let trace = small().trace();
    let budgets = Budgets { dram: Some(400 * MIB), nvme: Some(1 << 40), ..Budgets::default() };
    let (plan, text) = shown(&trace, &budgets, Ask::default());
    assert_eq!((plan.moved_bytes(), plan.stall_s), (0, 0.0));
    assert!(plan.homes.iter().all(|home| *home == Tier::Dram));
    insta::assert_snapshot!("fits", text);
}

/// The same step by every rule: what the choice of rule is worth.
#[test]
fn two_tiers_by_rule() {
    let trace = small().trace();
    let budgets = Budgets { dram: Some(80 * MIB), nvme: Some(1 << 30), ..Budgets::default() };
    let mut text = String::new();
    for rule in [Rule::Dynamic, Rule::Belady, Rule::Lru, Rule::Gemini, Rule::Static] {
        text += &format!("{rule:?}\n{}\n", shown(&trace, &budgets, by(rule)).1);
    }
    insta::assert_snapshot!("two_tiers_by_rule", text);
}

/// The same bytes at three times of the step: when updates run decides what can be hidden.
#[test]
fn two_tiers_by_time_of_update() {
    let budgets = Budgets { dram: Some(80 * MIB), nvme: Some(1 << 30), ..Budgets::default() };
    let mut text = String::new();
    for updates in [Updates::AfterBackward, Updates::InBackward, Updates::BeforeForward] {
        let trace = Transformer { updates, ..small() }.trace();
        text += &format!("{updates:?}\n{}\n", shown(&trace, &budgets, Ask::default()).1);
    }
    insta::assert_snapshot!("two_tiers_by_time_of_update", text);
}

/// Updates may run on either side; activations may be made again; DRAM is short as well.
#[test]
fn three_tiers() {
    let model = Transformer { recompute: true, accumulate: 2, host_update_s: Some(4e-9), ..small() };
    let trace = Transformer { update_s: 1e-10, ..model }.trace();
    let budgets = Budgets { hbm: Some(40 * MIB), dram: Some(100 * MIB), nvme: Some(1 << 30) };
    insta::assert_snapshot!("three_tiers", shown(&trace, &budgets, Ask::default()).1);
}

#[test]
fn recompute_instead_of_moving() {
    let trace =
        Transformer { recompute: true, kept_bytes: 16 * MIB, layer_forward_s: 0.002, ..small() }.trace();
    let budgets = Budgets { dram: Some(80 * MIB), nvme: Some(1 << 30), ..Budgets::default() };
    let (plan, text) = shown(&trace, &budgets, Ask::default());
    assert!(plan.recompute_s > 0.0);
    insta::assert_snapshot!("recompute", text);
}

#[test]
fn refusals_say_what_would_do() {
    let trace = small().trace();
    let cases = [
        ("a working set that does not fit", Budgets { dram: Some(6 * MIB), nvme: Some(1 << 40), hbm: None }),
        ("nothing below dram", Budgets { dram: Some(80 * MIB), ..Budgets::default() }),
        ("hbm alone", Budgets { hbm: Some(80 * MIB), ..Budgets::default() }),
        ("hbm and dram", Budgets { hbm: Some(40 * MIB), dram: Some(60 * MIB), nvme: None }),
        ("a drive too small", Budgets { dram: Some(80 * MIB), nvme: Some(3 * MIB), hbm: None }),
        ("a drive alone", Budgets { nvme: Some(1 << 40), ..Budgets::default() }),
    ];
    let mut text = String::new();
    for (name, budgets) in cases {
        let refusal = plan(&trace, &budgets, &RATES).expect_err(name);
        text += &format!("{name}\n  {refusal}\n");
        if let Refusal::DoesNotFit(short) = refusal {
            let remedied = budgets.with(short.tier, Some(short.least_bytes));
            plan(&trace, &remedied, &RATES).unwrap_or_else(|error| panic!("{name}, remedied: {error}"));
        }
    }
    let slow = Rates { nvme: LinkRate { up_per_s: 0.0, down_per_s: 1.0 }, ..RATES };
    let budgets = Budgets { dram: Some(80 * MIB), nvme: Some(1 << 40), hbm: None };
    text += &format!("no speed\n  {}\n", plan(&trace, &budgets, &slow).expect_err("no speed"));
    insta::assert_snapshot!("refusals", text);
}
