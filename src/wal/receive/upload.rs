//! The storing half: what the spool holds goes into the store, oldest first, and leaves the spool in that order.
//!
//! Whole segments go as they would be pushed; of the one that is being received a piece goes every few seconds, or as
//! soon as there is something where commits wait for the store. Segments go side by side, and no piece waits for them.
//! A store that is away is asked again for ever, and the spool grows meanwhile, not the memory. Only what contradicts
//! the archive ends it (the site is another cluster's, or something else stands under the name), and a spool that has
//! lost what it held.

mod histories;
mod spoiled;

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

use bytes::Bytes;
use futures::StreamExt;
use futures::future::BoxFuture;
use futures::stream::FuturesUnordered;
use tokio::sync::watch;

use crate::catalog::basebackups;
use crate::clock::Clock;
use crate::codec::Compression;
use crate::disk;
use crate::pg::{SEGMENT_HEADER_LEN, TimelineId, WalSegmentName, check_segment_header};
use crate::repo::layout::WalObjectName;
use crate::repo::wal_object::{Replace, Stored, seal_wal, supersede_wal, verified_reach, verify_wal};
use crate::repo::{self, ClusterId, RawContent, Repository};
use crate::wal::Error;
use crate::wal::head;
use crate::wal::head_notes::HEAD_INTERVAL;
use crate::wal::key_rotation::KeyRotation;
use crate::wal::left_out::RecoveryStart;
use crate::wal::receive::PIECE_INTERVAL;
use crate::wal::receive::disk_work::on_disk;
use crate::wal::receive::plan::{InStore, PieceRule, Upload, durable_in_store, may_leave, plan_upload};
use crate::wal::receive::state::{Shared, clear, note};
use crate::wal::spool::Position;

use histories::WaitingHistories;
use spoiled::SpoiledPieces;

/// Opens the repository for writing, as often as it takes.
pub type OpenRepository = Arc<dyn Fn() -> BoxFuture<'static, Result<Repository, repo::Error>> + Send + Sync>;

/// What the storing half works with.
pub(super) struct Uploader {
    pub shared: Arc<Shared>,
    pub cluster: ClusterId,
    pub open: OpenRepository,
    pub clock: Arc<dyn Clock>,
    pub compression: Compression,
    pub rule: PieceRule,
    pub stop: watch::Receiver<Stop>,
}

/// What the storing half is told.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Stop {
    No,
    /// Store what there is, and end.
    Soon,
    /// The same, and leave nothing in the spool: no server goes on with it.
    Emptied,
}

/// Segments sealed and sent at a time, after an outage.
const SEGMENTS_MAX: usize = 4;
/// Raw bytes of segments that are in memory at a time, unless one is larger.
const SEGMENT_BYTES_MAX: usize = 64 << 20;
/// Segments of the spool that are looked at for work: more than may be on their way.
const LOOKED_AT_MAX: usize = 64;
/// Pauses between attempts at a store that fails.
const PAUSE_FIRST: Duration = Duration::from_millis(200);
const PAUSE_MAX: Duration = Duration::from_secs(10);
/// How often it is looked whether a piece is due.
const LOOK_INTERVAL: Duration = Duration::from_millis(250);
// A commit is to be in the store within five seconds: what these leave of them is for sealing it and for the store.
const _: () = assert!(PIECE_INTERVAL.saturating_add(LOOK_INTERVAL).as_millis() < 5_000);

/// How often it is looked, while WAL is missing, whether there is a basebackup behind it: two small reads for each.
const GAPS_INTERVAL: Duration = Duration::from_secs(5 * 60);

/// What is on its way to the store, or asked of it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Work {
    Upload(Upload),
    Head(TimelineId),
    Gaps,
}

type Running = FuturesUnordered<BoxFuture<'static, (Work, Result<(), Error>)>>;

/// What is known of what the store has.
struct Progress {
    repository: Repository,
    keys: Arc<KeyRotation>,
    stored: BTreeMap<WalSegmentName, InStore>,
    /// The history files that could not be stored.
    histories: WaitingHistories,
    /// The pieces in the store that nobody can use.
    spoiled: SpoiledPieces,
    in_flight: Vec<Work>,
    /// When the last piece was stored.
    last_piece: Instant,
    /// When the last head was due.
    last_head: Option<Instant>,
    /// When it was last looked whether gaps still matter.
    last_gaps: Option<Instant>,
    /// Whether it was looked how much of the first segment received is stored already, for a spool that was empty.
    first_asked: bool,
    /// The end of the newest segment that left the spool, all before it being stored.
    left: Option<Position>,
}

impl Uploader {
    /// Stores until it is told to stop and all is stored, or fails then, or the archive contradicts it.
    pub async fn run(mut self) -> Result<(), Error> {
        let Some(mut progress) = self.begin().await? else { return Ok(()) };
        let mut running = Running::new();
        let mut pause = PAUSE_FIRST;
        let mut wait_until = None;
        loop {
            let stop = *self.stop.borrow();
            if wait_until.is_none_or(|until| self.clock.monotonic() >= until) {
                let begun = self.begin_due(&mut progress, &mut running, stop).await;
                wait_until = self.judge(begun, &mut pause)?;
            }
            if stop != Stop::No && running.is_empty() {
                // What could not be stored now waits for the next start.
                return Ok(());
            }
            tokio::select! {
                Some((work, result)) = running.next(), if !running.is_empty() => {
                    progress.in_flight.retain(|other| *other != work);
                    let accounted = match result {
                        Ok(()) => self.account(&mut progress, work).await,
                        Err(error) => progress.meet(work, error),
                    };
                    if let (Ok(()), Work::Upload(_)) = (&accounted, work) {
                        pause = PAUSE_FIRST;
                        self.tell_stored(&progress);
                    }
                    wait_until = self.judge(accounted, &mut pause)?;
                }
                _ = self.shared.spooled.notified() => {}
                _ = tokio::time::sleep(LOOK_INTERVAL) => {}
                Ok(()) = self.stop.changed() => {}
            }
        }
    }

    /// Returns until when nothing more is tried, where something failed that a later attempt may mend.
    fn judge(&self, result: Result<(), Error>, pause: &mut Duration) -> Result<Option<Instant>, Error> {
        match result {
            Ok(()) => Ok(None),
            Err(error) if is_final(&error) => Err(error),
            Err(error) => {
                self.trouble(&error);
                let until = self.clock.monotonic() + *pause;
                *pause = (*pause * 2).min(PAUSE_MAX);
                Ok(Some(until))
            }
        }
    }

    fn trouble(&self, error: &Error) {
        note(&mut self.shared.state().store_problem, trouble_of(error), self.clock.now());
    }

    /// Opens the repository and finds out what of the spool is stored already; nothing if told to stop before.
    async fn begin(&mut self) -> Result<Option<Progress>, Error> {
        let mut pause = PAUSE_FIRST;
        loop {
            let error = match self.try_begin().await {
                Ok(progress) => {
                    self.shared.repository.send_replace(Some(progress.repository.clone()));
                    // A server that is idle may send nothing to be stored for hours.
                    clear(&mut self.shared.state().store_problem, "the repository is open");
                    self.publish(&progress);
                    return Ok(Some(progress));
                }
                Err(error) if is_final(&error) => return Err(error),
                Err(error) => error,
            };
            self.trouble(&error);
            if *self.stop.borrow() != Stop::No {
                return Ok(None);
            }
            tokio::select! {
                _ = tokio::time::sleep(pause) => {}
                _ = self.stop.changed() => {}
            }
            pause = (pause * 2).min(PAUSE_MAX);
        }
    }

    async fn try_begin(&self) -> Result<Progress, Error> {
        let repository = (self.open)().await?;
        repository.admit(self.cluster).await?;
        let size = self.cluster.segment_size.bytes();
        let mut stored = BTreeMap::new();
        // Whole ones are sealed again, and found to be there where they are.
        for (segment, _) in
            self.shared.spool.oldest(usize::MAX).into_iter().filter(|(_, length)| *length < size)
        {
            stored.insert(segment, stored_of(&repository, self.cluster, segment).await?);
        }
        Ok(Progress {
            repository,
            keys: Arc::new(KeyRotation::default()),
            stored,
            histories: WaitingHistories::new(),
            spoiled: SpoiledPieces::default(),
            in_flight: Vec::new(),
            last_piece: self.clock.monotonic(),
            last_head: None,
            last_gaps: None,
            first_asked: !self.shared.spool.is_empty(),
            left: None,
        })
    }

    /// Begins with what is due; history files go before any segment of their timelines.
    async fn begin_due(
        &self,
        progress: &mut Progress,
        running: &mut Running,
        stop: Stop,
    ) -> Result<(), Error> {
        // What it fails with holds back nothing but its timeline.
        let histories = self.store_histories(progress).await;
        if histories.as_ref().is_err_and(is_final) {
            return histories;
        }
        self.ask_for_first(progress).await?;
        self.let_leave(progress, stop).await?;
        self.publish(progress);
        for upload in self.plan(progress, stop) {
            self.start(progress, running, Work::Upload(upload));
        }
        if stop == Stop::No {
            self.start_looks(progress, running);
        }
        histories
    }

    /// Begins with what is done now and then.
    fn start_looks(&self, progress: &mut Progress, running: &mut Running) {
        let now = self.clock.monotonic();
        let due = |last: Option<Instant>, interval| {
            last.is_none_or(|last| now.saturating_duration_since(last) >= interval)
        };
        let newest = self.shared.spool.newest().filter(|_| !progress.stored.is_empty());
        if let Some(newest) = newest.filter(|_| due(progress.last_head, HEAD_INTERVAL)) {
            progress.last_head = Some(now);
            self.start(progress, running, Work::Head(newest.timeline()));
        }
        if due(progress.last_gaps, GAPS_INTERVAL) && !self.shared.state().gaps.is_empty() {
            progress.last_gaps = Some(now);
            self.start(progress, running, Work::Gaps);
        }
    }

    fn start(&self, progress: &mut Progress, running: &mut Running, work: Work) {
        progress.in_flight.push(work);
        let sender = Sender {
            shared: self.shared.clone(),
            cluster: self.cluster,
            repository: progress.repository.clone(),
            keys: progress.keys.clone(),
            clock: self.clock.clone(),
            compression: self.compression,
        };
        running.push(Box::pin(async move {
            let result = match work {
                Work::Upload(upload) => sender.send(upload).await,
                Work::Head(timeline) => sender.write_head(timeline).await,
                Work::Gaps => sender.forget_gaps().await,
            };
            (work, result)
        }));
    }

    /// A spool that was lost may begin again within a segment of which there are pieces.
    async fn ask_for_first(&self, progress: &mut Progress) -> Result<(), Error> {
        if progress.first_asked {
            return Ok(());
        }
        let Some((segment, _)) = self.shared.spool.oldest(1).pop() else { return Ok(()) };
        let stored = stored_of(&progress.repository, self.cluster, segment).await?;
        progress.stored.insert(segment, stored);
        progress.first_asked = true;
        Ok(())
    }

    /// Decides what to begin with: one piece and some segments at a time, and one thing for each segment.
    fn plan(&self, progress: &Progress, stop: Stop) -> Vec<Upload> {
        let size = self.cluster.segment_size;
        let segments_max = (SEGMENT_BYTES_MAX / size.bytes() as usize).clamp(1, SEGMENTS_MAX);
        let newest = self.shared.spool.newest();
        let age = self.clock.monotonic().saturating_duration_since(progress.last_piece);
        let rule = PieceRule { at_once: self.rule.at_once || stop != Stop::No, ..self.rule };
        let mut begun: Vec<Upload> = progress.in_flight.iter().filter_map(|work| work.upload()).collect();
        let running = begun.len();
        let hole = self.shared.hole();
        // Where something is missing nothing leaves, and all that is behind it has its turn nevertheless.
        let looked_at = if hole.is_some() { usize::MAX } else { LOOKED_AT_MAX };
        for (segment, length) in self.shared.spool.oldest(looked_at) {
            if self.is_held_back(progress, segment.timeline()) {
                continue;
            }
            let stored = progress.stored.get(&segment).copied().unwrap_or_default();
            let open = newest == Some(segment) || hole.is_some_and(|hole| hole.is_in(segment, size));
            let due = plan_upload((segment, length), stored, age, open, size, rule);
            let is_whole = length == size.bytes();
            let Some(upload) = due.and_then(|upload| progress.spoiled.go_round(upload, is_whole)) else {
                continue;
            };
            let like_it = begun.iter().filter(|other| other.is_piece() == upload.is_piece()).count();
            let room = like_it < if upload.is_piece() { 1 } else { segments_max };
            if room && begun.iter().all(|other| other.segment() != segment) {
                begun.push(upload);
            }
        }
        begun.split_off(running)
    }

    async fn account(&self, progress: &mut Progress, work: Work) -> Result<(), Error> {
        let Work::Upload(upload) = work else { return Ok(()) };
        let size = self.cluster.segment_size.bytes();
        match upload {
            Upload::Piece { segment, to, .. } => {
                progress.last_piece = self.clock.monotonic();
                progress.stored.entry(segment).or_default().bytes = to;
            }
            Upload::Segment(segment) => {
                progress.stored.insert(segment, InStore { bytes: size, whole: true });
            }
        }
        self.publish(progress);
        let stop = *self.stop.borrow();
        self.let_leave(progress, stop).await
    }

    /// Lets segments leave the spool, in order.
    async fn let_leave(&self, progress: &mut Progress, stop: Stop) -> Result<(), Error> {
        let size = self.cluster.segment_size;
        // Looked at first: it gets smaller as the spool gets more.
        let hole = self.shared.hole().filter(|_| stop != Stop::Emptied);
        while let Some((segment, length)) = self.shared.spool.oldest(1).pop() {
            if hole.is_some_and(|hole| hole.holds(segment, length, size)) {
                break;
            }
            let stored = progress.stored.get(&segment).copied().unwrap_or_default();
            let open = stop != Stop::Emptied && self.shared.spool.newest() == Some(segment);
            if !may_leave(length, stored, open, size) {
                break;
            }
            if let Ok(start) = segment.start_lsn(size) {
                let lsn = start + u64::from(length);
                progress.left = Some(Position { timeline: segment.timeline(), lsn });
            }
            let shared = self.shared.clone();
            on_disk(move || shared.spool.remove(segment)).await?;
            progress.stored.remove(&segment);
            progress.spoiled.forget(segment);
        }
        Ok(())
    }

    /// Says how far the store has everything; the receiving half tells the server where commits wait for it.
    fn publish(&self, progress: &Progress) {
        let (hole, size) = (self.shared.hole(), self.cluster.segment_size);
        let is_sure = |segment| hole.is_none_or(|hole| hole.is_behind(segment, size));
        let spooled = self.shared.spool.oldest(LOOKED_AT_MAX).into_iter();
        let spooled = spooled.take_while(|(segment, _)| is_sure(*segment));
        let spooled =
            spooled.map(|(segment, _)| (segment, progress.stored.get(&segment).copied().unwrap_or_default()));
        let durable = durable_in_store(spooled, progress.left, size);
        self.shared.durable.send_if_modified(|known| {
            let changed = durable.is_some() && *known != durable;
            if changed {
                *known = durable;
            }
            changed
        });
    }
}

impl Work {
    fn upload(self) -> Option<Upload> {
        match self {
            Self::Upload(upload) => Some(upload),
            Self::Head(_) | Self::Gaps => None,
        }
    }
}

/// What one thing on its way needs.
struct Sender {
    shared: Arc<Shared>,
    cluster: ClusterId,
    repository: Repository,
    keys: Arc<KeyRotation>,
    clock: Arc<dyn Clock>,
    compression: Compression,
}

impl Sender {
    /// Stores a segment or a piece; one that is there already is compared. A segment goes beside one that is damaged or
    /// that nobody trusted has signed, or claims a newer format, as by `wal check --repair`: nothing behind it leaves the
    /// spool before.
    async fn send(self, upload: Upload) -> Result<(), Error> {
        let (cluster, compression) = (self.cluster, self.compression);
        let (segment, range) = match upload {
            Upload::Segment(segment) => (segment, 0..cluster.segment_size.bytes()),
            Upload::Piece { segment, from, to } => (segment, from..to),
        };
        let key = self.keys.next(self.repository.keyring(), &*self.clock)?;
        let (shared, repository, sealing) = (self.shared.clone(), self.repository.clone(), key.clone());
        // Not on the threads that tell the server where it may go on.
        let prepared = tokio::task::spawn_blocking(move || {
            let bytes = Bytes::from(shared.spool.read(segment, range.clone())?);
            let name = match upload {
                Upload::Piece { segment, from, to } => WalObjectName::Piece { segment, from, to },
                Upload::Segment(segment) => {
                    let front = &bytes[..bytes.len().min(SEGMENT_HEADER_LEN)];
                    let expected = (cluster.system_identifier, cluster.segment_size);
                    check_segment_header(front, bytes.len() as u64, segment, expected)?;
                    WalObjectName::Segment(segment)
                }
            };
            let content = RawContent::from(bytes);
            Ok::<_, Error>((seal_wal(&repository, cluster, name, &content, &sealing, compression)?, content))
        });
        let (sealed, content) =
            prepared.await.map_err(|error| repo::Error::Internal(error.to_string()))??;
        let Stored::Taken(place) = sealed.store(&self.repository).await? else { return Ok(()) };
        match (place.compare(&self.repository, &content).await, upload) {
            (Err(error), Upload::Segment(segment)) if error.is_unusable() => {
                tracing::error!("{error}; segment {segment} is archived beside it");
                let (repository, replace) = (&self.repository, Replace::Damaged);
                supersede_wal(repository, cluster, segment, replace, &content, &key, compression).await?;
            }
            (compared, _) => {
                compared?;
            }
        }
        Ok(())
    }

    /// Notes in the store how far the archive reaches; a failure is for the next time.
    async fn write_head(self, timeline: TimelineId) -> Result<(), Error> {
        head::keep(&self.repository, self.cluster, timeline).await;
        Ok(())
    }

    /// Forgets the gaps that a basebackup lies behind; a failure is for the next time.
    async fn forget_gaps(self) -> Result<(), Error> {
        let listed = match basebackups::list(&self.repository).await {
            Ok(listed) => listed.complete,
            Err(error) => {
                tracing::warn!("whether the WAL that is missing still matters could not be seen: {error}");
                return Ok(());
            }
        };
        let starts: Vec<_> = listed.iter().map(|listed| RecoveryStart::of(&listed.record)).collect();
        self.shared.state().gaps.retain(|gap| {
            let told = !starts.iter().any(|start| gap.lies_before(start));
            if !told {
                tracing::info!("the WAL missing from {} to {} lies before a basebackup", gap.from, gap.to);
            }
            told
        });
        Ok(())
    }
}

/// Returns how much the store has of a segment that can be used: what the spool lets go by that may be the only copy.
async fn stored_of(
    repository: &Repository,
    cluster: ClusterId,
    segment: WalSegmentName,
) -> Result<InStore, Error> {
    let stored = |bytes| Ok(InStore { bytes, whole: false });
    match verify_wal(repository, cluster, WalObjectName::Segment(segment)).await {
        // The one that is received is still to come, and is compared then.
        Ok(_) => return stored(cluster.segment_size.bytes()),
        Err(error) if error.is_absent() => {}
        Err(error) if error.may_pass() => return Err(error.into()),
        // It is stored again, and what stands in its place is dealt with then.
        Err(error) => tracing::warn!("{error}"),
    }
    match verified_reach(repository, cluster, segment).await {
        Err(error) if error.may_pass() => Err(error.into()),
        Err(error) => {
            tracing::warn!("{error}");
            stored(0)
        }
        Ok(reach) => stored(reach),
    }
}

fn trouble_of(error: &Error) -> String {
    format!("WAL cannot be stored and stays in the spool: {error}")
}

/// Tells what no later attempt mends: the archive holds something else, or is somebody else's; or the spool has lost what
/// it held, and its next start tells what that is.
fn is_final(error: &Error) -> bool {
    match error {
        Error::Repository(error) => {
            matches!(error, repo::Error::Different { .. } | repo::Error::ForeignCluster { .. })
        }
        Error::Segment(_) | Error::Disk(disk::Error::Malformed { .. }) => true,
        _ => false,
    }
}

#[cfg(test)]
mod tests;
