//! Runs N ranks as processes of this machine, ends what is left when one fails, and starts them
//! again. Knows nothing of what they do; they resume from what they saved.

use std::fs::DirBuilder;
use std::io;
use std::os::unix::fs::DirBuilderExt;
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus};
use std::time::{Duration, Instant};

/// Between two looks at the processes.
const LOOK_EVERY: Duration = Duration::from_millis(10);
/// After a failure ranks end by themselves, with their message. When none has for so long, what is left
/// (a stopped process, a hung one) is killed.
const LAST_WORDS: Duration = Duration::from_millis(600);

/// One rank of one attempt.
#[derive(Clone, Debug)]
pub struct Start<'a> {
    /// Its number.
    pub rank: usize,
    /// All of them.
    pub ranks: usize,
    /// 0 for the first attempt, 1 after one restart, and so on.
    pub attempt: usize,
    /// Where the ranks of this attempt meet: what [`crate::Process::join`] wants.
    pub meet: &'a Path,
}

/// Why a supervised run ended.
#[derive(Debug, thiserror::Error)]
pub enum RunError {
    /// A rank failed more often than it may.
    #[error("rank {rank} {how}; gave up after {attempts} attempts (raise --restart to go on)")]
    Rank {
        /// The first rank that failed in the last attempt.
        rank: usize,
        /// `was ended by signal 9`, `exited with code 1`.
        how: String,
        /// Attempts made.
        attempts: usize,
    },
    /// Processes or their meeting place could not be made.
    #[error("cannot {what}: {error}")]
    Io {
        /// What was tried.
        what: String,
        /// Why it failed.
        error: io::Error,
    },
}

/// How a run of processes is looked after.
#[derive(Clone, Debug)]
pub struct Supervision {
    /// Processes.
    pub ranks: usize,
    /// How often all may be started again.
    pub restarts: usize,
    /// How long a rank may go on after another has ended well; longer than it takes to save.
    pub patience: Duration,
}

/// Starts processes that meet below `folder`, which must have a short path, and waits for them. When
/// one fails the others are ended and all are started again. Returns how many attempts it took.
pub fn supervise(
    folder: &Path,
    supervision: &Supervision,
    command: impl Fn(&Start<'_>) -> Command,
) -> Result<usize, RunError> {
    let mut attempt = 0;
    loop {
        let meet = meeting_place(folder, attempt)?;
        let mut running = Running { children: Vec::new() };
        let ranks = supervision.ranks;
        for rank in 0..ranks {
            let mut command = command(&Start { rank, ranks, attempt, meet: &meet });
            let what = || format!("start rank {rank} as {}", command.get_program().to_string_lossy());
            let what = what();
            let child = command.spawn().map_err(|error| RunError::Io { what, error })?;
            running.children.push(child);
        }
        let failed = running.wait(supervision.patience)?;
        drop(running);
        // Sockets of ended processes; a later attempt meets elsewhere.
        let _ = std::fs::remove_dir_all(&meet);
        attempt += 1;
        match failed {
            None => return Ok(attempt),
            Some((rank, status)) if attempt > supervision.restarts => {
                return Err(RunError::Rank { rank, how: how(status), attempts: attempt });
            }
            Some(_) => {}
        }
    }
}

/// A folder that only this user may enter, and only this attempt knows.
fn meeting_place(folder: &Path, attempt: usize) -> Result<PathBuf, RunError> {
    let meet = folder.join(format!("ranks-{}-{attempt}", std::process::id()));
    let made = DirBuilder::new().recursive(true).mode(0o700).create(&meet);
    made.map_err(|error| RunError::Io { what: format!("make {}", meet.display()), error })?;
    Ok(meet)
}

fn how(status: ExitStatus) -> String {
    match (status.code(), status.signal()) {
        (Some(code), _) => format!("exited with code {code}"),
        (None, Some(signal)) => format!("was ended by signal {signal}"),
        (None, None) => "ended".to_string(),
    }
}

/// Processes that do not outlive this value.
struct Running {
    children: Vec<Child>,
}

impl Running {
    /// The first rank that failed, when all have ended.
    fn wait(&mut self, patience: Duration) -> Result<Option<(usize, ExitStatus)>, RunError> {
        let mut failed: Option<(usize, ExitStatus)> = None;
        let (mut ended, mut last_end) = (vec![false; self.children.len()], Instant::now());
        loop {
            for (rank, child) in self.children.iter_mut().enumerate() {
                let status = child.try_wait();
                let status =
                    status.map_err(|error| RunError::Io { what: format!("watch rank {rank}"), error })?;
                let Some(status) = status.filter(|_| !ended[rank]) else { continue };
                (ended[rank], last_end) = (true, Instant::now());
                if !status.success() {
                    failed.get_or_insert((rank, status));
                }
            }
            if ended.iter().all(|ended| *ended) {
                return Ok(failed);
            }
            let some_ended = ended.iter().any(|ended| *ended);
            let limit = if failed.is_some() { LAST_WORDS } else { patience };
            if some_ended && last_end.elapsed() > limit {
                self.kill();
            }
            std::thread::sleep(LOOK_EVERY);
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
