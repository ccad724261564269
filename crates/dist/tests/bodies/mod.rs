//! What every collective must do, whoever carries the messages: the same checks run on threads, on
//! processes, under `mpirun`, and from GPU to GPU.

use device::{DType, Device, View, ViewMut};
use dist::pipeline::{Action, Message, Pipeline, Schedule};
use dist::{Array, CommError, Group, Mesh};
use half::bf16;

/// A check, run by every rank of a group on arrays in memory of a device.
pub type Body = fn(&Mesh, &Group, Device) -> Result<(), CommError>;

/// All of them, by name.
pub const BODIES: &[(&str, Body)] = &[
    ("all_reduce_is_the_sum_in_the_order_of_ranks", all_reduce_is_the_sum_in_the_order_of_ranks),
    ("all_gather_puts_pieces_in_order", all_gather_puts_pieces_in_order),
    ("reduce_scatter_gives_each_its_piece_of_the_sum", reduce_scatter_gives_each_its_piece_of_the_sum),
    ("broadcast_and_reduce_from_and_to_every_root", broadcast_and_reduce_from_and_to_every_root),
    ("all_to_all_moves_runs_of_any_length", all_to_all_moves_runs_of_any_length),
    ("letters_travel_around_a_ring_in_order", letters_travel_around_a_ring_in_order),
    (
        "what_is_gathered_and_scattered_in_place_is_the_same",
        what_is_gathered_and_scattered_in_place_is_the_same,
    ),
    ("jobs_beside_computation_make_several_calls", jobs_beside_computation_make_several_calls),
    (
        "calls_beside_computation_give_the_same_as_calls_in_the_foreground",
        calls_beside_computation_give_the_same_as_calls_in_the_foreground,
    ),
    ("arrays_shift_around_the_ring_beside_computation", arrays_shift_around_the_ring_beside_computation),
    (
        "panels_broadcast_beside_computation_arrive_by_number",
        panels_broadcast_beside_computation_arrive_by_number,
    ),
    ("messages_asked_for_early_are_taken_in_any_order", messages_asked_for_early_are_taken_in_any_order),
    ("stages_walk_the_lists_of_every_schedule", stages_walk_the_lists_of_every_schedule),
];

const LENS: [usize; 6] = [0, 1, 3, 64, 1001, 5000];

/// Owned by a call beside computation.
#[allow(dead_code)]
pub fn array(data: &[f32]) -> Array {
    put(Device::Cpu, data)
}

/// The same in memory of a device.
fn put(device: Device, data: &[f32]) -> Array {
    let mut array = Array::new(device, DType::F32, data.len()).unwrap();
    device::copy(array.view_mut(), View::of_f32(data));
    array
}

fn put_bf16(device: Device, data: &[bf16]) -> Array {
    let mut array = Array::new(device, DType::Bf16, data.len()).unwrap();
    device::copy(array.view_mut(), View::of_bf16(data));
    array
}

/// What is there, wherever that is.
fn f32s(array: &Array) -> Vec<f32> {
    let mut values = vec![0.0; array.len];
    device::copy(ViewMut::of_f32(&mut values), array.view());
    values
}

fn bf16s(array: &Array) -> Vec<bf16> {
    let mut values = vec![bf16::ZERO; array.len];
    device::copy(ViewMut::of_bf16(&mut values), array.view());
    values
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

fn all_reduce_is_the_sum_in_the_order_of_ranks(
    mesh: &Mesh,
    group: &Group,
    on: Device,
) -> Result<(), CommError> {
    let ranks = group.size();
    for len in LENS {
        let mut wide = put(on, &data(mesh.rank(), len));
        let mut short = put_bf16(on, &narrow(&data(mesh.rank(), len)));
        group.all_reduce_sum(wide.view_mut())?;
        group.all_reduce_sum(short.view_mut())?;
        assert_eq!(f32s(&wide), sum(ranks, len), "{ranks} ranks, {len}");
        assert_eq!(bf16s(&short), sum_bf16(ranks, len), "{ranks} ranks, {len}");
    }
    Ok(())
}

fn all_gather_puts_pieces_in_order(mesh: &Mesh, group: &Group, on: Device) -> Result<(), CommError> {
    let ranks = group.size();
    for len in LENS {
        let mine = data(mesh.rank(), len);
        let want: Vec<f32> = (0..ranks).flat_map(|rank| data(rank, len)).collect();
        let mut all = Array::new(on, DType::F32, ranks * len)?;
        group.all_gather(put(on, &mine).view(), all.view_mut())?;
        assert_eq!(f32s(&all), want);
        let mut all = Array::new(on, DType::Bf16, ranks * len)?;
        group.all_gather(put_bf16(on, &narrow(&mine)).view(), all.view_mut())?;
        assert_eq!(bf16s(&all), narrow(&want));
        assert_eq!(f32s(&group.all_gather_shared(put(on, &mine).view())?), want);
        assert_eq!(bf16s(&group.all_gather_shared(put_bf16(on, &narrow(&mine)).view())?), narrow(&want));
    }
    Ok(())
}

fn reduce_scatter_gives_each_its_piece_of_the_sum(
    mesh: &Mesh,
    group: &Group,
    on: Device,
) -> Result<(), CommError> {
    let ranks = group.size();
    for len in LENS {
        let own = mesh.rank() * len..(mesh.rank() + 1) * len;
        let mine = data(mesh.rank(), ranks * len);
        let mut out = Array::new(on, DType::F32, len)?;
        group.reduce_scatter_sum(put(on, &mine).view(), out.view_mut())?;
        assert_eq!(f32s(&out), sum(ranks, ranks * len)[own.clone()]);
        let mut out = Array::new(on, DType::Bf16, len)?;
        group.reduce_scatter_sum(put_bf16(on, &narrow(&mine)).view(), out.view_mut())?;
        assert_eq!(bf16s(&out), sum_bf16(ranks, ranks * len)[own]);
    }
    Ok(())
}

fn what_is_gathered_and_scattered_in_place_is_the_same(
    mesh: &Mesh,
    group: &Group,
    on: Device,
) -> Result<(), CommError> {
    let (ranks, me) = (group.size(), mesh.rank());
    for len in LENS {
        let own = me * len..(me + 1) * len;
        let mut all = vec![0f32; ranks * len];
        all[own.clone()].copy_from_slice(&data(me, len));
        let (mut short, mut all) = (put_bf16(on, &narrow(&all)), put(on, &all));
        group.all_gather_within(all.view_mut())?;
        group.all_gather_within(short.view_mut())?;
        let want: Vec<f32> = (0..ranks).flat_map(|rank| data(rank, len)).collect();
        assert!(f32s(&all) == want && bf16s(&short) == narrow(&want), "{ranks} ranks, {len}");
        let wide = data(me, ranks * len);
        let (mut short, mut wide) = (put_bf16(on, &narrow(&wide)), put(on, &wide));
        group.reduce_scatter_sum_within(wide.view_mut())?;
        group.reduce_scatter_sum_within(short.view_mut())?;
        assert_eq!(f32s(&wide)[own.clone()], sum(ranks, ranks * len)[own.clone()]);
        assert_eq!(bf16s(&short)[own.clone()], sum_bf16(ranks, ranks * len)[own]);
    }
    Ok(())
}

fn jobs_beside_computation_make_several_calls(
    mesh: &Mesh,
    group: &Group,
    on: Device,
) -> Result<(), CommError> {
    let (ranks, me, len) = (group.size(), mesh.rank(), 60);
    let start = |shift: usize| {
        let mut mine = put(on, &data(me + shift, ranks * len));
        dist::start_beside(&[group.clone(), group.clone()], move |groups| {
            groups[0].reduce_scatter_sum_within(mine.view_mut())?;
            groups[1].all_gather_within(mine.view_mut())?;
            Ok(mine)
        })
    };
    let jobs = [start(0)?, start(1)?, start(2)?];
    group.barrier()?;
    for (shift, job) in jobs.into_iter().enumerate().rev() {
        let value = |i| (1..ranks).fold(value(shift, i), |sum, rank| sum + value(rank + shift, i));
        assert_eq!(f32s(&job.finish()?), (0..ranks * len).map(value).collect::<Vec<_>>());
    }
    Ok(())
}

fn broadcast_and_reduce_from_and_to_every_root(
    mesh: &Mesh,
    group: &Group,
    on: Device,
) -> Result<(), CommError> {
    let ranks = group.size();
    for (root, len) in (0..ranks).flat_map(|root| LENS.map(|len| (root, len))) {
        let mut copy = put(on, &data(mesh.rank(), len));
        group.broadcast(copy.view_mut(), root)?;
        assert_eq!(f32s(&copy), data(root, len));
        let mut total = put(on, &data(mesh.rank(), len));
        group.reduce_sum(total.view_mut(), root)?;
        let want = if mesh.rank() == root { sum(ranks, len) } else { data(mesh.rank(), len) };
        assert_eq!(f32s(&total), want);
        let mut total = put_bf16(on, &narrow(&data(mesh.rank(), len)));
        group.reduce_sum(total.view_mut(), root)?;
        if mesh.rank() == root {
            assert_eq!(bf16s(&total), sum_bf16(ranks, len));
        }
    }
    Ok(())
}

fn all_to_all_moves_runs_of_any_length(mesh: &Mesh, group: &Group, on: Device) -> Result<(), CommError> {
    let ranks = group.size();
    let run = |from: usize, to: usize| (from * 31 + to * 17) % 40;
    let content = |from: usize, to: usize| data(from * 100 + to, run(from, to));
    let me = mesh.rank();
    let send: Vec<usize> = (0..ranks).map(|to| run(me, to)).collect();
    let receive: Vec<usize> = (0..ranks).map(|from| run(from, me)).collect();
    let mine: Vec<f32> = (0..ranks).flat_map(|to| content(me, to)).collect();
    let mut out = Array::new(on, DType::F32, receive.iter().sum())?;
    group.all_to_all((put(on, &mine).view(), &send), (out.view_mut(), &receive))?;
    assert_eq!(f32s(&out), (0..ranks).flat_map(|from| content(from, me)).collect::<Vec<_>>());
    Ok(())
}

fn letters_travel_around_a_ring_in_order(mesh: &Mesh, group: &Group, on: Device) -> Result<(), CommError> {
    let ranks = group.size();
    if ranks == 1 {
        return Ok(());
    }
    let (next, before) = ((mesh.rank() + 1) % ranks, (mesh.rank() + ranks - 1) % ranks);
    for len in LENS {
        group.send(put(on, &data(mesh.rank(), len)).view(), next)?;
    }
    group.barrier()?;
    for len in LENS {
        let mut got = Array::new(on, DType::F32, len)?;
        group.receive(got.view_mut(), before)?;
        assert_eq!(f32s(&got), data(before, len));
    }
    Ok(())
}

fn calls_beside_computation_give_the_same_as_calls_in_the_foreground(
    mesh: &Mesh,
    group: &Group,
    on: Device,
) -> Result<(), CommError> {
    let ranks = group.size();
    let me = mesh.rank();
    let len = 240;
    let reduced = group.start_all_reduce_sum(put(on, &data(me, len)))?;
    let gathered = group.start_all_gather(put(on, &data(me, 7)))?;
    let scattered = group.start_reduce_scatter_sum(put(on, &data(me, ranks * 5)))?;
    // In the foreground meanwhile, over the same group.
    let mut other = put(on, &data(me + 1, 33));
    group.all_reduce_sum(other.view_mut())?;
    // Finished in another order than started.
    assert_eq!(f32s(&scattered.finish()?), &sum(ranks, ranks * 5)[me * 5..me * 5 + 5]);
    let all: Vec<f32> = (0..ranks).flat_map(|rank| data(rank, 7)).collect();
    assert_eq!(f32s(&gathered.finish()?), all);
    assert_eq!(f32s(&reduced.finish()?), sum(ranks, len));
    Ok(())
}

fn panels_broadcast_beside_computation_arrive_by_number(
    mesh: &Mesh,
    group: &Group,
    on: Device,
) -> Result<(), CommError> {
    let ranks = group.size();
    let panel = |root: usize, k: usize| data(root * 10 + k, 50);
    let start = |root: usize, k: usize| {
        let mine = (mesh.rank() == root).then(|| put(on, &panel(root, k)));
        group.start_broadcast(mine, (on, DType::F32, 50), root)
    };
    for root in 0..ranks {
        let (first, second) = (start(root, 0)?, start(root, 1)?);
        assert_eq!(f32s(&second.finish()?), panel(root, 1));
        assert_eq!(f32s(&first.finish()?), panel(root, 0));
    }
    Ok(())
}

/// What goes around the ring comes back, each time from the rank before; what was sent may be kept.
fn arrays_shift_around_the_ring_beside_computation(
    mesh: &Mesh,
    group: &Group,
    on: Device,
) -> Result<(), CommError> {
    let ranks = group.size();
    let owner = |step: usize| (mesh.rank() + ranks - step) % ranks;
    let mut block = put(on, &data(mesh.rank(), 50));
    let mut sum = put(on, &[0.0; 50]);
    for step in 1..=ranks {
        let arriving = group.start_shift(block.clone())?;
        // Two at a time, of which the second has one owner after the other.
        let more: Vec<f32> = f32s(&sum).iter().map(|x| x + mesh.rank() as f32).collect();
        sum = group.start_shift(put(on, &more))?.finish()?;
        block = arriving.finish()?;
        assert_eq!(f32s(&block), data(owner(step), 50));
    }
    let all = (ranks * (ranks - 1) / 2) as f32;
    assert!(f32s(&sum).iter().all(|x| *x == all));
    Ok(())
}

fn messages_asked_for_early_are_taken_in_any_order(
    mesh: &Mesh,
    group: &Group,
    on: Device,
) -> Result<(), CommError> {
    let ranks = group.size();
    if ranks == 1 {
        return Ok(());
    }
    let (next, before) = ((mesh.rank() + 1) % ranks, (mesh.rank() + ranks - 1) % ranks);
    let asked = LENS.map(|len| group.start_receive((on, DType::F32, len), before));
    // A call beside computation is not held up by messages that have not been sent.
    let gathered = group.start_all_gather(put(on, &data(mesh.rank(), 9)))?;
    gathered.finish()?;
    let sent: Vec<_> =
        LENS.iter().map(|len| group.start_send(put(on, &data(mesh.rank(), *len)), next)).collect();
    for (len, pending) in LENS.into_iter().zip(asked).rev() {
        assert_eq!(f32s(&pending?.finish()?), data(before, len));
    }
    sent.into_iter().try_for_each(|sending| sending?.finish())
}

/// Every stage executes its list of every schedule: a message holds who it is.
fn stages_walk_the_lists_of_every_schedule(_: &Mesh, group: &Group, on: Device) -> Result<(), CommError> {
    let stages = group.size();
    let words = |message: Message| {
        [message.payload as usize, message.microbatch, message.chunk].map(|word| word as f32)
    };
    let schedules =
        [Schedule::GPipe, Schedule::OneFOneB, Schedule::Interleaved { chunks: 2 }, Schedule::ZeroBubble];
    for schedule in schedules {
        let pipeline = Pipeline::new(stages, 3 * stages, schedule).unwrap();
        let mut sent = Vec::new();
        for action in &pipeline.actions()[group.index()] {
            match *action {
                Action::Run(_) => {}
                Action::Send { message, to } => sent.push(group.start_send(put(on, &words(message)), to)?),
                Action::Recv { message, from } => {
                    let came = group.start_receive((on, DType::F32, 3), from)?.finish()?;
                    assert_eq!(f32s(&came), words(message), "{schedule}");
                }
            }
        }
        sent.into_iter().try_for_each(|sending| sending.finish())?;
    }
    Ok(())
}
