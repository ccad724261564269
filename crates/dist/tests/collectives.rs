//! Every collective on 1 to 8 ranks, odd sizes and all types, against serial references.

use device::{DType, View, ViewMut};
use dist::{Array, Axis, CommError, Communicator, Counts, Group, Mesh, MeshShape, Options, launch};
use half::bf16;

const LENS: [usize; 6] = [0, 1, 3, 64, 1001, 5000];

fn on_ranks<R: Send>(ranks: usize, body: impl Fn(&Mesh, &Group) -> Result<R, CommError> + Sync) -> Vec<R> {
    let shape = MeshShape::new(&[(Axis::X, ranks)]).unwrap();
    launch(&shape, &Options::default(), |mesh| body(mesh, &mesh.group(Axis::X))).unwrap()
}

fn value(rank: usize, i: usize) -> f32 {
    ((rank * 7919 + i * 104_729) % 1000) as f32 * 0.37 - 180.0
}

fn data(rank: usize, len: usize) -> Vec<f32> {
    (0..len).map(|i| value(rank, i)).collect()
}

fn narrow(x: &[f32]) -> Vec<bf16> {
    x.iter().map(|x| bf16::from_f32(*x)).collect()
}

/// In the order of ranks, in f32.
fn sum(ranks: usize, len: usize) -> Vec<f32> {
    (0..len).map(|i| (1..ranks).fold(value(0, i), |sum, rank| sum + value(rank, i))).collect()
}

fn sum_bf16(ranks: usize, len: usize) -> Vec<bf16> {
    let wide = |rank, i| bf16::from_f32(value(rank, i)).to_f32();
    (0..len).map(|i| bf16::from_f32((1..ranks).fold(wide(0, i), |sum, rank| sum + wide(rank, i)))).collect()
}

#[test]
fn all_reduce_is_the_sum_in_the_order_of_ranks() {
    for ranks in 1..=8 {
        on_ranks(ranks, |mesh, group| {
            for len in LENS {
                let mut wide = data(mesh.rank(), len);
                let mut short = narrow(&wide);
                group.all_reduce_sum(ViewMut::of_f32(&mut wide))?;
                group.all_reduce_sum(ViewMut::of_bf16(&mut short))?;
                assert_eq!(wide, sum(ranks, len), "{ranks} ranks, {len}");
                assert_eq!(short, sum_bf16(ranks, len), "{ranks} ranks, {len}");
            }
            Ok(())
        });
    }
}

#[test]
fn all_gather_puts_pieces_in_order() {
    for ranks in 1..=8 {
        on_ranks(ranks, |mesh, group| {
            for len in LENS {
                let mine = data(mesh.rank(), len);
                let want: Vec<f32> = (0..ranks).flat_map(|rank| data(rank, len)).collect();
                let mut all = vec![0f32; ranks * len];
                group.all_gather(View::of_f32(&mine), ViewMut::of_f32(&mut all))?;
                assert_eq!(all, want);
                let mut all = vec![bf16::ZERO; ranks * len];
                group.all_gather(View::of_bf16(&narrow(&mine)), ViewMut::of_bf16(&mut all))?;
                assert_eq!(all, narrow(&want));
            }
            Ok(())
        });
    }
}

#[test]
fn reduce_scatter_gives_each_its_piece_of_the_sum() {
    for ranks in 1..=8 {
        on_ranks(ranks, |mesh, group| {
            for len in LENS {
                let own = mesh.rank() * len..(mesh.rank() + 1) * len;
                let mine = data(mesh.rank(), ranks * len);
                let mut out = vec![0f32; len];
                group.reduce_scatter_sum(View::of_f32(&mine), ViewMut::of_f32(&mut out))?;
                assert_eq!(out, sum(ranks, ranks * len)[own.clone()]);
                let mut out = vec![bf16::ZERO; len];
                group.reduce_scatter_sum(View::of_bf16(&narrow(&mine)), ViewMut::of_bf16(&mut out))?;
                assert_eq!(out, sum_bf16(ranks, ranks * len)[own]);
            }
            Ok(())
        });
    }
}

#[test]
fn broadcast_and_reduce_from_and_to_every_root() {
    for ranks in 1..=8 {
        on_ranks(ranks, |mesh, group| {
            for (root, len) in (0..ranks).flat_map(|root| LENS.map(|len| (root, len))) {
                let mut copy = data(mesh.rank(), len);
                group.broadcast(ViewMut::of_f32(&mut copy), root)?;
                assert_eq!(copy, data(root, len));
                let mut total = data(mesh.rank(), len);
                group.reduce_sum(ViewMut::of_f32(&mut total), root)?;
                let want = if mesh.rank() == root { sum(ranks, len) } else { data(mesh.rank(), len) };
                assert_eq!(total, want);
                let mut total = narrow(&data(mesh.rank(), len));
                group.reduce_sum(ViewMut::of_bf16(&mut total), root)?;
                if mesh.rank() == root {
                    assert_eq!(total, sum_bf16(ranks, len));
                }
            }
            Ok(())
        });
    }
}

#[test]
fn all_to_all_moves_runs_of_any_length() {
    for ranks in 1..=8 {
        on_ranks(ranks, |mesh, group| {
            let run = |from: usize, to: usize| (from * 31 + to * 17) % 40;
            let content = |from: usize, to: usize| data(from * 100 + to, run(from, to));
            let me = mesh.rank();
            let send: Vec<usize> = (0..ranks).map(|to| run(me, to)).collect();
            let receive: Vec<usize> = (0..ranks).map(|from| run(from, me)).collect();
            let mine: Vec<f32> = (0..ranks).flat_map(|to| content(me, to)).collect();
            let mut out = vec![0f32; receive.iter().sum()];
            group.all_to_all((View::of_f32(&mine), &send), (ViewMut::of_f32(&mut out), &receive))?;
            assert_eq!(out, (0..ranks).flat_map(|from| content(from, me)).collect::<Vec<_>>());
            Ok(())
        });
    }
}

#[test]
fn letters_travel_around_a_ring_in_order() {
    for ranks in 2..=8 {
        on_ranks(ranks, |mesh, group| {
            let (next, before) = ((mesh.rank() + 1) % ranks, (mesh.rank() + ranks - 1) % ranks);
            for len in LENS {
                group.send(View::of_f32(&data(mesh.rank(), len)), next)?;
            }
            group.barrier()?;
            for len in LENS {
                let mut got = vec![0f32; len];
                group.receive(ViewMut::of_f32(&mut got), before)?;
                assert_eq!(got, data(before, len));
            }
            Ok(())
        });
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

fn array(data: &[f32]) -> Array {
    let mut array = Array::new(DType::F32, data.len()).unwrap();
    array.view_mut().f32().copy_from_slice(data);
    array
}

#[test]
fn calls_beside_computation_give_the_same_as_calls_in_the_foreground() {
    for ranks in 1..=6 {
        on_ranks(ranks, |mesh, group| {
            let me = mesh.rank();
            let len = 240;
            let reduced = group.start_all_reduce_sum(array(&data(me, len)))?;
            let gathered = group.start_all_gather(array(&data(me, 7)))?;
            let scattered = group.start_reduce_scatter_sum(array(&data(me, ranks * 5)))?;
            // In the foreground meanwhile, over the same group.
            let mut other = data(me + 1, 33);
            group.all_reduce_sum(ViewMut::of_f32(&mut other))?;
            // Finished in another order than started.
            assert_eq!(scattered.finish()?.view().f32(), &sum(ranks, ranks * 5)[me * 5..me * 5 + 5]);
            let all: Vec<f32> = (0..ranks).flat_map(|rank| data(rank, 7)).collect();
            assert_eq!(gathered.finish()?.view().f32(), all);
            assert_eq!(reduced.finish()?.view().f32(), sum(ranks, len));
            Ok(())
        });
    }
}

#[test]
fn panels_broadcast_beside_computation_arrive_by_number() {
    for ranks in 1..=6 {
        on_ranks(ranks, |mesh, group| {
            let panel = |root: usize, k: usize| data(root * 10 + k, 50);
            let start = |root: usize, k: usize| {
                let mine = (mesh.rank() == root).then(|| array(&panel(root, k)));
                group.start_broadcast(mine, (DType::F32, 50), root)
            };
            for root in 0..ranks {
                let (first, second) = (start(root, 0)?, start(root, 1)?);
                assert_eq!(second.finish()?.view().f32(), panel(root, 1));
                assert_eq!(first.finish()?.view().f32(), panel(root, 0));
            }
            Ok(())
        });
    }
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
        row.start_broadcast(mine, (DType::F32, 9), 0)?.finish()?;
        row.start_all_reduce_sum(array(&[1.0; 6]))?.finish()?;
        mesh.group_over(&Axis::ALL).barrier()?;
        Ok(mesh.counts().into_iter().map(|counts| Counts { exposed_s: 0.0, ..counts }).collect())
    };
    let moved = launch(&shape, &Options::default(), calls).unwrap();
    for (rank, moved) in moved.into_iter().enumerate() {
        let null = Mesh::new(shape, Communicator::null(rank, 6)).unwrap();
        let counted = calls(&null).unwrap();
        assert_eq!(counted, moved, "rank {rank}");
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
