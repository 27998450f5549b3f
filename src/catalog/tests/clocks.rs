//! Plans for a target time where the hosts that recorded the basebackups have clocks an hour off: the times at which
//! PostgreSQL ended its transactions decide.

use std::ops::ControlFlow;

use jiff::{SignedDuration, Timestamp};

use super::*;
use crate::catalog::wal_records::{segments_of, visit_records};
use crate::pg::WalPayload;

/// WAL of a server of version 15 from 0/900000 on, in segments of 1 MiB; what is not there counts as zeros.
const WAL: &[u8] = include_bytes!("../../../tests/data/wal/15-start");
const BEGIN: Lsn = Lsn(0x90_0028);
const OF: &str = "7301234567890123456-1";
const HOUR: SignedDuration = SignedDuration::from_hours(1);

impl Site {
    /// Archives the sample, and returns where and when each transaction in it ended.
    async fn transactions(&self) -> Vec<(Lsn, Timestamp)> {
        let cluster = cluster(OF);
        let segment: WalSegmentName = "000000010000000000000009".parse().unwrap();
        let mut raw = WAL.to_vec();
        raw.resize(cluster.segment_size.bytes() as usize, 0);
        let name = WalObjectName::Segment(segment);
        archive_wal(&self.repository, cluster, name, &raw, &self.key, Compression::zstd(1)).await.unwrap();
        let mut ended = Vec::new();
        let visit = |lsn, payload| {
            if let WalPayload::Commit(end) | WalPayload::Abort(end) = payload {
                ended.push((lsn, end.time));
            }
            ControlFlow::Continue(())
        };
        let segments = segments_of([(segment, segment, None)], cluster.segment_size);
        visit_records(&self.repository, cluster, segments, BEGIN, visit).await.unwrap();
        assert!(ended.len() > 1 && ended.is_sorted_by_key(|(_, time)| *time), "{ended:?}");
        ended
    }

    /// Takes a basebackup up to a position as a host whose clock says `here`, of a server whose clock said `stopped_at`.
    async fn recorded(&self, stop: Lsn, stopped_at: Timestamp, here: Timestamp) -> BasebackupId {
        let options = testing::options(self.store.clone(), ManualClock::new(here), stop.0);
        let repository = Repository::open(options).await.unwrap();
        let options = BuilderOptions {
            cluster: cluster(OF),
            timeline: timeline(1),
            lsns: (BEGIN, stop),
            time: stopped_at,
            ..testing::basebackup()
        };
        BasebackupBuilder::begin(&repository, options, None).await.unwrap().finish().await.unwrap().id
    }
}

/// The host that runs Walden dates the id, which people read, and nothing else.
#[tokio::test]
async fn a_backup_host_an_hour_off_changes_no_plan() {
    for off in [-HOUR, HOUR] {
        let site = Site::create().await;
        let ended = site.transactions().await;
        let ((first, first_time), (last, last_time)) = (ended[0], *ended.last().unwrap());
        let moment = SignedDuration::from_micros(1);
        let old = site.recorded(first, first_time - moment, first_time + off).await;
        let new = site.recorded(last, last_time - moment, last_time + off).await;
        let time = async |time| site.plan(&target(Target::Time(time)), false).await;
        let chosen = async |at| time(at).await.map(|planned| planned.record.id).unwrap();
        assert_eq!(chosen(first_time).await, old, "{off:?}");
        let just_before = RecoveryTarget { inclusive: false, ..target(Target::Time(last_time)) };
        assert_eq!(site.plan(&just_before, false).await.unwrap().record.id, new, "{off:?}");
        let refusal = time(last_time).await.unwrap_err().to_string();
        assert!(refusal.starts_with(&format!("the archive ends before time {last_time}: ")), "{refusal}");
        let refusal = time(first_time - HOUR).await.unwrap_err().to_string();
        assert!(refusal.starts_with("no basebackup ended before time "), "{refusal}");
    }
}

/// A standby dates the end of its basebackup by its own clock, and its transactions by the primary's.
#[tokio::test]
async fn a_standby_an_hour_off_is_not_believed_against_the_wal() {
    for off in [-HOUR, HOUR] {
        let site = Site::create().await;
        let ended = site.transactions().await;
        let ((first, first_time), (last, last_time)) = (ended[0], *ended.last().unwrap());
        let moment = SignedDuration::from_micros(1);
        let old = site.recorded(first, first_time - moment, first_time).await;
        // It holds the transactions from the first on.
        let new = site.recorded(last, last_time - moment + off, last_time).await;
        let asked = target(Target::Time(first_time));
        assert_eq!(site.plan(&asked, false).await.unwrap().record.id, old, "{off:?}");
        let name = new.to_string();
        let request = RecoveryRequest { basebackup: Some(&name), target: &asked, until_hole: false };
        let refusal = plan_for_target(&site.repository, request).await.unwrap_err().to_string();
        let before = format!("time {first_time} is before the end of basebackup {new}: recovery from ");
        assert!(refusal.starts_with(&before), "{off:?}: {refusal}");
    }
}
