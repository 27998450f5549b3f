//! The folder of a site's states: who may write there, and which state counts.
//!
//! The newest finished one counts; a crash between the new one's name and the old one's removal leaves both. Whoever
//! takes a basebackup holds the lock from before it looks for a state until its own is finished. Where root takes
//! basebackups in the state folder of another user, what is made belongs to that user. Deliberately absent: another
//! choice where the newest is damaged; the next basebackup is a full one and replaces it.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use crate::backup::state::{State, StateError, StateWriter};
use crate::disk::{
    self, LockFile, Owner,
    durable::{self, Create},
};
use crate::repo::BasebackupId;

/// The states of one site on this host.
#[derive(Debug, Clone)]
pub struct StateFolder {
    path: PathBuf,
}

/// Held by the one process that takes a basebackup of the site on this host, until it is dropped.
#[derive(Debug)]
pub struct BackupLock {
    _held: LockFile,
}

const FINISHED: &str = ".pages";
const UNFINISHED: &str = ".pages.unfinished";
const JOURNAL: &str = ".pages.journal";
const LOCK: &str = "lock";
/// How often the state may be replaced by another process between its name being read and being opened.
const OPEN_ATTEMPTS: u32 = 10;

/// A file of the folder by its name.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Named {
    Finished(BasebackupId),
    Unfinished,
    Journal(BasebackupId),
}

impl StateFolder {
    /// Names the folder, which need not be there yet: `<paths.state>/basebackups/<site>`.
    pub fn new(path: PathBuf) -> Self {
        Self { path }
    }

    /// Takes the lock; never waits.
    ///
    /// # Errors
    /// `Busy` where another process holds it.
    pub fn take_lock(&self) -> Result<BackupLock, StateError> {
        durable::create_dir_all(&self.path, Create { owner: self.heir()?, ..Create::PRIVATE_DIRECTORY })?;
        let held = LockFile::acquire(&self.path.join(LOCK)).map_err(|error| match error {
            disk::Error::Locked { path, holder } => StateError::Busy { path, holder },
            other => other.into(),
        })?;
        if let Some(owner) = self.heir()? {
            owner.give(held.path())?;
        }
        Ok(BackupLock { _held: held })
    }

    /// Opens the state that counts; none where no basebackup has left one.
    ///
    /// # Errors
    /// `Damaged` or `Unsupported`: the next basebackup is a full one, and says why.
    pub fn open(&self) -> Result<Option<State>, StateError> {
        let mut attempt = 1;
        loop {
            let Some(id) = self.newest()? else {
                return Ok(None);
            };
            match State::open(self.finished(id), id) {
                Err(StateError::Disk(error)) if error.is_not_found() && attempt < OPEN_ATTEMPTS => {
                    attempt += 1;
                }
                other => return other.map(Some),
            }
        }
    }

    /// Begins the state of a basebackup, and removes what attempts that died have left.
    pub fn begin(&self, _held: &BackupLock, id: BasebackupId) -> Result<StateWriter, StateError> {
        self.remove_where(|named| !matches!(named, Named::Finished(_)))?;
        StateWriter::create(self.clone(), id, self.private_file()?)
    }

    /// Returns how files are made here.
    pub(super) fn private_file(&self) -> Result<Create, StateError> {
        Ok(Create { owner: self.heir()?, ..Create::PRIVATE_FILE })
    }

    /// Returns the newest basebackup that has left a journal, where it is newer than the state that counts.
    pub(super) fn killed(&self) -> Result<Option<BasebackupId>, StateError> {
        let newest = self.newest()?;
        let journals = self.list()?.into_iter().filter_map(|(_, named)| match named {
            Named::Journal(id) => Some(id),
            Named::Finished(_) | Named::Unfinished => None,
        });
        Ok(journals.max().filter(|id| newest.is_none_or(|newest| *id > newest)))
    }

    /// Returns where the state of a basebackup is once it is finished.
    pub(super) fn finished(&self, id: BasebackupId) -> PathBuf {
        self.path.join(format!("{id}{FINISHED}"))
    }

    /// Returns where the state of a basebackup is being written.
    pub(super) fn unfinished(&self, id: BasebackupId) -> PathBuf {
        self.path.join(format!("{id}{UNFINISHED}"))
    }

    /// Returns where the journal of a basebackup is.
    pub(super) fn journal(&self, id: BasebackupId) -> PathBuf {
        self.path.join(format!("{id}{JOURNAL}"))
    }

    /// Removes every state but that of `id`, whose writer has the lock.
    pub(super) fn remove_others(&self, id: BasebackupId) -> Result<(), StateError> {
        self.remove_where(|named| named != Named::Finished(id))
    }

    fn remove_where(&self, which: impl Fn(Named) -> bool) -> Result<(), StateError> {
        for (path, _) in self.list()?.into_iter().filter(|(_, named)| which(*named)) {
            durable::remove_file(&path)?;
        }
        Ok(())
    }

    fn newest(&self) -> Result<Option<BasebackupId>, StateError> {
        let ids = self.list()?.into_iter().filter_map(|(_, named)| match named {
            Named::Finished(id) => Some(id),
            Named::Unfinished | Named::Journal(_) => None,
        });
        Ok(ids.max())
    }

    /// Returns the states, finished and not; a folder that is not there has none, other files are none of ours.
    fn list(&self) -> Result<Vec<(PathBuf, Named)>, StateError> {
        let entries = match fs::read_dir(&self.path) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
            other => other.map_err(disk::Error::at("list", &self.path))?,
        };
        let mut found = Vec::new();
        for entry in entries {
            let path = entry.map_err(disk::Error::at("list", &self.path))?.path();
            if let Some(named) = named(&path) {
                found.push((path, named));
            }
        }
        Ok(found)
    }

    /// Returns who is to own what root makes here: the owner of the folder, or of the nearest one above it.
    fn heir(&self) -> Result<Option<Owner>, StateError> {
        if !Owner::current().is_root() {
            return Ok(None);
        }
        let existing = self.path.ancestors().find(|above| above.is_dir()).unwrap_or(Path::new("/"));
        Ok(Some(Owner::of(existing)?))
    }
}

fn named(path: &Path) -> Option<Named> {
    let name = path.file_name()?.to_str()?;
    let is_id = |text: &str| text.parse::<BasebackupId>().ok();
    if let Some(id) = name.strip_suffix(UNFINISHED) {
        return is_id(id).map(|_| Named::Unfinished);
    }
    if let Some(id) = name.strip_suffix(JOURNAL) {
        return is_id(id).map(Named::Journal);
    }
    is_id(name.strip_suffix(FINISHED)?).map(Named::Finished)
}
