//! Every collective on 1 to 8 ranks, odd sizes and all types, against serial references; on threads
//! and on processes' sockets.

mod bodies;
mod sockets;

use bodies::{BODIES, array};
use device::{DType, Device, View, ViewMut};
use dist::{Axis, CommError, Communicator, Counts, Group, Mesh, MeshShape, Options, launch};
use sockets::on_sockets;

fn on_ranks<R: Send>(ranks: usize, body: impl Fn(&Mesh, &Group) -> Result<R, CommError> + Sync) -> Vec<R> {
    let shape = MeshShape::new(&[(Axis::X, ranks)]).unwrap();
    launch(&shape, &Options::default(), |mesh| body(mesh, &mesh.group(Axis::X))).unwrap()
}

#[test]
fn on_threads() {
    for ranks in 1..=8 {
        for (name, body) in BODIES {
            on_ranks(ranks, |mesh, group| {
                body(mesh, group, Device::Cpu)
                    .inspect_err(|error| eprintln!("{name} on {ranks} ranks: {error}"))
            });
        }
    }
}

#[test]
fn on_processes() {
    for ranks in 1..=6 {
        let shape = MeshShape::new(&[(Axis::X, ranks)]).unwrap();
        on_sockets(shape, |mesh| {
            for (name, body) in BODIES {
                body(mesh, &mesh.group(Axis::X), Device::Cpu)
                    .inspect_err(|error| eprintln!("{name}: {error}"))?;
            }
            Ok(())
        })
        .unwrap();
    }
}

#[test]
fn rows_and_columns_of_a_mesh_meet_apart() {
    let shape: MeshShape = "dp=2,x=2,y=2".parse().unwrap();
    launch(&shape, &Options::default(), |mesh| -> Result<(), CommError> {
        for axis in [Axis::Dp, Axis::X, Axis::Y, Axis::Z] {
            let group = mesh.group(axis);
            let mut ranks = [mesh.rank() as f32];
            group.all_reduce_sum(ViewMut::of_f32(&mut ranks))?;
            assert_eq!(ranks[0], group.ranks().iter().sum::<usize>() as f32);
        }
        let group = mesh.group_over(&[Axis::Y, Axis::Dp]);
        let mut all = [0f32; 4];
        group.all_gather(View::of_f32(&[mesh.rank() as f32]), ViewMut::of_f32(&mut all))?;
        assert_eq!(all.map(|rank| rank as usize), group.ranks());
        if [0, 7].contains(&mesh.rank()) {
            mesh.group_of("ends", &[0, 7]).barrier()?;
        }
        Ok(())
    })
    .unwrap();
}

#[test]
fn wrong_arguments_are_refused_before_anybody_waits() {
    on_ranks(2, |_, group| {
        let ids = [1u32, 2];
        let refusals = [
            group.all_gather(View::of_u32(&ids), ViewMut::of_f32(&mut [0.0; 4])),
            group.broadcast(ViewMut::of_f32(&mut [0.0]), 2),
            group.send(View::of_u32(&ids), group.index()),
            group.all_to_all((View::of_u32(&ids), &[1, 0]), (ViewMut::of_u16(&mut [0]), &[1, 0])),
            group.all_reduce_sum(ViewMut::of_u16(&mut [0])),
        ];
        let wants = [
            "a piece of 2 u32",
            "member 2 does not exist",
            "is this rank itself",
            "one run a member",
            "no sum of u16",
        ];
        for (refusal, want) in refusals.into_iter().zip(wants) {
            let refusal = refusal.unwrap_err().to_string();
            assert!(refusal.contains(want), "{want}: {refusal}");
        }
        group.barrier()
    });
}

#[test]
fn a_rank_that_only_counts_counts_what_a_rank_that_moves_does() {
    let shape: MeshShape = "dp=2,x=3".parse().unwrap();
    let calls = |mesh: &Mesh| -> Result<Vec<Counts>, CommError> {
        let (row, column) = (mesh.group(Axis::X), mesh.group(Axis::Dp));
        let mut x = vec![1f32; 100];
        row.all_reduce_sum(ViewMut::of_f32(&mut x))?;
        row.broadcast(ViewMut::of_f32(&mut x), 1)?;
        row.reduce_sum(ViewMut::of_f32(&mut x), 2)?;
        column.all_gather(View::of_f32(&x), ViewMut::of_f32(&mut [0.0; 200]))?;
        column.reduce_scatter_sum(View::of_f32(&x), ViewMut::of_f32(&mut [0.0; 50]))?;
        let runs = [[1, 2, 3], [4, 5, 6], [7, 8, 9]];
        let receive = runs.map(|run| run[row.index()]);
        let send = runs[row.index()];
        let (sent, mut received) = (vec![1f32; send.iter().sum()], vec![0f32; receive.iter().sum()]);
        row.all_to_all((View::of_f32(&sent), &send), (ViewMut::of_f32(&mut received), &receive))?;
        column.send(View::of_f32(&x), 1 - column.index())?;
        column.receive(ViewMut::of_f32(&mut x), 1 - column.index())?;
        let mine = (row.index() == 0).then(|| array(&[1.0; 9]));
        row.start_broadcast(mine, (Device::Cpu, DType::F32, 9), 0)?.finish()?;
        row.start_all_reduce_sum(array(&[1.0; 6]))?.finish()?;
        mesh.group_over(&Axis::ALL).barrier()?;
        Ok(mesh
            .counts()
            .into_iter()
            .map(|counts| Counts { exposed_s: 0.0, beside_s: 0.0, ..counts })
            .collect())
    };
    let threads = launch(&shape, &Options::default(), calls).unwrap();
    let processes = on_sockets(shape, |mesh| {
        let counts = calls(mesh)?;
        // What the formulas say is what crossed the sockets.
        let Communicator::Processes(process) = mesh.communicator() else { unreachable!() };
        let (sent, received) = process.payload_bytes();
        assert_eq!(sent, counts.iter().map(|counts| counts.bytes_sent).sum::<u64>());
        assert_eq!(received, counts.iter().map(|counts| counts.bytes_received).sum::<u64>());
        Ok(counts)
    });
    assert_eq!(processes.unwrap(), threads);
    for (rank, moved) in threads.into_iter().enumerate() {
        let null = Mesh::new(shape, Communicator::null(rank, 6)).unwrap();
        assert_eq!(calls(&null).unwrap(), moved, "rank {rank}");
    }
}

#[test]
fn ten_thousand_ranks_fit_on_a_laptop_when_nothing_moves() {
    let shape: MeshShape = "x=100,y=100".parse().unwrap();
    let mut x = vec![0f32; 1000];
    for rank in [0, 4321, 9999] {
        let mesh = Mesh::new(shape, Communicator::null(rank, 10_000)).unwrap();
        for axis in [Axis::X, Axis::Y] {
            mesh.group(axis).all_reduce_sum(ViewMut::of_f32(&mut x)).unwrap();
        }
        let counts = mesh.counts();
        assert_eq!(counts.iter().map(|c| c.peers.len()).collect::<Vec<_>>(), [99, 99]);
        assert!(counts.iter().all(|c| c.bytes_received == 2 * 99 * 40 && c.calls == 1));
    }
}
