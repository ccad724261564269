//! Every change a save makes to the file system, one function each, so that tests can stop a save
//! before any of them and look at what a crash there would leave.

use failpoint::burn;
use std::fs::{self, File};
use std::io::{self, Write};
use std::path::Path;

#[cfg(not(test))]
mod failpoint {
    pub(crate) fn burn() -> std::io::Result<()> {
        Ok(())
    }
}

pub(crate) fn create_dirs(path: &Path) -> io::Result<()> {
    if path.is_dir() {
        return Ok(());
    }
    burn()?;
    fs::create_dir_all(path)
}

pub(crate) fn create_dir(path: &Path) -> io::Result<()> {
    burn()?;
    fs::create_dir(path)
}

pub(crate) fn create(path: &Path) -> io::Result<File> {
    burn()?;
    File::create(path)
}

pub(crate) fn write(mut file: &File, bytes: &[u8]) -> io::Result<usize> {
    burn()?;
    file.write(bytes)
}

pub(crate) fn sync(file: &File) -> io::Result<()> {
    burn()?;
    file.sync_all()
}

/// Make the names in a folder durable.
pub(crate) fn sync_dir(path: &Path) -> io::Result<()> {
    burn()?;
    File::open(path)?.sync_all()
}

pub(crate) fn rename(from: &Path, to: &Path) -> io::Result<()> {
    burn()?;
    fs::rename(from, to)
}

/// Swap two names in one step.
pub(crate) fn exchange(a: &Path, b: &Path) -> io::Result<()> {
    use rustix::fs::{CWD, RenameFlags, renameat_with};
    burn()?;
    Ok(renameat_with(CWD, a, CWD, b, RenameFlags::EXCHANGE)?)
}

/// Remove a file or a folder with all it holds; absent is fine.
pub(crate) fn remove(path: &Path) -> io::Result<()> {
    let meta = match fs::symlink_metadata(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        other => other?,
    };
    if !meta.is_dir() {
        burn()?;
        return fs::remove_file(path);
    }
    for entry in fs::read_dir(path)? {
        remove(&entry?.path())?;
    }
    burn()?;
    fs::remove_dir(path)
}

#[cfg(test)]
pub(crate) mod failpoint {
    use std::cell::Cell;

    /// What happens when the fuel runs out.
    #[derive(Clone, Copy, PartialEq)]
    pub(crate) enum Failure {
        /// Every further effect fails: the process is dead.
        Crash,
        /// One effect fails: a full disk, a bad sector.
        Once,
    }

    thread_local! {
        static FUEL: Cell<Option<(usize, Failure)>> = const { Cell::new(None) };
    }

    /// Let `effects` effects of this thread pass, then fail. True from the closure's caller if it did.
    pub(crate) fn run<T>(effects: usize, failure: Failure, body: impl FnOnce() -> T) -> (T, bool) {
        FUEL.set(Some((effects, failure)));
        let result = body();
        let reached = !matches!(FUEL.get(), Some((left, _)) if left > 0);
        FUEL.set(None);
        (result, reached)
    }

    pub(crate) fn burn() -> std::io::Result<()> {
        let stopped = || Err(std::io::Error::other("stopped by a failpoint"));
        match FUEL.get() {
            None => Ok(()),
            Some((0, Failure::Crash)) => stopped(),
            Some((0, Failure::Once)) => {
                FUEL.set(None);
                stopped()
            }
            Some((left, failure)) => {
                FUEL.set(Some((left - 1, failure)));
                Ok(())
            }
        }
    }
}
