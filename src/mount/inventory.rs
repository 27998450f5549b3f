//! Which basebackups a mount shows, remembered between look-ups.
//!
//! An outcome never changes, so each is read once: after the first listing a site with thousands of basebackups is
//! listed by one request, and a new one appears as soon as it is complete. Marks of retention do come later; they
//! are looked for again after [`RECHECK_AFTER`].

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use futures::{FutureExt, StreamExt};

use crate::catalog::ListedBasebackup;
use crate::catalog::basebackups::find;
use crate::clock::Clock;
use crate::repo::{self, BasebackupId, ErrorKind, Repository};

/// What is known of the basebackups of a site.
#[derive(Debug)]
pub(crate) struct Inventory {
    repository: Repository,
    clock: Arc<dyn Clock>,
    known: Mutex<BTreeMap<BasebackupId, Known>>,
}

#[derive(Debug, Clone)]
struct Known {
    /// The basebackup; none where it was abandoned.
    listed: Option<Arc<ListedBasebackup>>,
    checked_at: Instant,
}

/// How long a basebackup that retention has marked may still be listed.
const RECHECK_AFTER: Duration = Duration::from_secs(60);
/// Look-ups under way at once.
const LOOKUPS_MAX: usize = 16;

impl Inventory {
    pub(crate) fn new(repository: Repository, clock: Arc<dyn Clock>) -> Self {
        Self { repository, clock, known: Mutex::default() }
    }

    /// Finds a basebackup that is complete and has not expired.
    pub(crate) async fn find(&self, id: BasebackupId) -> Result<Option<Arc<ListedBasebackup>>, repo::Error> {
        if let Some(known) = self.fresh(id) {
            return Ok(known.listed);
        }
        let listed = find(&self.repository, id).await?.map(Arc::new);
        if let Some(record) = listed.as_ref().map(|listed| &listed.record)
            && let Some(wal) = &record.wal
        {
            // A server that was copied from the mount asks for it there, and later WAL would make a hole of it.
            self.repository.carried_index().note(record.cluster, record.id, wal);
        }
        let known = Known { listed: listed.clone(), checked_at: self.clock.monotonic() };
        let mut all = self.lock();
        // One that is still running is asked for again at once.
        if listed.is_some() {
            all.insert(id, known);
        } else {
            all.remove(&id);
        }
        Ok(listed)
    }

    /// Lists the ids, ascending; those whose record cannot be read are among them, so that they are not missed.
    pub(crate) async fn list(&self) -> Result<Vec<BasebackupId>, repo::Error> {
        let layout = self.repository.layout();
        let folder = layout.basebackups();
        let names = self.repository.store().list_folder(&folder).await?.folders;
        let id_of = |name: String| layout.parse_basebackup_folder(&format!("{folder}{name}"));
        let ids: Vec<BasebackupId> = names.into_iter().filter_map(id_of).collect();
        let find = |id| async move { (id, self.find(id).await) }.boxed();
        let mut found = futures::stream::iter(ids.into_iter().map(find)).buffered(LOOKUPS_MAX);
        let mut listed = Vec::new();
        while let Some((id, outcome)) = found.next().await {
            match outcome {
                Ok(Some(_)) => listed.push(id),
                Ok(None) => {}
                Err(error) if error.kind() == ErrorKind::Damaged => listed.push(id),
                Err(error) => return Err(error),
            }
        }
        Ok(listed)
    }

    /// Finds the newest basebackup; one that cannot be read is an error, not passed over.
    pub(crate) async fn newest(&self) -> Result<Option<Arc<ListedBasebackup>>, repo::Error> {
        for id in self.list().await?.into_iter().rev() {
            if let Some(listed) = self.find(id).await? {
                return Ok(Some(listed));
            }
        }
        Ok(None)
    }

    fn fresh(&self, id: BasebackupId) -> Option<Known> {
        let now = self.clock.monotonic();
        let known = self.lock().get(&id).cloned()?;
        (now.saturating_duration_since(known.checked_at) < RECHECK_AFTER).then_some(known)
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, BTreeMap<BasebackupId, Known>> {
        self.known.lock().expect("no holder of this lock panics")
    }
}
