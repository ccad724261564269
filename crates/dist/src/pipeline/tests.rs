//! Properties of all schedules, their closed formulas against the clock, and timelines to look at.

use super::*;
use proptest::prelude::*;
use std::collections::HashSet;

fn schedules() -> impl Strategy<Value = Pipeline> {
    (1usize..9, 1usize..5, 1usize..25, 0usize..4).prop_map(|(p, v, m, kind)| {
        let schedule = match kind {
            0 => Schedule::GPipe,
            1 => Schedule::OneFOneB,
            2 => Schedule::Interleaved { chunks: v },
            _ => Schedule::ZeroBubble,
        };
        let m = if schedule.chunks() > 1 { m.next_multiple_of(p) } else { m };
        Pipeline::new(p, m, schedule).unwrap()
    })
}

/// Every need of every unit is met: checked on the clock, apart from how the lists were made.
fn check_needs(pipeline: &Pipeline, walk: &Walk) {
    let slices = pipeline.stages * pipeline.chunks();
    let mut ends = std::collections::HashMap::new();
    for (stage, spans) in walk.spans.iter().enumerate() {
        for Span { unit, end, .. } in spans {
            let key = (unit.work, unit.microbatch, pipeline.slice(stage, unit.chunk));
            assert!(ends.insert(key, *end).is_none(), "{unit:?} twice on stage {stage}");
        }
    }
    let split = pipeline.schedule.splits_backward();
    let back = if split { Work::BackwardInput } else { Work::Backward };
    let kinds = if split { 3 } else { 2 };
    assert_eq!(ends.len(), kinds * slices * pipeline.microbatches, "each unit once");
    for (stage, spans) in walk.spans.iter().enumerate() {
        for Span { unit, start, .. } in spans {
            let (i, slice) = (unit.microbatch, pipeline.slice(stage, unit.chunk));
            let need = match unit.work {
                Work::Forward if slice == 0 => continue,
                Work::Forward => (Work::Forward, i, slice - 1),
                Work::BackwardWeight => (back, i, slice),
                _ if slice + 1 == slices => (Work::Forward, i, slice),
                _ => (back, i, slice + 1),
            };
            assert!(ends[&need] <= *start, "{unit:?} of stage {stage} began before {need:?} ended");
        }
    }
}

proptest! {
    #[test]
    fn units_run_once_in_order_and_nothing_deadlocks(pipeline in schedules()) {
        let lists = pipeline.actions();
        for transport in [Transport::Rendezvous, Transport::Buffered] {
            let walk = simulate(&lists, Times::USUAL, transport).unwrap();
            check_needs(&pipeline, &walk);
            for stage in 0..pipeline.stages() {
                prop_assert_eq!(walk.peak_live[stage], pipeline.peak_live(stage), "stage {}", stage);
            }
        }
    }

    #[test]
    fn each_message_is_sent_once_and_received_once_by_a_neighbour(pipeline in schedules()) {
        let (mut sent, mut received) = (HashSet::new(), HashSet::new());
        let p = pipeline.stages();
        for (stage, list) in pipeline.actions().iter().enumerate() {
            for action in list {
                match *action {
                    Action::Send { message, to } => {
                        prop_assert!(to == (stage + 1) % p || to == (stage + p - 1) % p);
                        prop_assert!(sent.insert((stage, to, message)));
                    }
                    Action::Recv { message, from } => {
                        prop_assert!(received.insert((from, stage, message)));
                    }
                    Action::Run(_) => {}
                }
            }
        }
        let edges = if p == 1 { 0 } else { p * pipeline.chunks() - 1 };
        prop_assert_eq!(sent.len(), 2 * edges * pipeline.microbatches());
        prop_assert_eq!(sent, received);
    }

    #[test]
    fn a_step_takes_what_the_formula_says(pipeline in schedules(), f in 1u32..4, i in 1u32..4, w in 1u32..4) {
        let times = Times { forward: f as f64, backward_input: i as f64, backward_weight: w as f64 };
        let walk = simulate(&pipeline.actions_for(times).unwrap(), times, Transport::Buffered).unwrap();
        prop_assert_eq!(walk.makespan, pipeline.makespan(times));
        for spans in &walk.spans {
            let busy: f64 = spans.iter().map(|span| span.end - span.start).sum();
            prop_assert!((1.0 - busy / walk.makespan - pipeline.bubble(times)).abs() < 1e-12);
        }
    }
}

/// Times of stages, the last one's longest.
fn uneven(p: usize, others: &[(u32, u32, u32)], last: (u32, u32, u32)) -> Vec<Times> {
    let times = |(f, i, w): (u32, u32, u32)| Times {
        forward: f64::from(f),
        backward_input: f64::from(i),
        backward_weight: f64::from(w),
    };
    let others = others.iter().cycle().take(p - 1).copied();
    let more = |(f, i, w): (u32, u32, u32)| (f + 4, i + 4, w + 4);
    others.chain([more(last)]).map(times).collect()
}

fn mean_of(times: &[Times]) -> Times {
    let mean = |of: fn(&Times) -> f64| times.iter().map(of).sum::<f64>() / times.len() as f64;
    Times {
        forward: mean(|t| t.forward),
        backward_input: mean(|t| t.backward_input),
        backward_weight: mean(|t| t.backward_weight),
    }
}

proptest! {
    #[test]
    fn a_step_of_uneven_stages_takes_what_the_longest_and_the_others_way_take(
        p in 1usize..7, m in 1usize..20, early in any::<bool>(),
        others in prop::collection::vec((1u32..4, 1u32..4, 1u32..4), 1..6),
        last in (0u32..4, 0u32..4, 0u32..4),
    ) {
        let schedule = if early { Schedule::OneFOneB } else { Schedule::GPipe };
        let pipeline = Pipeline::new(p, m, schedule).unwrap();
        let times = uneven(p, &others, last);
        let (lists, last) = (pipeline.actions_for(times[p - 1]).unwrap(), times[p - 1]);
        let walk = simulate_uneven(&lists, &times, Transport::Buffered).unwrap();
        let (said, most) = (pipeline.makespan_of_uneven(mean_of(&times), last), pipeline.makespan(last));
        prop_assert!(walk.makespan > said - 1e-6, "{} is less than {said}", walk.makespan);
        prop_assert!(walk.makespan < most + 1e-6, "{} is more than {most}", walk.makespan);
    }
}

#[test]
fn stages_that_share_processors_take_no_longer_than_work_and_chain_allow() {
    let schedules =
        [Schedule::GPipe, Schedule::OneFOneB, Schedule::Interleaved { chunks: 2 }, Schedule::ZeroBubble];
    for (schedule, p) in schedules.into_iter().flat_map(|schedule| [2, 4].map(|p| (schedule, p))) {
        let lists = Pipeline::new(p, 2 * p, schedule).unwrap().actions();
        let times: Vec<Times> = (0..p)
            .map(|stage| {
                let more = if stage + 1 == p { 2.5 } else { 1.0 };
                Times { forward: more, backward_input: 1.1 * more, backward_weight: 0.9 * more }
            })
            .collect();
        let own = simulate_uneven(&lists, &times, Transport::Buffered).unwrap();
        let work: f64 = own.spans.iter().flatten().map(|span| span.end - span.start).sum();
        let of = |processors: usize| makespan_shared(&lists, &times, p as f64 / processors as f64).unwrap();
        // A processor each; one for all, which is never idle.
        assert!((of(p) - own.makespan).abs() < 1e-9, "{schedule} {p}");
        assert!((of(1) - work / p as f64).abs() < 1e-9, "{schedule} {p}");
        // In between (Graham 1966): all processors are at work, or the longest chain goes on at full pace.
        let (two, chain) = (of(2), own.makespan * 2.0 / p as f64);
        assert!(two >= (work / p as f64).max(chain) - 1e-9, "{schedule} {p}: {two}");
        assert!(two <= work / p as f64 + chain / 2.0 + 1e-9, "{schedule} {p}: {two}");
    }
    let message = Message { payload: Payload::Activation, microbatch: 0, chunk: 0 };
    let stuck = makespan_shared(&[vec![Action::Recv { message, from: 0 }]], &[Times::USUAL], 1.0);
    assert_eq!(stuck.unwrap_err().waiting.len(), 1);
}

/// What a reader checks by eye, and the share of bubble.
fn timeline(p: usize, m: usize, schedule: Schedule) -> String {
    let pipeline = Pipeline::new(p, m, schedule).unwrap();
    let walk = simulate(&pipeline.actions(), Times::USUAL, Transport::Buffered).unwrap();
    let live: Vec<_> = (0..p).map(|stage| pipeline.peak_live(stage)).collect();
    format!("{schedule}: bubble {:.1} %, holds {live:?}\n{walk}", 100.0 * pipeline.bubble(Times::USUAL))
}

#[test]
fn timelines() {
    let all = [
        (4, 4, Schedule::GPipe),
        (4, 6, Schedule::OneFOneB),
        (4, 2, Schedule::OneFOneB),
        (2, 4, Schedule::Interleaved { chunks: 2 }),
        (4, 6, Schedule::ZeroBubble),
    ];
    let text: Vec<_> = all.iter().map(|(p, m, schedule)| timeline(*p, *m, *schedule)).collect();
    insta::assert_snapshot!(text.join("\n"));
}

#[test]
fn the_list_of_a_stage_reads_as_it_is_executed() {
    let lists = Pipeline::new(2, 2, Schedule::OneFOneB).unwrap().actions();
    let text: Vec<_> = lists[0].iter().map(|action| format!("{action}")).collect();
    insta::assert_snapshot!(text.join("\n"), @r"
    Forward of microbatch 0 on chunk 0
    send activation of microbatch 0 for chunk 0 to stage 1
    Forward of microbatch 1 on chunk 0
    send activation of microbatch 1 for chunk 0 to stage 1
    receive gradient of microbatch 0 for chunk 0 from stage 1
    Backward of microbatch 0 on chunk 0
    receive gradient of microbatch 1 for chunk 0 from stage 1
    Backward of microbatch 1 on chunk 0
    ");
}

#[test]
fn shapes_that_do_not_fit_are_refused_with_those_that_do() {
    let refused = Pipeline::new(4, 6, Schedule::Interleaved { chunks: 2 }).unwrap_err().to_string();
    assert!(refused.contains("6 microbatches") && refused.contains("take 4 or 8"), "{refused}");
    let never = Times { backward_weight: 0.0, ..Times::USUAL };
    assert!(Pipeline::new(2, 6, Schedule::ZeroBubble).unwrap().actions_for(never).is_err());
    assert!(Pipeline::new(0, 6, Schedule::GPipe).is_err());
    assert!(Pipeline::new(2, 6, Schedule::Interleaved { chunks: 0 }).is_err());
}

#[test]
fn lists_that_wait_for_each_other_are_a_deadlock_that_names_them() {
    let message = Message { payload: Payload::Activation, microbatch: 0, chunk: 0 };
    let lists = [vec![Action::Recv { message, from: 1 }], vec![Action::Recv { message, from: 0 }]];
    let stuck = simulate(&lists, Times::USUAL, Transport::Buffered).unwrap_err();
    assert_eq!(stuck.waiting.len(), 2);
    assert!(stuck.to_string().contains("stage 1 waits in: receive activation"), "{stuck}");
}
