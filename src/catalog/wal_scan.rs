//! What replay will do to the world outside the pages: read from the WAL before it is replayed.
//!
//! Three things matter here: absolute paths that CREATE TABLESPACE writes to (failure 27b), the limits that a hot
//! standby must not undercut, and records that only an extension's library can replay.

use std::collections::{BTreeMap, BTreeSet};
use std::ffi::OsString;
use std::ops::ControlFlow;
use std::os::unix::ffi::OsStringExt;
use std::path::PathBuf;

use crate::catalog::wal_records::{is_reached, segments_of, visit_records};
use crate::catalog::{RecoveryPlan, Target};
use crate::pg::{Lsn, RecoveryLimits, WalPayload};
use crate::repo::{self, Repository};

/// What the WAL of a plan will do.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct WalScan {
    /// Tablespaces that are created on the way, each with the absolute path that stands in the WAL.
    pub tablespaces: BTreeMap<u32, PathBuf>,
    /// The greatest limits that are announced on the way.
    pub limits: RecoveryLimits,
    /// Extensions' resource managers that have records on the way, by number.
    pub managers: BTreeSet<u8>,
}

/// Reads the WAL that recovery from `start` will go through, up to the target: nothing behind it is replayed.
pub async fn scan_wal(
    repository: &Repository,
    plan: &RecoveryPlan,
    target: &Target,
    start: Lsn,
) -> Result<WalScan, repo::Error> {
    let spans = plan.spans.iter().filter_map(|span| Some((span.first, span.last?, span.end)));
    let segments = segments_of(spans, plan.cluster.segment_size);
    let mut scan = WalScan::default();
    let visit = |lsn, payload| {
        let is_last = is_reached(target, lsn, &payload);
        scan.note(payload);
        if is_last { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
    };
    visit_records(repository, plan.cluster, segments, start, visit).await?;
    Ok(scan)
}

impl WalScan {
    fn note(&mut self, payload: WalPayload) {
        match payload {
            WalPayload::CreateTablespace { tablespace, path } if !path.is_empty() => {
                self.tablespaces.insert(tablespace.0, PathBuf::from(OsString::from_vec(path)));
            }
            WalPayload::ParameterChange(change) => self.limits = greatest(self.limits, change.limits),
            WalPayload::Extension { manager } => drop(self.managers.insert(manager)),
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
    use super::*;

    #[test]
    fn what_is_announced_adds_up() {
        let mut scan = WalScan::default();
        let path = b"/srv/ts".to_vec();
        scan.note(WalPayload::CreateTablespace { tablespace: crate::pg::Oid(16400), path });
        scan.note(WalPayload::CreateTablespace { tablespace: crate::pg::Oid(16401), path: Vec::new() });
        assert_eq!(scan.tablespaces.len(), 1, "one within PGDATA needs no stand-in");
        (128..130).for_each(|manager| scan.note(WalPayload::Extension { manager }));
        assert_eq!(scan.managers, BTreeSet::from([128, 129]));
        let a = RecoveryLimits { max_connections: 100, max_wal_senders: 3, ..RecoveryLimits::default() };
        let b = RecoveryLimits { max_connections: 50, max_wal_senders: 9, ..RecoveryLimits::default() };
        assert_eq!(greatest(a, b).max_connections, 100);
        assert_eq!(greatest(a, b).max_wal_senders, 9);
    }
}
