//! Files and folders that appear whole or not at all.
//!
//! Everything is written aside under `.<name>.tmp-<pid>`, made durable, then renamed. After an error
//! the temporary is removed and what existed before still stands; after a crash `clean_leftovers`
//! removes it.

use crate::effects;
use std::fs::File;
use std::io::{self, Write};
use std::path::{Path, PathBuf};

/// A save that failed. What existed before still stands.
#[derive(Debug, thiserror::Error)]
pub enum SaveError {
    /// The operating system refused.
    #[error("cannot {doing} {}: {source}", path.display())]
    Io {
        /// What was attempted.
        doing: &'static str,
        /// On which file or folder.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// The disk is too full to begin.
    #[error(
        "saving needs {}, {} has {} free; free some space or save to another folder",
        human(*needs), path.display(), human(*free)
    )]
    Space {
        /// Where.
        path: PathBuf,
        /// Bytes the save needs.
        needs: u64,
        /// Bytes free to us.
        free: u64,
    },
    /// A tensor's writer wrote too much or too little.
    #[error("tensor `{tensor}` of {expected} bytes was written as {written}; its shape or type is wrong")]
    Length {
        /// Which tensor.
        tensor: String,
        /// Bytes by shape and type.
        expected: u64,
        /// Bytes written.
        written: u64,
    },
    /// An element type that model folders do not hold.
    #[error("tensor `{tensor}` is {dtype}; weights are saved as f32, bf16 or f16")]
    Type {
        /// Which tensor.
        tensor: String,
        /// Its type.
        dtype: device::DType,
    },
    /// The folder to be replaced holds something a save does not know.
    #[error("{} holds `{entry}`, which is no part of a model; name another folder or move it away", path.display())]
    Foreign {
        /// Which folder.
        path: PathBuf,
        /// What it holds.
        entry: String,
    },
    /// A name that cannot be used.
    #[error("cannot save under the name {name:?}: {why}")]
    Name {
        /// Which.
        name: String,
        /// Why, and what would do.
        why: &'static str,
    },
}

impl SaveError {
    pub(crate) fn io(doing: &'static str, path: &Path) -> impl FnOnce(io::Error) -> SaveError {
        let path = path.to_path_buf();
        move |source| SaveError::Io { doing, path, source }
    }
}

/// 3.1 GiB.
fn human(bytes: u64) -> String {
    let units = ["bytes", "KiB", "MiB", "GiB", "TiB"];
    let power = (bytes.max(1).ilog2() / 10).min(4);
    match power {
        0 => format!("{bytes} bytes"),
        _ => format!("{:.1} {}", bytes as f64 / (1u64 << (10 * power)) as f64, units[power as usize]),
    }
}

/// Refuse now rather than after minutes of writing.
pub(crate) fn check_space(dir: &Path, needs: u64) -> Result<(), SaveError> {
    let found = dir.ancestors().find(|path| path.exists()).unwrap_or(Path::new("."));
    let stat = rustix::fs::statvfs(found)
        .map_err(|error| SaveError::io("ask for the free space of", found)(error.into()))?;
    let free = stat.f_bavail.saturating_mul(stat.f_frsize);
    if free < needs {
        return Err(SaveError::Space { path: dir.to_path_buf(), needs, free });
    }
    Ok(())
}

/// (folder, name) of a path to be written.
fn split(path: &Path) -> Result<(PathBuf, String), SaveError> {
    let bad = |why| SaveError::Name { name: path.display().to_string(), why };
    let name = path.file_name().ok_or_else(|| bad("it ends in no name; name the file or folder itself"))?;
    let name = name.to_str().ok_or_else(|| bad("it is not UTF-8; choose another"))?.to_string();
    let parent = match path.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => parent.to_path_buf(),
        _ => PathBuf::from("."),
    };
    Ok((parent, name))
}

/// Replace a file by `bytes`, or leave it as it was.
pub fn write_file(path: &Path, bytes: &[u8]) -> Result<(), SaveError> {
    let (parent, name) = split(path)?;
    let aside = parent.join(format!(".{name}.tmp-{}", std::process::id()));
    let written = (|| {
        let mut file = FileWriter::create(&aside)?;
        file.write_all(bytes).map_err(SaveError::io("write", &aside))?;
        file.finish()?;
        effects::rename(&aside, path).map_err(SaveError::io("replace", path))
    })();
    if written.is_err() {
        // The first failure is the one to tell.
        effects::remove(&aside).ok();
    }
    written?;
    effects::sync_dir(&parent).map_err(SaveError::io("sync", &parent))
}

/// A file under construction.
pub struct FileWriter {
    file: File,
    path: PathBuf,
    written: u64,
}

impl FileWriter {
    fn create(path: &Path) -> Result<FileWriter, SaveError> {
        let file = effects::create(path).map_err(SaveError::io("create", path))?;
        Ok(FileWriter { file, path: path.to_path_buf(), written: 0 })
    }

    /// Bytes so far.
    pub fn written(&self) -> u64 {
        self.written
    }

    /// Where it is being written.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Make it durable. Returns its length in bytes.
    pub fn finish(self) -> Result<u64, SaveError> {
        effects::sync(&self.file).map_err(SaveError::io("sync", &self.path))?;
        Ok(self.written)
    }
}

impl Write for FileWriter {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let n = effects::write(&self.file, bytes)?;
        self.written += n as u64;
        Ok(n)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// A folder under construction; dropped before `commit` it leaves no trace.
pub struct FolderWriter {
    target: PathBuf,
    parent: PathBuf,
    name: String,
    aside: PathBuf,
    committed: bool,
}

impl FolderWriter {
    /// Begin `target`, which may exist; its parents are made.
    pub fn new(target: &Path) -> Result<FolderWriter, SaveError> {
        let (parent, name) = split(target)?;
        effects::create_dirs(&parent).map_err(SaveError::io("create", &parent))?;
        let aside = parent.join(format!(".{name}.tmp-{}", std::process::id()));
        effects::remove(&aside).map_err(SaveError::io("remove", &aside))?;
        effects::create_dir(&aside).map_err(SaveError::io("create", &aside))?;
        Ok(FolderWriter { target: target.to_path_buf(), parent, name, aside, committed: false })
    }

    /// Begin a file of the folder; call `finish` on it before `commit`.
    pub fn file(&self, name: &str) -> Result<FileWriter, SaveError> {
        if name.is_empty() || name.contains(['/', '\0']) || name == "." || name == ".." {
            return Err(SaveError::Name { name: name.into(), why: "it must be a plain file name" });
        }
        FileWriter::create(&self.aside.join(name))
    }

    /// A whole file of the folder.
    pub fn write(&self, name: &str, bytes: &[u8]) -> Result<(), SaveError> {
        let mut file = self.file(name)?;
        file.write_all(bytes).map_err(SaveError::io("write", &file.path))?;
        file.finish().map(drop)
    }

    /// Put the folder in place, in one step where the file system can swap two names. The folder
    /// that stood there is removed afterwards.
    pub fn commit(mut self) -> Result<(), SaveError> {
        effects::sync_dir(&self.aside).map_err(SaveError::io("sync", &self.aside))?;
        let replaced = if self.target.symlink_metadata().is_ok() {
            Some(self.replace()?)
        } else {
            effects::rename(&self.aside, &self.target).map_err(SaveError::io("create", &self.target))?;
            None
        };
        // From here on the new folder stands: what lies aside is the old one, or nothing.
        self.committed = true;
        effects::sync_dir(&self.parent).map_err(SaveError::io("sync", &self.parent))?;
        if let Some(old) = replaced {
            // The save succeeded; an old folder that cannot be removed is left to `clean_leftovers`.
            effects::remove(&old).ok();
        }
        Ok(())
    }

    /// Swap with the folder in place. Returns where that lies now.
    fn replace(&self) -> Result<PathBuf, SaveError> {
        let failed = |error| SaveError::io("replace", &self.target)(error);
        let unsupported = [io::ErrorKind::InvalidInput, io::ErrorKind::Unsupported];
        match effects::exchange(&self.aside, &self.target) {
            Ok(()) => return Ok(self.aside.clone()),
            Err(error) if unsupported.contains(&error.kind()) => {}
            Err(error) => return Err(failed(error)),
        }
        // Network file systems cannot swap. Between these two the name is absent for a moment;
        // `clean_leftovers` puts the old folder back after a crash there.
        let old = self.parent.join(format!(".{}.old-{}", self.name, std::process::id()));
        effects::rename(&self.target, &old).map_err(failed)?;
        if let Err(error) = effects::rename(&self.aside, &self.target) {
            effects::rename(&old, &self.target).ok();
            return Err(failed(error));
        }
        Ok(old)
    }
}

impl Drop for FolderWriter {
    fn drop(&mut self) {
        if !self.committed {
            effects::remove(&self.aside).ok();
        }
    }
}

/// Remove what crashed saves left in `dir`. Call before a save, never beside one of this process;
/// those of other living processes stay. Returns how many were removed.
pub fn clean_leftovers(dir: &Path) -> Result<usize, SaveError> {
    let entries = match std::fs::read_dir(dir) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(0),
        other => other.map_err(SaveError::io("list", dir))?,
    };
    let mut removed = 0;
    for entry in entries {
        let path = entry.map_err(SaveError::io("list", dir))?.path();
        let Some(leftover) = path.file_name().and_then(|name| name.to_str()).and_then(parse_leftover) else {
            continue;
        };
        if leftover.pid != std::process::id() && alive(leftover.pid) {
            continue;
        }
        let target = dir.join(leftover.name);
        if leftover.moved_away && !target.exists() {
            effects::rename(&path, &target).map_err(SaveError::io("restore", &target))?;
        } else {
            effects::remove(&path).map_err(SaveError::io("remove", &path))?;
        }
        removed += 1;
    }
    Ok(removed)
}

struct Leftover<'a> {
    name: &'a str,
    pid: u32,
    moved_away: bool,
}

/// `.<name>.tmp-<pid>` or `.<name>.old-<pid>`.
fn parse_leftover(file: &str) -> Option<Leftover<'_>> {
    let (rest, pid) = file.strip_prefix('.')?.rsplit_once('-')?;
    let pid = pid.parse().ok()?;
    let (name, moved_away) = match rest.strip_suffix(".tmp") {
        Some(name) => (name, false),
        None => (rest.strip_suffix(".old")?, true),
    };
    (!name.is_empty()).then_some(Leftover { name, pid, moved_away })
}

fn alive(pid: u32) -> bool {
    let pid = i32::try_from(pid).ok().and_then(rustix::process::Pid::from_raw);
    pid.is_some_and(|pid| rustix::process::test_kill_process(pid) != Err(rustix::io::Errno::SRCH))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::effects::failpoint::{Failure, run};
    use std::fs;

    #[test]
    fn a_file_is_old_or_new_wherever_a_save_stops() {
        for failure in [Failure::Crash, Failure::Once] {
            for effects in 0.. {
                let dir = tempfile::tempdir().unwrap();
                let path = dir.path().join("config.json");
                fs::write(&path, "old").unwrap();
                let (result, reached) = run(effects, failure, || write_file(&path, b"new"));
                let text = fs::read_to_string(&path).unwrap();
                assert!(text == "old" || text == "new");
                assert!(result.is_err() || text == "new");
                clean_leftovers(dir.path()).unwrap();
                assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 1);
                if !reached {
                    break;
                }
            }
        }
    }

    #[test]
    fn a_folder_is_old_or_new_wherever_a_save_stops() {
        for failure in [Failure::Crash, Failure::Once] {
            for effects in 0.. {
                let dir = tempfile::tempdir().unwrap();
                let path = dir.path().join("model");
                fs::create_dir(&path).unwrap();
                fs::write(path.join("a"), "old").unwrap();
                fs::write(path.join("b"), "old").unwrap();
                let (result, reached) = run(effects, failure, || {
                    let writer = FolderWriter::new(&path)?;
                    writer.write("a", b"new")?;
                    writer.write("b", b"new")?;
                    writer.commit()
                });
                let both = ["a", "b"].map(|name| fs::read_to_string(path.join(name)).unwrap());
                assert!(both == ["old", "old"] || both == ["new", "new"], "{both:?} after {effects} effects");
                assert!(result.is_err() || both[0] == "new");
                if failure == Failure::Once && both[0] == "old" {
                    assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 1, "the temporary stayed");
                }
                clean_leftovers(dir.path()).unwrap();
                assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 1);
                if !reached {
                    break;
                }
            }
        }
    }

    #[test]
    fn leftovers_of_the_living_and_other_files_stay() {
        let dir = tempfile::tempdir().unwrap();
        // Process 1 always lives.
        for name in [".x.tmp-1", ".hidden", ".x.tmp-", "x.tmp-5", ".y.tmp-4194304000"] {
            fs::write(dir.path().join(name), "").unwrap();
        }
        fs::create_dir(dir.path().join(".moved.old-4194304000")).unwrap();
        assert_eq!(clean_leftovers(dir.path()).unwrap(), 2);
        assert!(dir.path().join("moved").is_dir(), "a folder moved away comes back");
        assert!(dir.path().join(".x.tmp-1").exists());
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 5);
    }

    #[test]
    fn a_full_disk_names_both_sizes() {
        let dir = tempfile::tempdir().unwrap();
        let error = check_space(&dir.path().join("not/yet"), u64::MAX).unwrap_err().to_string();
        assert!(error.contains("saving needs") && error.contains("free some space"), "{error}");
        assert_eq!((human(12), human(3 << 29)), ("12 bytes".into(), "1.5 GiB".into()));
    }
}
