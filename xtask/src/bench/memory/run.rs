//! One run: a fresh process, perhaps in a control group, followed by its log until the last step.

use std::fs::File;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use serde::{Deserialize, Serialize};

use super::cases::{Case, Program};
use super::{Args, Drive, Place};
use crate::bench::peers;
use crate::bench::runs::median;

/// Steps of ours that do not count.
pub const WARM_UP: usize = 4;

/// How often the log is read.
const LOOK_EVERY: Duration = Duration::from_millis(20);

/// A step as metrics.jsonl or torch_step.py tells it.
#[derive(Clone, Debug, Deserialize, Serialize)]
pub struct Step {
    pub seconds: f64,
    pub loss: f64,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub tiers: Option<Tiers>,
}

/// What tiers did in a step.
#[derive(Clone, Debug, Deserialize, Serialize)]
pub struct Tiers {
    pub links: Vec<Link>,
    /// From the end of the backward pass to the beginning of the next, and the rest; of a run with a plan.
    pub stretches: Option<[Stretch; 2]>,
}

/// What every plan has to do in a part of the step.
#[derive(Clone, Copy, Debug, PartialEq, Deserialize, Serialize)]
pub struct Stretch {
    pub compute_s: f64,
    pub up_bytes: f64,
    pub down_bytes: f64,
}

/// One link: bytes and seconds towards the faster and the slower tier.
#[derive(Clone, Debug, Deserialize, Serialize)]
pub struct Link {
    pub up_bytes: f64,
    pub down_bytes: f64,
    pub up_s: f64,
    pub down_s: f64,
    pub stall_s: f64,
    pub bound_bytes: Option<f64>,
}

/// One process.
#[derive(Clone, Debug, Serialize)]
pub struct Run {
    pub steps: Vec<Step>,
    pub warm_up: usize,
    /// Most bytes of the process that were resident, its mapped files among them.
    pub resident_bytes: f64,
    /// Most bytes its control group was charged with, the page cache of its files among them.
    pub group_bytes: Option<f64>,
}

impl Run {
    /// Seconds of a step: the median of those that count.
    pub fn step_s(&self) -> f64 {
        self.middle(|step| Some(step.seconds)).unwrap_or(f64::NAN)
    }

    /// The median over steps that count of something of the drive's link.
    pub fn of_link(&self, value: impl Fn(&Link) -> Option<f64>) -> Option<f64> {
        self.middle(|step| value(step.tiers.as_ref()?.links.last()?))
    }

    /// Both stretches of the last step.
    pub fn stretches(&self) -> Option<[Stretch; 2]> {
        self.steps.last()?.tiers.as_ref()?.stretches
    }

    fn middle(&self, value: impl Fn(&Step) -> Option<f64>) -> Option<f64> {
        median(self.steps[self.warm_up.min(self.steps.len() - 1)..].iter().filter_map(value))
    }
}

/// Runs a case until its last step is in its log, then ends it.
pub fn run(place: &Place, case: &Case, args: &Args) -> Result<Run> {
    let folder = place.folder.join(case.name.replace([' ', ','], "-"));
    std::fs::remove_dir_all(&folder).ok();
    std::fs::create_dir_all(&folder)?;
    let group = case.limit_bytes.map(Group::new).transpose()?;
    let (program, count, warm_up) = match &case.program {
        Program::Trilith(keys) => (trilith(place, &folder, keys), args.steps, WARM_UP),
        Program::Torch { .. } => (torch(place, &folder, case, args), args.torch_steps, 1),
    };
    let (log, errors) = (folder.join("out"), folder.join("errors"));
    let mut command = entering(group.as_ref(), &program);
    command.stdin(Stdio::null()).stdout(File::create(&log)?).stderr(File::create(&errors)?);
    let child = command.spawn().with_context(|| format!("starting {:?}", program.get_program()))?;
    let log = match case.program {
        Program::Trilith(_) => folder.join("run/metrics.jsonl"),
        Program::Torch { .. } => log,
    };
    let followed = follow(child, &log, count, Duration::from_secs(args.patience));
    let (steps, resident_bytes) = followed.with_context(|| last_words(&errors))?;
    let group_bytes = group.as_ref().map(Group::peak_bytes).transpose()?;
    std::fs::remove_dir_all(&folder).ok();
    // Dirty pages of this run are not the next one's business.
    Command::new("sync").status().ok();
    Ok(Run { steps, warm_up, resident_bytes, group_bytes })
}

fn trilith(place: &Place, folder: &Path, keys: &[String]) -> Command {
    let mut command = Command::new(&place.trilith);
    command.arg("train").arg(&place.recipe).arg("--overwrite");
    let paths = [("run.dir", folder.join("run")), ("data.path", place.text.clone())];
    command.args(paths.iter().flat_map(|(key, path)| ["--set".into(), format!("{key}={}", path.display())]));
    command.args(keys.iter().flat_map(|key| ["--set", key.as_str()]));
    command
}

fn torch(place: &Place, folder: &Path, case: &Case, args: &Args) -> Command {
    let mut command = Command::new(&place.python);
    command.arg(&place.script).args(["--config", "memory", "--threads", "2"]);
    command.args(["--steps", &args.torch_steps.to_string()]);
    if let Program::Torch { mode, mapped, gradients } = &case.program {
        command.args(["--mode", mode]);
        if *mapped {
            command.arg("--mapped").arg(folder);
        }
        if *gradients {
            command.arg("--mapped-gradients");
        }
    }
    command
}

/// The same program, in a control group from its first instruction on.
fn entering(group: Option<&Group>, program: &Command) -> Command {
    let Some(group) = group else {
        let mut command = Command::new(program.get_program());
        command.args(program.get_args());
        return command;
    };
    let mut command = Command::new("bash");
    command.args(["-c", "echo $$ > \"$0\"/cgroup.procs && exec \"$@\""]).arg(&group.0);
    command.arg(program.get_program()).args(program.get_args());
    command
}

/// Waits for `count` steps in the log, ends the process, and returns them with its peak of resident bytes.
fn follow(mut child: Child, log: &Path, count: usize, patience: Duration) -> Result<(Vec<Step>, f64)> {
    let started = Instant::now();
    let mut resident_bytes = 0.0f64;
    loop {
        let ended = child.try_wait()?;
        resident_bytes = resident_bytes.max(peak_resident_bytes(child.id()).unwrap_or(0.0));
        let steps = steps(&std::fs::read_to_string(log).unwrap_or_default());
        let late = started.elapsed() > patience;
        if steps.len() >= count || late || ended.is_some() {
            child.kill().ok();
            let status = ended.map_or_else(|| child.wait(), Ok)?;
            if steps.len() >= count {
                return Ok((steps, resident_bytes));
            }
            let seconds: Vec<String> = steps.iter().map(|step| format!("{:.1}", step.seconds)).collect();
            let why = if late { format!("not done after {patience:?}") } else { status.to_string() };
            bail!("{why}, {} of {count} steps, seconds: [{}]", steps.len(), seconds.join(", "));
        }
        std::thread::sleep(LOOK_EVERY);
    }
}

/// Lines that are steps; others are validations or chatter, or half written.
fn steps(log: &str) -> Vec<Step> {
    log.lines().filter_map(|line| serde_json::from_str(line).ok()).collect()
}

fn peak_resident_bytes(process: u32) -> Option<f64> {
    let status = std::fs::read_to_string(format!("/proc/{process}/status")).ok()?;
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:"))?;
    Some(line.trim().strip_suffix(" kB")?.parse::<f64>().ok()? * 1024.0)
}

fn last_words(errors: &Path) -> String {
    let text = std::fs::read_to_string(errors).unwrap_or_default();
    let lines: Vec<&str> = text.lines().filter(|line| !line.trim().is_empty()).collect();
    lines[lines.len().saturating_sub(6)..].join("\n")
}

/// The drive as the disk engine measures it now.
pub fn drive(place: &Place) -> Result<Drive> {
    let said = peers::capture(Command::new(&place.trilith).arg("doctor").arg("--disk").arg(&place.folder))?;
    parse_drive(&said).with_context(|| format!("no figures of the drive in:\n{said}"))
}

/// From `drive  2797 MB/s read, 4212 MB/s write, 3020 MB/s both at once in ...`.
fn parse_drive(said: &str) -> Option<Drive> {
    let line = said.lines().find(|line| line.trim_start().starts_with("drive"))?;
    let (read, rest) = line.trim_start().strip_prefix("drive")?.split_once(" MB/s read, ")?;
    let (write, rest) = rest.split_once(" MB/s write, ")?;
    let (both, _) = rest.split_once(" MB/s both at once")?;
    let per_s = |text: &str| text.trim().parse::<f64>().ok().map(|rate| rate * 1e6);
    Some(Drive { read_per_s: per_s(read)?, write_per_s: per_s(write)?, both_per_s: per_s(both)? })
}

/// A memory control group (v1), removed when it is dropped.
struct Group(PathBuf);

impl Group {
    fn new(limit_bytes: u64) -> Result<Group> {
        let parent = Path::new("/sys/fs/cgroup/memory");
        ensure!(parent.is_dir(), "{}: no memory control groups (v1) here", parent.display());
        let dir = parent.join(format!("trilith-bench-{}", std::process::id()));
        std::fs::create_dir(&dir).with_context(|| format!("making {}", dir.display()))?;
        let group = Group(dir);
        let limit = group.0.join("memory.limit_in_bytes");
        std::fs::write(&limit, limit_bytes.to_string()).with_context(|| limit.display().to_string())?;
        Ok(group)
    }

    fn peak_bytes(&self) -> Result<f64> {
        let peak = std::fs::read_to_string(self.0.join("memory.max_usage_in_bytes"))?;
        Ok(peak.trim().parse()?)
    }
}

impl Drop for Group {
    fn drop(&mut self) {
        std::fs::remove_dir(&self.0).ok();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const LOG: &str = concat!(
        r#"{"kind":"step","step":1,"loss":8.4,"seconds":9.0,"tiers":{"links":[{"link":"dram-nvme","up_bytes":1,"#,
        r#""down_bytes":2,"bound_bytes":null,"gap":null,"up_s":1.0,"down_s":1.0,"stall_s":0.5}],"tiers":[]}}"#,
        "\n",
        r#"{"kind":"validation","step":1,"loss":8.0}"#,
        "\nchatter\n",
        r#"{"impl":"torch-eager-f32","step":1,"loss":8.1,"seconds":2.0}"#,
        "\n",
        r#"{"kind":"step","step":3,"lo"#
    );

    #[test]
    fn steps_of_both_programs_are_read_and_nothing_else() {
        let steps = steps(LOG);
        assert_eq!(steps.iter().map(|step| step.seconds).collect::<Vec<_>>(), [9.0, 2.0]);
        let run = Run { steps, warm_up: 0, resident_bytes: 0.0, group_bytes: None };
        assert_eq!(run.step_s(), 5.5);
        assert_eq!(run.of_link(|link| Some(link.down_bytes)), Some(2.0));
        assert_eq!(run.of_link(|link| link.bound_bytes), None);
    }

    #[test]
    fn the_figures_of_the_drive_are_read_from_the_doctor() {
        let said = "  GPU  none\n  drive                   2797 MB/s read, 4212 MB/s write, 3020 MB/s both at \
                    once in ., by io_uring\n";
        let drive = parse_drive(said).expect("figures");
        assert_eq!((drive.read_per_s, drive.write_per_s, drive.both_per_s), (2.797e9, 4.212e9, 3.02e9));
        assert!(parse_drive("  drive  not measured: full").is_none());
    }

    #[test]
    fn a_program_that_ends_early_says_how() {
        let child = Command::new("sh").args(["-c", "exit 3"]).spawn().expect("sh");
        let error = follow(child, Path::new("/nowhere"), 1, Duration::from_secs(60)).expect_err("exit 3");
        assert!(error.to_string().contains("exit status: 3, 0 of 1 steps"), "{error}");
    }
}
