//! What is missing within the spool: a disk that lost what was synced, or a gap of before that the spool has not left yet.
//!
//! It is asked for again, the oldest first, and put where it belongs; until then nothing behind it counts as stored, and
//! what is before it stays, because only the segments around a hole tell of it. What is spooled behind it goes to the
//! store meanwhile. Where no server has it any more and the archive lacks it, it is told as a gap.

use std::collections::VecDeque;
use std::sync::{Mutex, MutexGuard};

use crate::catalog::WalCoverage;
use crate::pg::{Lsn, WalSegmentName, WalSegmentNumber, WalSegmentSize};
use crate::wal::Error;
use crate::wal::receive::Receiver;
use crate::wal::receive::resume::holes_of;
use crate::wal::receive::state::Shared;
use crate::wal::spool::{Position, Spool};

/// WAL that the spool lacks, with some behind it on the same timeline that it has.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct SpoolHole {
    pub from: Position,
    /// Where a segment begins.
    pub to: Lsn,
}

/// Those that were found when the spool was opened, the oldest first.
#[derive(Debug)]
pub(super) struct SpoolHoles(Mutex<VecDeque<SpoolHole>>);

impl SpoolHoles {
    /// Finds them.
    pub fn of(spool: &Spool) -> Self {
        let holes = spool.holes().into_iter().map(|(from, to)| SpoolHole { from, to });
        Self(Mutex::new(holes.collect()))
    }

    fn lock(&self) -> MutexGuard<'_, VecDeque<SpoolHole>> {
        self.0.lock().expect("no holder of this lock panics")
    }
}

impl SpoolHole {
    /// Returns whether a segment begins before it.
    pub fn is_behind(&self, segment: WalSegmentName, size: WalSegmentSize) -> bool {
        end_of(segment, 0, size).is_some_and(|start| start < self.from)
    }

    /// Returns whether it begins within a segment.
    pub fn is_in(&self, segment: WalSegmentName, size: WalSegmentSize) -> bool {
        segment == WalSegmentName::containing(self.from.timeline, self.from.lsn, size)
    }

    /// Returns whether a segment of which there are so many bytes has to stay for it.
    pub fn holds(&self, segment: WalSegmentName, length: u32, size: WalSegmentSize) -> bool {
        end_of(segment, length, size).is_some_and(|end| end >= self.from)
    }
}

fn end_of(segment: WalSegmentName, length: u32, size: WalSegmentSize) -> Option<Position> {
    let start = segment.start_lsn(size).ok()?;
    Some(Position { timeline: segment.timeline(), lsn: start + u64::from(length) })
}

impl Shared {
    /// Returns what is missing first within the spool, and not given up.
    pub fn hole(&self) -> Option<SpoolHole> {
        let mut holes = self.holes.lock();
        while let Some(hole) = holes.front_mut() {
            hole.from.lsn = self.spool.reach(hole.from, hole.to);
            if hole.from.lsn < hole.to {
                return Some(*hole);
            }
            holes.pop_front();
        }
        None
    }

    /// Takes a hole for lost: what is behind it counts.
    pub fn give_up_hole(&self, lost: SpoolHole) {
        self.holes.lock().retain(|hole| hole.to != lost.to || hole.from.timeline != lost.from.timeline);
        self.spooled.notify_one();
    }
}

impl Receiver<'_> {
    /// Returns from where WAL is wanted next: what is missing within the spool goes before what follows it.
    pub(super) fn wanted(&self) -> Option<Position> {
        self.shared.hole().map(|hole| hole.from).or(self.here)
    }

    /// Lists what the archive lacks of a hole; all of it while the repository could not be opened.
    pub(super) async fn missing_of(&self, hole: SpoolHole) -> Result<Vec<(Lsn, Lsn)>, Error> {
        let repository = self.shared.repository.borrow().clone();
        let Some(repository) = repository else { return Ok(vec![(hole.from.lsn, hole.to)]) };
        let (timeline, size) = (hole.from.timeline, self.size());
        let first = WalSegmentNumber::containing(hole.from.lsn, size);
        let until = WalSegmentNumber::containing(hole.to, size);
        let segments = first..=WalSegmentNumber(until.0 - 1);
        let held = WalCoverage::load_segments(&repository, self.cluster, timeline, segments).await?;
        let missing = holes_of(timeline, &held, first, until, size).into_iter();
        Ok(missing.map(|missing| (missing.at.stored.max(hole.from.lsn), missing.to)).collect())
    }

    /// Goes on without what is missing of a hole, which is told.
    pub(super) async fn give_up_spooled(&self, hole: SpoolHole, missing: &[(Lsn, Lsn)]) {
        for (from, to) in missing {
            self.tell_gap(Position { lsn: *from, ..hole.from }, *to).await;
        }
        self.shared.give_up_hole(hole);
    }

    /// The same for all that is missing within the spool: its cluster is gone.
    pub(super) async fn give_up_all_spooled(&self) {
        while let Some(hole) = self.shared.hole() {
            self.give_up_spooled(hole, &[(hole.from.lsn, hole.to)]).await;
        }
    }
}
