//! Timelines' history files on their way to the store: each goes before any segment of its timeline.
//!
//! One that cannot be stored holds back its own timeline. Where it is none, or something stands in its place that is
//! damaged, or that nobody signed who is trusted, not even that: no waiting mends it, and without the WAL more would be
//! lost than one small file. It is told, and tried again now and then, so that it is stored once the other one is gone.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use crate::pg::{TimelineHistory, TimelineId};
use crate::repo::wal_object::{HistoryBranch, archive_history};
use crate::wal::Error;
use crate::wal::receive::disk_work::on_disk;
use crate::wal::receive::state::{clear, note};
use crate::wal::receive::upload::spoiled::is_unusable;
use crate::wal::receive::upload::{Progress, Uploader, is_final, trouble_of};

/// A history file that could not be stored.
#[derive(Debug)]
pub(super) struct Waiting {
    /// Why, as it is told.
    message: String,
    /// Whether no waiting helps: it is no history, or what stands in its place is of no use to anybody.
    is_blocked: bool,
    /// When it is tried again.
    again: Instant,
}

/// Those that could not be stored, by timeline.
pub(super) type WaitingHistories = BTreeMap<TimelineId, Waiting>;

/// Between attempts at a store that fails.
const PAUSE: Duration = Duration::from_secs(2);
/// Between looks at what only a person removes.
const BLOCKED_PAUSE: Duration = Duration::from_secs(5 * 60);

impl Uploader {
    /// Archives the history files that wait, as far as they can be.
    ///
    /// # Errors
    /// The first that a later attempt may mend, after the others were tried; at once what contradicts the archive.
    pub(super) async fn store_histories(&self, progress: &mut Progress) -> Result<(), Error> {
        let mut failure = None;
        for (timeline, content) in self.shared.spool.histories() {
            let now = self.clock.monotonic();
            if progress.histories.get(&timeline).is_some_and(|waiting| now < waiting.again) {
                continue;
            }
            let error = match self.store_history(progress, timeline, &content).await {
                Ok(()) => {
                    let shared = self.shared.clone();
                    on_disk(move || shared.spool.remove_history(timeline)).await?;
                    if progress.histories.remove(&timeline).is_some() {
                        let what = format!("the history of timeline {timeline} is stored");
                        clear(&mut self.shared.state().store_problem, &what);
                    }
                    continue;
                }
                Err(error) if is_final(&error) => return Err(error),
                Err(error) => error,
            };
            let is_blocked = is_unusable(&error) || matches!(error, Error::History(_));
            let message = if is_blocked {
                format!("timeline {timeline} is stored without its history, which cannot be: {error}")
            } else {
                trouble_of(&error)
            };
            note(&mut self.shared.state().store_problem, message.clone(), self.clock.now());
            let again = now + if is_blocked { BLOCKED_PAUSE } else { PAUSE };
            progress.histories.insert(timeline, Waiting { message, is_blocked, again });
            if !is_blocked {
                failure.get_or_insert(error);
            }
        }
        failure.map_or(Ok(()), Err)
    }

    async fn store_history(
        &self,
        progress: &Progress,
        timeline: TimelineId,
        content: &[u8],
    ) -> Result<(), Error> {
        let history = TimelineHistory::parse(timeline, &String::from_utf8_lossy(content))?;
        let parent = history.parent();
        let branch = HistoryBranch { parent: parent.timeline, switch: parent.lsn };
        let repository = &progress.repository;
        let key = progress.keys.next(repository.keyring(), &*self.clock)?;
        archive_history(repository, self.cluster, timeline, branch, content, &key).await?;
        Ok(())
    }

    /// Tells whether segments of a timeline have to wait for its history.
    pub(super) fn is_held_back(&self, progress: &Progress, timeline: TimelineId) -> bool {
        let is_blocked = progress.histories.get(&timeline).is_some_and(|waiting| waiting.is_blocked);
        !is_blocked && self.shared.spool.has_history(timeline)
    }

    /// Tells that WAL is stored again, or else why a history is not, or what was found in the store.
    pub(super) fn tell_stored(&self, progress: &Progress) {
        let mut state = self.shared.state();
        let history = progress.histories.values().next().map(|waiting| waiting.message.as_str());
        match history.or(progress.spoiled.message()) {
            Some(message) => note(&mut state.store_problem, message.to_owned(), self.clock.now()),
            None => clear(&mut state.store_problem, "WAL is stored again"),
        }
    }
}
