//! The archive as fetches see it: opened at the first need, held while all goes well, opened anew after any failure.
//!
//! A fetch of one file opens and asks; a process that answers many keeps what it opened, and reads ahead. Both ask
//! the same way, so what is held must never know less: an absence found by what was opened earlier counts only once
//! the site is seen to be still there, and whatever went wrong is met by a fresh opening, with the configuration's
//! files read again.

use std::sync::{Arc, Mutex};

use crate::catalog::{RecoveryPlan, WalAhead, WalReader};
use crate::clock::Clock;
use crate::pg::WalSegmentName;
use crate::repo::{self, ClusterId, Repository};

/// One site's archive; `O` opens the repository.
#[derive(Debug)]
pub struct Archive<O> {
    open: O,
    clock: Arc<dyn Clock>,
    cache_bytes_max: usize,
    held: tokio::sync::Mutex<Option<Arc<Held>>>,
}

/// What was opened.
#[derive(Debug)]
pub(crate) struct Held {
    pub(crate) repository: Repository,
    ahead: Mutex<Option<Arc<WalAhead>>>,
    /// The plan of the recovery that it was opened for.
    plan: Mutex<Option<RecoveryPlan>>,
    clock: Arc<dyn Clock>,
    cache_bytes_max: usize,
}

impl<O: AsyncFn() -> Result<Repository, repo::Error>> Archive<O> {
    /// Describes an archive that is asked for one file, as often as that takes.
    pub fn once(open: O, clock: Arc<dyn Clock>) -> Self {
        Self::reading_ahead(open, clock, 0)
    }

    /// Describes an archive that is asked for many files, and keeps at most so many bytes of those to come.
    pub fn reading_ahead(open: O, clock: Arc<dyn Clock>, cache_bytes_max: usize) -> Self {
        Self { open, clock, cache_bytes_max, held: tokio::sync::Mutex::default() }
    }

    /// Forgets what was read and handed out.
    pub async fn forget_served(&self) {
        let held = self.held_now().await;
        if let Some(ahead) = held.and_then(|held| held.lock_ahead().clone()) {
            ahead.reader().forget_served();
        }
    }

    /// Returns who reads what comes behind a segment, and up to `count` names of that, where the archive is open and was
    /// asked for the segment by a plan.
    pub(crate) async fn behind(
        &self,
        segment: WalSegmentName,
        count: usize,
    ) -> Option<(Arc<WalReader>, Vec<WalSegmentName>)> {
        let held = self.held_now().await?;
        let plan = held.lock_plan().clone()?;
        let ahead = held.ahead(plan.cluster);
        Some((ahead.reader().clone(), ahead.behind(segment, Some(&plan), count)))
    }

    async fn held_now(&self) -> Option<Arc<Held>> {
        self.held.lock().await.clone()
    }

    pub(crate) fn clock(&self) -> &dyn Clock {
        &*self.clock
    }

    /// Returns the open archive, and whether it was opened just now.
    pub(crate) async fn hold(&self) -> Result<(Arc<Held>, bool), repo::Error> {
        let mut held = self.held.lock().await;
        if let Some(held) = &*held {
            return Ok((held.clone(), false));
        }
        let repository = (self.open)().await?;
        let (clock, cache_bytes_max) = (self.clock.clone(), self.cache_bytes_max);
        let (ahead, plan) = (Mutex::default(), Mutex::default());
        let opened = Arc::new(Held { repository, ahead, plan, clock, cache_bytes_max });
        *held = Some(opened.clone());
        Ok((opened, true))
    }

    /// Returns the open archive to go by a plan, and whether it was opened just now. What was read for another plan is
    /// let go: that recovery took segments for the newest that this one may not.
    pub(crate) async fn hold_for(&self, plan: &RecoveryPlan) -> Result<(Arc<Held>, bool), repo::Error> {
        let (mut held, mut fresh) = self.hold().await?;
        if !held.is_for(plan) {
            self.release().await;
            (held, fresh) = self.hold().await?;
        }
        held.go_by(plan);
        Ok((held, fresh))
    }

    /// Lets go of what was opened: the next question opens it again. What is on its way into memory is let go as well,
    /// so that there is never twice as much of it.
    pub(crate) async fn release(&self) {
        let held = self.held.lock().await.take();
        if let Some(ahead) = held.and_then(|held| held.lock_ahead().clone()) {
            ahead.reader().retire();
        }
    }
}

impl Held {
    /// Returns the reader of a cluster; a data directory's is always the same one.
    pub(crate) fn ahead(&self, cluster: ClusterId) -> Arc<WalAhead> {
        let mut ahead = self.lock_ahead();
        if let Some(ahead) = ahead.as_ref().filter(|ahead| ahead.reader().cluster() == cluster) {
            return ahead.clone();
        }
        let reader =
            WalReader::new(self.repository.clone(), cluster, self.clock.clone(), self.cache_bytes_max);
        ahead.insert(Arc::new(WalAhead::new(Arc::new(reader)))).clone()
    }

    fn is_for(&self, plan: &RecoveryPlan) -> bool {
        self.lock_plan().as_ref().is_none_or(|known| known == plan)
    }

    fn go_by(&self, plan: &RecoveryPlan) {
        self.lock_plan().get_or_insert_with(|| plan.clone());
        plan.tell(&self.repository);
    }

    fn lock_plan(&self) -> std::sync::MutexGuard<'_, Option<RecoveryPlan>> {
        self.plan.lock().expect("no holder of this lock panics")
    }

    fn lock_ahead(&self) -> std::sync::MutexGuard<'_, Option<Arc<WalAhead>>> {
        self.ahead.lock().expect("no holder of this lock panics")
    }
}
