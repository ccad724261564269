//! Times collectives between ranks that are threads, for `cargo xtask bench comm`.
//!
//! `comm_bench RANKS BYTES ITERATIONS`: one JSON line an op with the median seconds of an iteration,
//! taken on rank 0 between barriers.

use device::{DType, Device, View, ViewMut};
use dist::{Array, Axis, CommError, Group, MeshShape, Options, launch};
use std::time::Instant;

fn main() {
    let numbers: Vec<usize> = std::env::args().skip(1).filter_map(|arg| arg.parse().ok()).collect();
    let [ranks, bytes, iterations] = numbers[..] else {
        eprintln!("usage: comm_bench RANKS BYTES ITERATIONS");
        std::process::exit(2);
    };
    let shape = MeshShape::new(&[(Axis::X, ranks)]).expect("a mesh");
    let run = |mesh: &dist::Mesh| rank(&mesh.group(Axis::X), bytes / 4, iterations);
    let times = launch(&shape, &Options::default(), run).expect("no rank fails");
    for (op, seconds) in &times[0] {
        println!("{{\"op\":\"{op}\",\"seconds\":{seconds:e}}}");
    }
}

/// Bytes are those of the whole array, which every rank holds before or after the call.
fn rank(group: &Group, len: usize, iterations: usize) -> Result<Vec<(&'static str, f64)>, CommError> {
    let piece = len / group.size();
    let (mut whole, mut part) = (vec![1f32; piece * group.size()], vec![1f32; piece]);
    let panel = Array::new(Device::Cpu, DType::F32, whole.len())?;
    // The first rank hands out a handle and is done: until all have it is what counts.
    let shared = || {
        let mine = (group.index() == 0).then(|| panel.clone());
        group.start_broadcast(mine, (Device::Cpu, DType::F32, panel.len), 0)?.finish()?;
        group.barrier()
    };
    Ok(vec![
        ("all_reduce", time(group, iterations, || group.all_reduce_sum(ViewMut::of_f32(&mut whole)))?),
        (
            "all_gather",
            time(group, iterations, || group.all_gather(View::of_f32(&part), ViewMut::of_f32(&mut whole)))?,
        ),
        (
            "reduce_scatter",
            time(group, iterations, || {
                group.reduce_scatter_sum(View::of_f32(&whole), ViewMut::of_f32(&mut part))
            })?,
        ),
        ("broadcast", time(group, iterations, || group.broadcast(ViewMut::of_f32(&mut whole), 0))?),
        (
            "all_gather_shared",
            time(group, iterations, || group.all_gather_shared(View::of_f32(&part)).map(drop))?,
        ),
        ("broadcast_shared", time(group, iterations, shared)?),
    ])
}

fn time(
    group: &Group,
    iterations: usize,
    mut call: impl FnMut() -> Result<(), CommError>,
) -> Result<f64, CommError> {
    call()?;
    let mut seconds = Vec::with_capacity(iterations);
    for _ in 0..iterations {
        group.barrier()?;
        let start = Instant::now();
        call()?;
        seconds.push(start.elapsed().as_secs_f64());
    }
    seconds.sort_by(f64::total_cmp);
    Ok(seconds[iterations / 2])
}
