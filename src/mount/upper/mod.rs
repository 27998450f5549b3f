//! The upper: a plain tree on a local file system, above a basebackup, that takes every change.
//!
//! Its files are sparse, and their allocation is the record of what is local: a hole below a file's base length is
//! fetched from the lower when somebody reads it, and filled. Names of the lower that are gone stand in a journal, and
//! where something came from stands on it as an extended attribute. Nothing else is kept, so a crash at any point
//! leaves nothing to repair: what was not synced is fetched again. When everything is local, the upper is an ordinary
//! data directory.
//!
//! ```text
//! volume      ask the lower, then change under the lock     fetch, read_ahead   ensure_range, and what follows a scan
//! namespace   the merged tree            changes   create, remove, rename     node    what the kernel knows
//! content     one file: fill, write, cut     local_map   which units are local     make_local   whole trees, unasked
//! hydrate     all the rest, in the background     stable, durable   syncs, and what may be lost     room   whose it is
//! journal     hidden names     origin   the attribute     local_disk, real_disk   the calls     alone   no lower any more
//! ```

mod alone;
mod as_owner;
mod changes;
mod content;
mod durable;
mod fetch;
pub mod file_system;
mod forget_origins;
mod found;
pub mod hydrate;
mod journal;
mod local_disk;
mod local_map;
mod make_local;
mod namespace;
mod node;
mod origin;
mod read_ahead;
mod real_disk;
mod room;
mod sequential;
mod stable;
mod stats;
#[cfg(test)]
mod tests;
mod volume;

use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard};

use nix::errno::Errno;

use crate::disk::{self, Binding, LockFile, Owner, PrivateArea};
use crate::mount::errno;
use crate::mount::lower::{Lower, LowerError};
use crate::mount::single_flight::Flights;
use crate::mount::upper::hydrate::heat::ForegroundReads;
use crate::mount::upper::journal::NamesJournal;
use crate::mount::upper::local_disk::{LocalDisk, Times};
use crate::mount::upper::namespace::Namespace;
use crate::mount::upper::node::LowerNode;
use crate::mount::upper::read_ahead::ReadAheads;
use crate::mount::upper::real_disk::RealDisk;
use crate::mount::upper::room::Room;
use crate::mount::upper::stable::Stable;
use crate::mount::upper::stats::Counters;

pub use file_system::Unsuitable;
pub use forget_origins::forget_origins;
pub use stats::UpperStats;
pub use volume::UpperFile;

/// What an upper is opened with.
#[derive(Debug)]
pub struct UpperOptions {
    /// The directory it lives in, which must exist; where a mount is to lie over it, open it before mounting.
    pub directory: PathBuf,
    /// The basebackup it belongs to, now and for ever.
    pub binding: Binding,
    /// Who owns what comes from the basebackup.
    pub owner: Owner,
    /// Keeps `PG_VERSION` and `global/pg_control` in the private area, so that PostgreSQL refuses the bare directory;
    /// true for a data directory, false for a tablespace.
    pub holds_back: bool,
}

/// Why an upper could not be opened.
#[derive(Debug, thiserror::Error)]
pub enum OpenError {
    #[error(transparent)]
    Unsuitable(#[from] Unsuitable),
    #[error(transparent)]
    Disk(#[from] disk::Error),
    #[error(transparent)]
    Lower(#[from] LowerError),
    #[error("the disk has lost something that was written to \"{}\", and nobody knows what", path.display())]
    Lost { path: PathBuf },
    #[error("could not open the upper in \"{}\": {source}", path.display())]
    Io { path: PathBuf, source: std::io::Error },
}

/// A writable volume above a lower; clones are the same upper.
#[derive(Debug, Clone)]
pub struct Upper {
    shared: Arc<Shared>,
}

#[derive(Debug)]
pub(crate) struct Shared {
    lower: Arc<dyn Lower>,
    disk: Arc<dyn LocalDisk>,
    namespace: Mutex<Namespace>,
    flights: Flights,
    read_aheads: ReadAheads,
    counters: Arc<Counters>,
    foreground: ForegroundReads,
    stable: Arc<Stable>,
    room: Room,
    _lock: Option<LockFile>,
}

impl Upper {
    /// Opens the upper in a directory, or makes the directory one.
    ///
    /// Refuses a directory that belongs to another basebackup, is in use by another process, or lies on a file system
    /// that cannot hold an upper. Everything found is synced before it is believed, so a kill of the process before
    /// does not count as a power cut.
    pub async fn open(lower: Arc<dyn Lower>, options: UpperOptions) -> Result<Self, OpenError> {
        let path = options.directory.clone();
        file_system::check(&path)?;
        let is_new =
            PrivateArea::open(&path)?.and_then(|area| area.binding().transpose()).transpose()?.is_none();
        let give = Owner::current().is_root().then_some(options.owner);
        let area = PrivateArea::create(&path, give)?;
        let lock = area.lock()?;
        area.clear_temporary(&lock)?;
        area.bind(&options.binding)?;
        let io = |source| OpenError::Io { path: path.clone(), source };
        let disk: Arc<dyn LocalDisk> = Arc::new(RealDisk::open(&path).map_err(io)?);
        Self::over(lower, disk, &options, is_new, Some(lock)).await
    }

    /// Opens an upper on any disk whose private area exists.
    async fn over(
        lower: Arc<dyn Lower>,
        disk: Arc<dyn LocalDisk>,
        options: &UpperOptions,
        is_new: bool,
        lock: Option<LockFile>,
    ) -> Result<Self, OpenError> {
        let io = |source| OpenError::Io { path: options.directory.clone(), source };
        let node = lower.node(lower.root()).await?;
        if is_new {
            let here = Path::new("");
            disk.set_mode(here, node.mode & 0o7777).map_err(io)?;
            disk.give(here, options.owner).map_err(io)?;
            disk.set_times(here, Times::modified(node.mtime.into())).map_err(io)?;
        }
        let stable = Stable::open(disk.clone()).map_err(io)?;
        if stable.is_in_doubt() {
            return Err(OpenError::Lost { path: options.directory.clone() });
        }
        // Of a new one there is nothing that could be lost.
        disk.sync_all()
            .inspect_err(|error| {
                if !is_new {
                    stable.failed(error);
                }
            })
            .map_err(io)?;
        let journal = Path::new(disk::private_area::DIRECTORY_NAME).join("names.journal");
        let journal = NamesJournal::open(&*disk, &journal).map_err(io)?;
        let root = LowerNode { id: lower.root(), path: Vec::new(), node };
        let counters = Arc::new(Counters::default());
        let (owner, holds_back) = (options.owner, options.holds_back);
        let (stable, counts) = (Arc::new(stable), counters.clone());
        let namespace =
            Namespace::new(disk.clone(), journal, root, owner, holds_back, counts, stable.clone());
        let namespace = Mutex::new(namespace.map_err(|errno| io(errno.into()))?);
        let shared = Shared {
            lower,
            room: Room::new(disk.clone()),
            disk,
            namespace,
            flights: Flights::new(),
            read_aheads: ReadAheads::new(),
            counters,
            foreground: ForegroundReads::default(),
            stable,
            _lock: lock,
        };
        Ok(Self { shared: Arc::new(shared) })
    }

    /// Returns what was fetched since the upper was opened.
    pub fn stats(&self) -> UpperStats {
        self.shared.counters.stats()
    }

    /// Puts everything on stable storage: the kernel does not pass `syncfs` on to us, so whoever starts or stops a
    /// server on the mount calls this.
    pub fn sync_all(&self) -> Result<(), Errno> {
        let all =
            self.shared.sync_journal().and_then(|()| self.shared.stable.sync(|| self.shared.disk.sync_all()));
        all.map_err(|error| errno::of_io(&error))
    }
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, Namespace> {
        self.namespace.lock().expect("no holder of this lock panics")
    }
}
