//! What is on stable storage: everything, as far as is known, or perhaps not even what should be.
//!
//! Of a write that it lost, the kernel tells each descriptor once. The next sync succeeds, and in its cache the page
//! goes on to count as data until it is dropped; then it is zeros, or a hole. So a sync that failed is never tried again:
//! what was fetched into the upper before may be lost, and nobody can say what of it. A mark in the private area says so
//! to whoever opens the upper next. Once an upper is marked as whole, what was fetched is on stable storage for good,
//! and only what was written since can be lost; of that its writer is told, as on any file system.

use std::io;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use crate::disk::private_area::{DIRECTORY_NAME, SYNC_FAILED_MARK, WHOLE_MARK};
use crate::mount::upper::local_disk::LocalDisk;

/// What is known of one upper.
#[derive(Debug)]
pub(crate) struct Stable {
    disk: Arc<dyn LocalDisk>,
    /// Everything is local and on stable storage.
    is_whole: AtomicBool,
    /// A sync has failed, now or in an earlier process.
    has_failed: AtomicBool,
}

impl Stable {
    /// Looks for the marks of earlier processes.
    pub(crate) fn open(disk: Arc<dyn LocalDisk>) -> io::Result<Self> {
        let is_marked = |mark: &str| Ok::<_, io::Error>(disk.stat(&place(mark))?.is_some());
        let (is_whole, has_failed) = (is_marked(WHOLE_MARK)?, is_marked(SYNC_FAILED_MARK)?);
        let has_failed = has_failed && !is_whole;
        Ok(Self { disk, is_whole: AtomicBool::new(is_whole), has_failed: AtomicBool::new(has_failed) })
    }

    /// Tells whether everything is local and on stable storage.
    pub(crate) fn is_whole(&self) -> bool {
        self.is_whole.load(Ordering::Acquire)
    }

    /// Tells whether something that was fetched may be lost.
    pub(crate) fn is_in_doubt(&self) -> bool {
        self.has_failed.load(Ordering::Acquire) && !self.is_whole()
    }

    /// Fails once a sync has, whoever was told of that one.
    pub(crate) fn check(&self) -> io::Result<()> {
        if self.has_failed.load(Ordering::Acquire) {
            return Err(io::Error::from_raw_os_error(libc::EIO));
        }
        Ok(())
    }

    /// Syncs, unless a sync has failed before.
    pub(crate) fn sync(&self, sync: impl FnOnce() -> io::Result<()>) -> io::Result<()> {
        self.check()?;
        sync().inspect_err(|error| self.failed(error))
    }

    /// Takes note of a sync that failed.
    pub(crate) fn failed(&self, error: &io::Error) {
        if self.has_failed.swap(true, Ordering::AcqRel) {
            return;
        }
        tracing::error!("something that was written is lost: {error}");
        if !self.is_whole()
            && let Err(error) = self.mark(SYNC_FAILED_MARK)
        {
            tracing::error!("could not mark the upper as one that has lost something: {error}");
        }
    }

    /// Marks the upper as whole, after a sync of everything: it stays so, whatever is done to it.
    pub(crate) fn mark_whole(&self) -> io::Result<()> {
        self.mark(WHOLE_MARK)?;
        self.is_whole.store(true, Ordering::Release);
        Ok(())
    }

    fn mark(&self, mark: &str) -> io::Result<()> {
        if self.disk.stat(&place(mark))?.is_none() {
            self.disk.create(&place(mark), 0o600)?;
        }
        self.disk.sync_directory(Path::new(DIRECTORY_NAME))
    }
}

fn place(mark: &str) -> std::path::PathBuf {
    Path::new(DIRECTORY_NAME).join(mark)
}
