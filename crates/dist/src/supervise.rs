//! Runs N ranks as processes of this machine, ends what is left when one fails, and starts them
//! again for as long as its caller wants. Knows nothing of what they do; they resume from what they saved.

use rustix::process::{Pid, Signal, kill_process};
use std::ffi::OsString;
use std::fs::DirBuilder;
use std::io::{self, Read};
use std::os::unix::fs::DirBuilderExt;
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::atomic::{AtomicBool, Ordering::SeqCst};
use std::time::{Duration, Instant};

/// Between two looks at the processes.
const LOOK_EVERY: Duration = Duration::from_millis(10);
/// After a failure ranks end by themselves, with their message. When none has for so long, what is left
/// (a stopped process, a hung one) is killed: soon after the first that could speak, for all then have
/// heard the same; later where none has yet.
const LAST_WORDS: Duration = Duration::from_millis(600);
const FIRST_WORDS: Duration = Duration::from_millis(3500);

/// How a rank started here knows what it is: the names of its variables.
const MEET: &str = "TRILITH_MEET";
const RANK: &str = "TRILITH_RANK";
const RANKS: &str = "TRILITH_RANKS";
const ATTEMPT: &str = "TRILITH_ATTEMPT";
const SUPERVISOR: &str = "TRILITH_SUPERVISOR";

/// One rank of one attempt.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Start {
    /// Its number.
    pub rank: usize,
    /// All of them.
    pub ranks: usize,
    /// 0 for the first attempt, 1 after one restart, and so on.
    pub attempt: usize,
    /// Where the ranks of this attempt meet: what [`crate::Process::join`] wants.
    pub meet: PathBuf,
}

impl Start {
    /// The rank that [`supervise`] made this process; none when nobody did. From then on the process
    /// does not outlive its supervisor. `variable` looks into the environment. A message when the
    /// supervisor is gone already.
    pub fn of_this_process(variable: impl Fn(&str) -> Option<OsString>) -> Result<Option<Start>, String> {
        let Some(meet) = variable(MEET) else { return Ok(None) };
        let number = |name: &str| {
            let value = variable(name).and_then(|text| text.to_str()?.parse::<usize>().ok());
            value.ok_or_else(|| format!("{MEET} is set but {name} is no number; unset both"))
        };
        follow_parent();
        let parent = rustix::process::getppid().map(|pid| pid.as_raw_nonzero().get());
        if parent.and_then(|pid| usize::try_from(pid).ok()) != Some(number(SUPERVISOR)?) {
            return Err(format!(
                "the supervisor of this rank is gone; unset {MEET} to start a run of its own"
            ));
        }
        let (rank, ranks, attempt) = (number(RANK)?, number(RANKS)?, number(ATTEMPT)?);
        Ok(Some(Start { rank, ranks, attempt, meet: meet.into() }))
    }

    fn describe(&self, command: &mut Command) {
        command.env(MEET, &self.meet).env(SUPERVISOR, std::process::id().to_string());
        command.env(RANK, self.rank.to_string()).env(RANKS, self.ranks.to_string());
        command.env(ATTEMPT, self.attempt.to_string());
    }
}

/// The system kills this process when the thread that started it ends, stopped or not.
fn follow_parent() {
    #[cfg(target_os = "linux")]
    // Refused nowhere; a rank whose supervisor is gone would end at its next call anyway.
    let _ = rustix::process::set_parent_process_death_signal(Some(Signal::KILL));
}

/// Processes or their meeting place could not be made.
#[derive(Debug, thiserror::Error)]
#[error("cannot {what}: {error}")]
pub struct RunError {
    /// What was tried.
    what: String,
    /// Why it failed.
    error: io::Error,
}

/// How a run of processes is looked after.
#[derive(Clone, Copy, Debug)]
pub struct Supervision<'a> {
    /// Processes of the first attempt.
    pub ranks: usize,
    /// How long a rank may go on after another has ended well; longer than it takes to save.
    pub patience: Duration,
    /// Exit codes that are no failure.
    pub well: &'a [i32],
    /// When it comes true every rank is sent SIGTERM, once.
    pub stop: &'a AtomicBool,
}

/// How one rank ended.
#[derive(Clone, Debug)]
pub struct End {
    /// Its exit code, or the signal that ended it.
    pub status: ExitStatus,
    /// What it wrote to its standard output, which is kept for this.
    pub words: String,
}

impl End {
    /// `was ended by signal 9`, `exited with code 1`.
    pub fn how(&self) -> String {
        match (self.status.code(), self.status.signal()) {
            (Some(code), _) => format!("exited with code {code}"),
            (None, Some(signal)) => format!("was ended by signal {signal}"),
            (None, None) => "ended".to_string(),
        }
    }
}

/// How all ranks of one attempt ended.
#[derive(Clone, Debug)]
pub struct Ends {
    /// In the order of ranks.
    pub ranks: Vec<End>,
    /// The rank that failed first, if one did.
    pub first: Option<usize>,
}

/// Starts processes that meet below `folder`, which must have a short path, and waits until all have
/// ended; when one fails the others are ended. Then `again` says, from the number of the attempt and
/// how it ended, with how many ranks to start over, if at all. Returns how the last attempt ended.
///
/// Call it from a thread that lives as long as the run: ranks die with the thread that started them.
pub fn supervise(
    folder: &Path,
    supervision: &Supervision<'_>,
    command: impl Fn(&Start) -> Command,
    mut again: impl FnMut(usize, &Ends) -> Option<usize>,
) -> Result<Ends, RunError> {
    let (mut attempt, mut ranks) = (0, supervision.ranks);
    loop {
        let meet = MeetingPlace::make(folder, attempt)?;
        let mut running = Running { children: Vec::new() };
        for rank in 0..ranks {
            let start = Start { rank, ranks, attempt, meet: meet.0.clone() };
            let mut command = command(&start);
            start.describe(&mut command);
            command.stdin(Stdio::null()).stdout(Stdio::piped());
            let what = format!("start rank {rank} as {}", command.get_program().to_string_lossy());
            running.children.push(command.spawn().map_err(|error| RunError { what, error })?);
        }
        let ends = running.wait(supervision)?;
        match again(attempt, &ends) {
            Some(next) => (attempt, ranks) = (attempt + 1, next),
            None => return Ok(ends),
        }
    }
}

/// A folder that only this user may enter and only one attempt knows, so that whoever is left over from
/// an earlier one finds nobody there. Gone when dropped.
struct MeetingPlace(PathBuf);

impl MeetingPlace {
    fn make(folder: &Path, attempt: usize) -> Result<MeetingPlace, RunError> {
        let meet = folder.join(format!("trilith-{}-{attempt}", std::process::id()));
        let failed = |error| RunError { what: format!("make {}", meet.display()), error };
        // Left by a process of our number that was killed while its ranks met.
        match std::fs::remove_dir_all(&meet) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(failed(error)),
            _ => {}
        }
        DirBuilder::new().mode(0o700).create(&meet).map_err(failed)?;
        Ok(MeetingPlace(meet))
    }
}

impl Drop for MeetingPlace {
    fn drop(&mut self) {
        // Ranks that have met removed it themselves.
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

/// Processes that do not outlive this value.
struct Running {
    children: Vec<Child>,
}

impl Running {
    /// Until all have ended.
    fn wait(&mut self, supervision: &Supervision<'_>) -> Result<Ends, RunError> {
        let mut first = None;
        let mut statuses: Vec<Option<ExitStatus>> = vec![None; self.children.len()];
        let (mut last_end, mut told) = (Instant::now(), false);
        loop {
            for (rank, child) in self.children.iter_mut().enumerate() {
                if statuses[rank].is_some() {
                    continue;
                }
                let status = child.try_wait();
                let status =
                    status.map_err(|error| RunError { what: format!("watch rank {rank}"), error })?;
                let Some(status) = status else { continue };
                (statuses[rank], last_end) = (Some(status), Instant::now());
                if !status.code().is_some_and(|code| supervision.well.contains(&code)) {
                    first.get_or_insert(rank);
                }
            }
            if statuses.iter().all(Option::is_some) {
                return Ok(Ends { ranks: self.ends(statuses), first });
            }
            if supervision.stop.load(SeqCst) && !told {
                told = true;
                self.ask_to_stop(&statuses);
            }
            let spoke = statuses.iter().flatten().any(|status| status.code().is_some());
            let limit = match first {
                Some(_) if spoke => LAST_WORDS,
                Some(_) => FIRST_WORDS,
                None => supervision.patience,
            };
            if statuses.iter().any(Option::is_some) && last_end.elapsed() > limit {
                self.kill();
            }
            std::thread::sleep(LOOK_EVERY);
        }
    }

    fn ends(&mut self, statuses: Vec<Option<ExitStatus>>) -> Vec<End> {
        let of = |(child, status): (&mut Child, ExitStatus)| {
            let mut words = Vec::new();
            if let Some(mut out) = child.stdout.take() {
                // What cannot be read was not said.
                let _ = out.read_to_end(&mut words);
            }
            End { status, words: String::from_utf8_lossy(&words).trim_end().to_string() }
        };
        self.children.iter_mut().zip(statuses.into_iter().flatten()).map(of).collect()
    }

    fn ask_to_stop(&self, ended: &[Option<ExitStatus>]) {
        for (child, _) in self.children.iter().zip(ended).filter(|(_, ended)| ended.is_none()) {
            // One that has just ended needs no asking.
            let _ = kill_process(Pid::from_child(child), Signal::TERM);
        }
    }

    fn kill(&mut self) {
        // One that has ended already needs no killing.
        self.children.iter_mut().for_each(|child| drop(child.kill()));
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        self.kill();
        self.children.iter_mut().for_each(|child| drop(child.wait()));
    }
}
