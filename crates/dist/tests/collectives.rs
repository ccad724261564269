//! Every collective on 1 to 8 ranks, odd sizes and all types, against serial references.

use device::{View, ViewMut};
use dist::{Axis, CommError, Group, Mesh, MeshShape, Options, launch};
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
