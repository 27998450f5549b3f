//! What `wal push` does where more WAL waits than `[sites.NAME.archive] queue_max`: it leaves the file out, loudly.
//!
//! The command decides, not the daemon: it is there whether or not a daemon is, also one that hangs. It looks before it
//! begins and every second while it waits, because a store that does not answer is how it comes to this. First the
//! gap is noted, then the file is reported as archived; what cannot be noted is not left out. Of timeline histories that
//! were left out, which the server keeps, nothing is lost: they come once the archive takes files again.

use std::io;
use std::path::{Path, PathBuf};
use std::time::Duration;

use crate::config::SiteConfig;
use crate::disk;
use crate::pg::ArchiveFileName;
use crate::repo::ClusterId;
use crate::repo::documents::BackupRecord;
use crate::wal;
use crate::wal::left_out::{LeftOut, RecoveryStart, file_of};
use crate::wal::queue::{Overflow, WalQueue};

use super::context::Context;
use super::error::CommandError;
use super::text::size;

/// How often is looked whether too much waits; a look reads a folder.
const LOOK_EVERY: Duration = Duration::from_secs(1);

/// The limit of a site, and the queue that a file is in.
pub(super) struct QueueLimit<'a> {
    context: &'a Context,
    site: &'a SiteConfig,
    path: &'a Path,
    /// `None`: there is no limit.
    queue: Option<WalQueue>,
}

/// A file that was left out.
pub(super) struct LeftOutFile {
    pub(super) name: String,
    pub(super) cluster: String,
}

impl<'a> QueueLimit<'a> {
    /// Creates the limit for a file of `pg_wal`; costs nothing where there is none.
    pub(super) fn of(
        context: &'a Context,
        site: &'a SiteConfig,
        path: &'a Path,
    ) -> Result<Self, CommandError> {
        let queue = site.queue_max_bytes.map(|max_bytes| WalQueue::of(path, max_bytes)).transpose()?;
        Ok(Self { context, site, path, queue })
    }

    /// Leaves nothing out, however much waits.
    pub(super) fn none(context: &'a Context, site: &'a SiteConfig, path: &'a Path) -> Self {
        Self { context, site, path, queue: None }
    }

    /// Looks whether too much waits; where that cannot be told it does not.
    pub(super) fn overflow(&self) -> Option<Overflow> {
        self.queue.as_ref()?.overflow().unwrap_or_else(|error| {
            tracing::warn!("could not see how much WAL waits: {error}");
            None
        })
    }

    /// Waits until too much waits.
    pub(super) async fn overflowed(&self) -> Overflow {
        if self.queue.is_none() {
            return std::future::pending().await;
        }
        loop {
            tokio::time::sleep(LOOK_EVERY).await;
            if let Some(overflow) = self.overflow() {
                return overflow;
            }
        }
    }

    /// Leaves the file out of the archive.
    pub(super) fn leave_out(&self, overflow: Overflow) -> Result<LeftOutFile, CommandError> {
        let queue = self.queue.as_ref().expect("only a limit is exceeded");
        let name = self.path.file_name().unwrap_or_default().to_string_lossy();
        let name: ArchiveFileName = name.parse().map_err(wal::Error::from)?;
        let state = self.context.config()?.paths.open_state()?;
        let path = file_of(&state.path, &self.site.name);
        let now = self.context.clock().now();
        LeftOut::change(&path, state.owner, |left_out| left_out.note(queue.cluster(), name, now))?;
        let Overflow { segments, bytes, max_bytes } = overflow;
        tracing::error!(
            "{name} is NOT ARCHIVED, and PostgreSQL is told that it is: {segments} segments ({}) wait for the archive \
             of site \"{}\", more than queue_max = {}; nothing can be recovered across the gap, see \"walden check\"",
            size(bytes),
            self.site.name,
            size(max_bytes)
        );
        Ok(LeftOutFile { name: name.to_string(), cluster: queue.cluster().to_string() })
    }

    /// Archives the timeline histories of a cluster that were left out, by `push`, which says whether the archive has
    /// one: without them nobody finds the way onto their timelines (failure 9). What fails is for the next time.
    ///
    /// The note says whether there are any, not the limit, which may have been taken away since.
    pub(super) fn make_up(&self, cluster: ClusterId, push: impl Fn(PathBuf) -> Result<bool, CommandError>) {
        let make_up = || -> Result<(), CommandError> {
            let paths = &self.context.config()?.paths;
            let path = file_of(&paths.state, &self.site.name);
            for history in self.left_out(&path)?.histories(cluster) {
                // One that is gone from pg_wal, or another than the archive's, holds up none of the others.
                match push(self.path.with_file_name(history.to_string())) {
                    Ok(true) => {
                        let owner = paths.open_state()?.owner;
                        LeftOut::change(&path, owner, |left_out| left_out.forget_history(cluster, history))?;
                        tracing::warn!("{history}, which was left out, is archived now");
                    }
                    Ok(false) => {}
                    Err(error) => tracing::error!(
                        "{history}, which was left out, is still not archived: {}",
                        error.message()
                    ),
                }
            }
            Ok(())
        };
        if let Err(error) = make_up() {
            tracing::error!(
                "timeline histories that were left out are still not archived: {}",
                error.message()
            );
        }
    }

    /// Reads the note of what was left out. Who may not look there, and has no limit, has never left anything out.
    fn left_out(&self, note: &Path) -> Result<LeftOut, wal::Error> {
        match LeftOut::load(note) {
            Err(wal::Error::Disk(error)) if self.queue.is_none() && is_refused(&error) => {
                Ok(LeftOut::default())
            }
            left_out => left_out,
        }
    }
}

fn is_refused(error: &disk::Error) -> bool {
    error.io().is_some_and(|source| source.kind() == io::ErrorKind::PermissionDenied)
}

/// Forgets what was left out before a basebackup that has just been taken. That is not worth a failure: `check` looks at
/// the basebackups itself.
pub(super) fn forget_left_out(context: &Context, site: &SiteConfig, record: &BackupRecord) {
    let forget = || -> Result<(), CommandError> {
        let paths = &context.config()?.paths;
        let (path, start) = (file_of(&paths.state, &site.name), RecoveryStart::of(record));
        if LeftOut::load(&path)?.gaps.iter().any(|gap| gap.lies_before(&start)) {
            LeftOut::change(&path, paths.open_state()?.owner, |left_out| left_out.forget_before(&start))?;
        }
        Ok(())
    };
    if let Err(error) = forget() {
        tracing::warn!("could not forget what was left out of the archive: {}", error.message());
    }
}
