//! Reads the records of archived WAL: forward along a way, and backward from its end.
//!
//! Takes a private key where the WAL is encrypted. Segments come in the order of recovery, a few of them ahead. Where
//! the valid WAL ends early there is nothing more to say: recovery itself ends there, and tells.

use std::ops::ControlFlow;

use bytes::Bytes;
use futures::{StreamExt, TryStreamExt};
use jiff::Timestamp;

use crate::catalog::ending_segment::{read_ending, read_segment};
use crate::catalog::recovery_target::Target;
use crate::catalog::recovery_window::RecoveryWindow;
use crate::pg::{
    Lsn, WalPayload, WalRecordStream, WalSegmentName, WalSegmentNumber, WalSegmentSize, WalStep,
};
use crate::repo::{ClusterId, Error, Repository};

/// What was found of the last transaction that ended in a stretch of WAL.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum LastTransaction {
    /// It ended, by a commit or an abort, at this time.
    EndedAt(Timestamp),
    /// No transaction ended there.
    None,
    /// None ended in as many of its last segments as were to be read.
    NotNear,
}

/// A segment of which WAL is read, and where the WAL of it ends that counts, if not with the segment.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct SegmentPart {
    /// The segment.
    pub name: WalSegmentName,
    /// A position in it.
    pub end: Option<Lsn>,
}

/// Segments fetched side by side: the store's latency is hidden, and memory stays at a few segments.
const SEGMENTS_AHEAD_MAX: usize = 4;
/// What segments that are fetched side by side take; a larger one comes alone.
const BYTES_AHEAD_MAX: usize = 256 << 20;
/// The only size that servers are built with.
pub(crate) const WAL_PAGE_BYTES: u32 = 8192;

/// Shows each record, by its position and what it means, that recovery from `start` through `segments` will replay, until `visit` has seen enough.
pub async fn visit_records(
    repository: &Repository,
    cluster: ClusterId,
    segments: Vec<SegmentPart>,
    start: Lsn,
    mut visit: impl FnMut(Lsn, WalPayload) -> ControlFlow<()>,
) -> Result<(), Error> {
    let size = cluster.segment_size;
    let mut records = WalRecordStream::new(start, size, WAL_PAGE_BYTES);
    let reads = segments.into_iter().map(|segment| read_part(repository, cluster, segment));
    let segments = futures::stream::iter(reads).buffered(segments_ahead(size));
    futures::pin_mut!(segments);
    while let Some((segment, bytes)) = segments.try_next().await? {
        if records.push(start_of(segment, size)?, bytes).is_err() {
            break;
        }
        loop {
            match records.next_record() {
                Ok(WalStep::Record(record)) => match record.payload() {
                    Ok(payload) => {
                        if visit(record.lsn, payload).is_break() {
                            return Ok(());
                        }
                    }
                    // The record is whole, and recovery will understand it or say so.
                    Err(error) => tracing::debug!("a WAL record is not understood: {error}"),
                },
                Ok(WalStep::NeedBytes) => break,
                Ok(WalStep::End(_)) => return Ok(()),
                Err(error) => tracing::debug!("a WAL record is not understood: {error}"),
            }
        }
    }
    Ok(())
}

/// Returns whether recovery to `target` ends at this record, just before it or just after it.
pub fn is_reached(target: &Target, lsn: Lsn, payload: &WalPayload) -> bool {
    match (target, payload) {
        (Target::Time(time), WalPayload::Commit(ended) | WalPayload::Abort(ended)) => ended.time > *time,
        // As the server does it, the epoch is dropped.
        (Target::Xid(xid), WalPayload::Commit(ended) | WalPayload::Abort(ended)) => {
            xid.parse::<u64>().is_ok_and(|xid| xid as u32 == ended.transaction.0)
        }
        (Target::Name(wanted), WalPayload::RestorePoint { name, .. }) => name == wanted,
        (Target::Lsn(wanted), _) => lsn >= *wanted,
        _ => false,
    }
}

/// Looks backward for the last transaction that ended in a window, through at most `segments_max` of its segments.
pub async fn last_transaction(
    repository: &Repository,
    cluster: ClusterId,
    window: &RecoveryWindow,
    segments_max: usize,
) -> Result<LastTransaction, Error> {
    let segments = segments_of(window.stretches(), cluster.segment_size);
    last_transaction_in(repository, cluster, segments, segments_max).await
}

/// Looks backward for the last transaction that ended before the basebackup of a window was consistent: what it did is
/// recovered whatever the target.
pub async fn last_transaction_before_stop(
    repository: &Repository,
    cluster: ClusterId,
    window: &RecoveryWindow,
    segments_max: usize,
) -> Result<LastTransaction, Error> {
    let (size, stop) = (cluster.segment_size, window.start.stop_lsn);
    let last = WalSegmentNumber::ending_at(stop, size);
    let mut segments = segments_of(window.stretches(), size);
    segments.retain(|part| part.name.number(size).is_ok_and(|number| number <= last));
    if let Some(part) = segments.last_mut().filter(|part| part.name.number(size) == Ok(last)) {
        part.end = Some(part.end.map_or(stop, |end| end.min(stop)));
    }
    last_transaction_in(repository, cluster, segments, segments_max).await
}

async fn last_transaction_in(
    repository: &Repository,
    cluster: ClusterId,
    segments: Vec<SegmentPart>,
    segments_max: usize,
) -> Result<LastTransaction, Error> {
    let size = cluster.segment_size;
    let mut segments = segments.into_iter().rev();
    // Nearly always the first one tells, so no other is read with it.
    let mut ahead = 1;
    let (mut read, mut following) = (0, None);
    loop {
        let batch: Vec<SegmentPart> = segments.by_ref().take(ahead.min(segments_max - read)).collect();
        if batch.is_empty() {
            let all = segments.next().is_none();
            return Ok(if all { LastTransaction::None } else { LastTransaction::NotNear });
        }
        read += batch.len();
        ahead = segments_ahead(size);
        let reads = batch.into_iter().map(|segment| read_part(repository, cluster, segment));
        for (segment, bytes) in futures::future::try_join_all(reads).await? {
            if let Some(time) = last_end_in(start_of(segment, size)?, &bytes, following.as_ref(), size) {
                return Ok(LastTransaction::EndedAt(time));
            }
            following = Some(bytes);
        }
    }
}

/// Lists the segments from the first to the last of each stretch, in their order; with the last one comes where its WAL
/// ends.
pub fn segments_of(
    stretches: impl IntoIterator<Item = (WalSegmentName, WalSegmentName, Option<Lsn>)>,
    size: WalSegmentSize,
) -> Vec<SegmentPart> {
    let mut segments = Vec::new();
    for (first, last, end) in stretches {
        // A name that cannot be at this size stands for no segment.
        let (Ok(from), Ok(to)) = (first.number(size), last.number(size)) else { continue };
        let name = |number| WalSegmentName::new(first.timeline(), WalSegmentNumber(number), size);
        let parts = (from.0..=to.0).map(name);
        segments.extend(parts.map(|name| SegmentPart { name, end: end.filter(|_| name == last) }));
    }
    segments
}

async fn read_part(
    repository: &Repository,
    cluster: ClusterId,
    SegmentPart { name, end }: SegmentPart,
) -> Result<(WalSegmentName, Bytes), Error> {
    let bytes = match end {
        Some(end) => read_ending(repository, cluster, name, end).await?,
        None => read_segment(repository, cluster, name).await?,
    };
    Ok((name, bytes))
}

fn segments_ahead(size: WalSegmentSize) -> usize {
    (BYTES_AHEAD_MAX / size.bytes() as usize).clamp(1, SEGMENTS_AHEAD_MAX)
}

fn start_of(segment: WalSegmentName, size: WalSegmentSize) -> Result<Lsn, Error> {
    segment.start_lsn(size).map_err(|error| Error::Internal(error.to_string()))
}

/// Returns when the last transaction ended whose record begins in the segment at `at`; `following` is the segment
/// behind it, into which that record may reach.
fn last_end_in(at: Lsn, bytes: &Bytes, following: Option<&Bytes>, size: WalSegmentSize) -> Option<Timestamp> {
    let mut records = WalRecordStream::new(at, size, WAL_PAGE_BYTES);
    let end = at + bytes.len() as u64;
    let mut pushed = [Some((at, bytes)), following.map(|bytes| (end, bytes))].into_iter().flatten();
    let mut newest = None;
    loop {
        match records.next_record() {
            Ok(WalStep::Record(record)) if record.lsn >= end => return newest,
            Ok(WalStep::Record(record)) => {
                if let Ok(WalPayload::Commit(ended) | WalPayload::Abort(ended)) = record.payload() {
                    newest = newest.max(Some(ended.time));
                }
            }
            Ok(WalStep::NeedBytes) => match pushed.next() {
                Some((at, bytes)) if records.push(at, bytes.clone()).is_ok() => {}
                _ => return newest,
            },
            Ok(WalStep::End(_)) => return newest,
            Err(_) => {}
        }
    }
}

#[cfg(test)]
mod tests {
    use crate::catalog::recovery_window::{RecoveryStart, SegmentRange};
    use crate::clock::SystemClock;
    use crate::codec::Compression;
    use crate::pg::TimelineId;
    use crate::repo::layout::WalObjectName;
    use crate::repo::testing;
    use crate::repo::wal_object::{WalKey, archive_wal};
    use crate::storage::MemoryStore;

    use super::*;

    const SEGMENT_BYTES: usize = 1 << 20;
    /// WAL of a server of version 15 from 0/900000 on; what is not there counts as zeros.
    const START: &[u8] = include_bytes!("../../tests/data/wal/15-start");
    /// Neighbouring segments of another, from 0/D00000 on: a record crosses into the first, which ends with a switch.
    const BORDER: [&[u8]; 2] = [
        include_bytes!("../../tests/data/wal/15-border-0D00000"),
        include_bytes!("../../tests/data/wal/15-border-0E00000"),
    ];

    fn cluster() -> ClusterId {
        "7301234567890123456-1".parse().unwrap()
    }

    fn name(number: u64) -> WalSegmentName {
        WalSegmentName::new(TimelineId::FIRST, WalSegmentNumber(number), cluster().segment_size)
    }

    fn range(first: u64, last: u64) -> SegmentRange {
        let (size, first, last) = (cluster().segment_size, WalSegmentNumber(first), WalSegmentNumber(last));
        SegmentRange::new(TimelineId::FIRST, first, last, size)
    }

    /// A window over these segments.
    fn window(reached: &[SegmentRange]) -> RecoveryWindow {
        let timeline = TimelineId::FIRST;
        let start = RecoveryStart { timeline, start_lsn: Lsn::ZERO, stop_lsn: Lsn::ZERO };
        let (reached, holes) = (reached.to_vec(), Vec::new());
        RecoveryWindow { timeline, start, reached, end: Lsn::ZERO, holes, ending: None, missing_start: None }
    }

    /// An archive with these segments, filled up with zeros.
    async fn archive(segments: &[(u64, &[u8])]) -> Repository {
        let repository = testing::site(MemoryStore::new(), SystemClock).await;
        let key = WalKey::create(repository.keyring()).unwrap();
        for (number, bytes) in segments {
            let mut raw = bytes.to_vec();
            raw.resize(SEGMENT_BYTES, 0);
            let name = WalObjectName::Segment(name(*number));
            archive_wal(&repository, cluster(), name, &raw, &key, Compression::zstd(1)).await.unwrap();
        }
        repository
    }

    /// The ends of transactions that a plain pass forward sees.
    async fn ends_of(repository: &Repository, range: SegmentRange) -> Vec<Timestamp> {
        let mut ends = Vec::new();
        let segments = segments_of([(range.first, range.last, None)], cluster().segment_size);
        let start = range.first.start_lsn(cluster().segment_size).unwrap();
        let visit = |_, payload| {
            if let WalPayload::Commit(ended) | WalPayload::Abort(ended) = payload {
                ends.push(ended.time);
            }
            ControlFlow::Continue(())
        };
        visit_records(repository, cluster(), segments, start, visit).await.unwrap();
        ends
    }

    #[tokio::test]
    async fn the_last_transaction_is_found_behind_segments_without_any() {
        let mut segments = vec![(9, START)];
        segments.extend((10..20).map(|number| (number, &[][..])));
        let repository = archive(&segments).await;
        let ends = ends_of(&repository, range(9, 9)).await;
        let newest = LastTransaction::EndedAt(*ends.iter().max().unwrap());
        assert!(ends.len() > 1, "{ends:?}");
        for (last, segments_max, expected) in
            [(9, 1, newest), (10, 100, newest), (19, 11, newest), (19, 10, LastTransaction::NotNear)]
        {
            let window = window(&[range(9, last)]);
            let found = last_transaction(&repository, cluster(), &window, segments_max).await.unwrap();
            assert_eq!(found, expected, "{last} {segments_max}");
        }
        let empty = last_transaction(&repository, cluster(), &window(&[range(10, 19)]), 100).await.unwrap();
        assert_eq!(empty, LastTransaction::None);
        let nothing = last_transaction(&repository, cluster(), &window(&[]), 100).await.unwrap();
        assert_eq!(nothing, LastTransaction::None);
    }

    #[tokio::test]
    async fn nothing_behind_the_target_is_read() {
        let repository = archive(&[(9, START)]).await;
        let newest = *ends_of(&repository, range(9, 9)).await.iter().max().unwrap();
        let before = newest - std::time::Duration::from_nanos(1);
        for (target, is_met) in [
            (Target::Lsn(Lsn(0x90_1000)), true),
            (Target::Time(before), true),
            (Target::Time(newest), false),
            (Target::Lsn(Lsn(0xA0_0000)), false),
            (Target::Name("nowhere".to_owned()), false),
            (Target::Latest, false),
        ] {
            // What lies behind the first segment is not there, and nobody asks for it in vain.
            let segments =
                segments_of([(name(9), name(9 + u64::from(is_met)), None)], cluster().segment_size);
            let mut met = false;
            let visit = |lsn, payload| {
                met = is_reached(&target, lsn, &payload);
                if met { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
            };
            visit_records(&repository, cluster(), segments, Lsn(0x90_0000), visit).await.unwrap();
            assert_eq!(met, is_met, "{target}");
        }
    }

    #[tokio::test]
    async fn a_pass_goes_on_behind_a_switch_and_ends_when_it_has_seen_enough() {
        let repository = archive(&[(13, BORDER[0]), (14, BORDER[1])]).await;
        let segments = segments_of([(name(13), name(14), None)], cluster().segment_size);
        let start = Lsn(0xD0_0000);
        let (mut all, mut first) = (0, 0);
        let count = |counter: &mut u32, enough| {
            *counter += 1;
            if *counter == enough { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
        };
        visit_records(&repository, cluster(), segments.clone(), start, |_, _| count(&mut all, 0))
            .await
            .unwrap();
        visit_records(&repository, cluster(), segments, start, |_, _| count(&mut first, 2)).await.unwrap();
        assert_eq!(first, 2);
        let expected = include_str!("../../tests/data/wal/15-border.records");
        // The record that crosses into the first segment is whole only with the one before.
        let begun = |line: &&str| line.split(' ').next().unwrap().parse::<Lsn>().unwrap() >= start;
        // The sample holds a record more than its list.
        assert_eq!(all as usize, expected.lines().filter(begun).count() + 1);
    }

    #[test]
    fn segments_are_listed_across_the_end_of_a_log_and_of_a_timeline() {
        let size = WalSegmentSize::DEFAULT;
        let range = |first: &str, last: &str| (first.parse().unwrap(), last.parse().unwrap(), Some(Lsn(7)));
        let ranges = [
            range("0000000100000000000000FE", "000000010000000100000000"),
            range("000000020000000100000001", "000000020000000100000001"),
        ];
        let segments = segments_of(ranges, size);
        // Where the WAL of a stretch ends matters to its last segment alone.
        let ends: Vec<bool> = segments.iter().map(|part| part.end.is_some()).collect();
        assert_eq!(ends, [false, false, true, true]);
        let names: Vec<String> = segments.iter().map(|part| part.name.to_string()).collect();
        assert_eq!(
            names,
            [
                "0000000100000000000000FE",
                "0000000100000000000000FF",
                "000000010000000100000000",
                "000000020000000100000001"
            ]
        );
    }
}
