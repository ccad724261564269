//! Arrays in memory of a GPU: every call gives the bits it gives for arrays of the host, on threads, on processes'
//! sockets, and where calls are only counted. The GPU is played by the CPU; with `TRILITH_GPU=real` it is the
//! machine's own.

mod sockets;

use device::{DType, Device, View, ViewMut};
use dist::{Array, Axis, CommError, Communicator, Counts, Group, Mesh, MeshShape, Options, launch};
use half::bf16;
use sockets::on_sockets;

/// An array that every rank fills in its own way.
fn array(device: Device, dtype: DType, rank: usize, len: usize) -> Array {
    let value = |i: usize| ((rank * 7919 + i * 104_729) % 1000) as f32 * 0.37 - 180.0;
    let wide: Vec<f32> = (0..len).map(value).collect();
    let narrow: Vec<bf16> = wide.iter().map(|x| bf16::from_f32(*x)).collect();
    let from = match dtype {
        DType::F32 => View::of_f32(&wide),
        _ => View::of_bf16(&narrow),
    };
    let mut array = Array::new(device, dtype, len).unwrap();
    device::copy(array.view_mut(), from);
    array
}

fn bytes(array: &Array) -> Vec<u8> {
    let mut bytes = vec![0; array.len * array.dtype.size_bytes()];
    device::copy(ViewMut::of_bytes(array.dtype, &mut bytes), array.view());
    bytes
}

/// What every call in the foreground leaves.
fn foreground(group: &Group, device: Device, dtype: DType) -> Result<Vec<Vec<u8>>, CommError> {
    let (ranks, me) = (group.size(), group.index());
    let mut left = Vec::new();
    for each in [0, 1, 3, 1001] {
        let new = |len| array(device, dtype, me, len);
        let (piece, mut pieces) = (new(each), new(each * ranks));
        group.all_gather(piece.view(), pieces.view_mut())?;
        let shared = group.all_gather_shared(piece.view())?;
        let (all, mut sum) = (new(each * ranks), new(each));
        group.reduce_scatter_sum(all.view(), sum.view_mut())?;
        let mut gathered = new(each * ranks);
        group.all_gather_within(gathered.view_mut())?;
        let mut scattered = new(each * ranks);
        group.reduce_scatter_sum_within(scattered.view_mut())?;
        // Of other pieces nothing is said.
        let mut own = Array::new(device, dtype, each)?;
        device::copy(own.view_mut(), scattered.view().narrow(me * each, each));
        let mut whole = new(each);
        group.all_reduce_sum(whole.view_mut())?;
        let (mut given, mut added) = (new(each), new(each));
        group.broadcast(given.view_mut(), ranks - 1)?;
        group.reduce_sum(added.view_mut(), ranks / 2)?;
        // Rank i gives each + i elements to rank j, and gets each + j.
        let send = vec![each + me; ranks];
        let receive: Vec<usize> = (0..ranks).map(|rank| each + rank).collect();
        let (mine, mut come) = (new(send.iter().sum()), new(receive.iter().sum()));
        group.all_to_all((mine.view(), &send), (come.view_mut(), &receive))?;
        left.extend([pieces, shared, sum, gathered, own, whole, given, added, come].iter().map(bytes));
        if ranks > 1 {
            let (letter, mut got) = (new(each), new(each));
            group.send(letter.view(), (me + 1) % ranks)?;
            group.receive(got.view_mut(), (me + ranks - 1) % ranks)?;
            left.push(bytes(&got));
        }
    }
    Ok(left)
}

/// What every call beside computation gives.
fn beside(group: &Group, device: Device, dtype: DType) -> Result<Vec<Vec<u8>>, CommError> {
    let (ranks, me) = (group.size(), group.index());
    let new = |len| array(device, dtype, me, len);
    // Its messages are numbered with those that are asked for below.
    let shifted = group.start_shift(new(50))?.finish()?;
    let mut pending = vec![
        group.start_all_reduce_sum(new(240))?,
        group.start_all_gather(new(7))?,
        group.start_reduce_scatter_sum(new(5 * ranks))?,
    ];
    for root in 0..ranks {
        let mine = (root == me).then(|| new(33));
        // Shared, as panels are.
        let kept = mine.clone();
        pending.push(group.start_broadcast(mine, (device, dtype, 33), root)?);
        drop(kept);
    }
    let mut sent = Vec::new();
    if ranks > 1 {
        for len in [0, 9, 2000] {
            pending.push(group.start_receive((device, dtype, len), (me + ranks - 1) % ranks)?);
            sent.push(group.start_send(new(len), (me + 1) % ranks)?);
        }
    }
    let mut left = vec![bytes(&shifted)];
    for pending in pending {
        let array = pending.finish()?;
        assert_eq!(array.device(), device, "where it was asked for");
        left.push(bytes(&array));
    }
    sent.into_iter().try_for_each(dist::Sending::finish)?;
    Ok(left)
}

fn all(mesh: &Mesh) -> Result<(), CommError> {
    for dtype in [DType::F32, DType::Bf16] {
        for calls in [foreground, beside] {
            let counts = || {
                let Counts { bytes_sent, bytes_received, calls, .. } = mesh.group(Axis::X).counts();
                [bytes_sent, bytes_received, calls]
            };
            let (mut left, mut counted) = (Vec::new(), Vec::new());
            for device in Device::ALL {
                let before = counts();
                left.push(calls(&mesh.group(Axis::X), device, dtype)?);
                counted.push([0, 1, 2].map(|i| counts()[i] - before[i]));
            }
            assert_eq!(counted[0], counted[1], "{dtype}");
            assert!(left[0] == left[1], "{dtype} on rank {} of {}", mesh.rank(), mesh.world_size());
        }
    }
    Ok(())
}

#[test]
fn on_threads() {
    let _gpu = device::cuda::for_a_test();
    for ranks in 1..=4 {
        let shape = MeshShape::new(&[(Axis::X, ranks)]).unwrap();
        launch(&shape, &Options::default(), all).unwrap();
    }
}

#[test]
fn on_processes() {
    let _gpu = device::cuda::for_a_test();
    for ranks in 1..=4 {
        on_sockets(MeshShape::new(&[(Axis::X, ranks)]).unwrap(), all).unwrap();
    }
}

#[test]
fn where_calls_are_counted_nothing_moves() {
    let _gpu = device::cuda::for_a_test();
    let shape = MeshShape::new(&[(Axis::X, 3)]).unwrap();
    let mesh = Mesh::new(shape, Communicator::null(1, 3)).unwrap();
    let group = mesh.group(Axis::X);
    let (mut data, before) = (array(Device::Cuda, DType::F32, 1, 9), array(Device::Cuda, DType::F32, 1, 9));
    group.all_reduce_sum(data.view_mut()).unwrap();
    group.all_gather(before.view().narrow(0, 3), data.view_mut()).unwrap();
    assert_eq!(bytes(&data), bytes(&before));
}
