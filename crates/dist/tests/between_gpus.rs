//! Every collective on memory of GPUs, which is moved from card to card; and ranks that are late, dead or out
//! of step there. Ranks are threads that talk over sockets as processes do; the CPU plays one GPU for all of
//! them, and NCCL.

mod bodies;

use bodies::BODIES;
use device::cuda::{self, PlayedPeers};
use device::{DType, Device, View, ViewMut};
use dist::{
    Array, Axis, CommError, Communicator, Counts, Group, Mesh, MeshShape, Nccl, Options, Process, launch,
};
use half::bf16;
use std::sync::{Barrier, LazyLock, MutexGuard, Once};
use std::time::{Duration, Instant};

const PATIENT: Duration = Duration::from_secs(60);
/// Longer than a busy machine keeps a rank that is well.
const SHORT: Duration = Duration::from_secs(1);

static NCCL: LazyLock<PlayedPeers> = LazyLock::new(|| {
    let played = PlayedPeers::default();
    assert!(cuda::play_peers(Box::new(played.clone())), "nobody asked before");
    played
});

/// The GPU and NCCL of a process that tests, for one test at a time.
fn played() -> MutexGuard<'static, ()> {
    static READY: Once = Once::new();
    let turn = cuda::for_a_test();
    NCCL.break_down(None);
    // The first kernel is compiled, which takes longer than the deadlines of tests.
    READY.call_once(|| drop(all(on_gpus("x=2", PATIENT, |mesh| sum(&mesh.group(Axis::X))))));
    turn
}

/// What every rank of `shape` came to.
fn on_gpus<R: Send>(
    shape: &str,
    deadline: Duration,
    body: impl Fn(&Mesh) -> Result<R, CommError> + Sync,
) -> Vec<Result<R, CommError>> {
    let shape: MeshShape = shape.parse().unwrap();
    let folder = tempfile::tempdir().unwrap();
    let ranks = shape.world_size();
    let rank = |rank: usize| {
        let process = Process::join(folder.path(), rank, ranks, PATIENT)?.with_deadline(deadline);
        let nccl = Nccl::new(&process).expect("it is played");
        let mesh = Mesh::new(shape, Communicator::Nccl(nccl)).unwrap();
        let result = body(&mesh);
        let ended = process.end(result.as_ref().err().map(CommError::to_string));
        result.and_then(|result| ended.map(|()| result))
    };
    std::thread::scope(|scope| {
        let rank = &rank;
        let running: Vec<_> = (0..ranks).map(|i| scope.spawn(move || rank(i))).collect();
        running.into_iter().map(|thread| thread.join().unwrap()).collect()
    })
}

fn all<R>(ends: Vec<Result<R, CommError>>) -> Vec<R> {
    ends.into_iter().map(|end| end.unwrap_or_else(|error| panic!("{error}"))).collect()
}

/// The one message that every rank was told, or those of `some`.
fn told(ends: Vec<Result<(), CommError>>, some: &[usize]) -> String {
    let words: Vec<String> =
        ends.into_iter().map(|end| end.err().map_or("went well".into(), |error| error.to_string())).collect();
    assert!(some.iter().all(|rank| words[*rank] == words[some[0]]), "{words:#?}");
    words[some[0]].clone()
}

fn values(len: usize, seed: usize) -> Vec<f32> {
    (0..len).map(|i| ((seed * 7919 + i * 104_729) % 1000) as f32 * 0.37 - 180.0).collect()
}

fn put(on: Device, values: &[f32]) -> Array {
    let mut array = Array::new(on, DType::F32, values.len()).unwrap();
    device::copy(array.view_mut(), View::of_f32(values));
    array
}

fn sum_of(group: &Group, len: usize) -> Result<(), CommError> {
    group.all_reduce_sum(put(Device::Cuda, &values(len, 1)).view_mut())
}

fn sum(group: &Group) -> Result<(), CommError> {
    sum_of(group, 10)
}

#[test]
fn every_collective() {
    let _turn = played();
    for ranks in 2..=5 {
        all(on_gpus(&format!("x={ranks}"), PATIENT, |mesh| {
            for (name, body) in BODIES {
                for on in [Device::Cuda, Device::Cpu] {
                    body(mesh, &mesh.group(Axis::X), on)
                        .inspect_err(|error| eprintln!("{name} on {ranks} ranks, {on}: {error}"))?;
                }
            }
            Ok(())
        }));
    }
}

/// A program over several groups, in the foreground and beside it; everything it sees, and what was counted.
fn program(mesh: &Mesh, on: Device) -> Result<(Vec<u32>, Vec<Counts>), CommError> {
    let mut seen = Vec::new();
    let mut see = |array: &Array| {
        let mut bytes = vec![0u8; array.len * array.dtype.size_bytes()];
        device::copy(ViewMut::of_bytes(array.dtype, &mut bytes), array.view());
        seen.extend(bytes.chunks(2).map(|two| u32::from(two[0]) | u32::from(two[1]) << 8));
    };
    let groups = [mesh.group(Axis::X), mesh.group(Axis::Dp), mesh.group_over(&[Axis::Y, Axis::Dp])];
    for (round, len) in [7usize, 1001].into_iter().enumerate() {
        for group in &groups {
            let mine = values(len * group.size(), mesh.rank() + round);
            let short: Vec<bf16> = mine.iter().map(|x| bf16::from_f32(*x)).collect();
            let bucket = group.start_all_reduce_sum(put(on, &mine))?;
            let scattered = group.start_reduce_scatter_sum(put(on, &mine))?;
            let mut wide = put(on, &mine[..len]);
            group.all_reduce_sum(wide.view_mut())?;
            see(&wide);
            let mut narrow = Array::new(on, DType::Bf16, short.len())?;
            device::copy(narrow.view_mut(), View::of_bf16(&short));
            group.all_reduce_sum(narrow.view_mut())?;
            group.reduce_sum(narrow.view_mut(), group.size() - 1)?;
            if group.index() + 1 == group.size() {
                see(&narrow);
            }
            see(&group.start_shift(wide)?.finish()?);
            see(&bucket.finish()?);
            see(&scattered.finish()?);
        }
    }
    let still = |counts: Counts| Counts { exposed_s: 0.0, beside_s: 0.0, ..counts };
    Ok((seen, mesh.counts().into_iter().map(still).collect()))
}

#[test]
fn the_bits_and_counts_are_those_of_threads() {
    let _turn = played();
    let shape = "dp=2,x=2,y=2";
    let threads =
        launch(&shape.parse().unwrap(), &Options::default(), |mesh| program(mesh, Device::Cpu)).unwrap();
    let gpus = all(on_gpus(shape, PATIENT, |mesh| program(mesh, Device::Cuda)));
    assert!(threads.iter().all(|(seen, _)| !seen.is_empty()));
    for (rank, (want, got)) in threads.into_iter().zip(gpus).enumerate() {
        assert_eq!(want.1, got.1, "counts of rank {rank}");
        assert!(want.0 == got.0, "bits of rank {rank}");
    }
}

#[test]
fn a_late_rank_is_named_with_op_layer_and_step() {
    let _turn = played();
    let given_up = Barrier::new(3);
    let ends = on_gpus("x=3", SHORT, |mesh| {
        let group = mesh.group(Axis::X);
        mesh.set_place(11, Some(4));
        sum(&group)?;
        group.barrier()?;
        mesh.set_place(12, Some(if mesh.rank() == 2 { 6 } else { 7 }));
        if mesh.rank() == 2 {
            given_up.wait();
            return sum(&group);
        }
        let result = sum(&group);
        given_up.wait();
        result
    });
    let failure = told(ends, &[0, 1, 2]);
    for part in [
        "rank 2 is late",
        "all_reduce #",
        "on `x` (40 bytes of f32, layer 7, step 12)",
        "in step 12, layer 6",
    ] {
        assert!(failure.contains(part), "{part}: {failure}");
    }
}

#[test]
fn a_rank_late_to_a_call_beside_computation_is_named() {
    let _turn = played();
    let given_up = Barrier::new(2);
    let ends = on_gpus("x=2", SHORT, |mesh| {
        let group = mesh.group(Axis::X);
        sum(&group)?;
        group.start_all_reduce_sum(put(Device::Cuda, &[1.0; 6]))?.finish()?;
        mesh.set_place(3, None);
        if mesh.rank() == 1 {
            given_up.wait();
            return sum(&group);
        }
        let result = group.start_all_reduce_sum(put(Device::Cuda, &[1.0; 8]))?.finish().map(drop);
        given_up.wait();
        result
    });
    let failure = told(ends, &[0, 1]);
    assert!(failure.contains("rank 1 is late") && failure.contains("beside computation"), "{failure}");
    assert!(failure.contains("32 bytes of f32"), "{failure}");
}

#[test]
fn a_dead_rank_ends_the_others_with_its_words_before_the_deadline() {
    let _turn = played();
    let start = Instant::now();
    let ends = on_gpus("x=4", PATIENT, |mesh| {
        let group = mesh.group(Axis::X);
        sum(&group)?;
        mesh.set_place(3, Some(1));
        if mesh.rank() == 1 {
            return Err(CommError::Transport("the disk is full".into()));
        }
        sum(&group)
    });
    let failure = told(ends, &[0, 2, 3]);
    assert!(failure.contains("rank 1 is dead: the disk is full"), "{failure}");
    assert!(start.elapsed() < PATIENT / 2, "nobody waited for the deadline");
}

#[test]
fn a_rank_that_leaves_early_is_missed_at_once() {
    let _turn = played();
    let start = Instant::now();
    let ends = on_gpus("x=3", PATIENT, |mesh| {
        let group = mesh.group(Axis::X);
        sum(&group)?;
        if mesh.rank() == 0 { Ok(()) } else { sum(&group) }
    });
    let failure = told(ends, &[1, 2]);
    assert!(failure.contains("rank 0 is dead: its work ended while others still waited"), "{failure}");
    assert!(start.elapsed() < PATIENT / 2, "nobody waited for the deadline");
}

#[test]
fn messages_that_never_come_and_of_another_length_are_told() {
    let _turn = played();
    let given_up = Barrier::new(2);
    let ends = on_gpus("x=2", SHORT, |mesh| {
        let group = mesh.group(Axis::X);
        if mesh.rank() == 0 {
            given_up.wait();
            return sum(&group);
        }
        let asked = [6, 7].map(|len| group.start_receive((Device::Cuda, DType::F32, len), 0));
        let result = asked.into_iter().next_back().expect("two")?.finish().map(drop);
        given_up.wait();
        result
    });
    let failure = told(ends, &[0, 1]);
    assert!(failure.contains("rank 0 is late") && failure.contains("receive #1"), "{failure}");
    let ends = on_gpus("x=2", PATIENT, |mesh| {
        let group = mesh.group(Axis::X);
        match mesh.rank() {
            0 => group.send(put(Device::Cuda, &[1.0; 5]).view(), 1)?,
            _ => group.receive(put(Device::Cuda, &[0.0; 6]).view_mut(), 0)?,
        }
        sum(&group)
    });
    let failure = told(ends, &[0, 1]);
    assert!(failure.contains("receive #0") && failure.contains("send #0"), "{failure}");
}

#[test]
fn other_ops_sizes_and_types_are_out_of_step() {
    let _turn = played();
    type Odd = fn(&Group) -> Result<(), CommError>;
    let odd: [(Odd, &str); 4] = [
        (|group| sum_of(group, 11), "(44 bytes of f32"),
        (|group| group.broadcast(put(Device::Cuda, &[1.0; 10]).view_mut(), 0), "broadcast #"),
        (
            |group| group.all_reduce_sum(Array::new(Device::Cuda, DType::Bf16, 20)?.view_mut()),
            "(40 bytes of bf16",
        ),
        (|group| group.reduce_sum(put(Device::Cuda, &[1.0; 10]).view_mut(), 2), "reduce #"),
    ];
    for (call, want) in odd {
        let ends = on_gpus("x=3", PATIENT, |mesh| {
            let group = mesh.group(Axis::X);
            sum(&group)?;
            if mesh.rank() == 1 {
                call(&group)?
            } else {
                sum(&group)?
            }
            // Whoever was not held up by it hears of it here.
            group.barrier()
        });
        let failure = told(ends, &[0, 1, 2]);
        assert!(failure.contains("is out of step: it is in ") && failure.contains(want), "{failure}");
        assert!(
            failure.contains("all_reduce #") && failure.contains("(40 bytes of f32, no layer"),
            "{failure}"
        );
    }
}

#[test]
fn what_nccl_reports_by_itself_ends_the_run() {
    let _turn = played();
    let ends = on_gpus("x=2", PATIENT, |mesh| {
        let group = mesh.group(Axis::X);
        sum(&group)?;
        group.barrier()?;
        mesh.set_place(5, Some(2));
        if mesh.rank() == 1 {
            NCCL.break_down(Some("unhandled system error (2)"));
            // Not in the call in which the other one hears of it.
            return group.barrier();
        }
        sum(&group)
    });
    let failure = told(ends, &[0, 1]);
    assert!(failure.starts_with("played NCCL failed in all_reduce #"), "{failure}");
    assert!(failure.contains("layer 2, step 5): unhandled system error (2)"), "{failure}");
}

#[test]
fn runs_that_do_not_fit_are_told() {
    let _turn = played();
    let ends = on_gpus("x=2", PATIENT, |mesh| {
        let group = mesh.group(Axis::X);
        let own = group.index();
        // Member 0 sends three to member 1, which expects two.
        let (send, receive) = if own == 0 { ([1, 3], [1, 2]) } else { ([2, 1], [2, 1]) };
        let mine = put(Device::Cuda, &vec![1.0; send.iter().sum()]);
        let mut out = put(Device::Cuda, &vec![0.0; receive.iter().sum()]);
        group.all_to_all((mine.view(), &send), (out.view_mut(), &receive))?;
        group.barrier()
    });
    let failure = told(ends, &[0, 1]);
    assert!(failure.contains("member 0 sends 12 bytes, member 1 expects 8"), "{failure}");
}

/// A random rank returns an error or skips a call at a random place of a random program; whatever it is, every
/// rank is back in time and one message says why.
#[test]
fn random_failures_at_random_places_end_every_rank() {
    let _turn = played();
    for seed in 0..16usize {
        let ranks = 2 + seed % 3;
        let (victim, place, skips) = (seed * 7 % ranks, seed * 13 % 12, seed % 2 == 1);
        let ends = on_gpus(&format!("x={ranks}"), SHORT, |mesh| {
            let group = mesh.group(Axis::X);
            for step in 0..12 {
                mesh.set_place(step as u64, None);
                if (mesh.rank(), step) == (victim, place) {
                    if skips {
                        continue;
                    }
                    return Err(CommError::Transport("on purpose".to_string()));
                }
                match (seed + step) % 4 {
                    0 => sum(&group)?,
                    1 => group.broadcast(put(Device::Cuda, &[1.0; 100]).view_mut(), step % ranks)?,
                    2 => group.barrier()?,
                    _ => drop(group.start_all_reduce_sum(put(Device::Cuda, &[1.0; 64]))?.finish()?),
                }
            }
            Ok(())
        });
        for (rank, end) in ends.iter().enumerate().filter(|(rank, _)| *rank != victim) {
            let heard = end.as_ref().err().map(CommError::to_string);
            let heard = heard.unwrap_or_else(|| panic!("{seed}: rank {rank} was not told"));
            assert!(heard.contains(&format!("rank {victim} ")), "{seed}: rank {rank} heard {heard}");
        }
    }
}
