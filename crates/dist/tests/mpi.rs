//! Every collective over MPI: one process a rank, started by `scripts/test_mpi.sh` with `mpirun`.
//! Run alone it is a world of one rank.

mod bodies;

use device::Device;
use dist::{Axis, CommError, Communicator, Mesh, MeshShape, Process};
use std::time::Duration;

fn main() {
    let process = Process::over_mpi(Duration::from_secs(60)).expect("MPI starts");
    let ranks = Communicator::Processes(process.clone()).world_size();
    let result = checks(&process, ranks);
    let ended = process.end(result.as_ref().err().map(CommError::to_string));
    if let Err(error) = result.and(ended) {
        eprintln!("{error}");
        std::process::exit(1);
    }
}

fn checks(process: &Process, ranks: usize) -> Result<(), CommError> {
    let row = MeshShape::new(&[(Axis::X, ranks)]).expect("a mesh");
    let mesh = Mesh::new(row, Communicator::Processes(process.clone())).expect("as many ranks");
    for (name, body) in bodies::BODIES {
        body(&mesh, &mesh.group(Axis::X), Device::Cpu)?;
        if mesh.rank() == 0 {
            println!("{name} on {ranks} MPI ranks ... ok");
        }
    }
    if ranks.is_multiple_of(2) {
        let shape = MeshShape::new(&[(Axis::Dp, 2), (Axis::Y, ranks / 2)]).expect("a mesh");
        let mesh = Mesh::new(shape, Communicator::Processes(process.clone())).expect("as many ranks");
        for axis in [Axis::Dp, Axis::Y] {
            let group = mesh.group(axis);
            let mut sum = [mesh.rank() as f32];
            group.all_reduce_sum(device::ViewMut::of_f32(&mut sum))?;
            assert_eq!(sum[0], group.ranks().iter().sum::<usize>() as f32);
        }
    }
    Ok(())
}
