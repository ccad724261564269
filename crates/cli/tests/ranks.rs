//! Training as processes that are killed, stopped and delayed at random moments: every run ends resumed,
//! with the bits of one that nobody disturbed, and leaves no process and no socket behind.
//!
//! `DISTURBED_RUNS=50` makes the disturbed runs as many; each writes a line with `--nocapture`.

mod common;

use common::{Draws, Place};
use std::io::{BufRead, BufReader, Read};
use std::path::PathBuf;
use std::process::{Child, ChildStderr, Command, Stdio};
use std::time::{Duration, Instant};

/// Runs of the test suite: as many as take about a minute.
const RUNS: usize = 9;
/// Longer than a healthy call on a busy machine; one that is later only costs a restart.
const DEADLINE: Duration = Duration::from_secs(2);
/// Of runs that nobody disturbs, and which are not started again.
const PATIENT: [&str; 2] = ["--set", "mesh.deadline=60"];
const MESHES: [(&str, usize); 3] = [("dp=2", 2), ("fsdp=2,x=2", 4), ("x=3", 3)];

/// `trilith train tiny.toml` on a mesh, with a folder for its sockets that must be empty afterwards.
fn train(place: &Place, run: &str, mesh: &str, more: &[&str]) -> Command {
    let mut args: Vec<String> = ["train", "tiny.toml"].map(String::from).into();
    let deadline = format!("mesh.deadline={}", DEADLINE.as_secs_f64());
    let axes = mesh.split(',').map(|axis| format!("mesh.{axis}"));
    for set in axes.chain([format!("run.dir={run}"), deadline]) {
        args.extend(["--set".to_string(), set]);
    }
    args.extend(more.iter().map(|arg| arg.to_string()));
    std::fs::create_dir_all(place.path("t")).unwrap();
    let mut command = place.command(&args.iter().map(String::as_str).collect::<Vec<_>>());
    command.env("TMPDIR", place.path("t")).stdout(Stdio::null()).stderr(Stdio::piped());
    command
}

/// A model whose heads three ranks can share, and steps enough to be struck in.
fn place() -> Place {
    let place = Place::new();
    let recipe = String::from_utf8(place.read("tiny.toml")).unwrap();
    let recipe = recipe.replace("width = 32, heads = 4", "width = 96, heads = 6");
    place.write("tiny.toml", recipe.replace("steps = 24", "steps = 80"));
    place
}

fn said(stderr: Option<ChildStderr>) -> String {
    let mut text = String::new();
    stderr.unwrap().read_to_string(&mut text).unwrap();
    text
}

fn signal(pid: u32, name: &str) {
    // Whoever has ended cannot be told.
    let _ = Command::new("kill").args([name, &pid.to_string()]).stderr(Stdio::null()).status();
}

/// Ranks of a supervisor that live: (rank, process).
fn ranks_of(supervisor: u32) -> Vec<(usize, u32)> {
    let value = |environ: &[u8], name: &str| -> Option<u32> {
        let of = |entry: &[u8]| String::from_utf8_lossy(entry).strip_prefix(name)?.parse().ok();
        environ.split(|byte| *byte == 0).find_map(of)
    };
    let processes = std::fs::read_dir("/proc").unwrap().flatten();
    let pids = processes.filter_map(|entry| entry.file_name().to_string_lossy().parse::<u32>().ok());
    let mut ranks: Vec<(usize, u32)> = pids
        .filter_map(|pid| {
            let environ = std::fs::read(format!("/proc/{pid}/environ")).ok()?;
            let theirs = value(&environ, "TRILITH_SUPERVISOR=")? == supervisor;
            Some((value(&environ, "TRILITH_RANK=").filter(|_| theirs)? as usize, pid))
        })
        .collect();
    ranks.sort();
    ranks
}

/// Nobody and nothing is left of a run whose supervisor has ended.
fn assert_gone(place: &Place, supervisor: u32) {
    // The system may take a moment to bury those it killed.
    let patient = Instant::now();
    while !ranks_of(supervisor).is_empty() && patient.elapsed() < Duration::from_secs(20) {
        std::thread::sleep(Duration::from_millis(10));
    }
    assert_eq!(ranks_of(supervisor), [], "processes are left");
    let left: Vec<PathBuf> =
        std::fs::read_dir(place.path("t")).unwrap().map(|entry| entry.unwrap().path()).collect();
    assert!(left.is_empty(), "{left:?}");
}

/// What is done to a rank.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Disturbance {
    Kill,
    Stop,
    /// Stopped and let go after this part of the deadline, in percent.
    Delay(u32),
}

const DISTURBANCES: [Disturbance; 5] = [
    Disturbance::Kill,
    Disturbance::Stop,
    Disturbance::Delay(30),
    Disturbance::Kill,
    Disturbance::Delay(250),
];

/// Strikes the rank `victim` of a running supervisor, or whoever is rank 0 while that one is not there yet.
fn disturb(child: &Child, victim: usize, kind: Disturbance) {
    let ranks = ranks_of(child.id());
    let Some((_, pid)) = ranks.iter().find(|(rank, _)| *rank == victim).or(ranks.first()) else { return };
    match kind {
        Disturbance::Kill => signal(*pid, "-KILL"),
        Disturbance::Stop => signal(*pid, "-STOP"),
        Disturbance::Delay(percent) => {
            signal(*pid, "-STOP");
            std::thread::sleep(DEADLINE * percent / 100);
            signal(*pid, "-CONT");
        }
    }
}

#[test]
fn disturbed_runs_end_resumed_and_with_the_bits_of_threads() {
    let runs = std::env::var("DISTURBED_RUNS").ok().and_then(|n| n.parse().ok()).unwrap_or(RUNS);
    let place = place();
    let mut whole = Vec::new();
    for (i, (mesh, ranks)) in MESHES.iter().enumerate() {
        let (threads, processes) = (format!("threads{i}"), format!("processes{i}"));
        let ranks = ranks.to_string();
        let more = ["--ranks", &ranks, PATIENT[0], PATIENT[1]];
        let done = train(&place, &threads, mesh, &more).output().unwrap();
        assert!(done.status.success(), "{}", String::from_utf8_lossy(&done.stderr));
        let started = Instant::now();
        let mut child =
            train(&place, &processes, mesh, &[&more[..], &["--processes"]].concat()).spawn().unwrap();
        let (id, stderr) = (child.id(), said(child.stderr.take()));
        assert!(child.wait().unwrap().success(), "{stderr}");
        assert_eq!(stderr.matches("measured peak").count(), 1, "one rank has the screen: {stderr}");
        assert_gone(&place, id);
        let result = place.result(&threads);
        assert!(place.result(&processes) == result, "{mesh}: processes end with other bits than threads");
        whole.push((result, started.elapsed()));
    }
    let (mut draws, mut restarts) = (Draws(23), 0);
    for run in 0..runs {
        let ((mesh, ranks), (whole, span)) = (MESHES[run % MESHES.len()], &whole[run % MESHES.len()]);
        let kind = DISTURBANCES[draws.below(DISTURBANCES.len() as u64) as usize];
        let (victim, at) = (draws.below(ranks as u64) as usize, *span * draws.below(1000) as u32 / 1000);
        let dir = format!("run{run}");
        let mut child = train(&place, &dir, mesh, &["--processes", "--restart", "9"]).spawn().unwrap();
        let (id, stderr) = (child.id(), child.stderr.take());
        let reader = std::thread::spawn(move || said(stderr));
        std::thread::sleep(at);
        disturb(&child, victim, kind);
        let status = child.wait().unwrap();
        let stderr = reader.join().unwrap();
        assert!(status.success(), "run {run}: {stderr}");
        assert_gone(&place, id);
        let messages: Vec<&str> = stderr.lines().filter_map(|line| line.strip_prefix("lost: ")).collect();
        restarts += messages.len();
        println!("run {run:>2}  {mesh:<8}  {kind:?} rank {victim} at {at:.1?}: {messages:?}");
        assert!(messages.iter().all(|message| message.contains("rank ")), "run {run}: {stderr}");
        assert!(!stderr.contains("error:"), "run {run}: {stderr}");
        assert!(place.result(&dir) == *whole, "run {run}: other bits after {stderr}");
        std::fs::remove_dir_all(place.path(&dir)).unwrap();
    }
    assert!(restarts > 0, "no run was struck in time");
    println!("{runs} disturbed runs, {restarts} restarts, each resumed and bit-identical");
}

/// Axes whose calls run beside computation, between experts and along rows, and several of them.
#[test]
fn processes_compute_what_threads_compute_on_every_kind_of_axis() {
    let place = place();
    let mixture = ["--set", "model.family=mixtral", "--set", "model.experts=4"];
    for (mesh, more) in [
        ("fsdp=2,cp=2", &["--set", "mesh.attention=all-to-all"][..]),
        ("dp=2,cp=2,x=2", &["--set", "mesh.attention=ring", "--set", "train.accumulate=2"][..]),
        ("fsdp=2,ep=2", &mixture[..]),
        ("pp=2,fsdp=2", &["--set", "mesh.schedule=zero-bubble", "--set", "train.accumulate=4"]),
    ] {
        let few = ["--set", "train.steps=8", "--set", "train.batch=4", "--overwrite"];
        let more = [more, &few, &PATIENT].concat();
        let done = train(&place, "threads", mesh, &more).output().unwrap();
        assert!(done.status.success(), "{}", String::from_utf8_lossy(&done.stderr));
        let more = [&more[..], &["--processes"]].concat();
        let mut child = train(&place, "processes", mesh, &more).spawn().unwrap();
        let (id, stderr) = (child.id(), said(child.stderr.take()));
        assert!(child.wait().unwrap().success(), "{mesh}: {stderr}");
        assert_gone(&place, id);
        assert!(place.result("processes") == place.result("threads"), "{mesh}: other bits than threads");
    }
}

/// The next line that holds `part`; what came before it.
fn wait_for(lines: &mut impl Iterator<Item = std::io::Result<String>>, part: &str) -> String {
    let mut passed = String::new();
    for line in lines.map_while(Result::ok) {
        if line.contains(part) {
            return line;
        }
        passed += &(line + "\n");
    }
    panic!("it never said `{part}`: {passed}");
}

/// Until the log of `run` has this many lines.
fn wait_for_steps(place: &Place, run: &str, child: &mut Child, wanted: usize) {
    let lines = || {
        let log = std::fs::read(place.path(run).join("metrics.jsonl")).unwrap_or_default();
        log.iter().filter(|byte| **byte == b'\n').count()
    };
    while lines() < wanted {
        assert!(child.try_wait().unwrap().is_none(), "it ended before step {wanted}");
        std::thread::sleep(Duration::from_millis(5));
    }
}

#[test]
fn told_to_stop_the_supervisor_saves_and_leaves_nobody() {
    let place = place();
    let done = train(&place, "whole", "dp=2", &[]).output().unwrap();
    assert!(done.status.success(), "{}", String::from_utf8_lossy(&done.stderr));
    let mut child = train(&place, "run", "dp=2", &["--processes"]).spawn().unwrap();
    wait_for_steps(&place, "run", &mut child, 5);
    signal(child.id(), "-TERM");
    let (id, stderr) = (child.id(), said(child.stderr.take()));
    assert_eq!(child.wait().unwrap().code(), Some(75), "{stderr}");
    assert!(stderr.contains("--resume to go on"), "{stderr}");
    assert_eq!(stderr.matches("saving before the end").count(), 1, "{stderr}");
    assert_gone(&place, id);
    // What was saved is gone on with, here as threads.
    let done = train(&place, "run", "dp=2", &["--resume"]).output().unwrap();
    assert!(done.status.success(), "{}", String::from_utf8_lossy(&done.stderr));
    assert!(String::from_utf8_lossy(&done.stderr).contains("resumed at step "));
    assert!(place.result("run") == place.result("whole"));
}

#[test]
fn ranks_of_a_killed_supervisor_die_with_it() {
    let place = place();
    let more = ["--set", "train.steps=100000", "--processes"];
    let mut child = train(&place, "run", "dp=2,x=2", &more).spawn().unwrap();
    wait_for_steps(&place, "run", &mut child, 2);
    let ranks = ranks_of(child.id());
    assert_eq!(ranks.len(), 4);
    // Also one that could not act by itself.
    signal(ranks[3].1, "-STOP");
    child.kill().unwrap();
    child.wait().unwrap();
    assert_gone(&place, child.id());
}

#[test]
fn a_loss_is_told_once_and_the_run_goes_on_with_fewer_ranks() {
    let place = place();
    // One loss is struck, a second by a busy machine would be one too many.
    let patient = ["--set", "mesh.deadline=10", "--set", "train.steps=200"];
    let more = [&patient[..], &["--processes", "--restart", "1", "--fallback", "x=2"]].concat();
    let mut child = train(&place, "run", "dp=2,x=2", &more).spawn().unwrap();
    wait_for_steps(&place, "run", &mut child, 10);
    disturb(&child, 3, Disturbance::Kill);
    let mut lines = BufReader::new(child.stderr.take().unwrap()).lines();
    let lost = wait_for(&mut lines, "lost: ");
    assert!(lost.contains("rank 3 is dead: its process is gone") && lost.contains("step "), "{lost}");
    let mesh = wait_for(&mut lines, "restart 1 of 1");
    assert!(mesh.ends_with("on mesh `x=2`"), "{mesh}");
    wait_for(&mut lines, "ranks as processes");
    // The second loss is one too many, and is told as the one error of the run.
    let log = || place.read("run/metrics.jsonl").iter().filter(|byte| **byte == b'\n').count();
    let (patient, before) = (Instant::now(), log());
    while log() <= before && patient.elapsed() < Duration::from_secs(60) {
        std::thread::sleep(Duration::from_millis(5));
    }
    disturb(&child, 1, Disturbance::Stop);
    let error = wait_for(&mut lines, "error: ");
    for part in ["rank 1 is dead: its process does not answer", " #", "step ", "gave up after 1 restarts"] {
        assert!(error.contains(part), "{part}: {error}");
    }
    assert_eq!(lines.map_while(Result::ok).filter(|line| line.contains("rank")).count(), 0);
    assert_eq!(child.wait().unwrap().code(), Some(1));
    assert_gone(&place, child.id());
    let done = train(&place, "run", "x=2", &["--set", "train.steps=200", "--resume"]).output().unwrap();
    assert!(done.status.success(), "{}", String::from_utf8_lossy(&done.stderr));
}

/// The folder of states becomes a file: the next save fails. It is put right after the first loss.
fn fails_to_save_for_a_while(place: &Place, way: &[&str]) {
    let more = [&["--restart", "100000", "--set", "train.steps=100"], way].concat();
    let mut child = train(place, "run", "dp=2", &more).spawn().unwrap();
    wait_for_steps(place, "run", &mut child, 6);
    let (states, away) = (place.path("run/state"), place.path("run/away"));
    std::fs::rename(&states, &away).unwrap();
    std::fs::write(&states, "no folder").unwrap();
    let mut lines = BufReader::new(child.stderr.take().unwrap()).lines();
    let lost = wait_for(&mut lines, "lost: ");
    assert!(lost.contains("run/state"), "{lost}");
    std::fs::remove_file(&states).unwrap();
    std::fs::rename(&away, &states).unwrap();
    wait_for(&mut lines, "100 steps in");
    // Read to the end: a writer whose reader is gone fails.
    assert_eq!(lines.map_while(Result::ok).filter(|line| line.starts_with("error:")).count(), 0);
    assert!(child.wait().unwrap().success());
    assert_gone(place, child.id());
}

#[test]
fn a_rank_that_fails_is_started_again_as_thread_and_as_process() {
    let place = place();
    let done = train(&place, "whole", "dp=2", &["--set", "train.steps=100"]).output().unwrap();
    assert!(done.status.success(), "{}", String::from_utf8_lossy(&done.stderr));
    for way in [&[][..], &["--processes"][..]] {
        fails_to_save_for_a_while(&place, way);
        assert!(place.result("run") == place.result("whole"), "{way:?}");
        std::fs::remove_dir_all(place.path("run")).unwrap();
    }
}

#[test]
fn what_is_refused_is_refused_once() {
    let place = place();
    let refused = |more: &[&str]| {
        let mut child = train(&place, "run", "dp=2", more).spawn().unwrap();
        let stderr = said(child.stderr.take());
        assert_eq!(child.wait().unwrap().code(), Some(1), "{stderr}");
        assert_eq!(stderr.lines().filter(|line| line.starts_with("error: ")).count(), 1, "{stderr}");
        assert!(!stderr.contains("restart"), "{stderr}");
        assert_gone(&place, child.id());
        stderr
    };
    let processes = ["--processes", "--restart", "5"];
    let with = |set: &'static str| [&["--set", set][..], &processes].concat();
    assert!(refused(&with("data.path=nowhere.txt")).contains("nowhere.txt"));
    assert!(train(&place, "run", "dp=2", &[]).output().unwrap().status.success());
    assert!(refused(&processes).contains("holds a run at step 80; pass --resume"));
    assert!(refused(&["--ranks", "3", "--processes"]).contains("--ranks 3: mesh `dp=2` has 2 places"));
    let fallback = [&processes[..], &["--fallback", "dp=3"]].concat();
    assert!(refused(&fallback).contains("--fallback dp=3"));

    if !cfg!(feature = "mpi") {
        let mut child = train(&place, "run", "dp=2", &["--resume"]).env("PMI_SIZE", "2").spawn().unwrap();
        let stderr = said(child.stderr.take());
        assert_eq!(child.wait().unwrap().code(), Some(1));
        assert!(stderr.contains("built without MPI") && stderr.contains("--features mpi"), "{stderr}");
    }
}
