//! Fetching what follows a reader: what `sequential` says, behind what is waited for and before the hydrator.
//!
//! What is under way for an open file is dropped when that file is closed, and what comes for one that was removed is
//! not kept. Nobody hears of a failure here: who then reads the bytes fetches them and has the error. Deliberately
//! absent: a bound in bytes, which is the gate's that every request goes through.

use std::num::NonZeroUsize;
use std::ops::Range;
use std::sync::{Arc, Mutex, MutexGuard};

use lru::LruCache;
use nix::errno::Errno;
use tokio::runtime::Handle;
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio::task::JoinSet;

use crate::mount::caller::Caller;
use crate::mount::fs::LocalId;
use crate::mount::upper::Upper;
use crate::mount::upper::room::Use;
use crate::mount::upper::sequential::{ReadAhead, Sequential};
use crate::mount::upper::stats::Counters;
use crate::mount::upper::volume::UpperFile;
use crate::repo::Urgency;

/// Files whose readers are followed: more than a server scans at once, at some 300 bytes each.
const FILES_MAX: NonZeroUsize = NonZeroUsize::new(256).expect("256 is not zero");
/// Windows being fetched at once in one upper: four for each of two scans, which is more than a line can serve.
const WINDOWS_MAX: usize = 8;

/// Who reads on from where in the files of one upper, and how much is being fetched for them.
#[derive(Debug)]
pub(crate) struct ReadAheads {
    files: Mutex<LruCache<LocalId, Sequential>>,
    places: Arc<Semaphore>,
}

/// What is under way for one open file, until this is dropped.
#[derive(Debug, Default)]
pub(crate) struct TasksAhead(Mutex<JoinSet<()>>);

impl ReadAheads {
    pub(crate) fn new() -> Self {
        Self { files: Mutex::new(LruCache::new(FILES_MAX)), places: Arc::new(Semaphore::new(WINDOWS_MAX)) }
    }

    fn files(&self) -> MutexGuard<'_, LruCache<LocalId, Sequential>> {
        self.files.lock().expect("no holder of this lock panics")
    }

    fn note(&self, file: LocalId, read: &Range<u64>, limit: u64) -> Option<ReadAhead> {
        self.files().get_or_insert_mut(file, Sequential::default).note(read, limit)
    }

    fn take_back(&self, file: LocalId, range: &Range<u64>) {
        if let Some(sequential) = self.files().peek_mut(&file) {
            sequential.take_back(range);
        }
    }

    fn forget(&self, file: LocalId) {
        self.files().pop(&file);
    }
}

/// A window that is being fetched. What did not come, because of a failure or because the file was closed, is taken
/// back, so that another reader of the stream is not left to fetch it page by page.
#[derive(Debug)]
struct Window {
    file: Arc<UpperFile>,
    range: Range<u64>,
    has_come: bool,
    _place: OwnedSemaphorePermit,
}

impl Window {
    async fn fetch(mut self) {
        let (range, caller) = (self.range.clone(), Caller::background());
        let outcome = self.file.ensure_range_as(Urgency::Ahead, &caller, range).await;
        match outcome {
            Ok(()) => self.has_come = true,
            Err(Errno::ENOSPC | Errno::EDQUOT) => self.file.stop_reading_ahead(),
            Err(errno) => tracing::debug!(range = ?self.range, "could not read ahead: {errno}"),
        }
    }
}

impl Drop for Window {
    fn drop(&mut self) {
        if !self.has_come {
            self.file.shared.read_aheads.take_back(self.file.node.id, &self.range);
        }
    }
}

impl TasksAhead {
    fn spawn(&self, task: impl Future<Output = ()> + Send + 'static, runtime: &Handle) {
        let mut tasks = self.0.lock().expect("no holder of this lock panics");
        while tasks.try_join_next().is_some() {}
        tasks.spawn_on(task, runtime);
    }
}

impl UpperFile {
    /// Takes note of a read, and begins to fetch what is likely to be read next.
    pub(super) fn read_ahead(&self, read: &Range<u64>) {
        let Some(content) = self.node.content.as_ref().filter(|content| content.lower_node().is_some())
        else {
            return;
        };
        let (read_aheads, id) = (&self.shared.read_aheads, self.node.id);
        // 0 while it is not known what is local; the first read will tell.
        let Some(ReadAhead { range }) = read_aheads.note(id, read, content.base_length()) else { return };
        if content.first_missing(&range).is_none() {
            return;
        }
        if !self.shared.room.is_for(Use::Reads) {
            return self.stop_reading_ahead();
        }
        let Ok(runtime) = Handle::try_current() else { return };
        let Ok(place) = read_aheads.places.clone().try_acquire_owned() else {
            return read_aheads.take_back(id, &range);
        };
        // A handle of its own, so that this one can be closed, which ends the task.
        let Ok(file) = (Upper { shared: self.shared.clone() }).open_file(id) else { return };
        Counters::add(&self.shared.counters.read_aheads, 1);
        let window = Window { file, range, has_come: false, _place: place };
        self.ahead.spawn(window.fetch(), &runtime);
    }

    /// Forgets who reads on in this file: there is no room for what follows.
    pub(super) fn stop_reading_ahead(&self) {
        self.shared.read_aheads.forget(self.node.id);
    }
}
