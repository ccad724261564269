//! The replay is what every other test of plans leans on: it must notice what is wrong with one.

use memory::plan::{Ask, Broken, Budgets, LinkRate, Move, MoveKind, Plan, Rates, plan, replay};
use memory::trace::{Access, ChunkId, Moment, Phase, Runs, Trace};
use memory::{Class, Tier};

const RATES: Rates = Rates {
    host: LinkRate { up_per_s: 100.0, down_per_s: 100.0 },
    nvme: LinkRate { up_per_s: 10.0, down_per_s: 20.0 },
};

fn moment(trace: &mut Trace, uses: &[(ChunkId, Access)]) {
    let (phase, op) = (Phase::Forward, "op".to_owned());
    trace.add_moment(Moment { phase, op, layer: 0, seconds: 1.0, other_bytes: 0, runs: Runs::Fastest });
    uses.iter().for_each(|(chunk, access)| trace.add_use(*chunk, *access));
}

/// Four chunks of 10 bytes, changed in turn.
fn scan() -> Trace {
    let mut trace = Trace::default();
    let chunks: Vec<ChunkId> = (0..4).map(|_| trace.add_chunk(Class::M, 10)).collect();
    chunks.iter().for_each(|chunk| moment(&mut trace, &[(*chunk, Access::ReadWrite)]));
    trace
}

fn budgets(dram: u64) -> Budgets {
    Budgets { hbm: None, dram: Some(dram), nvme: Some(40) }
}

fn good() -> (Trace, Budgets, Plan) {
    let (trace, budgets) = (scan(), budgets(20));
    let plan = plan(&trace, &budgets, &RATES).expect("fits");
    assert!(replay(&trace, &budgets, &RATES, &plan).is_ok());
    assert!(plan.moved_bytes() > 0);
    (trace, budgets, plan)
}

#[test]
fn a_move_left_out_is_noticed() {
    let (trace, budgets, plan) = good();
    for index in 0..plan.moves.len() {
        let mut broken = plan.clone();
        let left_out = broken.moves.remove(index);
        let error = replay(&trace, &budgets, &RATES, &broken).expect_err("something is missing");
        let fits = match left_out.kind {
            MoveKind::Drop => matches!(error, Broken::OverBudget { tier: Tier::Dram, .. }),
            _ => matches!(error, Broken::NotValid { .. }),
        };
        assert!(fits, "without {left_out:?}: {error}");
    }
}

#[test]
fn a_fetch_too_early_is_over_budget() {
    let (trace, budgets, mut plan) = good();
    let fetch = plan.moves.iter_mut().find(|action| action.kind == MoveKind::Fetch).expect("something moves");
    fetch.after = (fetch.after + 3) % 4;
    let error = replay(&trace, &budgets, &RATES, &plan).expect_err("no room yet");
    assert!(
        matches!(error, Broken::OverBudget { tier: Tier::Dram, .. } | Broken::NotValid { .. }),
        "{error}"
    );
}

#[test]
fn changing_what_is_copied_is_noticed() {
    let trace = scan();
    let back = |after, before| Move {
        after,
        before,
        chunk: ChunkId(1),
        from: Tier::Dram,
        to: Tier::Nvme,
        kind: MoveKind::WriteBack,
        bytes: 10,
    };
    let mut plan = plan(&trace, &budgets(40), &RATES).expect("fits");
    plan.homes[1] = Tier::Nvme;
    plan.moves = vec![back(1, 1)];
    assert!(replay(&trace, &budgets(40), &RATES, &plan).is_ok(), "until the chunk is used again");
    plan.moves = vec![back(0, 2)];
    let error = replay(&trace, &budgets(40), &RATES, &plan).expect_err("written meanwhile");
    assert_eq!(error, Broken::Torn { chunk: 1, tier: Tier::Dram, moment: 1 });
}

#[test]
fn senseless_moves_are_named() {
    let (trace, budgets, plan) = good();
    let first = plan.moves[0];
    let cases: [(Move, &str); 5] = [
        (Move { after: 9, ..first }, "a moment or chunk"),
        (Move { from: Tier::Hbm, ..first }, "a tier without a budget"),
        (Move { kind: MoveKind::Fetch, from: Tier::Dram, to: Tier::Nvme, ..first }, "one tier up"),
        (
            Move { kind: MoveKind::WriteBack, from: Tier::Dram, to: Tier::Nvme, bytes: 9, ..first },
            "too few bytes",
        ),
        (
            Move {
                kind: MoveKind::Recompute,
                from: Tier::Dram,
                to: Tier::Dram,
                bytes: 0,
                after: 0,
                before: 1,
                ..first
            },
            "cannot be made again",
        ),
    ];
    for (action, reason) in cases {
        let mut broken = plan.clone();
        broken.moves[0] = action;
        let error = replay(&trace, &budgets, &RATES, &broken).expect_err(reason).to_string();
        assert!(error.contains(reason), "{error}");
    }
}

/// By hand: 30 bytes move up at 10/s and 30 down at 20/s in a step of 4 s.
#[test]
fn seconds_are_counted() {
    let trace = scan();
    let ask = Ask { aim: memory::plan::Aim::Bytes, ..Ask::default() };
    // Room for one chunk: nothing overlaps, every second of a transfer is waited for.
    let plan = memory::plan::plan_with(&trace, &budgets(10), &RATES, &ask).expect("fits");
    let link = plan.links[0];
    assert_eq!((link.up_bytes, link.down_bytes), (40, 40));
    assert!((link.stall_s - (4.0 + 2.0)).abs() < 1e-9, "{link:?}");
    assert!((plan.step_s() - 10.0).abs() < 1e-9);
}
