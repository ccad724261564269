//! Processes' sockets without processes.

use dist::{CommError, Communicator, Mesh, MeshShape, Process};
use std::time::Duration;

/// Ranks that talk over sockets, as processes do, though they are threads of this test.
pub fn on_sockets<R: Send>(
    shape: MeshShape,
    body: impl Fn(&Mesh) -> Result<R, CommError> + Sync,
) -> Result<Vec<R>, CommError> {
    let folder = tempfile::tempdir().unwrap();
    let ranks = shape.world_size();
    let rank = |rank: usize| {
        let process = Process::join(folder.path(), rank, ranks, Duration::from_secs(30))?;
        let mesh = Mesh::new(shape, Communicator::Processes(process.clone())).unwrap();
        let result = body(&mesh);
        process.end(result.as_ref().err().map(CommError::to_string))?;
        result
    };
    std::thread::scope(|scope| {
        let running: Vec<_> = (0..ranks).map(|i| scope.spawn(move || rank(i))).collect();
        running.into_iter().map(|thread| thread.join().unwrap()).collect()
    })
}
