//! Reads the WAL archive of one cluster by PostgreSQL's file names: the one reader behind `wal fetch` and the mount.
//!
//! Three answers, never fewer: the file, *not there*, and *there but unreadable*. A store that does not answer is
//! none of them: it is asked again until the caller's patience ends. What was read lately is kept in a bounded
//! cache, because a copy arrives as many small reads; one read of a file is under way at a time.
//!
//! Who knows what is asked for next has it read ahead, into the same cache: a recovery asks for one file after the
//! other, and waits for each. What was read ahead is handed out only while nothing supersedes it; what was handed out
//! once stays what it was, for as long as it is kept.

use std::collections::HashMap;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use bytes::Bytes;
use tokio::sync::OnceCell;

use crate::catalog::ending_segment::{self, list_partials};
use crate::clock::Clock;
use crate::codec::Digest;
use crate::pg::{ArchiveFileName, Lsn, WalSegmentName};
use crate::repo::forced_index::LISTING_AGE_MAX;
use crate::repo::layout::WalObjectName;
use crate::repo::{ClusterId, Error, ErrorKind, Repository, wal_object};
use crate::storage;

/// How long a store that does not answer is asked again.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Patience {
    /// Until this moment of the clock's monotonic time; the first attempt is always made.
    Until(Instant),
    /// For ever; the caller ends the wait by dropping it.
    Forever,
}

/// What the archive holds under a name.
#[derive(Debug)]
pub enum Found<T> {
    /// The file, verified.
    Present(T),
    /// The store answered that it is not there.
    Absent,
    /// It is there, and waiting will not make it readable: damaged, not trusted, or sealed for somebody else.
    Unreadable(Error),
}

impl<T> Found<T> {
    /// Turns what was found into something else.
    pub fn map<U>(self, turn: impl FnOnce(T) -> U) -> Found<U> {
        match self {
            Self::Present(found) => Found::Present(turn(found)),
            Self::Absent => Found::Absent,
            Self::Unreadable(error) => Found::Unreadable(error),
        }
    }
}

/// Reads the archive of one cluster.
#[derive(Debug)]
pub struct WalReader {
    repository: Repository,
    cluster: ClusterId,
    clock: Arc<dyn Clock>,
    cache: Mutex<Cache>,
    flights: Mutex<HashMap<ArchiveFileName, Arc<OnceCell<Bytes>>>>,
}

/// Files read lately; what was handed out goes before what was read ahead, and the least recently used first.
#[derive(Debug)]
struct Cache {
    files: Vec<CachedFile>,
    bytes_max: usize,
}

#[derive(Debug)]
struct CachedFile {
    name: ArchiveFileName,
    bytes: Bytes,
    /// Whether somebody has been given it: it was not only read ahead.
    served: bool,
    /// When its read began, and so how old is what was known of it then.
    read_at: Instant,
}

/// The pause after the first failure; it doubles up to [`PAUSE_MAX`].
const PAUSE_FIRST: Duration = Duration::from_millis(200);
/// The longest pause: a store that comes back is noticed this fast.
const PAUSE_MAX: Duration = Duration::from_secs(5);
/// Segments read ahead at once: at 20 ms from the store and some 60 ms for each, enough for a hundred a second.
const AHEAD_MAX: usize = 8;

impl WalReader {
    /// Creates a reader that keeps at most `cache_bytes_max` of files read lately.
    pub fn new(
        repository: Repository,
        cluster: ClusterId,
        clock: Arc<dyn Clock>,
        cache_bytes_max: usize,
    ) -> Self {
        let cache = Cache { files: Vec::new(), bytes_max: cache_bytes_max };
        Self { repository, cluster, clock, cache: Mutex::new(cache), flights: Mutex::default() }
    }

    /// Returns the cluster.
    pub fn cluster(&self) -> ClusterId {
        self.cluster
    }

    /// Returns the repository.
    pub fn repository(&self) -> &Repository {
        &self.repository
    }

    /// Returns the clock that patience is measured by.
    pub fn clock(&self) -> &dyn Clock {
        &*self.clock
    }

    /// Reads a file, every byte verified.
    ///
    /// # Errors
    /// The store's last answer, when patience ends before there is one that says something.
    pub async fn read(&self, name: ArchiveFileName, patience: Patience) -> Result<Found<Bytes>, Error> {
        self.give_up_superseded(name, patience).await?;
        if let Some(bytes) = self.cache().get(name) {
            return Ok(Found::Present(bytes));
        }
        let read_at = self.clock.monotonic();
        let found = self.read_stored(name, patience).await;
        if let Ok(Found::Present(bytes)) = &found {
            self.cache().put(name, bytes.clone(), true, read_at);
        }
        found
    }

    /// Forgets a segment that was read ahead a while ago if anything supersedes it: nobody has been given it, and who
    /// asks now is to have what they would get from the store.
    async fn give_up_superseded(&self, name: ArchiveFileName, patience: Patience) -> Result<(), Error> {
        let ArchiveFileName::Segment(segment) = name else { return Ok(()) };
        let now = self.clock.monotonic();
        let is_old = |file: &CachedFile| now.saturating_duration_since(file.read_at) >= LISTING_AGE_MAX;
        if !self.cache().find(name).is_some_and(|file| !file.served && is_old(file)) {
            return Ok(());
        }
        let look = || wal_object::is_superseded(&self.repository, self.cluster, segment);
        if !matches!(self.patiently(patience, &name.to_string(), look).await?, Found::Present(false)) {
            self.cache().files.retain(|file| file.name != name);
        }
        Ok(())
    }

    /// Starts reading files that are about to be asked for, the next one first. No more than the cache holds beside
    /// one that is being handed out, so that they do not push each other out. Who asks for one meanwhile waits for the
    /// same read; a failure is left for them to meet.
    pub fn read_ahead(self: &Arc<Self>, names: impl IntoIterator<Item = ArchiveFileName>) {
        for name in names.into_iter().take(self.ahead_max()) {
            if self.cache().contains(name) || self.lock_flights().contains_key(&name) {
                continue;
            }
            // Before the task runs, so that nobody starts another one for it.
            let under_way = {
                let mut flights = self.lock_flights();
                flights.entry(name).or_default();
                flights.len()
            };
            self.cache().make_room(under_way * self.cluster.segment_size.bytes() as usize);
            let reader = self.clone();
            tokio::spawn(async move {
                let read_at = reader.clock.monotonic();
                // One attempt: there is time to wait when it is asked for.
                let patience = Patience::Until(reader.clock.monotonic());
                match reader.read_stored(name, patience).await {
                    Ok(Found::Present(bytes)) => reader.cache().put(name, bytes, false, read_at),
                    Ok(Found::Absent) => {}
                    Ok(Found::Unreadable(error)) | Err(error) => {
                        tracing::debug!("{name} could not be read ahead: {error}");
                    }
                }
            });
        }
    }

    /// Returns a file that is being read ahead, as soon as it is there, or nothing where nobody reads it. It is not handed
    /// out by that: who asks for it is given what counts then.
    pub async fn coming(&self, name: ArchiveFileName) -> Option<Bytes> {
        // First: what is on its way now is in the cache a moment later.
        let flight = self.lock_flights().get(&name).cloned();
        let cached = self.cache().find(name).map(|file| file.bytes.clone());
        if cached.is_some() {
            return cached;
        }
        flight?.get_or_try_init(|| self.read_once(name)).await.ok().cloned()
    }

    /// Returns how many segments are read ahead at most: none where the cache holds but one.
    pub fn ahead_max(&self) -> usize {
        let segment_bytes = self.cluster.segment_size.bytes() as usize;
        (self.cache().bytes_max / segment_bytes).saturating_sub(1).min(AHEAD_MAX)
    }

    /// Forgets what was handed out and is not likely to be asked for again.
    pub fn forget_served(&self) {
        self.cache().files.retain(|file| !file.served);
    }

    /// Keeps nothing any more, and reads nothing ahead: another reader takes its place.
    pub fn retire(&self) {
        let mut cache = self.cache();
        cache.bytes_max = 0;
        cache.files.clear();
    }

    async fn read_stored(&self, name: ArchiveFileName, patience: Patience) -> Result<Found<Bytes>, Error> {
        let flight = self.lock_flights().entry(name).or_default().clone();
        let read = || async {
            let bytes = flight.get_or_try_init(|| self.read_once(name)).await?;
            Ok(bytes.clone())
        };
        let found = self.patiently(patience, &name.to_string(), read).await;
        self.lock_flights().remove(&name);
        found
    }

    /// Reads a segment up to the position where a plan ends in it, filled up with zeros; asks the store each time.
    ///
    /// # Errors
    /// As [`WalReader::read`].
    pub async fn read_ending(
        &self,
        segment: WalSegmentName,
        end: Lsn,
        patience: Patience,
    ) -> Result<Found<Bytes>, Error> {
        let read = || ending_segment::read_ending(&self.repository, self.cluster, segment, end);
        self.patiently(patience, &segment.to_string(), read).await
    }

    /// Returns how large a file is, from its signed header.
    pub async fn size(&self, name: ArchiveFileName, patience: Patience) -> Result<Found<u64>, Error> {
        // To be asked for its size is not to be handed out.
        if let Some(file) = self.cache().find(name) {
            return Ok(Found::Present(file.bytes.len() as u64));
        }
        if self.lock_flights().contains_key(&name) {
            let found = self.read(name, patience).await;
            return found.map(|found| found.map(|bytes| bytes.len() as u64));
        }
        self.patiently(patience, &name.to_string(), || self.size_once(name)).await
    }

    /// Repeats `attempt` until the store says something or patience ends.
    pub async fn patiently<T, F>(
        &self,
        patience: Patience,
        what: &str,
        attempt: impl Fn() -> F,
    ) -> Result<Found<T>, Error>
    where
        F: Future<Output = Result<T, Error>>,
    {
        patiently(&*self.clock, patience, what, attempt).await
    }

    async fn read_once(&self, name: ArchiveFileName) -> Result<Bytes, Error> {
        let (repository, cluster) = (&self.repository, self.cluster);
        match name {
            ArchiveFileName::Segment(segment) => {
                ending_segment::read_segment(repository, cluster, segment).await
            }
            ArchiveFileName::Partial(segment) => self.read_partial(segment).await,
            ArchiveFileName::History(timeline) => {
                wal_object::read_history(repository, cluster, timeline).await
            }
            ArchiveFileName::BackupHistory { segment, offset } => {
                let name = WalObjectName::BackupHistory { segment, offset };
                wal_object::read_wal(repository, cluster, name).await
            }
        }
    }

    async fn size_once(&self, name: ArchiveFileName) -> Result<u64, Error> {
        let ArchiveFileName::Segment(segment) = name else {
            // The others are small, or have to be read to be chosen among.
            return Ok(self.read_once(name).await?.len() as u64);
        };
        let name = WalObjectName::Segment(segment);
        match wal_object::read_wal_header(&self.repository, self.cluster, name).await {
            // It may be there in pieces, or superseded.
            Err(error) if error.is_absent() || error.kind() == ErrorKind::Damaged => {
                let read = ending_segment::read_segment(&self.repository, self.cluster, segment).await;
                Ok(read?.len() as u64)
            }
            header => Ok(header?.raw_size),
        }
    }

    /// Reads the partial segment that holds the most WAL; one that is damaged does not hide another.
    async fn read_partial(&self, segment: WalSegmentName) -> Result<Bytes, Error> {
        let mut best: Option<(usize, Bytes)> = None;
        let mut failure = None;
        for name in list_partials(&self.repository, self.cluster, segment).await? {
            match wal_object::read_wal(&self.repository, self.cluster, name).await {
                Ok(bytes) => {
                    let used = bytes.iter().rposition(|byte| *byte != 0).map_or(0, |at| at + 1);
                    if best.as_ref().is_none_or(|(most, _)| used > *most) {
                        best = Some((used, bytes));
                    }
                }
                Err(error) if may_heal(&error) => return Err(error),
                Err(error) => failure = Some(error),
            }
        }
        let absent = || {
            let key = self.repository.layout().wal_object(self.cluster, WalObjectName::Segment(segment));
            storage::Error::NotFound { key: format!("{key}.partial") }.into()
        };
        best.map(|(_, bytes)| bytes).ok_or_else(|| failure.unwrap_or_else(absent))
    }

    fn cache(&self) -> std::sync::MutexGuard<'_, Cache> {
        self.cache.lock().expect("no holder of this lock panics")
    }

    fn lock_flights(&self) -> std::sync::MutexGuard<'_, HashMap<ArchiveFileName, Arc<OnceCell<Bytes>>>> {
        self.flights.lock().expect("no holder of this lock panics")
    }
}

/// Repeats `attempt` until the store says something or patience ends; `what` is for the log.
///
/// # Errors
/// The last failure, when patience ends.
pub async fn patiently<T, F>(
    clock: &dyn Clock,
    patience: Patience,
    what: &str,
    attempt: impl Fn() -> F,
) -> Result<Found<T>, Error>
where
    F: Future<Output = Result<T, Error>>,
{
    let mut pauses = Pauses::new();
    loop {
        let error = match attempt().await {
            Ok(value) => return Ok(Found::Present(value)),
            Err(error) if error.is_absent() => return Ok(Found::Absent),
            Err(error) if !may_heal(&error) => return Ok(Found::Unreadable(error)),
            Err(error) => error,
        };
        if !pauses.pause(patience, clock).await {
            return Err(error);
        }
        tracing::warn!("waiting for the store, for {what}: {error}");
    }
}

/// The name under which a partial is archived whose content has this digest.
pub fn partial_object(segment: WalSegmentName, Digest([a, b, c, d, ..]): Digest) -> WalObjectName {
    WalObjectName::Partial { segment, digest: [a, b, c, d] }
}

/// Tells whether asking again later may bring another answer than this error.
pub fn may_heal(error: &Error) -> bool {
    match error.kind() {
        ErrorKind::Retry => true,
        ErrorKind::Absent | ErrorKind::Damaged | ErrorKind::Bug => false,
        // Rights, credentials and mounts come back; a key that is not here does not come by waiting.
        ErrorKind::Input => matches!(error, Error::Store(_)),
    }
}

/// Pauses that grow, for as long as patience lasts.
#[derive(Debug)]
pub struct Pauses {
    next: Duration,
}

impl Pauses {
    /// Begins with the shortest.
    pub fn new() -> Self {
        Self { next: PAUSE_FIRST }
    }

    /// Waits a little and returns true, or returns false at once where patience has ended.
    pub async fn pause(&mut self, patience: Patience, clock: &dyn Clock) -> bool {
        let pause = match patience {
            Patience::Forever => self.next,
            Patience::Until(end) => {
                let left = end.saturating_duration_since(clock.monotonic());
                if left.is_zero() {
                    return false;
                }
                self.next.min(left)
            }
        };
        tokio::time::sleep(pause).await;
        self.next = (self.next * 2).min(PAUSE_MAX);
        true
    }
}

impl Default for Pauses {
    fn default() -> Self {
        Self::new()
    }
}

impl Cache {
    fn contains(&self, name: ArchiveFileName) -> bool {
        self.find(name).is_some()
    }

    fn find(&self, name: ArchiveFileName) -> Option<&CachedFile> {
        self.files.iter().find(|file| file.name == name)
    }

    fn get(&mut self, name: ArchiveFileName) -> Option<Bytes> {
        let at = self.files.iter().position(|file| file.name == name)?;
        let file = self.files.remove(at);
        let bytes = file.bytes.clone();
        self.files.push(CachedFile { served: true, ..file });
        Some(bytes)
    }

    fn put(&mut self, name: ArchiveFileName, bytes: Bytes, served: bool, read_at: Instant) {
        // Another partial may become the longest; everything else never changes.
        if matches!(name, ArchiveFileName::Partial(_)) {
            return;
        }
        let served = served || self.files.iter().any(|file| file.name == name && file.served);
        self.files.retain(|file| file.name != name);
        self.files.push(CachedFile { name, bytes, served, read_at });
        // The newest stays even where it alone is larger: it is about to be read.
        while self.files.len() > 1 && self.bytes() > self.bytes_max {
            let newest = self.files.len() - 1;
            let oldest_served = self.files[..newest].iter().position(|file| file.served);
            self.files.remove(oldest_served.unwrap_or(0));
        }
    }

    /// Gives up what was handed out for what is on its way, but not the file that was handed out last.
    fn make_room(&mut self, coming: usize) {
        while self.bytes() + coming > self.bytes_max {
            let mut served = (0..self.files.len()).filter(|at| self.files[*at].served);
            let (Some(oldest), Some(_)) = (served.next(), served.next()) else { return };
            self.files.remove(oldest);
        }
    }

    fn bytes(&self) -> usize {
        self.files.iter().map(|file| file.bytes.len()).sum()
    }
}

#[cfg(test)]
mod tests;
