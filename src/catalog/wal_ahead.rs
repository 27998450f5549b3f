//! Reads WAL segments ahead of whoever reads them in order: a recovery, a standby, a copy from the mount.
//!
//! What comes next is told by the recovery's plan, across timelines; where no plan has an end, by what the archive
//! lists on the segment's own timeline, up to the first that is not there. It is a guess, and only costs when it is
//! wrong: nothing is answered from here, and no order of requests is assumed.

use std::collections::BTreeSet;
use std::sync::{Arc, Mutex, MutexGuard};

use crate::catalog::recovery_plan::RecoveryPlan;
use crate::catalog::wal_reader::WalReader;
use crate::pg::{ArchiveFileName, TimelineId, WalSegmentName, WalSegmentNumber};
use crate::repo::Error;
use crate::repo::layout::{ObjectName, WalObjectName};

/// A reader, and what is known of the segments behind those it was asked for.
#[derive(Debug)]
pub struct WalAhead {
    reader: Arc<WalReader>,
    listed: Mutex<Listed>,
}

/// A stretch of one timeline as the archive listed it.
#[derive(Debug, Default)]
struct Listed {
    timeline: Option<TimelineId>,
    /// What is known of begins behind this number,
    from: u64,
    /// and ends with this one.
    through: u64,
    there: BTreeSet<u64>,
    under_way: bool,
}

/// Names asked for at a time: a list costs as much as a small object, so it serves many segments.
const LIST_MAX: usize = 1000;

impl WalAhead {
    /// Reads ahead into the cache of `reader`.
    pub fn new(reader: Arc<WalReader>) -> Self {
        Self { reader, listed: Mutex::default() }
    }

    /// Returns the reader.
    pub fn reader(&self) -> &Arc<WalReader> {
        &self.reader
    }

    /// Says that this segment is being read: those behind it are started upon.
    pub fn follow(self: &Arc<Self>, segment: WalSegmentName, plan: Option<&RecoveryPlan>) {
        if let Some(plan) = plan.filter(|plan| !plan.standby) {
            return self.reader.read_ahead(plan.segments_behind(segment).map(ArchiveFileName::Segment));
        }
        let Ok(number) = segment.number(self.reader.cluster().segment_size) else { return };
        let depth = self.reader.ahead_max();
        let (known, list) = {
            let mut listed = self.lock();
            let known = listed.behind(segment.timeline(), number, depth);
            let list = depth > 0 && !listed.under_way && !listed.answers(segment.timeline(), number, depth);
            listed.under_way |= list;
            (known, list)
        };
        self.start(segment.timeline(), known);
        if list {
            let ahead = self.clone();
            tokio::spawn(async move { ahead.list_behind(segment, number).await });
        }
    }

    /// Returns up to `count` of those behind a segment that was followed, the next one first.
    pub fn behind(
        &self,
        segment: WalSegmentName,
        plan: Option<&RecoveryPlan>,
        count: usize,
    ) -> Vec<WalSegmentName> {
        let count = count.min(self.reader.ahead_max());
        if let Some(plan) = plan.filter(|plan| !plan.standby) {
            return plan.segments_behind(segment).take(count).collect();
        }
        let (timeline, size) = (segment.timeline(), self.reader.cluster().segment_size);
        let Ok(number) = segment.number(size) else { return Vec::new() };
        let known = self.lock().behind(timeline, number, count);
        known
            .into_iter()
            .map(|number| WalSegmentName::new(timeline, WalSegmentNumber(number), size))
            .collect()
    }

    fn start(&self, timeline: TimelineId, numbers: Vec<u64>) {
        let size = self.reader.cluster().segment_size;
        let name = |number| WalSegmentName::new(timeline, WalSegmentNumber(number), size);
        self.reader.read_ahead(numbers.into_iter().map(|number| ArchiveFileName::Segment(name(number))));
    }

    async fn list_behind(&self, segment: WalSegmentName, number: WalSegmentNumber) {
        let found = self.names_behind(segment).await;
        let timeline = segment.timeline();
        let known = {
            let mut listed = self.lock();
            listed.under_way = false;
            match found {
                Ok(there) => {
                    let through = there.last().copied().unwrap_or(number.0);
                    let timeline = Some(timeline);
                    *listed = Listed { timeline, from: number.0, through, there, under_way: false };
                }
                Err(error) => tracing::debug!("what comes after {segment} could not be listed: {error}"),
            }
            listed.behind(timeline, number, self.reader.ahead_max())
        };
        self.start(timeline, known);
    }

    /// Lists the numbers of the segments behind one, on its timeline.
    async fn names_behind(&self, segment: WalSegmentName) -> Result<BTreeSet<u64>, Error> {
        let (repository, cluster) = (self.reader.repository(), self.reader.cluster());
        let layout = repository.layout();
        let folder = layout.wal_timeline(cluster, segment.timeline());
        let after = layout.wal_object(cluster, WalObjectName::Segment(segment));
        let page = repository.store().list(&folder, Some(&after), LIST_MAX).await?;
        let numbers = page.iter().filter_map(|object| match layout.parse(&object.key) {
            Some(ObjectName::Wal(_, WalObjectName::Segment(name))) => name.number(cluster.segment_size).ok(),
            _ => None,
        });
        Ok(numbers.map(|number| number.0).collect())
    }

    fn lock(&self) -> MutexGuard<'_, Listed> {
        self.listed.lock().expect("no holder of this lock panics")
    }
}

impl Listed {
    /// Returns up to `depth` numbers behind `number` that are there without a gap.
    fn behind(&self, timeline: TimelineId, number: WalSegmentNumber, depth: usize) -> Vec<u64> {
        if !self.covers(timeline, number) {
            return Vec::new();
        }
        (number.0 + 1..).take_while(|number| self.there.contains(number)).take(depth).collect()
    }

    /// Tells whether nothing more can be learnt: the list reaches as far as is read ahead.
    fn answers(&self, timeline: TimelineId, number: WalSegmentNumber, depth: usize) -> bool {
        self.covers(timeline, number) && number.0 + depth as u64 <= self.through
    }

    fn covers(&self, timeline: TimelineId, number: WalSegmentNumber) -> bool {
        self.timeline == Some(timeline) && (self.from..=self.through).contains(&number.0)
    }
}
