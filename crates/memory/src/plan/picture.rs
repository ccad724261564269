//! A plan as text: how full each tier is over the moments of a step, what each link carries, and the
//! figures of every link.

use super::replay::Replay;
use super::types::{Budgets, Move, MoveKind, Plan, Rates};
use crate::Class;
use crate::trace::{Phase, Trace};
use std::collections::BTreeMap;
use std::fmt::Write;

/// Columns of a picture at most.
const WIDTH: usize = 96;
const HEIGHTS: [char; 9] = [' ', '▁', '▂', '▃', '▄', '▅', '▆', '▇', '█'];

/// Tiers over moments. A column is one moment or several, of which it shows the fullest.
///
/// `phase` is F forward, B backward, R recompute, O optimizer (of a column's first moment). A tier's bar
/// is full at its budget. A link's row shows bytes that are due in a column, full at the most of any
/// column; `again` marks chunks that are recomputed.
pub fn picture(trace: &Trace, budgets: &Budgets, plan: &Plan, replay: &Replay) -> String {
    let moments = trace.moments.len();
    let per = moments.div_ceil(WIDTH).max(1);
    let columns = moments.div_ceil(per);
    let mut text = String::new();
    let phases = (0..columns).map(|column| letter(trace.moments[column * per].phase));
    row(&mut text, "phase", phases.collect(), &format!("{moments} moments, {per} a column"));
    for (index, (tier, peak)) in plan.peaks.iter().enumerate() {
        let budget = budgets.of(*tier).unwrap_or(0);
        let fill = (0..columns).map(|column| {
            let end = ((column + 1) * per).min(moments);
            let most = (column * per..end).map(|moment| replay.usage[moment][index]).max().unwrap_or(0);
            height(most, budget)
        });
        let note = format!("peak {} of {}", bytes(*peak), bytes(budget));
        row(&mut text, &tier.to_string(), fill.collect(), &note);
    }
    for link in &plan.links {
        for up in [true, false] {
            let carried = |action: &&Move| match action.kind {
                MoveKind::Fetch => up && action.to == link.upper,
                MoveKind::WriteBack => !up && action.from == link.upper,
                MoveKind::Drop | MoveKind::Recompute => false,
            };
            let due = by_column(plan.moves.iter().filter(carried).map(|m| (m.before, m.bytes)), per, columns);
            let most = due.iter().copied().max().unwrap_or(0);
            let total: u64 = due.iter().sum();
            let arrow = if up { '↑' } else { '↓' };
            let name = format!("{arrow} {}", link.lower);
            row(&mut text, &name, due.iter().map(|bytes| height(*bytes, most)).collect(), &bytes(total));
        }
    }
    let again = plan.moves.iter().filter(|action| action.kind == MoveKind::Recompute);
    let again = by_column(again.map(|action| (action.before, 1)), per, columns);
    if again.iter().any(|count| *count > 0) {
        let marks = again.iter().map(|count| if *count > 0 { '*' } else { ' ' });
        row(&mut text, "again", marks.collect(), &format!("{} chunks", again.iter().sum::<u64>()));
    }
    text
}

fn by_column(due: impl Iterator<Item = (u32, u64)>, per: usize, columns: usize) -> Vec<u64> {
    let mut sums = vec![0; columns];
    due.for_each(|(moment, bytes)| sums[moment as usize / per] += bytes);
    sums
}

fn row(text: &mut String, name: &str, cells: String, note: &str) {
    writeln!(text, "{name:>7} |{cells}| {note}").expect("a string takes all");
}

const fn letter(phase: Phase) -> char {
    match phase {
        Phase::Forward => 'F',
        Phase::Backward => 'B',
        Phase::Recompute => 'R',
        Phase::Optimizer => 'O',
    }
}

/// A bar; what is not empty shows.
fn height(part: u64, whole: u64) -> char {
    let eighths = (u128::from(part) * 8).div_ceil(u128::from(whole.max(1))).min(8);
    HEIGHTS[eighths as usize]
}

/// The figures of every link and of the step, one line each.
pub fn link_table(plan: &Plan) -> String {
    let mut text = String::new();
    for link in &plan.links {
        writeln!(
            text,
            "{} <-> {}: moved {} (up {}, down {}), bound {}, gap {:.1} %, stall {:.3} s",
            link.upper,
            link.lower,
            bytes(link.moved_bytes()),
            bytes(link.up_bytes),
            bytes(link.down_bytes),
            bytes(link.bound_bytes),
            link.gap() * 100.0,
            link.stall_s,
        )
        .expect("a string takes all");
    }
    let (step, compute) = (plan.step_s(), plan.compute_s);
    let (again, stall) = (plan.recompute_s, plan.stall_s);
    writeln!(
        text,
        "step {step:.3} s predicted: compute {compute:.3} s, recompute {again:.3} s, stall {stall:.3} s"
    )
    .expect("a string takes all");
    text
}

/// Bytes of every class by the slowest tier its chunks ever lie in, and altogether.
pub fn class_table(trace: &Trace, plan: &Plan) -> String {
    let tiers: Vec<_> = plan.peaks.iter().map(|(tier, _)| *tier).collect();
    let mut sums: BTreeMap<Class, Vec<u64>> = BTreeMap::new();
    for (chunk, home) in trace.chunks.iter().zip(&plan.homes) {
        let row = sums.entry(chunk.class).or_insert_with(|| vec![0; tiers.len()]);
        if let Some(column) = tiers.iter().position(|tier| tier == home) {
            row[column] += chunk.bytes;
        }
    }
    let mut text = String::new();
    let mut line = |name: &str, cells: &[String]| {
        let cells: String = cells.iter().map(|cell| format!("  {cell:>12}")).collect();
        writeln!(text, "{name:<12}{cells}").expect("a string takes all");
    };
    let mut header = vec!["all".to_owned()];
    header.extend(tiers.iter().enumerate().map(|(nth, tier)| match nth {
        0 => format!("stay in {tier}"),
        _ => format!("go to {tier}"),
    }));
    line("class", &header);
    let mut all = vec![0; tiers.len()];
    for (class, row) in &sums {
        all.iter_mut().zip(row).for_each(|(all, bytes)| *all += bytes);
        let mut cells = vec![bytes(row.iter().sum())];
        cells.extend(row.iter().map(|count| bytes(*count)));
        line(&class.to_string(), &cells);
    }
    let mut cells = vec![bytes(all.iter().sum())];
    cells.extend(all.iter().map(|count| bytes(*count)));
    line("all", &cells);
    text
}

/// What keeps a step from being faster, in a sentence.
pub fn limit(plan: &Plan, rates: &Rates) -> String {
    let (step, compute) = (plan.step_s(), plan.compute_s + plan.recompute_s);
    let share = |seconds: f64| format!("{:.0} %", 100.0 * seconds / step.max(f64::MIN_POSITIVE));
    let mut parts = vec![(compute, "compute".to_owned())];
    for link in &plan.links {
        let rate = rates.below(link.upper);
        for (bytes, per_s, way) in
            [(link.up_bytes, rate.up_per_s, "up"), (link.down_bytes, rate.down_per_s, "down")]
        {
            parts.push((bytes as f64 / per_s, format!("{} <-> {} {way}", link.upper, link.lower)));
        }
    }
    parts.sort_by(|a, b| b.0.total_cmp(&a.0));
    let busy: Vec<String> =
        parts.iter().map(|(seconds, name)| format!("{name} {}", share(*seconds))).collect();
    format!("limited by {}; of the step busy: {}", parts[0].1, busy.join(", "))
}

/// Bytes for people.
pub(super) fn bytes(count: u64) -> String {
    const UNITS: [&str; 5] = ["KiB", "MiB", "GiB", "TiB", "PiB"];
    if count < 1024 {
        return format!("{count} B");
    }
    let mut value = count as f64 / 1024.0;
    let mut unit = 0;
    while value >= 1023.95 && unit + 1 < UNITS.len() {
        value /= 1024.0;
        unit += 1;
    }
    format!("{value:.1} {}", UNITS[unit])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bytes_read_well() {
        let cases =
            [(0, "0 B"), (1023, "1023 B"), (1024, "1.0 KiB"), (1 << 20, "1.0 MiB"), (3 << 29, "1.5 GiB")];
        for (count, text) in cases {
            assert_eq!(bytes(count), text);
        }
        assert_eq!(bytes(u64::MAX), "16384.0 PiB");
    }

    #[test]
    fn bars_show_what_is_not_empty() {
        assert_eq!((height(0, 10), height(1, 1000), height(10, 10), height(20, 10)), (' ', '▁', '█', '█'));
    }
}
