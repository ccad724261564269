//! A plan with one thing changed, for the answer of a search.

use super::choices::{mixed, offloads, schemes};
use super::plan::{Plan, Zero};
use crate::pipeline::Schedule;
use crate::{Axis, Parts, Scheme};

/// A plan with one thing changed, named.
pub(super) fn changed(plan: &Plan, offload: bool) -> Vec<(String, Plan)> {
    let mut all = Vec::new();
    if plan.mesh.size(Axis::Pp) > 1 {
        let chunks = plan.schedule.chunks().max(2);
        let schedules =
            [Schedule::GPipe, Schedule::OneFOneB, Schedule::Interleaved { chunks }, Schedule::ZeroBubble];
        for schedule in schedules.into_iter().filter(|schedule| *schedule != plan.schedule) {
            all.push((format!("schedule {schedule}"), Plan { schedule, ..*plan }));
        }
    }
    let recompute = !plan.recompute;
    let word = if recompute { "recompute always" } else { "recompute never" };
    all.push((word.into(), Plan { recompute, ..*plan }));
    for choice in offloads(offload).iter().filter(|choice| **choice != plan.offload) {
        all.push((format!("{choice} on the host"), Plan { offload: *choice, ..*plan }));
    }
    if plan.mesh.size(Axis::Fsdp) > 1 {
        for zero in [Zero::One, Zero::Two, Zero::Three].into_iter().filter(|zero| *zero != plan.zero) {
            all.push((format!("{zero}"), Plan { zero, ..*plan }));
        }
    }
    all.extend(other_parts(plan));
    for rows in [plan.microbatch_rows / 2, plan.microbatch_rows * 2].into_iter().filter(|rows| *rows > 0) {
        all.push((format!("microbatches of {rows} rows"), Plan { microbatch_rows: rows, ..*plan }));
    }
    all
}

/// On a plane, the plan with one of its parts, or both, following the other scheme.
fn other_parts(plan: &Plan) -> Vec<(String, Plan)> {
    let grid = plan.mesh.grid();
    let one = schemes(grid).into_iter().map(|(_, scheme)| (scheme, Parts::default()));
    let all = if mixed(grid).is_empty() { Vec::new() } else { one.chain(mixed(grid)).collect() };
    let other = |(scheme, parts): &(Scheme, Parts)| (*scheme, *parts) != (plan.scheme, plan.parts);
    let named = |(scheme, parts): (Scheme, Parts)| (parts.named(scheme), Plan { scheme, parts, ..*plan });
    all.into_iter().filter(other).map(named).collect()
}

/// The plan with experts shared by half as many replicas, or by twice as many: `fsdp` of them, else `dp`, go
/// the other way.
pub(super) fn other_experts(plan: &Plan) -> Vec<(String, Plan)> {
    let (mesh, ep) = (&plan.mesh, plan.mesh.size(Axis::Ep));
    let halved = |axis: Axis| mesh.size(axis).is_multiple_of(2).then(|| mesh.with(axis, mesh.size(axis) / 2));
    let other = if mesh.size(Axis::Fsdp) > 1 { Axis::Fsdp } else { Axis::Dp };
    let fewer = halved(Axis::Ep).map(|half| half.with(other, 2 * mesh.size(other)));
    let more = halved(other).map(|half| half.with(Axis::Ep, 2 * ep));
    fewer.into_iter().chain(more).map(|mesh| (mesh.to_string(), Plan { mesh, ..*plan })).collect()
}
