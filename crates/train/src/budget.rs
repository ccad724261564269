//! Budgets of the tiers that change while a run goes on. `budget.json` in the run folder goes before
//! the recipe: the trainer looks at it between steps, and a run that is set up again, by hand or after
//! a loss, takes it up before its first weight. What was refused does not stay in the file.

use crate::learner::Learner;
use crate::ranks::{self, first_says, numbers_of, words_of};
use crate::{TrainError, bytes};
use checkpoint::write_file;
use device::Device;
use dist::{Axis, Mesh};
use memory::Tier;
use memory::pager::{PagerError, key_of};
use memory::plan::Budgets;
use serde::{Deserialize, Serialize};
use std::io::ErrorKind;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

/// Budgets that go before those of the recipe; where there is none, the recipe's counts.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct BudgetFile {
    /// Bytes of the memory that plays a device.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub device_bytes: Option<u64>,
    /// Bytes of memory.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub dram_bytes: Option<u64>,
    /// Bytes on the drive.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub nvme_bytes: Option<u64>,
}

impl BudgetFile {
    /// Its name in the run folder.
    pub const NAME: &str = "budget.json";

    /// What stands in the folder of a run; nothing is given where there is no file.
    pub fn read(run: &Path) -> Result<BudgetFile, TrainError> {
        let path = run.join(BudgetFile::NAME);
        let text = match std::fs::read(&path) {
            Ok(text) => text,
            Err(error) if error.kind() == ErrorKind::NotFound => return Ok(BudgetFile::default()),
            Err(source) => return Err(TrainError::Folder { path, source }),
        };
        serde_json::from_slice(&text).map_err(|error| TrainError::Budget {
            what: format!("{} holds no budgets: {error}", path.display()),
            remedy: "write it with `trilith budget`".into(),
        })
    }

    /// Put it into the folder of a run, whole or not at all; without a budget the file goes.
    pub fn write(&self, run: &Path) -> Result<(), TrainError> {
        let path = run.join(BudgetFile::NAME);
        if *self != BudgetFile::default() {
            return Ok(write_file(&path, format!("{}\n", serde_json::json!(self)).as_bytes())?);
        }
        match std::fs::remove_file(&path) {
            Err(source) if source.kind() != ErrorKind::NotFound => Err(TrainError::Folder { path, source }),
            _ => Ok(()),
        }
    }

    /// With what is given here instead of what is there.
    fn over(&self, budgets: Budgets) -> Budgets {
        Budgets {
            hbm: self.device_bytes.or(budgets.hbm),
            dram: self.dram_bytes.or(budgets.dram),
            nvme: self.nvme_bytes.or(budgets.nvme),
        }
    }

    /// In which `now` differs from what the recipe says.
    fn between(recipe: Budgets, now: Budgets) -> BudgetFile {
        let given = |tier| now.of(tier).filter(|bytes| recipe.of(tier) != Some(*bytes));
        BudgetFile {
            device_bytes: given(Tier::Hbm),
            dram_bytes: given(Tier::Dram),
            nvme_bytes: given(Tier::Nvme),
        }
    }
}

/// Other budgets were asked for.
#[derive(Clone, Debug, PartialEq)]
pub struct BudgetChange {
    /// Those in force from now on.
    pub budgets: Budgets,
    /// Why they are not those asked for.
    pub refused: Option<String>,
}

/// Which file was seen: another one has another of these.
#[derive(Clone, Copy, PartialEq, Eq)]
struct Stamp {
    inode: u64,
    changed: (i64, i64),
    len: u64,
}

/// What was asked for while a run is set up or goes on. Every rank has one.
pub(crate) struct LiveBudgets {
    /// On the first rank.
    file: Option<Watched>,
    /// What was found while the run was set up, to be told by the first look.
    found: Option<BudgetChange>,
}

/// The file of a run.
struct Watched {
    run: PathBuf,
    /// Where ops compute.
    device: Device,
    /// As the run was set up.
    recipe: Budgets,
    seen: Option<Stamp>,
}

impl Watched {
    /// What stands there now, if that is new; an error is a refusal or one of the folder.
    fn wanted(&mut self, before: Budgets) -> Result<Option<Budgets>, TrainError> {
        let stamp = self.stamp()?;
        if stamp == self.seen {
            return Ok(None);
        }
        self.seen = stamp;
        let wanted = BudgetFile::read(&self.run)?.over(self.recipe);
        if wanted != before {
            check_available(before, wanted, self.device)?;
        }
        Ok((wanted != before).then_some(wanted))
    }

    /// Put back what counts, unless something newer stands there already.
    fn refuse(&mut self, before: Budgets) -> Result<(), TrainError> {
        if self.stamp()? == self.seen {
            BudgetFile::between(self.recipe, before).write(&self.run)?;
            self.seen = self.stamp()?;
        }
        Ok(())
    }

    fn stamp(&self) -> Result<Option<Stamp>, TrainError> {
        let path = self.run.join(BudgetFile::NAME);
        match std::fs::metadata(&path) {
            Ok(file) => Ok(Some(Stamp {
                inode: file.ino(),
                changed: (file.mtime(), file.mtime_nsec()),
                len: file.len(),
            })),
            Err(error) if error.kind() == ErrorKind::NotFound => Ok(None),
            Err(source) => Err(TrainError::Folder { path, source }),
        }
    }
}

/// What the first rank found.
enum Found {
    Nothing,
    /// It asks for these.
    Wanted(Budgets),
    /// It could not ask for what stands there.
    Refused(TrainError),
}

impl LiveBudgets {
    /// While a run is set up: take up what stands in its folder, which is given on the first rank.
    pub fn begin(run: Option<&Path>, learner: &mut Learner) -> Result<LiveBudgets, TrainError> {
        let recipe = learner.budgets().unwrap_or_default();
        let file =
            run.map(|run| Watched { run: run.into(), device: learner.store.device(), recipe, seen: None });
        let mut live = LiveBudgets { file, found: None };
        live.found = live.look(learner)?;
        Ok(live)
    }

    /// Between two steps: apply what is new, on all ranks or on none. Errors: those of the drive and the
    /// folder; budgets that are refused are an answer.
    pub fn look(&mut self, learner: &mut Learner) -> Result<Option<BudgetChange>, TrainError> {
        if self.found.is_some() {
            return Ok(self.found.take());
        }
        let before = learner.budgets().unwrap_or_default();
        let found = match &mut self.file {
            None => Found::Nothing,
            Some(file) => match file.wanted(before) {
                Ok(None) => Found::Nothing,
                Ok(Some(wanted)) => Found::Wanted(wanted),
                Err(error) if is_refusal(&error) => Found::Refused(error),
                Err(error) => return Err(error),
            },
        };
        let mesh = learner.mesh.clone();
        let set = match tell(&mesh, found)? {
            Found::Nothing => return Ok(None),
            Found::Wanted(wanted) => set_on_all(&mesh, learner, (before, wanted))?,
            Found::Refused(error) => Err(error),
        };
        match set {
            Ok(budgets) => Ok(Some(BudgetChange { budgets, refused: None })),
            Err(error) if is_refusal(&error) => {
                if let Some(file) = &mut self.file {
                    file.refuse(before)?;
                }
                Ok(Some(BudgetChange { budgets: before, refused: Some(error.to_string()) }))
            }
            Err(error) => Err(error),
        }
    }
}

/// What the first rank found, on every rank.
fn tell(mesh: &Mesh, found: Found) -> Result<Found, TrainError> {
    let (kind, budgets) = match &found {
        Found::Nothing => (0, Budgets::default()),
        Found::Wanted(budgets) => (1, *budgets),
        Found::Refused(_) => (2, Budgets::default()),
    };
    let given = [budgets.hbm, budgets.dram, budgets.nvme];
    let there = given.map(|bytes| u64::from(bytes.is_some()));
    let mut words = words_of(&[&[kind], &there[..], &given.map(Option::unwrap_or_default)].concat());
    first_says(mesh, &mut words)?;
    if mesh.rank() == 0 {
        return Ok(found);
    }
    let numbers = numbers_of(&words);
    let [hbm, dram, nvme] = [0, 1, 2].map(|i| (numbers[1 + i] != 0).then_some(numbers[4 + i]));
    Ok(match numbers[0] {
        0 => Found::Nothing,
        1 => Found::Wanted(Budgets { hbm, dram, nvme }),
        _ => Found::Refused(elsewhere()),
    })
}

fn elsewhere() -> TrainError {
    TrainError::Budget {
        what: "these budgets cannot work on another rank".into(),
        remedy: "ask for others; the budgets stay as they were".into(),
    }
}

/// The inner error is that of this rank, or says that it is another's.
fn set_on_all(
    mesh: &Mesh,
    learner: &mut Learner,
    (before, wanted): (Budgets, Budgets),
) -> Result<Result<Budgets, TrainError>, TrainError> {
    let set = learner.set_budget(wanted).map_err(TrainError::Tiers);
    if ranks::sum_over(mesh, &Axis::ALL, f64::from(u8::from(set.is_err())))? == 0.0 {
        return Ok(Ok(wanted));
    }
    if set.is_ok() {
        learner.set_budget(before)?;
    }
    Ok(Err(set.err().unwrap_or_else(elsewhere)))
}

/// Refuse to promise memory the system does not have beside what is held.
fn check_available(before: Budgets, wanted: Budgets, device: Device) -> Result<(), TrainError> {
    // A GPU has memory of its own: what it has not, its chunks will say.
    let hbm = |budgets: Budgets| budgets.hbm.filter(|_| device == Device::Cpu).unwrap_or(0);
    let memory = |budgets: Budgets| hbm(budgets).saturating_add(budgets.dram.unwrap_or(0));
    let Some(free) = device::available_bytes().filter(|_| memory(wanted) > memory(before)) else {
        return Ok(());
    };
    let available = (free + device::memory_use().live_bytes) as u64;
    if memory(wanted) <= available {
        return Ok(());
    }
    let named = [Tier::Hbm, Tier::Dram].into_iter().filter_map(|tier| Some((tier, wanted.of(tier)?)));
    let named: Vec<String> =
        named.map(|(tier, budget)| format!("{} = {}", key_of(tier, device), bytes(budget))).collect();
    Err(TrainError::Budget {
        what: format!("{}, {} are available", named.join(" beside "), bytes(available)),
        remedy: "ask for less; the budgets stay as they were".into(),
    })
}

/// Whether budgets were found to be impossible before anything was changed.
fn is_refusal(error: &TrainError) -> bool {
    matches!(
        error,
        TrainError::Budget { .. }
            | TrainError::Tiers(
                PagerError::Budget { .. } | PagerError::Tiers { .. } | PagerError::Drive { .. }
            )
    )
}
