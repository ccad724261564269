//! Ranks as real processes that are killed, stopped and delayed at random. Every run must end
//! resumed, with the bits of a run that nobody disturbed, and every rank must say the same.
//!
//! The program is its own rank: `processes rank ...` works, without arguments it is the test.

use device::ViewMut;
use dist::{Axis, CommError, Communicator, Mesh, MeshShape, Process, Start, Supervision, supervise};
use rustix::process::Signal;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::atomic::AtomicBool;
use std::time::Duration;

const STEPS: u64 = 30;
const SAVE_EVERY: u64 = 4;
const RUNS: usize = 50;
/// Longer than a healthy call even on a busy machine; a call that is later only costs an attempt.
const DEADLINE: Duration = Duration::from_millis(400);

fn main() {
    let args: Vec<String> = std::env::args().skip(1).collect();
    if args.first().map(String::as_str) == Some("rank") {
        std::process::exit(i32::from(rank_main(&args[1..]).is_err()));
    }
    one_death_is_told_alike();
    fifty_disturbed_runs_end_with_the_bits_of_an_undisturbed_one();
}

/// What happens to one rank in the first attempt.
#[derive(Clone, Copy, PartialEq)]
enum Disturbance {
    None,
    Kill,
    Stop,
    Delay,
}

const DISTURBANCES: [Disturbance; 4] =
    [Disturbance::None, Disturbance::Kill, Disturbance::Stop, Disturbance::Delay];

/// `rank STATE KIND VICTIM STEP MICROSECONDS`
fn rank_main(args: &[String]) -> Result<(), CommError> {
    let number = |i: usize| args[i].parse::<usize>().expect("a number");
    let start =
        Start::of_this_process(|name| std::env::var_os(name)).expect("a supervisor").expect("started by one");
    let (rank, ranks, attempt, state) = (start.rank, start.ranks, start.attempt, PathBuf::from(&args[0]));
    let disturbed = attempt == 0 && rank == number(2);
    let kind = if disturbed { DISTURBANCES[number(1)] } else { Disturbance::None };
    let process = Process::join(&start.meet, rank, ranks, Duration::from_secs(20))?.with_deadline(DEADLINE);
    let shape = MeshShape::new(&[(Axis::Dp, ranks)]).expect("a mesh");
    let mesh = Mesh::new(shape, Communicator::Processes(process.clone())).expect("as many ranks");
    let result = train(&mesh, &state, |step| {
        if step == number(3) as u64 {
            disturb(kind, Duration::from_micros(number(4) as u64));
        }
    });
    let ended = process.end(result.as_ref().err().map(CommError::to_string));
    let result = result.and(ended);
    if let Err(error) = &result {
        let words = state.join(format!("words-{attempt}-{rank}"));
        std::fs::write(words, error.to_string()).expect("a place for last words");
    }
    result
}

/// Soon, in the middle of whatever the rank then does.
fn disturb(kind: Disturbance, after: Duration) {
    // From within: our number is ours for as long as there is somebody to send it.
    let signal = |signal: Signal| {
        std::thread::spawn(move || {
            std::thread::sleep(after);
            rustix::process::kill_process(rustix::process::getpid(), signal)
        });
    };
    match kind {
        Disturbance::None => {}
        Disturbance::Kill => signal(Signal::KILL),
        Disturbance::Stop => signal(Signal::STOP),
        Disturbance::Delay => std::thread::sleep(DEADLINE * 3),
    }
}

/// Data-parallel descent whose gradients depend on rank and step; rank 0 saves.
fn train(mesh: &Mesh, state: &Path, mut before: impl FnMut(u64)) -> Result<(), CommError> {
    let group = mesh.group(Axis::Dp);
    let mut weights = vec![1f32; 2000];
    let mut first = [0f32];
    if let (0, Ok(saved)) = (mesh.rank(), std::fs::read(state.join("saved"))) {
        first[0] = f32::from_le_bytes(saved[..4].try_into().expect("four bytes"));
        for (weight, bytes) in weights.iter_mut().zip(saved[4..].chunks_exact(4)) {
            *weight = f32::from_le_bytes(bytes.try_into().expect("four bytes"));
        }
    }
    group.broadcast(ViewMut::of_f32(&mut first), 0)?;
    group.broadcast(ViewMut::of_f32(&mut weights), 0)?;
    for step in first[0] as u64..STEPS {
        mesh.set_place(step, None);
        before(step);
        let place = (step * 31 + mesh.rank() as u64 * 17) as f32;
        let mut grads: Vec<f32> =
            weights.iter().enumerate().map(|(i, w)| (w * 0.3 + i as f32 * 0.01 + place).sin()).collect();
        group.all_reduce_sum(ViewMut::of_f32(&mut grads))?;
        weights.iter_mut().zip(&grads).for_each(|(w, g)| *w -= 0.01 * g);
        if (step + 1) % SAVE_EVERY == 0 || step + 1 == STEPS {
            if mesh.rank() == 0 {
                save(state, step + 1, &weights);
            }
            group.barrier()?;
        }
    }
    Ok(())
}

fn save(state: &Path, step: u64, weights: &[f32]) {
    let mut bytes = (step as f32).to_le_bytes().to_vec();
    weights.iter().for_each(|w| bytes.extend(w.to_le_bytes()));
    std::fs::write(state.join("saving"), bytes).expect("room to save");
    std::fs::rename(state.join("saving"), state.join("saved")).expect("the same folder");
}

/// One supervised run: attempts it took, last words of each attempt, the saved bytes.
fn run(ranks: usize, kind: Disturbance, victim: usize, at: (u64, u64)) -> (usize, Vec<Vec<String>>, Vec<u8>) {
    let folder = tempfile::tempdir().expect("a folder");
    let state = folder.path();
    let program = std::env::current_exe().expect("our own path");
    let kind = DISTURBANCES.iter().position(|k| *k == kind).expect("one of them");
    let stop = AtomicBool::new(false);
    let supervision = Supervision { ranks, patience: Duration::from_secs(3), well: &[0], stop: &stop };
    let command = |_: &Start| {
        let mut command = Command::new(&program);
        command.arg("rank").arg(state).args([kind, victim].map(|n| n.to_string()));
        command.args([at.0, at.1].map(|n| n.to_string()));
        command
    };
    let mut attempts = 0;
    let ends = supervise(state, &supervision, command, |attempt, ends| {
        attempts = attempt + 1;
        ends.first.filter(|_| attempts <= 10).map(|_| ranks)
    });
    assert_eq!(ends.expect("processes can be started").first, None, "ten restarts are enough");
    let words = |attempt: usize| {
        let of = |rank| std::fs::read_to_string(state.join(format!("words-{attempt}-{rank}"))).ok();
        (0..ranks).filter_map(of).collect()
    };
    let saved = std::fs::read(state.join("saved")).expect("a saved state");
    (attempts, (0..attempts).map(words).collect(), saved)
}

fn one_death_is_told_alike() {
    let (attempts, words, _) = run(4, Disturbance::Stop, 2, (10, 0));
    assert!(attempts >= 2);
    let words = &words[0];
    assert_eq!(words.len(), 3, "everybody but the stopped rank: {words:?}");
    assert!(words.iter().all(|w| w == &words[0]), "{words:?}");
    for part in ["rank 2 is dead: its process does not answer", " #", "on `dp`", "step "] {
        assert!(words[0].contains(part), "{part}: {}", words[0]);
    }
    println!("one death is told alike ... ok\n    {}", words[0]);
}

fn fifty_disturbed_runs_end_with_the_bits_of_an_undisturbed_one() {
    let undisturbed: Vec<Vec<u8>> =
        (2..=4).map(|ranks| run(ranks, Disturbance::None, 0, (99, 0)).2).collect();
    let mut attempts_made = 0;
    for seed in 0..RUNS {
        // A generator of which any bit will do.
        let random = (seed as u64 + 1).wrapping_mul(0x9e37_79b9_7f4a_7c15).rotate_left(29);
        let ranks = 2 + seed % 3;
        let kind = DISTURBANCES[1 + seed % 3];
        let victim = (random >> 8) as usize % ranks;
        let at = ((random >> 16) % STEPS, (random >> 32) % 3000);
        let (attempts, words, saved) = run(ranks, kind, victim, at);
        assert!(saved == undisturbed[ranks - 2], "run {seed}: other bits");
        for words in words.iter().filter(|words| !words.is_empty()) {
            assert!(words.iter().all(|w| w == &words[0]), "run {seed}: {words:#?}");
        }
        attempts_made += attempts;
    }
    println!("{RUNS} disturbed runs, {attempts_made} attempts, each resumed and bit-identical ... ok");
}
