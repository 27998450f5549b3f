//! Finds out from the WAL of a window whether a target lies in it.
//!
//! A time from the end of the window backward, because a server stops at a time only where it sees a later transaction
//! end. A transaction or a restore point from its beginning forward, because the server stops at the first that it
//! meets; how much is read for that has a bound, and behind it the server decides: it errs by FATAL, never by promoting.

use std::ops::ControlFlow;

use jiff::Timestamp;

use crate::catalog::recovery_decision::TargetPlace;
use crate::catalog::recovery_target::{RecoveryTarget, Target};
use crate::catalog::recovery_window::RecoveryWindow;
use crate::catalog::wal_records::{
    LastTransaction, is_reached, last_transaction, last_transaction_before_stop, segments_of, visit_records,
};
use crate::pg::{Lsn, TimelineId, WalSegmentNumber};
use crate::repo::{self, ClusterId, Repository};

/// WAL in which a target was looked for in vain: everything from a position on, on the way to a timeline.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Searched {
    /// The timeline that the way leads to.
    pub timeline: TimelineId,
    /// Where the search began.
    pub from: Lsn,
}

/// Segments at the end of a window among which a transaction is looked for. Recovery reads them all anyway; an idle server
/// that archives every minute fills four hours with so many.
const SEGMENTS_BACK_MAX: usize = 256;
/// Segments from the beginning of a window among which a transaction or a restore point is looked for: 4 GiB of WAL are
/// a minute of reading, and less than what recovery is about to replay.
pub const SEGMENTS_FORWARD_MAX: usize = 256;

/// Reads as much of a window as it takes to say where a target lies; not again what has been searched.
pub async fn place_by_reading(
    repository: &Repository,
    cluster: ClusterId,
    window: &RecoveryWindow,
    target: &RecoveryTarget,
    searched: Option<Searched>,
) -> Result<TargetPlace, repo::Error> {
    if let Target::Time(time) = target.target {
        let last = last_transaction(repository, cluster, window, SEGMENTS_BACK_MAX).await?;
        let place = place_of_time(last, time, target.inclusive);
        if matches!(place, TargetPlace::Behind(_)) {
            return Ok(place);
        }
        // When the basebackup stopped is known by the clock of the server it was taken from, which for a standby is not the
        // one that dates transactions.
        let before = last_transaction_before_stop(repository, cluster, window, SEGMENTS_BACK_MAX).await?;
        return Ok(match before {
            LastTransaction::EndedAt(ended) if stops_at(ended, time, target.inclusive) => {
                TargetPlace::TooEarly(Some(ended))
            }
            _ => place,
        });
    }
    let size = cluster.segment_size;
    let mut segments = segments_of(window.stretches(), size);
    let mut start = window.start.start_lsn;
    if let (Target::Lsn(_), Some(ending)) = (&target.target, window.ending) {
        // By its position it lies in the last segment, if that goes so far.
        segments.retain(|part| part.name == ending.segment);
        start = ending.segment.start_lsn(size).map_or(start, |begin| start.max(begin));
    }
    if let Some(Searched { from, .. }) = searched.filter(|searched| searched.timeline == window.timeline) {
        // A record that begins before the position may end in its segment.
        let last = WalSegmentNumber::containing(from, size);
        segments.retain(|part| part.name.number(size).is_ok_and(|number| number <= last));
    }
    let is_all = segments.len() <= SEGMENTS_FORWARD_MAX;
    segments.truncate(SEGMENTS_FORWARD_MAX);
    let mut found = None;
    let visit = |lsn, payload| {
        if is_reached(&target.target, lsn, &payload) {
            found = Some(lsn);
            return ControlFlow::Break(());
        }
        ControlFlow::Continue(())
    };
    visit_records(repository, cluster, segments, start, visit).await?;
    Ok(match found {
        Some(lsn) if lsn < window.start.stop_lsn => TargetPlace::TooEarly(None),
        Some(_) => TargetPlace::Within,
        None if is_all => TargetPlace::Behind(None),
        None => TargetPlace::Unproven,
    })
}

/// Whether the server stops at a target time when it sees a transaction that ended then.
fn stops_at(ended: Timestamp, time: Timestamp, inclusive: bool) -> bool {
    ended > time || (ended == time && !inclusive)
}

/// The server stops at a time only where it sees a transaction that ended later, or then where the target is
/// exclusive; where it sees none it ends FATAL (failure 26).
fn place_of_time(last: LastTransaction, time: Timestamp, inclusive: bool) -> TargetPlace {
    match last {
        LastTransaction::EndedAt(ended) if stops_at(ended, time, inclusive) => TargetPlace::Within,
        LastTransaction::EndedAt(ended) => TargetPlace::Behind(Some(ended)),
        LastTransaction::None => TargetPlace::Behind(None),
        LastTransaction::NotNear => TargetPlace::Unproven,
    }
}
