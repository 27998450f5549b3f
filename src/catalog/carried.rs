//! WAL that a basebackup carries itself, beside what the archive has: for that basebackup alone it counts as archived.
//!
//! What is carried ends in a segment where the basebackup comes from a standby, which cannot end one: then it is the
//! segment's beginning, as pieces are. Others never get to see it: a hole in the archive stays one for them.

use std::borrow::Cow;

use crate::catalog::wal_coverage::WalCoverage;
use crate::pg::WalSegmentNumber;
use crate::repo::Repository;
use crate::repo::documents::BackupRecord;

/// Adds to the archive what a basebackup carries, and lets readers of the repository know of it.
pub fn with_carried<'a>(
    repository: &Repository,
    coverage: &'a WalCoverage,
    record: &BackupRecord,
) -> Cow<'a, WalCoverage> {
    let Some(wal) = &record.wal else { return Cow::Borrowed(coverage) };
    repository.carried_index().note(record.cluster, record.id, wal);
    let mut coverage = coverage.clone();
    add_carried(&mut coverage, record);
    Cow::Owned(coverage)
}

/// Adds what a basebackup carries to what is there otherwise.
fn add_carried(coverage: &mut WalCoverage, record: &BackupRecord) {
    let (Some(wal), size) = (&record.wal, record.cluster.segment_size) else { return };
    for range in &wal.segments {
        // A name that cannot be at this size stands for no segment.
        let (Ok(first), Ok(last)) = (range.first.number(size), range.last.number(size)) else { continue };
        if first > last || range.first.timeline() != range.last.timeline() {
            continue;
        }
        let held = coverage.timelines.entry(range.first.timeline()).or_default();
        let Some(end) = wal.end_in(range.last, size) else {
            held.insert(first, last);
            continue;
        };
        if first < last {
            held.insert(first, WalSegmentNumber(last.0 - 1));
        }
        if let Some(bytes) = end.checked_sub(last.start_lsn(size)).and_then(|bytes| u32::try_from(bytes).ok())
            && bytes < size.bytes()
            && !held.contains(last)
        {
            held.pieces.entry(last).or_default().add(0, bytes);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use crate::catalog::recovery_decision::{PlanError, TargetPlace, plan_recovery};
    use crate::catalog::recovery_target::{RecoveryTarget, Target, TargetAction};
    use crate::catalog::recovery_window::{RecoveryStart, RecoveryWindow};
    use crate::catalog::timeline_tree::TimelineTree;
    use crate::catalog::wal_coverage::TimelineCoverage;
    use crate::pg::{Lsn, TimelineId, WalSegmentSize};
    use crate::repo::builder::{BasebackupBuilder, BuilderOptions};
    use crate::repo::carried_wal::{CarriedSegments, CarriedWal};
    use crate::repo::testing;
    use crate::storage::MemoryStore;

    use super::*;

    const MIB: u64 = 1 << 20;

    /// A basebackup that starts in segment 5 and stops in segment 7, and carries these, up to `end`.
    async fn record(end: u64) -> (Repository, BackupRecord) {
        let repository = testing::site(MemoryStore::new(), crate::clock::SystemClock).await;
        let options = BuilderOptions {
            cluster: "7301234567890123456-16".parse().unwrap(),
            lsns: (Lsn(5 * 16 * MIB + 40), Lsn(7 * 16 * MIB + 500)),
            ..testing::basebackup()
        };
        let builder = BasebackupBuilder::begin(&repository, options, None).await.unwrap();
        let mut record = builder.finish().await.unwrap();
        let name = |number: u32| format!("0000000100000000{number:08X}").parse().unwrap();
        let segments = vec![CarriedSegments { first: name(5), last: name(7) }];
        record.wal = Some(CarriedWal { segments, end: Lsn(end) });
        (repository, record)
    }

    fn archive(numbers: &[u64]) -> WalCoverage {
        let mut held = TimelineCoverage::default();
        numbers.iter().for_each(|number| held.push(WalSegmentNumber(*number)));
        WalCoverage { timelines: BTreeMap::from([(TimelineId::FIRST, held)]) }
    }

    fn window(record: &BackupRecord, coverage: &WalCoverage) -> RecoveryWindow {
        let (start, size) = (RecoveryStart::from(record), WalSegmentSize::DEFAULT);
        RecoveryWindow::new(start, &TimelineTree::default(), coverage, TimelineId::FIRST, size).unwrap()
    }

    #[tokio::test]
    async fn what_is_carried_makes_a_basebackup_recoverable_and_the_archive_goes_on_behind_it() {
        let (repository, record) = record(8 * 16 * MIB).await;
        let reached = |numbers: &[u64]| {
            let coverage = archive(numbers);
            let window = window(&record, &with_carried(&repository, &coverage, &record));
            (window.missing_start, window.end.0 / (16 * MIB), window.holes.len())
        };
        assert_eq!(reached(&[]), (None, 8, 0));
        assert_eq!(reached(&[1, 2]), (None, 8, 0));
        assert_eq!(reached(&[6, 7, 8, 9]), (None, 10, 0));
        assert_eq!(reached(&[10, 11]), (None, 8, 1));
        let alone = window(&BackupRecord { wal: None, ..record.clone() }, &archive(&[6, 7]));
        assert!(alone.missing_start.is_some());
        let segment = "000000010000000000000006".parse().unwrap();
        assert_eq!(repository.carried_index().find(record.cluster, segment).len(), 1);
    }

    #[tokio::test]
    async fn the_last_segment_of_a_standby_is_a_beginning_that_the_archive_may_have_whole() {
        let (repository, record) = record(7 * 16 * MIB + 500).await;
        let (nothing, whole) = (archive(&[]), archive(&[7, 8]));
        let own = window(&record, &with_carried(&repository, &nothing, &record));
        assert_eq!((own.missing_start, own.end), (None, record.stop_lsn));
        assert_eq!(own.ending.map(|ending| ending.end), Some(record.stop_lsn));
        let with = window(&record, &with_carried(&repository, &whole, &record));
        assert_eq!((with.missing_start, with.end.0, with.ending), (None, 9 * 16 * MIB, None));
    }

    /// PostgreSQL sees that target at the record behind it; without one it ends FATAL, at each start.
    #[tokio::test]
    async fn the_immediate_target_is_the_end_of_wal_where_nothing_lies_behind_it() {
        let (repository, record) = record(7 * 16 * MIB + 500).await;
        let planned = |numbers: &[u64], action| {
            let target = RecoveryTarget { target: Target::Immediate, ..RecoveryTarget::latest(action) };
            let coverage = archive(numbers);
            let window = window(&record, &with_carried(&repository, &coverage, &record));
            let tree = TimelineTree::default();
            plan_recovery(&record, &tree, &window, &target, TargetPlace::Within, false)
                .map(|decision| decision.target.target)
        };
        assert_eq!(planned(&[], TargetAction::Promote), Ok(Target::Latest));
        for action in [TargetAction::Pause, TargetAction::Shutdown] {
            let refused = planned(&[], action).unwrap_err();
            assert!(matches!(refused, PlanError::NothingBehind { .. }), "{refused}");
            assert!(refused.hint().contains("--target-action promote"));
            assert_eq!(planned(&[7], action), Ok(Target::Immediate));
        }
    }

    #[tokio::test]
    async fn impossible_segments_are_none() {
        let (repository, mut record) = record(8 * 16 * MIB).await;
        let name = |text: &str| text.parse().unwrap();
        let ranges = [
            ("000000010000000000000007", "000000010000000000000005"),
            ("000000010000000000000005", "000000020000000000000007"),
            ("000000010000000000000005", "0000000100000000FFFFFFFF"),
        ];
        let segments =
            ranges.iter().map(|(a, b)| CarriedSegments { first: name(a), last: name(b) }).collect();
        record.wal = Some(CarriedWal { segments, end: Lsn(8 * 16 * MIB) });
        let coverage = archive(&[6, 7]);
        assert_eq!(*with_carried(&repository, &coverage, &record), coverage);
    }
}
