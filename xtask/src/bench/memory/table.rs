//! The tables of `bench memory` and what goes into the results file. Pure.

use comfy_table::{CellAlignment, Table, presets};
use serde_json::{Value, json};

use super::cases::{Case, Program};
use super::run::{Link, Run, Stretch};
use super::{Drive, Round};
use crate::bench::runs::median;

const HEADERS: [&str; 12] = [
    "step s (min..max)",
    "to no limit",
    "read GB",
    "written GB",
    "bound GB",
    "waited s",
    "reading GB/s",
    "writing GB/s",
    "floor s",
    "step / floor",
    "ordered s",
    "step / ordered",
];

/// Medians over rounds; ratios are taken within a round.
pub fn table(title: &str, cases: &[Case], rounds: &[Round]) -> Table {
    let mut table = Table::new();
    table.load_style(presets::UTF8_FULL_CONDENSED);
    let headers = HEADERS.into_iter().chain(["resident MiB", "group MiB"]);
    table.set_header(std::iter::once(title).chain(headers));
    for index in 0..cases.len() {
        table.add_row(row(index, cases, rounds));
    }
    table.column_iter_mut().skip(1).for_each(|column| column.set_cell_alignment(CellAlignment::Right));
    table
}

fn row(index: usize, cases: &[Case], rounds: &[Round]) -> Vec<String> {
    let runs = || rounds.iter().filter_map(|round| round.runs[index].as_ref());
    let seconds: Vec<f64> = runs().map(|run| run.step_s()).collect();
    let Some(step) = median(seconds.iter().copied()) else {
        return vec![cases[index].name.clone(), "failed".to_string()];
    };
    let (least, most) = seconds.iter().fold((f64::MAX, 0f64), |(lo, hi), v| (lo.min(*v), hi.max(*v)));
    let link = |value: fn(&Link) -> Option<f64>| median(runs().filter_map(|run| run.of_link(value)));
    let show = |value: Option<f64>| value.map_or_else(|| "-".to_string(), |value| format!("{value:.2}"));
    let mib = |bytes: f64| format!("{:.0}", bytes / f64::from(1 << 20));
    let within = |value: fn(f64, f64) -> f64, base: &dyn Fn(&Round) -> Option<f64>| {
        let one = |round: &Round| Some(value(round.runs[index].as_ref()?.step_s(), base(round)?));
        median(rounds.iter().filter_map(one))
    };
    let compute = |round: &Round| compute_s(cases, round);
    let floor = |round: &Round| floor_s(index, cases, round);
    let ordered = |round: &Round| ordered_s(index, cases, round);
    vec![
        cases[index].name.clone(),
        format!("{step:.2} ({least:.2}..{most:.2})"),
        show(within(|step, base| step / base, &compute)),
        show(link(|link| Some(link.up_bytes / 1e9))),
        show(link(|link| Some(link.down_bytes / 1e9))),
        show(link(|link| Some(link.bound_bytes? / 1e9))),
        show(link(|link| Some(link.stall_s))),
        show(link(|link| (link.up_s > 0.0).then(|| link.up_bytes / link.up_s / 1e9))),
        show(link(|link| (link.down_s > 0.0).then(|| link.down_bytes / link.down_s / 1e9))),
        show(within(|_, floor| floor, &floor)),
        show(within(|step, floor| step / floor, &floor)),
        show(within(|_, ordered| ordered, &ordered)),
        show(within(|step, ordered| step / ordered, &ordered)),
        median(runs().map(|run| run.resident_bytes)).map_or_else(|| "-".to_string(), mib),
        median(runs().filter_map(|run| run.group_bytes)).map_or_else(|| "-".to_string(), mib),
    ]
}

/// Seconds of a step of the same program without limits, in the same round.
fn compute_s(cases: &[Case], round: &Round) -> Option<f64> {
    let reference = cases.iter().position(|case| case.is_reference)?;
    round.runs[reference].as_ref().map(|run| run.step_s())
}

/// max(compute, bytes read / reading, bytes written / writing, both / both at once); none for a run that
/// moves nothing, or that is not ours.
fn floor_s(index: usize, cases: &[Case], round: &Round) -> Option<f64> {
    let (run, drive) = (round.runs[index].as_ref()?, round.drive);
    let read = run.of_link(|link| Some(link.up_bytes))?;
    let written = run.of_link(|link| Some(link.down_bytes))?;
    let both = (read + written) / drive.both_per_s;
    Some(compute_s(cases, round)?.max(read / drive.read_per_s).max(written / drive.write_per_s).max(both))
}

/// The floor, or what the order of the step asks for where that is more: the two stretches of docs/memory.md
/// one after the other. All runs of a table share step and budget, so those of the run with a plan count for
/// all; compute is the reference's, in the parts that the planned run saw.
fn ordered_s(index: usize, cases: &[Case], round: &Round) -> Option<f64> {
    let floor = floor_s(index, cases, round)?;
    let (both, compute) = (round.runs.iter().flatten().find_map(Run::stretches)?, compute_s(cases, round)?);
    let seen: f64 = both.iter().map(|stretch| stretch.compute_s).sum();
    let seconds = both.map(|Stretch { compute_s, up_bytes, down_bytes }| {
        let drive = round.drive;
        let moved = (up_bytes / drive.read_per_s).max(down_bytes / drive.write_per_s);
        (compute * compute_s / seen).max(moved).max((up_bytes + down_bytes) / drive.both_per_s)
    });
    Some(floor.max(seconds.iter().sum()))
}

/// The drive, as measured at the beginning of each round.
pub fn drive_line(rounds: &[Round]) -> String {
    let rates = |of: fn(&Drive) -> f64| {
        let each: Vec<String> = rounds.iter().map(|round| format!("{:.2}", of(&round.drive) / 1e9)).collect();
        each.join(", ")
    };
    format!(
        "drive by round: reads {} GB/s, writes {} GB/s, both at once {} GB/s together",
        rates(|drive| drive.read_per_s),
        rates(|drive| drive.write_per_s),
        rates(|drive| drive.both_per_s)
    )
}

/// Budgets and rules must not change a bit: whether all our runs had the same losses.
pub fn losses_line(cases: &[Case], rounds: &[Round]) -> String {
    let ours = |round: &'_ Round| -> Vec<Vec<u64>> {
        let runs =
            cases.iter().zip(&round.runs).filter(|(case, _)| matches!(case.program, Program::Trilith(_)));
        let losses = runs.filter_map(|(_, run)| run.as_ref());
        losses.map(|run| run.steps.iter().map(|step| step.loss.to_bits()).collect()).collect()
    };
    let all: Vec<Vec<u64>> = rounds.iter().flat_map(ours).collect();
    // A run is followed until its last step is seen, which may be one late.
    let steps = all.iter().map(Vec::len).min().unwrap_or(0);
    match all.windows(2).all(|pair| pair[0][..steps] == pair[1][..steps]) {
        true => format!("losses of all {} runs of ours: equal in every bit, {steps} steps", all.len()),
        false => "LOSSES DIFFER between runs of ours: a budget or a rule changed the result".to_string(),
    }
}

/// Everything measured, by case and round.
pub fn document(title: &str, cases: &[Case], rounds: &[Round]) -> Value {
    let drives: Vec<Drive> = rounds.iter().map(|round| round.drive).collect();
    let case = |(index, case): (usize, &Case)| {
        let floors: Vec<Option<f64>> = rounds.iter().map(|round| floor_s(index, cases, round)).collect();
        let ordered: Vec<Option<f64>> = rounds.iter().map(|round| ordered_s(index, cases, round)).collect();
        let runs: Vec<_> = rounds.iter().map(|round| round.runs[index].as_ref()).collect();
        json!({ "name": case.name, "floor_s_by_round": floors, "ordered_s_by_round": ordered, "runs_by_round": runs })
    };
    json!({
        "title": title, "drive_by_round": drives,
        "cases": cases.iter().enumerate().map(case).collect::<Vec<_>>(),
    })
}

#[cfg(test)]
mod tests {
    use super::super::run::{Step, Tiers};
    use super::*;

    fn case(name: &str) -> Case {
        let program = Program::Trilith(Vec::new());
        Case { name: name.to_string(), program, limit_bytes: None, is_reference: name == "no limit" }
    }

    fn run(seconds: f64, loss: f64, moved: Option<(f64, f64)>) -> Option<Run> {
        let link = |(up_bytes, down_bytes)| Link {
            up_bytes,
            down_bytes,
            up_s: 1.0,
            down_s: 1.0,
            stall_s: 0.0,
            bound_bytes: None,
        };
        let tiers = moved.map(|moved| Tiers { links: vec![link(moved)], stretches: None });
        let steps = vec![Step { seconds, loss, tiers }];
        Some(Run { steps, warm_up: 0, resident_bytes: 0.0, group_bytes: None })
    }

    fn round(slowdown: f64, runs: Vec<Option<Run>>) -> Round {
        let (read_per_s, write_per_s, both_per_s) = (1e9 / slowdown, 2e9 / slowdown, 2.5e9 / slowdown);
        Round { drive: Drive { read_per_s, write_per_s, both_per_s }, runs }
    }

    #[test]
    fn the_floor_is_the_slowest_of_compute_and_either_way() {
        let cases = [case("no limit"), case("dynamic")];
        let floor = |moved| floor_s(1, &cases, &round(1.0, vec![run(2.0, 1.0, None), run(6.0, 1.0, moved)]));
        assert_eq!(floor(Some((1e9, 1e9))), Some(2.0));
        assert_eq!(floor(Some((3e9, 1e9))), Some(3.0));
        assert_eq!(floor(Some((1e9, 7e9))), Some(3.5));
        assert_eq!(floor(Some((4e9, 6e9))), Some(4.0));
        assert_eq!(floor(Some((3e9, 7e9))), Some(4.0));
        assert_eq!(floor(None), None);
    }

    #[test]
    fn stretches_come_one_after_the_other() {
        let cases = [case("no limit"), case("dynamic"), case("lru")];
        let mut planned = run(6.0, 1.0, Some((3e9, 1e9)));
        let tiers = planned.as_mut().and_then(|run| run.steps[0].tiers.as_mut()).expect("it has tiers");
        let stretch = |compute_s, up_bytes, down_bytes| Stretch { compute_s, up_bytes, down_bytes };
        // A third of the compute beside 2.5 s of reading, two thirds beside nothing.
        tiers.stretches = Some([stretch(1.1, 2.5e9, 1e9), stretch(2.2, 0.0, 1e8)]);
        let round = round(1.0, vec![run(1.5, 1.0, None), planned, run(7.0, 1.0, Some((4e9, 1e9)))]);
        assert_eq!([1, 2].map(|index| floor_s(index, &cases, &round)), [Some(3.0), Some(4.0)]);
        assert_eq!([1, 2].map(|index| ordered_s(index, &cases, &round)), [Some(3.5), Some(4.0)]);
        assert_eq!(ordered_s(0, &cases, &round), None);
    }

    #[test]
    fn ratios_are_taken_within_rounds() {
        let cases = [case("no limit"), case("dynamic")];
        let one =
            |slow: f64| round(slow, vec![run(2.0 * slow, 1.0, None), run(3.0 * slow, 1.0, Some((1e9, 1e9)))]);
        let rounds = [one(1.0), one(4.0), one(2.0)];
        let row = row(1, &cases, &rounds);
        assert_eq!(row[1..4], ["6.00 (3.00..12.00)", "1.50", "1.00"]);
        assert_eq!(row[9..11], ["4.00", "1.50"]);
        assert!(losses_line(&cases, &rounds).contains("equal in every bit"));
    }

    #[test]
    fn another_loss_is_told() {
        let rounds = [round(1.0, vec![run(1.0, 0.1, None), run(1.0, 0.1f64.next_up(), None)])];
        let cases = [case("no limit"), case("dynamic")];
        assert!(losses_line(&cases, &rounds).contains("DIFFER"));
    }
}
