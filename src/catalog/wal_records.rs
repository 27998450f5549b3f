//! Reads the records of archived WAL: forward along a way, and backward from its end.
//!
//! Takes a private key where the WAL is encrypted. Segments come in the order of recovery, a few of them ahead. Where
//! the valid WAL ends early there is nothing more to say: recovery itself ends there, and tells.

use std::ops::ControlFlow;

use bytes::Bytes;
use futures::{StreamExt, TryStreamExt};
use jiff::Timestamp;

use crate::catalog::recovery_window::SegmentRange;
use crate::pg::{
    Lsn, WalPayload, WalRecordStream, WalSegmentName, WalSegmentNumber, WalSegmentSize, WalStep,
};
use crate::repo::{ClusterId, Error, Repository, layout::WalObjectName, wal_object::read_wal};

/// What was found of the last transaction that ended in a stretch of WAL.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum LastTransaction {
    /// It ended, by a commit or an abort, at this time.
    EndedAt(Timestamp),
    /// No transaction ended there.
    None,
    /// None ended in its last [`SEGMENTS_BACK_MAX`] segments; those before were not read.
    NotNear,
}

/// Segments fetched side by side: the store's latency is hidden, and memory stays at a few segments.
const SEGMENTS_AHEAD: usize = 4;
/// An idle server that archives every minute fills four hours with segments in which no transaction ends.
pub const SEGMENTS_BACK_MAX: usize = 256;
/// The only size that servers are built with.
const WAL_PAGE_BYTES: u32 = 8192;

/// Shows every record that recovery from `start` through `segments` will replay, until `visit` has seen enough.
pub async fn visit_records(
    repository: &Repository,
    cluster: ClusterId,
    segments: Vec<WalSegmentName>,
    start: Lsn,
    mut visit: impl FnMut(WalPayload) -> ControlFlow<()>,
) -> Result<(), Error> {
    let size = cluster.segment_size;
    let mut records = WalRecordStream::new(start, size, WAL_PAGE_BYTES);
    let reads = segments.into_iter().map(|segment| read_segment(repository, cluster, segment));
    let segments = futures::stream::iter(reads).buffered(SEGMENTS_AHEAD);
    futures::pin_mut!(segments);
    while let Some((segment, bytes)) = segments.try_next().await? {
        if records.push(start_of(segment, size)?, bytes).is_err() {
            break;
        }
        loop {
            match records.next_record() {
                Ok(WalStep::Record(record)) => match record.payload() {
                    Ok(payload) => {
                        if visit(payload).is_break() {
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

/// Looks backward for the last transaction that ended in `ranges`.
pub async fn last_transaction(
    repository: &Repository,
    cluster: ClusterId,
    ranges: &[SegmentRange],
) -> Result<LastTransaction, Error> {
    let size = cluster.segment_size;
    let ranges = ranges.iter().map(|range| (range.first, range.last));
    let mut segments = segments_of(ranges, size).into_iter().rev();
    // Nearly always the first one tells, so no other is read with it.
    let mut ahead = 1;
    let (mut read, mut following) = (0, None);
    loop {
        let batch: Vec<WalSegmentName> = segments.by_ref().take(ahead).collect();
        if batch.is_empty() {
            return Ok(LastTransaction::None);
        }
        if read >= SEGMENTS_BACK_MAX {
            return Ok(LastTransaction::NotNear);
        }
        read += batch.len();
        ahead = SEGMENTS_AHEAD;
        let reads = batch.into_iter().map(|segment| read_segment(repository, cluster, segment));
        for (segment, bytes) in futures::future::try_join_all(reads).await? {
            if let Some(time) = last_end_in(start_of(segment, size)?, &bytes, following.as_ref(), size) {
                return Ok(LastTransaction::EndedAt(time));
            }
            following = Some(bytes);
        }
    }
}

/// Lists the segments from the first to the last of each pair, in their order.
pub fn segments_of(
    ranges: impl IntoIterator<Item = (WalSegmentName, WalSegmentName)>,
    size: WalSegmentSize,
) -> Vec<WalSegmentName> {
    let mut segments = Vec::new();
    for (first, last) in ranges {
        // A name that cannot be at this size stands for no segment.
        let (Ok(from), Ok(to)) = (first.number(size), last.number(size)) else { continue };
        let name = |number| WalSegmentName::new(first.timeline(), WalSegmentNumber(number), size);
        segments.extend((from.0..=to.0).map(name));
    }
    segments
}

async fn read_segment(
    repository: &Repository,
    cluster: ClusterId,
    segment: WalSegmentName,
) -> Result<(WalSegmentName, Bytes), Error> {
    Ok((segment, read_wal(repository, cluster, WalObjectName::Segment(segment)).await?))
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
    use super::*;

    #[test]
    fn segments_are_listed_across_the_end_of_a_log_and_of_a_timeline() {
        let size = WalSegmentSize::DEFAULT;
        let range = |first: &str, last: &str| (first.parse().unwrap(), last.parse().unwrap());
        let ranges = [
            range("0000000100000000000000FE", "000000010000000100000000"),
            range("000000020000000100000001", "000000020000000100000001"),
        ];
        let names: Vec<String> = segments_of(ranges, size).iter().map(ToString::to_string).collect();
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
