//! Runs whose ranks exchange memory of GPUs from card to card have the bits of those that pass through the host.
//! Ranks are threads that talk over sockets as processes do; the CPU plays one GPU for all of them, and NCCL.

mod common;

use common::Place;
use common::runs::{begin, run};
use device::cuda::{self, PlayedPeers};
use dist::{CommError, Communicator, Mesh, Nccl, Process};
use std::time::Duration;
use train::{Start, TrainError, Trainer};

const PATIENCE: Duration = Duration::from_secs(120);

/// The run of `sets` to its end over NCCL.
fn run_over_nccl(place: &Place, dir: &str, sets: &[&str]) {
    let begin = begin(place, dir, sets, Start::Overwrite);
    let shape = begin.recipe.mesh.shape;
    let (meeting, ranks) = (tempfile::tempdir().unwrap(), shape.world_size());
    let work = |mesh: &Mesh| -> Result<(), TrainError> {
        let mut trainer = Trainer::on(mesh, begin.clone())?;
        while trainer.advance()?.is_some() {}
        Ok(())
    };
    let rank = |rank: usize| -> Result<(), CommError> {
        let process = Process::join(meeting.path(), rank, ranks, PATIENCE)?.with_deadline(PATIENCE);
        let nccl = Nccl::new(&process).expect("it is played");
        let mesh = Mesh::new(shape, Communicator::Nccl(nccl)).unwrap();
        let pool = device::Threads::share(rank, ranks).unwrap();
        let why = pool.run(|| work(&mesh)).err().map(|error| error.to_string());
        process.end(why)
    };
    std::thread::scope(|scope| {
        let rank = &rank;
        let running: Vec<_> = (0..ranks).map(|i| scope.spawn(move || rank(i))).collect();
        running.into_iter().for_each(|thread| thread.join().unwrap().unwrap_or_else(|why| panic!("{why}")));
    });
}

#[test]
fn training_from_card_to_card_has_the_bits_of_training_through_the_host() {
    let _gpu = cuda::for_a_test();
    assert!(cuda::play_peers(Box::new(PlayedPeers::default())), "nobody asked before");
    let place = Place::new();
    let mixtral: &[&str] = &["model.family=mixtral", "model.experts=4", "mesh.ep=2"];
    let meshes: &[&[&str]] = &[
        &["mesh.dp=2"],
        &["mesh.fsdp=2", "mesh.zero=1"],
        &["mesh.fsdp=2", "mesh.zero=2", "train.accumulate=2", "train.batch=2"],
        &["mesh.fsdp=2", "mesh.zero=3"],
        &["mesh.x=2", "mesh.scheme=1d-sequence"],
        &["mesh.x=2", "mesh.y=2", "mesh.scheme=summa"],
        &["mesh.cp=2", "mesh.attention=ring"],
        &["mesh.cp=2", "mesh.attention=all-to-all"],
        &["mesh.pp=2", "mesh.schedule=zero-bubble", "train.accumulate=2", "train.batch=2"],
        mixtral,
        &["mesh.pp=2", "mesh.fsdp=2", "mesh.x=2", "train.accumulate=2", "train.batch=2"],
    ];
    for mesh in meshes {
        let fixed = ["train.device=cuda", "train.batch=4", "train.steps=2", "eval.every=2", "sample.every=0"];
        let sets = [&fixed[..], mesh].concat();
        run(&place, "host", &sets, Start::Overwrite, false);
        run_over_nccl(&place, "cards", &sets);
        let (got, want) = (place.result("cards"), place.result("host"));
        assert_eq!(got.2, want.2, "log of {mesh:?}");
        assert!(got.0 == want.0, "weights of {mesh:?}");
        assert!(got.1 == want.1, "state of {mesh:?}");
    }
}
