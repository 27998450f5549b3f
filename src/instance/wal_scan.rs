//! What replay will do to the world outside the pages: read from the WAL before a clone replays it.
//!
//! Only two things matter here: absolute paths that CREATE TABLESPACE writes to, which need a stand-in, and the
//! limits that a hot standby must not undercut. Segments come in the order in which recovery reads them, a few ahead.
//! Where the valid WAL ends early there is nothing to say: recovery itself ends there, and tells.

use std::collections::BTreeMap;
use std::ffi::OsString;
use std::os::unix::ffi::OsStringExt;
use std::path::PathBuf;

use futures::{StreamExt, TryStreamExt};

use crate::catalog::RecoveryPlan;
use crate::pg::{
    Lsn, RecoveryLimits, WalPayload, WalRecordStream, WalSegmentName, WalSegmentNumber, WalStep,
};
use crate::repo::{self, Repository, layout::WalObjectName, wal_object::read_wal};

/// What the WAL of a plan will do.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct WalScan {
    /// Tablespaces that are created on the way, each with the absolute path that stands in the WAL.
    pub tablespaces: BTreeMap<u32, PathBuf>,
    /// The greatest limits that are announced on the way.
    pub limits: RecoveryLimits,
}

/// Segments fetched side by side: the store's latency is hidden, and memory stays at a few segments.
const SEGMENTS_AHEAD: usize = 4;
const WAL_PAGE_BYTES: u32 = 8192;

/// Reads the WAL that recovery from `start` will go through.
pub async fn scan_wal(
    repository: &Repository,
    plan: &RecoveryPlan,
    start: Lsn,
) -> Result<WalScan, repo::Error> {
    let (cluster, size) = (plan.cluster, plan.cluster.segment_size);
    let mut records = WalRecordStream::new(start, size, WAL_PAGE_BYTES);
    let mut scan = WalScan::default();
    let segments = futures::stream::iter(segments_of(plan))
        .map(|segment| async move {
            let bytes = read_wal(repository, cluster, WalObjectName::Segment(segment)).await?;
            Ok::<_, repo::Error>((segment, bytes))
        })
        .buffered(SEGMENTS_AHEAD);
    futures::pin_mut!(segments);
    while let Some((segment, bytes)) = segments.try_next().await? {
        let at = segment.start_lsn(size).map_err(|error| repo::Error::Internal(error.to_string()))?;
        if records.push(at, bytes).is_err() {
            break;
        }
        if !scan.take(&mut records) {
            break;
        }
    }
    Ok(scan)
}

/// Lists the segments of a plan in the order in which recovery reads them.
fn segments_of(plan: &RecoveryPlan) -> Vec<WalSegmentName> {
    let size = plan.cluster.segment_size;
    let mut segments = Vec::new();
    for span in &plan.spans {
        let Some(last) = span.last else { continue };
        let (Ok(first), Ok(last)) = (span.first.number(size), last.number(size)) else { continue };
        let name = |number| WalSegmentName::new(span.timeline, WalSegmentNumber(number), size);
        segments.extend((first.0..=last.0).map(name));
    }
    segments
}

impl WalScan {
    /// Takes the records that are there; returns whether more bytes can bring more.
    fn take(&mut self, records: &mut WalRecordStream) -> bool {
        loop {
            match records.next_record() {
                Ok(WalStep::Record(record)) => match record.payload() {
                    Ok(payload) => self.note(payload),
                    // The record is whole, and recovery will understand it or say so.
                    Err(error) => tracing::debug!("a WAL record is not understood: {error}"),
                },
                Ok(WalStep::NeedBytes) => return true,
                Ok(WalStep::End(_)) => return false,
                Err(error) => tracing::debug!("a WAL record is not understood: {error}"),
            }
        }
    }

    fn note(&mut self, payload: WalPayload) {
        match payload {
            WalPayload::CreateTablespace { tablespace, path } if !path.is_empty() => {
                self.tablespaces.insert(tablespace.0, PathBuf::from(OsString::from_vec(path)));
            }
            WalPayload::ParameterChange(change) => self.limits = greatest(self.limits, change.limits),
            _ => {}
        }
    }
}

/// Returns the greater of each limit.
pub fn greatest(a: RecoveryLimits, b: RecoveryLimits) -> RecoveryLimits {
    RecoveryLimits {
        max_connections: a.max_connections.max(b.max_connections),
        max_worker_processes: a.max_worker_processes.max(b.max_worker_processes),
        max_wal_senders: a.max_wal_senders.max(b.max_wal_senders),
        max_prepared_transactions: a.max_prepared_transactions.max(b.max_prepared_transactions),
        max_locks_per_transaction: a.max_locks_per_transaction.max(b.max_locks_per_transaction),
    }
}

#[cfg(test)]
mod tests {
    use crate::catalog::TimelineSpan;
    use crate::pg::TimelineId;

    use super::*;

    #[test]
    fn segments_follow_the_plan_from_timeline_to_timeline() {
        let span = |number: u32, first: &str, last: &str| TimelineSpan {
            timeline: TimelineId::new(number).unwrap(),
            first: first.parse().unwrap(),
            last: Some(last.parse().unwrap()),
            history: number > 1,
        };
        let plan = RecoveryPlan {
            format: 1,
            cluster: "7301234567890123456-16".parse().unwrap(),
            basebackup: None,
            spans: vec![
                span(1, "0000000100000000000000FE", "000000010000000100000000"),
                span(2, "000000020000000100000001", "000000020000000100000001"),
            ],
            standby: false,
        };
        let names: Vec<String> = segments_of(&plan).iter().map(ToString::to_string).collect();
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

    #[test]
    fn what_is_announced_adds_up() {
        let mut scan = WalScan::default();
        let path = b"/srv/ts".to_vec();
        scan.note(WalPayload::CreateTablespace { tablespace: crate::pg::Oid(16400), path });
        scan.note(WalPayload::CreateTablespace { tablespace: crate::pg::Oid(16401), path: Vec::new() });
        assert_eq!(scan.tablespaces.len(), 1, "one within PGDATA needs no stand-in");
        let a = RecoveryLimits { max_connections: 100, max_wal_senders: 3, ..RecoveryLimits::default() };
        let b = RecoveryLimits { max_connections: 50, max_wal_senders: 9, ..RecoveryLimits::default() };
        assert_eq!(greatest(a, b).max_connections, 100);
        assert_eq!(greatest(a, b).max_wal_senders, 9);
    }
}
