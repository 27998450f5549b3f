//! Which WAL is in the archive: for each timeline the segments that stand there, as runs of neighbours.
//!
//! Found by listing names alone: whether a segment is whole is told when it is read. A run that ends before the
//! next begins is a hole. Segments past a switch point and partial segments are listed and never counted as
//! *later* by those who ask whether something is missing; pieces are, and so is the newest head, which are both
//! proof that WAL was written.

use std::collections::BTreeMap;
use std::ops::RangeInclusive;

use futures::{StreamExt, TryStreamExt};
use jiff::Timestamp;

use crate::pg::{Lsn, TimelineId, WalSegmentName, WalSegmentNumber, WalSegmentSize};
use crate::repo::forced_index::ForcedListing;
use crate::repo::layout::{ObjectName, WalObjectName};
use crate::repo::wal_object::newest_head;
use crate::repo::wal_piece::PieceReach;
use crate::repo::{ClusterId, Error, Repository};
use crate::storage::ObjectMeta;

/// The segments of one timeline.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct TimelineCoverage {
    /// First and last segment of each run, ascending.
    runs: Vec<(WalSegmentNumber, WalSegmentNumber)>,
    /// Segments that exist as `.partial`; one may be there more than once.
    pub partials: Vec<WalSegmentName>,
    /// Segments of which there are pieces alone, and how far those reach; where they are all of it, the segment counts
    /// as there.
    pub pieces: BTreeMap<WalSegmentNumber, PieceReach>,
    /// The position that the archive had reached when its newest head was written, where that was asked for.
    pub head: Option<Lsn>,
    /// Segments that another object supersedes.
    pub forced: Vec<WalSegmentName>,
    /// Bytes of all objects that were listed, as stored.
    pub stored_bytes: u64,
    /// When the last of its segments or pieces came, by the store's clock.
    pub newest_at: Option<Timestamp>,
}

/// The segments of a cluster.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct WalCoverage {
    /// By timeline.
    pub timelines: BTreeMap<TimelineId, TimelineCoverage>,
}

/// Keys asked for at a time, as many as S3 gives.
const PAGE: usize = 1000;
/// Timelines listed at a time.
const LISTINGS_MAX: usize = 8;

impl TimelineCoverage {
    /// Adds a segment, which is not before any that was added.
    pub fn push(&mut self, number: WalSegmentNumber) {
        match self.runs.last_mut() {
            Some((_, last)) if *last == number => {}
            Some((_, last)) if last.next() == number => *last = number,
            _ => self.runs.push((number, number)),
        }
    }

    /// Adds neighbouring segments that stand anywhere among the others.
    pub fn insert(&mut self, first: WalSegmentNumber, last: WalSegmentNumber) {
        let mut runs = std::mem::take(&mut self.runs);
        runs.push((first, last));
        runs.sort_unstable();
        for (from, to) in runs {
            match self.runs.last_mut() {
                Some((_, end)) if from <= end.next() => *end = to.max(*end),
                _ => self.runs.push((from, to)),
            }
        }
        self.pieces.retain(|number, _| !(first..=last).contains(number));
    }

    /// Returns the runs, ascending.
    pub fn runs(&self) -> &[(WalSegmentNumber, WalSegmentNumber)] {
        &self.runs
    }

    /// Returns first and last segment of what is missing between each run and the next.
    pub fn holes(&self) -> Vec<(WalSegmentNumber, WalSegmentNumber)> {
        let between = |pair: &[(WalSegmentNumber, WalSegmentNumber)]| {
            (pair[0].1.next(), WalSegmentNumber(pair[1].0.0 - 1))
        };
        self.runs.windows(2).map(between).collect()
    }

    /// Adds a piece of a segment; segments and pieces come in the order of their names.
    pub fn push_piece(&mut self, number: WalSegmentNumber, from: u32, to: u32, size: WalSegmentSize) {
        if self.last() == Some(number) {
            return;
        }
        let reach = self.pieces.entry(number).or_default();
        reach.add(from, to);
        if reach.contiguous >= size.bytes() {
            self.pieces.remove(&number);
            self.push(number);
        }
    }

    /// Returns the position behind the last byte that anything here proves to have been archived.
    pub fn proven_end(&self, size: WalSegmentSize) -> Lsn {
        let whole = self.last().map(|last| last.next().start_lsn(size));
        let pieces = self.pieces.last_key_value();
        let pieces = pieces.map(|(number, reach)| number.start_lsn(size) + u64::from(reach.furthest));
        whole.max(pieces).max(self.head).unwrap_or(Lsn::ZERO)
    }

    /// Returns how many segments there are.
    pub fn segments(&self) -> u64 {
        self.runs.iter().map(|(first, last)| last.0 - first.0 + 1).sum()
    }

    /// Returns the newest segment.
    pub fn last(&self) -> Option<WalSegmentNumber> {
        self.runs.last().map(|(_, last)| *last)
    }

    /// Returns whether a segment is there.
    pub fn contains(&self, number: WalSegmentNumber) -> bool {
        self.runs.iter().any(|(first, last)| (*first..=*last).contains(&number))
    }

    /// Returns the first segment of `first..=last` that is not there.
    pub fn first_missing(&self, first: WalSegmentNumber, last: WalSegmentNumber) -> Option<WalSegmentNumber> {
        let mut wanted = first;
        for (from, to) in &self.runs {
            if wanted > last || *from > wanted {
                break;
            }
            if *to >= wanted {
                wanted = to.next();
            }
        }
        (wanted <= last).then_some(wanted)
    }
}

impl WalCoverage {
    /// Lists one timeline from the log of `from` on.
    pub async fn load_timeline(
        repository: &Repository,
        cluster: ClusterId,
        timeline: TimelineId,
        from: WalSegmentNumber,
    ) -> Result<TimelineCoverage, Error> {
        let all = from..=WalSegmentNumber(u64::MAX);
        Self::load_segments(repository, cluster, timeline, all).await
    }

    /// Lists one timeline from the first of `wanted` on, at least as far as the last.
    pub async fn load_segments(
        repository: &Repository,
        cluster: ClusterId,
        timeline: TimelineId,
        wanted: RangeInclusive<WalSegmentNumber>,
    ) -> Result<TimelineCoverage, Error> {
        let from = *wanted.start();
        let listed_at = repository.clock().monotonic();
        let layout = repository.layout();
        let size = cluster.segment_size;
        let mut coverage = TimelineCoverage::default();
        let prefix = layout.wal_timeline(cluster, timeline);
        // The key just before the first wanted one in the order of listing; it need not exist.
        let mut after = (from.0 > 0).then(|| {
            let before = WalSegmentName::new(timeline, WalSegmentNumber(from.0 - 1), size);
            layout.wal_object(cluster, WalObjectName::Segment(before))
        });
        loop {
            let page = repository.store().list(&prefix, after.as_ref(), PAGE).await?;
            for object in &page {
                if let Some(ObjectName::Wal(_, name)) = layout.parse(&object.key) {
                    coverage.take(name, object, size);
                }
            }
            if page.len() < PAGE || coverage.last() >= Some(*wanted.end()) {
                if let Some(last) = coverage.last() {
                    let name = |number| WalSegmentName::new(timeline, number, size);
                    repository.forced_index().note(ForcedListing {
                        cluster,
                        timeline,
                        segments: name(from)..=name(last),
                        but_last: page.len() == PAGE,
                        forced: coverage.forced.clone(),
                        listed_at: Some(listed_at),
                    });
                }
                return Ok(coverage);
            }
            after = page.last().map(|object| object.key.clone());
        }
    }

    /// Lists every timeline of a cluster.
    pub async fn load(repository: &Repository, cluster: ClusterId) -> Result<Self, Error> {
        let timelines = list_timelines(repository, cluster).await?;
        Self::load_timelines(repository, cluster, timelines, WalSegmentNumber(0)).await
    }

    /// Lists these timelines from the log of `from` on, with their heads, some of them at a time.
    pub async fn load_timelines(
        repository: &Repository,
        cluster: ClusterId,
        timelines: impl IntoIterator<Item = TimelineId>,
        from: WalSegmentNumber,
    ) -> Result<Self, Error> {
        let listings = timelines.into_iter().map(|timeline| async move {
            // First the head: all that one speaks of stands in a listing that begins later.
            let head = newest_head(repository, cluster, timeline).await?.map(|head| head.end);
            let coverage = Self::load_timeline(repository, cluster, timeline, from).await?;
            Ok::<_, Error>((timeline, TimelineCoverage { head, ..coverage }))
        });
        let timelines = futures::stream::iter(listings).buffered(LISTINGS_MAX).try_collect().await?;
        Ok(Self { timelines })
    }
}

impl TimelineCoverage {
    fn take(&mut self, name: WalObjectName, object: &ObjectMeta, size: WalSegmentSize) {
        self.stored_bytes += object.size;
        match name {
            WalObjectName::Segment(segment) => {
                let Ok(number) = segment.number(size) else { return };
                self.push(number);
                self.newest_at = self.newest_at.max(Some(object.last_modified));
            }
            WalObjectName::Partial { segment, .. } => self.partials.push(segment),
            WalObjectName::Piece { segment, from, to } => {
                let Ok(number) = segment.number(size) else { return };
                self.push_piece(number, from, to, size);
                self.newest_at = self.newest_at.max(Some(object.last_modified));
            }
            WalObjectName::Forced { segment, .. } => {
                let Ok(number) = segment.number(size) else { return };
                self.push(number);
                self.pieces.remove(&number);
                self.newest_at = self.newest_at.max(Some(object.last_modified));
                if self.forced.last() != Some(&segment) {
                    self.forced.push(segment);
                }
            }
            // Parts are nothing without the index, which stands under the segment's own name.
            WalObjectName::BackupHistory { .. } | WalObjectName::Part { .. } => {}
        }
    }
}

/// Lists the timelines of which there is WAL.
pub async fn list_timelines(repository: &Repository, cluster: ClusterId) -> Result<Vec<TimelineId>, Error> {
    let layout = repository.layout();
    let prefix = layout.wal(cluster);
    let folder = repository.store().list_folder(&prefix).await?;
    let timeline_of = |name: &String| layout.parse_timeline_folder(cluster, &format!("{prefix}{name}"));
    Ok(folder.folders.iter().filter_map(timeline_of).collect())
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn what_is_inserted_is_there_and_runs_stay_apart(
            numbers in proptest::collection::btree_set(0u64..60, 0..30), from in 0u64..60, len in 0u64..20,
        ) {
            let mut coverage = TimelineCoverage::default();
            numbers.iter().for_each(|number| coverage.push(WalSegmentNumber(*number)));
            coverage.insert(WalSegmentNumber(from), WalSegmentNumber(from + len));
            let mut model: BTreeSet<u64> = numbers;
            model.extend(from..=from + len);
            let found: Vec<u64> = coverage.runs().iter().flat_map(|(first, last)| first.0..=last.0).collect();
            prop_assert_eq!(found, model.into_iter().collect::<Vec<_>>());
            prop_assert!(coverage.runs().windows(2).all(|pair| pair[0].1.next() < pair[1].0));
        }

        #[test]
        fn runs_answer_as_a_set_would(numbers in proptest::collection::btree_set(0u64..60, 0..40), from in 0u64..60, len in 0u64..20) {
            let mut coverage = TimelineCoverage::default();
            numbers.iter().for_each(|number| coverage.push(WalSegmentNumber(*number)));
            let model: BTreeSet<u64> = numbers;
            let missing = (from..=from + len).find(|number| !model.contains(number));
            let (first, last) = (WalSegmentNumber(from), WalSegmentNumber(from + len));
            prop_assert_eq!(coverage.first_missing(first, last), missing.map(WalSegmentNumber));
            prop_assert_eq!(coverage.last(), model.last().copied().map(WalSegmentNumber));
            prop_assert_eq!(coverage.contains(first), model.contains(&from));
            prop_assert_eq!(coverage.segments(), model.len() as u64);
            let holes = coverage.holes().into_iter().flat_map(|(first, last)| first.0..=last.0);
            let last = model.last().copied().unwrap_or_default();
            let missing = (0..last).filter(|number| model.first() < Some(number) && !model.contains(number));
            prop_assert!(holes.eq(missing));
        }
    }
}
