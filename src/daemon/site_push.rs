//! Archiving for one site: asked for or ahead of that, several files side by side, each of them once.
//!
//! file → (slot, memory) → checked → read, compressed and sealed on the pool → stored → outcome. Whoever asks for a
//! file that is under way waits for it, and for one that is done has the answer at once. All files share one
//! repository, one admission of their cluster and one key; after a failure, and after [`OPEN_AGE_MAX`], the
//! repository is opened anew, so that a site that was made anew under the daemon is noticed.

use std::fmt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use tokio::sync::{Notify, Semaphore};

use crate::clock::Clock;
use crate::control::{ArchivedFile, Destination, Failure};
use crate::repo::wal_object::{Archived, Stored};
use crate::repo::{self, ClusterId, Repository};
use crate::wal;
use crate::wal::head;
use crate::wal::key_rotation::KeyRotation;
use crate::wal::push::{CheckedFile, OnConflict, check_file, compare, push_admitted, seal};

use super::SiteOptions;
use super::budget::Budget;
use super::file_identity::{FileIdentity, SETTLING};
use super::heads::Heads;
use super::look_ahead::{Next, Upcoming, is_ready, look};
use super::outcomes::{Awaited, Known, Outcome, Outcomes};
use super::threads::Threads;

/// What all sites share: nothing of it waits for a store, or for long for a volume.
#[derive(Debug, Clone)]
pub(super) struct Workers {
    pub(super) threads: Threads,
    pub(super) clock: Arc<dyn Clock>,
    pub(super) failure_of: fn(wal::Error) -> Failure,
}

/// The push service of a site.
pub(super) struct SitePush {
    options: SiteOptions,
    workers: Workers,
    keys: KeyRotation,
    opened: tokio::sync::Mutex<Option<Opened>>,
    outcomes: Mutex<Outcomes>,
    slots: Semaphore,
    budget: Budget,
    heads: Heads,
    ahead: Mutex<Ahead>,
    wake: Notify,
}

/// An open repository, and the clusters it has admitted.
struct Opened {
    repository: Repository,
    at: Instant,
    admitted: Vec<ClusterId>,
}

/// The data directory that was asked for last, and what comes next there.
#[derive(Default)]
struct Ahead {
    data_directory: PathBuf,
    upcoming: Upcoming,
}

/// Why a file was not archived.
enum PushError {
    Opening(Failure),
    Wal(wal::Error),
}

/// A repository is used no longer without looking whether it is still the same.
const OPEN_AGE_MAX: Duration = Duration::from_secs(60);
/// The least memory a site has, however many there are: one segment of the usual size.
const SHARE_BYTES_MIN: u64 = 32 << 20;

impl SitePush {
    pub(super) fn new(mut options: SiteOptions, workers: Workers, transfers: usize, share: u64) -> Self {
        Self {
            heads: Heads::new(options.head_notes.take()),
            options,
            workers,
            keys: KeyRotation::default(),
            opened: tokio::sync::Mutex::default(),
            outcomes: Mutex::default(),
            slots: Semaphore::new(transfers),
            budget: Budget::new(share.max(SHARE_BYTES_MIN)),
            ahead: Mutex::default(),
            wake: Notify::new(),
        }
    }

    pub(super) fn name(&self) -> &str {
        &self.options.name
    }

    pub(super) fn data_directory(&self) -> Option<PathBuf> {
        self.options.data_directory.clone()
    }

    pub(super) fn destination(&self) -> &Destination {
        &self.options.destination
    }

    /// Opens the repository, so that what is wrong with it stands in the log before PostgreSQL asks.
    pub(super) async fn open_once(&self) {
        if let Err(PushError::Opening(failure)) = self.repository(None).await {
            tracing::error!(site = self.name(), "could not open the repository: {}", failure.message);
        }
    }

    /// Archives a file that somebody has asked for; its outcome may be known already, or on its way.
    pub(super) async fn push(self: &Arc<Self>, path: &Path) -> Outcome {
        let outcome = match self.identify(path).await {
            Ok(identity) => {
                self.note_request(path);
                let told = lock(&self.outcomes).tell(path, &identity);
                let mut awaited = match told {
                    Known::Archived(file) => return Ok(file),
                    Known::Running(awaited) => awaited,
                    Known::Nothing => self.begin(path.to_owned(), identity),
                };
                let outcome = awaited.wait_for(Option::is_some).await;
                let outcome = outcome.map(|outcome| outcome.clone());
                // Its memory was for whoever is told now.
                lock(&self.outcomes).tell(path, &identity);
                outcome.ok().flatten().unwrap_or_else(|| Err(panicked()))
            }
            Err(error) => Err((self.workers.failure_of)(error)),
        };
        self.log_failure(path, &outcome);
        outcome
    }

    /// Archives a segment whatever stands under its name, because a person said so; nothing is remembered of it.
    pub(super) async fn push_by_force(&self, path: &Path) -> Outcome {
        let forced = async {
            let identity = self.identify(path).await?;
            let _slot = self.slots.acquire().await.expect("the semaphore is never closed");
            let _charge = self.budget.charge_for_sealing(identity.size).await;
            let file = self.check(path, identity).await?;
            let repository = self.repository(Some(file.cluster)).await?;
            let key = self.keys.next(repository.keyring(), &*self.workers.clock).map_err(wal::Error::from)?;
            let compression = self.options.compression;
            let archived =
                push_admitted(&repository, &file, &key, compression, OnConflict::Supersede).await?;
            self.heads.archived(file.cluster, file.name);
            let (name, cluster) = (file.name.to_string(), file.cluster.to_string());
            tracing::info!(site = self.name(), created = archived == Archived::Created, "forced {name}");
            Ok::<_, PushError>(ArchivedFile { name, cluster, created: archived == Archived::Created })
        };
        let outcome = forced.await.map_err(|error| self.failure(error));
        self.log_failure(path, &outcome);
        outcome
    }

    fn log_failure(&self, path: &Path, outcome: &Outcome) {
        if let Err(failure) = outcome {
            let site = self.name();
            tracing::error!(site, "\"{}\" is not archived: {}", path.display(), failure.message);
        }
    }

    fn failure(&self, error: PushError) -> Failure {
        match error {
            PushError::Opening(failure) => failure,
            PushError::Wal(error) => (self.workers.failure_of)(error),
        }
    }

    /// Notes in the store how far the archive reaches, when that is due; never returns.
    pub(super) async fn keep_heads(self: Arc<Self>) {
        loop {
            let (cluster, timeline) = self.heads.due(&*self.workers.clock).await;
            let kept = match self.repository(Some(cluster)).await {
                Ok(repository) => head::keep(&repository, cluster, timeline).await,
                Err(error) => {
                    let (site, failure) = (self.name(), self.failure(error));
                    tracing::warn!(
                        site,
                        "how far the archive reaches could not be noted: {}",
                        failure.message
                    );
                    false
                }
            };
            if !kept {
                self.heads.wait_for_next(cluster, timeline);
            }
        }
    }

    /// Archives what comes next after each request, as far as there is room; never returns.
    pub(super) async fn look_ahead(self: Arc<Self>) {
        loop {
            self.wake.notified().await;
            while self.slots.available_permits() > 0 && self.next_ahead().await {}
        }
    }

    /// Takes the next step; returns whether there may be another.
    async fn next_ahead(self: &Arc<Self>) -> bool {
        let (next, data_directory) = {
            let mut ahead = lock(&self.ahead);
            (ahead.upcoming.next(), ahead.data_directory.clone())
        };
        match next {
            Next::Rest => false,
            Next::Look => {
                let looked = tokio::task::spawn_blocking(move || look(&data_directory)).await;
                match looked {
                    Ok(Ok(found)) => lock(&self.ahead).upcoming.found(found),
                    Ok(Err(error)) => tracing::debug!(site = self.name(), "no look-ahead: {error}"),
                    Err(_) => {}
                }
                true
            }
            Next::Begin(name) => {
                let path = data_directory.join("pg_wal").join(name.to_string());
                let looked = path.clone();
                let identity = tokio::task::spawn_blocking(move || {
                    is_ready(&data_directory, name).then(|| FileIdentity::of(&looked).ok()).flatten()
                });
                let Some(identity) = identity.await.ok().flatten() else { return true };
                if !identity.is_settled(self.workers.clock.now()) {
                    // Nothing could be remembered of it yet, nor of those behind it, which are younger.
                    lock(&self.ahead).upcoming.put_back(name);
                    tokio::time::sleep(SETTLING).await;
                } else if matches!(self.known(&path, &identity), Known::Nothing) {
                    lock(&self.ahead).upcoming.begun();
                    drop(self.begin(path, identity));
                }
                true
            }
        }
    }

    async fn identify(&self, path: &Path) -> Result<FileIdentity, wal::Error> {
        let asked = path.to_owned();
        let identity = tokio::task::spawn_blocking(move || FileIdentity::of(&asked)).await;
        let identity = identity.unwrap_or_else(|error| Err(std::io::Error::other(error)));
        identity.map_err(|source| wal::Error::Unreadable { path: path.to_owned(), source })
    }

    /// Returns whether files have come and gone since the last time, and none is there now.
    pub(super) fn has_become_idle(&self) -> bool {
        self.budget.has_become_idle()
    }

    fn note_request(&self, path: &Path) {
        if let Some(data_directory) = path.parent().and_then(Path::parent) {
            let mut ahead = lock(&self.ahead);
            if ahead.data_directory != data_directory {
                *ahead = Ahead { data_directory: data_directory.to_owned(), ..Ahead::default() };
            }
            ahead.upcoming.asked();
        }
        self.wake.notify_one();
    }

    fn known(&self, path: &Path, identity: &FileIdentity) -> Known {
        lock(&self.outcomes).known(path, identity)
    }

    /// Begins with a file; it goes on whether or not anybody waits.
    fn begin(self: &Arc<Self>, path: PathBuf, identity: FileIdentity) -> Awaited {
        let sender = lock(&self.outcomes).begin(&path, identity);
        let awaited = sender.subscribe();
        let site = self.clone();
        // As the file is read after this moment, a change behind it shows.
        let settled = identity.is_settled(self.workers.clock.now());
        tokio::spawn(async move {
            // Also where the task panics: what is not under way must not look so.
            let _forget = ForgetUnlessDone { site: &site, path: &path, identity: &identity };
            let outcome = site.archive(&path, &identity).await.map_err(|error| site.failure(error));
            match &outcome {
                Ok(file) => {
                    tracing::debug!(site = site.name(), created = file.created, "archived {}", file.name);
                    lock(&site.outcomes).end(&path, &identity, settled.then(|| file.clone()));
                }
                Err(failure) => {
                    tracing::debug!(site = site.name(), "\"{}\": {}", path.display(), failure.message);
                    lock(&site.outcomes).end(&path, &identity, None);
                }
            }
            sender.send_replace(Some(outcome));
            site.wake.notify_one();
        });
        awaited
    }

    async fn archive(&self, path: &Path, identity: &FileIdentity) -> Result<ArchivedFile, PushError> {
        let _slot = self.slots.acquire().await.expect("the semaphore is never closed");
        // Before any memory is taken: a store that hangs is waited for here.
        self.repository(None).await?;
        let outcome = self.archive_in_slot(path, identity).await;
        if let Err(PushError::Wal(wal::Error::Repository(error))) = &outcome
            && !matches!(error, repo::Error::Different { .. })
        {
            self.opened.lock().await.take();
        }
        outcome
    }

    async fn archive_in_slot(&self, path: &Path, identity: &FileIdentity) -> Result<ArchivedFile, PushError> {
        let mut charge = self.budget.charge_for_sealing(identity.size).await;
        let file = self.check(path, *identity).await?;
        let (name, cluster) = (file.name, file.cluster);
        let repository = self.repository(Some(cluster)).await?;
        let key = self.keys.next(repository.keyring(), &*self.workers.clock).map_err(wal::Error::from)?;
        let (compression, sealer) = (self.options.compression, repository.clone());
        let sealed = self.workers.threads.run(move || seal(&sealer, &file, &key, compression)).await;
        let sealed = sealed.map_err(|error| {
            wal::Error::from(repo::Error::Internal(format!("could not seal {name}: {error}")))
        })??;
        charge.shrink_to(sealed.held_len());
        let archived = match sealed.store(&repository).await.map_err(wal::Error::from)? {
            Stored::Created => Archived::Created,
            Stored::Taken(place) => {
                drop(charge);
                let _charge = self.budget.charge_for_comparing(identity.size).await;
                let file = self.check(path, *identity).await?;
                compare(&repository, &file, place).await?
            }
        };
        self.heads.archived(cluster, name);
        let (name, cluster) = (name.to_string(), cluster.to_string());
        Ok(ArchivedFile { name, cluster, created: archived == Archived::Created })
    }

    /// Opens and checks a file, and makes sure that it is the one that was meant.
    async fn check(&self, path: &Path, identity: FileIdentity) -> Result<CheckedFile, PushError> {
        let asked = path.to_owned();
        let read = tokio::task::spawn_blocking(move || {
            let file = check_file(&asked)?;
            match FileIdentity::of(&asked) {
                Ok(now) if now == identity => Ok(file),
                Ok(_) => Err(wal::Error::Changed { path: asked }),
                Err(source) => Err(wal::Error::Unreadable { path: asked, source }),
            }
        });
        let read = read.await.unwrap_or_else(|error| {
            Err(wal::Error::Unreadable { path: path.to_owned(), source: std::io::Error::other(error) })
        });
        Ok(read?)
    }

    /// Returns the repository, opened if need be, once it has admitted `cluster`.
    async fn repository(&self, cluster: Option<ClusterId>) -> Result<Repository, PushError> {
        let mut opened = self.opened.lock().await;
        let now = self.workers.clock.monotonic();
        let fresh = |opened: &Opened| now.saturating_duration_since(opened.at) < OPEN_AGE_MAX;
        let mut current = match opened.take().filter(fresh) {
            Some(current) => current,
            None => {
                let repository = (self.options.open)().await.map_err(PushError::Opening)?;
                Opened { repository, at: now, admitted: Vec::new() }
            }
        };
        if let Some(cluster) = cluster.filter(|cluster| !current.admitted.contains(cluster)) {
            current.repository.admit(cluster).await.map_err(wal::Error::from)?;
            current.admitted.push(cluster);
        }
        Ok(opened.insert(current).repository.clone())
    }
}

/// Takes a file that is no longer under way off the list, where that was not done with its outcome.
struct ForgetUnlessDone<'a> {
    site: &'a SitePush,
    path: &'a Path,
    identity: &'a FileIdentity,
}

impl Drop for ForgetUnlessDone<'_> {
    fn drop(&mut self) {
        let mut outcomes = lock(&self.site.outcomes);
        if matches!(outcomes.known(self.path, self.identity), Known::Running(_)) {
            outcomes.end(self.path, self.identity, None);
        }
    }
}

impl From<wal::Error> for PushError {
    fn from(error: wal::Error) -> Self {
        Self::Wal(error)
    }
}

impl fmt::Debug for SitePush {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("SitePush").field("options", &self.options).finish_non_exhaustive()
    }
}

fn panicked() -> Failure {
    Failure {
        kind: "bug".to_owned(),
        message: "the daemon failed in the middle of it".to_owned(),
        hint: None,
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
