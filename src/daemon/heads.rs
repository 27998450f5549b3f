//! Which timelines of a site have got WAL since their last head, and when the next one is due.
//!
//! A segment that is archived makes its timeline wait for a head; the job that writes them is the site's. Whether one is
//! due is asked of the host's notes, which commands share, and not before that can have changed. Deliberately absent: a
//! head at the daemon's end, which a store that is away would hold up; the first one after it says the same.

use std::collections::BTreeMap;
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use tokio::sync::Notify;

use crate::clock::Clock;
use crate::pg::{ArchiveFileName, TimelineId};
use crate::repo::ClusterId;
use crate::wal::head_notes::{HEAD_INTERVAL, HeadNotes, Turn};

/// The timelines of a site.
#[derive(Debug)]
pub(super) struct Heads {
    /// `None`: this host remembers nothing, and no head is written.
    notes: Option<HeadNotes>,
    timelines: Mutex<BTreeMap<(ClusterId, TimelineId), Timeline>>,
    archived: Notify,
}

/// What is known of one.
#[derive(Debug, Default)]
struct Timeline {
    /// Whether WAL was archived since the last head.
    waits: bool,
    /// Before this nothing is due; `None`: it was not asked yet.
    not_before: Option<Instant>,
}

/// How often it is looked whether something has become due, while nothing is archived.
const LOOK_EVERY: Duration = Duration::from_secs(60);

impl Heads {
    pub(super) fn new(notes: Option<HeadNotes>) -> Self {
        Self { notes, timelines: Mutex::default(), archived: Notify::new() }
    }

    /// Takes note that the archive has a file; only segments say how far it reaches.
    pub(super) fn archived(&self, cluster: ClusterId, name: ArchiveFileName) {
        if let ArchiveFileName::Segment(segment) = name {
            self.wait_for_next(cluster, segment.timeline());
            self.archived.notify_one();
        }
    }

    /// Has a timeline wait for the next head, where one could not be written.
    pub(super) fn wait_for_next(&self, cluster: ClusterId, timeline: TimelineId) {
        self.change(cluster, timeline, |known| known.waits = true);
    }

    /// Waits until a head is due, and returns of which timeline; whoever is told so has to write it.
    pub(super) async fn due(&self, clock: &dyn Clock) -> (ClusterId, TimelineId) {
        loop {
            if let Some(due) = self.look(clock).await {
                return due;
            }
            tokio::select! {
                () = self.archived.notified() => {}
                () = tokio::time::sleep(LOOK_EVERY) => {}
            }
        }
    }

    /// Looks whether a head is due.
    async fn look(&self, clock: &dyn Clock) -> Option<(ClusterId, TimelineId)> {
        let now = clock.monotonic();
        for (cluster, timeline) in self.to_ask(now) {
            let (notes, wall) = (self.notes.clone()?, clock.now());
            let turn = tokio::task::spawn_blocking(move || notes.take_turn(cluster, timeline, wall)).await;
            let wait = match turn {
                Ok(Ok(Turn::Now)) => {
                    let not_before = Some(now + HEAD_INTERVAL);
                    self.change(cluster, timeline, |known| *known = Timeline { waits: false, not_before });
                    return Some((cluster, timeline));
                }
                Ok(Ok(Turn::In(wait))) => wait,
                Ok(Err(error)) => {
                    tracing::warn!("it cannot be told whether a head of timeline {timeline} is due: {error}");
                    HEAD_INTERVAL
                }
                Err(_) => HEAD_INTERVAL,
            };
            self.change(cluster, timeline, |known| known.not_before = Some(now + wait));
        }
        None
    }

    /// Lists the timelines that wait, and of which one may be due.
    fn to_ask(&self, now: Instant) -> Vec<(ClusterId, TimelineId)> {
        let timelines = self.timelines.lock().unwrap_or_else(PoisonError::into_inner);
        let may_be_due = |known: &Timeline| known.waits && known.not_before.is_none_or(|begin| begin <= now);
        timelines.iter().filter(|(_, known)| may_be_due(known)).map(|(timeline, _)| *timeline).collect()
    }

    fn change(&self, cluster: ClusterId, timeline: TimelineId, change: impl FnOnce(&mut Timeline)) {
        let mut timelines = self.timelines.lock().unwrap_or_else(PoisonError::into_inner);
        change(timelines.entry((cluster, timeline)).or_default());
    }
}

#[cfg(test)]
mod tests {
    use crate::clock::ManualClock;
    use crate::disk::Owner;

    use super::*;

    fn cluster() -> ClusterId {
        "7301234567890123456-16".parse().unwrap()
    }

    fn clock() -> ManualClock {
        ManualClock::new("2026-11-21T10:00:00Z".parse().unwrap())
    }

    #[tokio::test]
    async fn a_head_is_due_for_what_was_archived_once_in_an_interval() {
        let folder = tempfile::tempdir().unwrap();
        let notes = HeadNotes::of(folder.path(), Owner::current(), "main");
        let (heads, clock) = (Heads::new(Some(notes.clone())), clock());
        let archived = |name: &str| heads.archived(cluster(), name.parse().unwrap());
        let due = Some((cluster(), TimelineId::FIRST));
        assert_eq!(heads.look(&clock).await, None, "nothing was archived");
        archived("000000010000000000000002");
        assert_eq!(heads.look(&clock).await, None, "the interval has just begun");
        clock.advance(HEAD_INTERVAL);
        assert_eq!(heads.look(&clock).await, due);
        clock.advance(HEAD_INTERVAL);
        assert_eq!(heads.look(&clock).await, None, "nothing was archived since");
        archived("00000002.history");
        assert_eq!(heads.look(&clock).await, None, "a history is no WAL");
        archived("000000010000000000000003");
        assert_eq!(heads.look(&clock).await, due);
        // The store was away.
        heads.wait_for_next(cluster(), TimelineId::FIRST);
        assert_eq!(heads.look(&clock).await, None);
        clock.advance(HEAD_INTERVAL);
        // A command was faster.
        let turn = notes.take_turn(cluster(), TimelineId::FIRST, clock.now()).unwrap();
        assert_eq!((turn, heads.look(&clock).await), (Turn::Now, None));
        clock.advance(HEAD_INTERVAL);
        assert_eq!(heads.look(&clock).await, due);
    }

    #[tokio::test]
    async fn whoever_waits_is_told_when_a_segment_comes_and_without_notes_never() {
        let folder = tempfile::tempdir().unwrap();
        let notes = HeadNotes::of(folder.path(), Owner::current(), "main");
        let clock = clock();
        notes.take_turn(cluster(), TimelineId::FIRST, clock.now()).unwrap();
        clock.advance(HEAD_INTERVAL);
        let (heads, without) = (Heads::new(Some(notes)), Heads::new(None));
        let name: ArchiveFileName = "000000010000000000000002".parse().unwrap();
        let archived = async {
            // The other one waits by now.
            tokio::task::yield_now().await;
            heads.archived(cluster(), name);
        };
        let (due, ()) = tokio::join!(heads.due(&clock), archived);
        assert_eq!(due, (cluster(), TimelineId::FIRST));
        without.archived(cluster(), name);
        assert_eq!(without.look(&clock).await, None);
    }
}
