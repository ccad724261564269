//! Ranks that are late, dead or out of step end the run on all ranks with one message.

use device::ViewMut;
use dist::{Axis, CommError, Failure, Group, Mesh, MeshShape, Options, launch};
use std::sync::atomic::{AtomicUsize, Ordering::SeqCst};
use std::sync::{Barrier, Mutex};
use std::time::Duration;

const PATIENT: Duration = Duration::from_secs(60);
const SHORT: Duration = Duration::from_millis(100);

/// What every rank of `x=ranks` was told, and what `launch` returned.
fn told(
    ranks: usize,
    deadline: Duration,
    body: impl Fn(&Mesh, &Group) -> Result<(), CommError> + Sync,
) -> (Vec<Option<String>>, String) {
    let heard: Vec<Mutex<Option<String>>> = (0..ranks).map(|_| Mutex::new(None)).collect();
    let shape = MeshShape::new(&[(Axis::X, ranks)]).unwrap();
    let failure = launch(&shape, &Options { deadline }, |mesh| {
        let result = body(mesh, &mesh.group(Axis::X));
        *heard[mesh.rank()].lock().unwrap() = result.as_ref().err().map(CommError::to_string);
        result
    });
    let heard = heard.into_iter().map(|heard| heard.into_inner().unwrap()).collect();
    (heard, failure.err().map_or_else(String::new, |failure| failure.to_string()))
}

fn sum(group: &Group) -> Result<(), CommError> {
    group.all_reduce_sum(ViewMut::of_f32(&mut [1.0; 10]))
}

#[test]
fn a_late_rank_is_named_with_op_layer_and_step() {
    // The late rank comes when the others have given up, and is told the same.
    let given_up = Barrier::new(3);
    let (heard, failure) = told(3, SHORT, |mesh, group| {
        mesh.set_place(11, Some(4));
        sum(group)?;
        mesh.set_place(12, Some(if mesh.rank() == 2 { 6 } else { 7 }));
        if mesh.rank() == 2 {
            given_up.wait();
            return sum(group);
        }
        let result = sum(group);
        given_up.wait();
        result
    });
    for part in [
        "rank 2 is late",
        "all_reduce #1 on `x` (40 bytes of f32, layer 7, step 12)",
        "rank 2 was last seen computing in step 12, layer 6, after all_reduce #0",
    ] {
        assert!(failure.contains(part), "{part}: {failure}");
    }
    assert!(heard.iter().all(|heard| heard.as_ref() == Some(&failure)), "{heard:?}");
}

#[test]
fn a_rank_that_fails_ends_the_others_with_its_words() {
    let shape: MeshShape = "x=4".parse().unwrap();
    let others = AtomicUsize::new(0);
    let failure = launch(&shape, &Options { deadline: PATIENT }, |mesh| -> Result<(), String> {
        mesh.set_place(3, Some(1));
        if mesh.rank() == 1 {
            return Err("the disk is full".to_string());
        }
        let error = sum(&mesh.group(Axis::X)).unwrap_err();
        assert!(
            error
                .to_string()
                .contains("rank 1 is dead: the disk is full; it was last seen computing in step 3")
        );
        others.fetch_add(1, SeqCst);
        Err(error.to_string())
    });
    assert!(matches!(failure, Err(Failure::Rank { rank: 1, error }) if error == "the disk is full"));
    assert_eq!(others.into_inner(), 3);
}

#[test]
fn a_rank_that_panics_ends_the_others() {
    let (heard, failure) = told(4, PATIENT, |mesh, group| {
        sum(group)?;
        assert_ne!(mesh.rank(), 3, "on purpose");
        sum(group)
    });
    assert!(failure.starts_with("rank 3 panicked") && failure.contains("on purpose"), "{failure}");
    for heard in &heard[..3] {
        let heard = heard.as_ref().unwrap();
        assert!(heard.contains("rank 3 is dead: it panicked") && heard.contains("all_reduce #0"), "{heard}");
    }
}

#[test]
fn a_rank_that_leaves_early_is_missed_at_once() {
    let (heard, failure) = told(3, PATIENT, |mesh, group| {
        sum(group)?;
        if mesh.rank() == 0 { Ok(()) } else { sum(group) }
    });
    assert!(failure.contains("rank 0 is dead: its work ended while others still waited"), "{failure}");
    assert_eq!(heard.iter().filter(|heard| heard.is_some()).count(), 2);
}

#[test]
fn other_ops_sizes_and_types_are_out_of_step() {
    type Odd = fn(&Group) -> Result<(), CommError>;
    let odd: [(Odd, &str); 4] = [
        (|group| group.barrier(), "barrier #0"),
        (
            |group| group.all_reduce_sum(ViewMut::of_f32(&mut [1.0; 11])),
            "all_reduce #0 on `x` (44 bytes of f32",
        ),
        (
            |group| group.all_reduce_sum(ViewMut::of_bf16(&mut [half::bf16::ONE; 20])),
            "all_reduce #0 on `x` (40 bytes of bf16",
        ),
        (
            |group| group.broadcast(ViewMut::of_f32(&mut [1.0; 10]), 0),
            "broadcast #0 on `x` (40 bytes of f32, root",
        ),
    ];
    for (call, want) in odd {
        let (heard, failure) =
            told(3, PATIENT, |mesh, group| if mesh.rank() == 1 { call(group) } else { sum(group) });
        assert!(failure.contains("rank 1 is out of step: it is in ") && failure.contains(want), "{failure}");
        assert!(failure.contains("all_reduce #0 on `x` (40 bytes of f32, no layer, step 0)"), "{failure}");
        assert!(heard.iter().all(|heard| heard.as_ref() == Some(&failure)), "{heard:?}");
    }
}

#[test]
fn ranks_that_wait_for_each_other_are_out_of_step() {
    let shape: MeshShape = "x=2".parse().unwrap();
    let failure = launch(&shape, &Options { deadline: SHORT }, |mesh| {
        let (row, world) = (mesh.group(Axis::X), mesh.group_over(&[Axis::X, Axis::Y]));
        let (first, second) = if mesh.rank() == 0 { (row, world) } else { (world, row) };
        first.barrier()?;
        second.barrier()
    });
    let failure = failure.unwrap_err().to_string();
    assert!(
        failure.contains("is out of step") && failure.contains("`x`") && failure.contains("`x+y`"),
        "{failure}"
    );
}

#[test]
fn a_receiver_of_another_length_and_one_without_a_sender_are_told() {
    let (_, failure) = told(2, SHORT, |mesh, group| match mesh.rank() {
        0 => group.send(device::View::of_f32(&[1.0; 5]), 1),
        _ => group.receive(ViewMut::of_f32(&mut [0.0; 6]), 0),
    });
    assert!(failure.contains("receive #0") && failure.contains("send #0"), "{failure}");
    let (_, failure) = told(2, SHORT, |mesh, group| match mesh.rank() {
        0 => Ok(()),
        _ => group.receive(ViewMut::of_f32(&mut [0.0; 6]), 0),
    });
    assert!(failure.contains("rank 0 is dead: its work ended"), "{failure}");
}

#[test]
fn calls_beside_computation_fail_with_the_run() {
    let (heard, failure) = told(3, PATIENT, |mesh, group| {
        let bucket = dist::Array::new(device::Device::Cpu, device::DType::F32, 8)?;
        if mesh.rank() == 2 {
            return Ok(());
        }
        group.start_all_reduce_sum(bucket)?.finish().map(drop)
    });
    assert!(failure.contains("rank 2 is dead"), "{failure}");
    assert!(heard[..2].iter().all(|heard| heard.as_ref() == Some(&failure)), "{heard:?}");
}

/// A random rank panics, returns an error or skips a call at a random place of a random program;
/// whatever it is, every rank is back in time and one message says why.
#[test]
fn random_failures_at_random_places_end_every_rank() {
    for seed in 0..60usize {
        let ranks = 2 + seed % 5;
        let (victim, place, kind) = (seed * 7 % ranks, seed * 13 % 20, seed % 3);
        let (heard, failure) = told(ranks, SHORT, |mesh, group| {
            for step in 0..20 {
                mesh.set_place(step as u64, None);
                if (mesh.rank(), step) == (victim, place) {
                    match kind {
                        0 => panic!("on purpose"),
                        1 => return Err(CommError::Transport("on purpose".to_string())),
                        _ => continue,
                    }
                }
                match (seed + step) % 4 {
                    0 => sum(group)?,
                    1 => group.broadcast(ViewMut::of_f32(&mut [1.0; 100]), step % ranks)?,
                    2 => group.barrier()?,
                    _ => drop(
                        group
                            .start_all_reduce_sum(dist::Array::new(
                                device::Device::Cpu,
                                device::DType::F32,
                                64,
                            )?)?
                            .finish()?,
                    ),
                }
            }
            Ok(())
        });
        assert!(failure.contains(&format!("rank {victim} ")) || failure == "on purpose", "{seed}: {failure}");
        let others = heard.iter().enumerate().filter(|(rank, _)| *rank != victim);
        for (rank, heard) in others {
            let heard = heard.as_ref().unwrap_or_else(|| panic!("{seed}: rank {rank} was not told"));
            let blames = heard.contains(&format!("rank {victim} "));
            assert!(blames, "{seed}: rank {rank} heard {heard}");
        }
    }
}
