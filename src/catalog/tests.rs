//! The catalogue over a repository in memory: overviews, choices and plans from basebackups and WAL that are made up.

use std::sync::Arc;
use std::time::Duration;

use crate::catalog::basebackups;
use crate::catalog::overview::{self, SiteOverview};
use crate::catalog::recoverable::recoverabilities;
use crate::catalog::target_search::SEGMENTS_FORWARD_MAX;
use crate::catalog::{
    PlanError, PlannedRecovery, Recoverability, RecoveryError, RecoveryRequest, RecoveryTarget, Target,
    TargetAction, plan_for_target,
};
use crate::clock::ManualClock;
use crate::codec::Compression;
use crate::pg::{Lsn, TimelineId, WalSegmentName, WalSegmentNumber};
use crate::repo::builder::{BasebackupBuilder, BuilderOptions};
use crate::repo::layout::WalObjectName;
use crate::repo::wal_object::{HistoryBranch, WalKey, archive_history, archive_wal};
use crate::repo::{Basebackup, BasebackupId, ClusterId, Repository, testing};
use crate::storage::{Fault, Faulty, MemoryStore, Recording, Rule, Verb};

mod clocks;
mod faults;
mod refusals;

/// Two clusters of a site, as pg_upgrade leaves them: other system identifiers, the same names of segments.
const OLD: &str = "7301234567890123456-16";
const NEW: &str = "7399999999999999999-16";

struct Site {
    store: Recording<Arc<Faulty<MemoryStore>>>,
    clock: ManualClock,
    repository: Repository,
    key: WalKey,
}

fn cluster(text: &str) -> ClusterId {
    text.parse().unwrap()
}

fn timeline(number: u32) -> TimelineId {
    TimelineId::new(number).unwrap()
}

/// A position in the middle of a segment of 16 MiB.
fn within(segment: u64) -> Lsn {
    Lsn((segment << 24) + 0x28)
}

impl Site {
    async fn create() -> Self {
        let clock = ManualClock::new("2026-11-20T10:00:00Z".parse().unwrap());
        let memory = MemoryStore::with_clock(Arc::new(clock.clone()));
        let store = Recording::new(Arc::new(Faulty::new(memory)));
        let repository = testing::site(store.clone(), clock.clone()).await;
        let key = WalKey::create(repository.keyring()).unwrap();
        Self { store, clock, repository, key }
    }

    /// Takes a basebackup an hour later, from within one segment to within another, with a file of these bytes.
    async fn backup_of(
        &self,
        of: &str,
        number: u32,
        segments: (u64, u64),
        file: &[u8],
        parent: Option<BasebackupId>,
    ) -> BasebackupId {
        self.clock.advance(Duration::from_secs(3600));
        let options = BuilderOptions {
            cluster: cluster(of),
            timeline: timeline(number),
            lsns: (within(segments.0), within(segments.1)),
            time: self.repository.clock().now(),
            ..testing::basebackup()
        };
        let parent = match parent {
            Some(id) => Some(Arc::new(Basebackup::open(&self.repository, id).await.unwrap())),
            None => None,
        };
        let mut builder = BasebackupBuilder::begin(&self.repository, options, parent).await.unwrap();
        builder.file("base/1/1259", file).await.unwrap();
        builder.finish().await.unwrap().id
    }

    async fn backup(&self, of: &str, number: u32, first: u64, last: u64) -> BasebackupId {
        self.backup_of(of, number, (first, last), &[7; 16384], None).await
    }

    /// Archives files in which no record is.
    async fn wal(&self, of: &str, number: u32, segments: impl IntoIterator<Item = u64>) {
        let cluster = cluster(of);
        for segment in segments {
            let name = WalSegmentName::new(timeline(number), WalSegmentNumber(segment), cluster.segment_size);
            let name = WalObjectName::Segment(name);
            archive_wal(&self.repository, cluster, name, b"x", &self.key, Compression::NONE).await.unwrap();
        }
    }

    async fn history(&self, of: &str, number: u32, parent: u32, switch: Lsn) {
        let branch = HistoryBranch { parent: timeline(parent), switch };
        archive_history(&self.repository, cluster(of), timeline(number), branch, b"x", &self.key)
            .await
            .unwrap();
    }

    async fn overview(&self) -> SiteOverview {
        overview::load(&self.repository).await.unwrap()
    }

    async fn worth(&self) -> Vec<Recoverability> {
        let listed = basebackups::list(&self.repository).await.unwrap().complete;
        recoverabilities(&self.repository, &listed).await.unwrap()
    }

    async fn plan(
        &self,
        target: &RecoveryTarget,
        until_hole: bool,
    ) -> Result<PlannedRecovery, RecoveryError> {
        plan_for_target(&self.repository, RecoveryRequest { basebackup: None, target, until_hole }).await
    }
}

fn target(target: Target) -> RecoveryTarget {
    RecoveryTarget { target, ..RecoveryTarget::latest(TargetAction::Promote) }
}

fn spans(planned: &PlannedRecovery) -> Vec<String> {
    let span = |span: &crate::catalog::TimelineSpan| format!("{}-{}", span.first, span.last.unwrap());
    planned.plan.spans.iter().map(span).collect()
}

/// Failure 12a: after pg_upgrade the new cluster's timeline 1 has the names of the old one's.
#[tokio::test]
async fn clusters_of_a_site_are_looked_at_each_by_itself() {
    let site = Site::create().await;
    let old = site.backup(OLD, 1, 3, 3).await;
    site.wal(OLD, 1, 3..6).await;
    let new = site.backup(NEW, 1, 8, 8).await;
    site.wal(NEW, 1, 8..10).await;
    let overview = site.overview().await;
    let ends: Vec<_> = overview
        .clusters
        .iter()
        .map(|found| (found.cluster, found.windows[&timeline(1)][0].window.end, found.basebackups.len()))
        .collect();
    assert_eq!(ends, [(cluster(OLD), Lsn(6 << 24), 1), (cluster(NEW), Lsn(10 << 24), 1)]);

    let chosen = |planned: PlannedRecovery| (planned.record.id, planned.record.cluster);
    let latest = site.plan(&target(Target::Latest), false).await.unwrap();
    assert_eq!(chosen(latest), (new, cluster(NEW)));
    // A position of the old cluster is none of the new one.
    let error = site.plan(&target(Target::Lsn(within(4))), false).await.unwrap_err();
    assert!(matches!(error, RecoveryError::NoneBefore { .. }), "{error}");
    let lsn = target(Target::Lsn(within(4)));
    let request = RecoveryRequest { basebackup: Some(&old.to_string()), target: &lsn, until_hole: false };
    assert_eq!(chosen(plan_for_target(&site.repository, request).await.unwrap()), (old, cluster(OLD)));
}

#[tokio::test]
async fn what_is_damaged_is_told_and_hides_nothing() {
    let site = Site::create().await;
    let [bad, torn, good] =
        [site.backup(OLD, 1, 3, 3).await, site.backup(OLD, 1, 4, 4).await, site.backup(OLD, 1, 5, 5).await];
    site.wal(OLD, 1, 3..8).await;
    site.history(OLD, 2, 1, within(6)).await;
    site.history(OLD, 3, 1, within(7)).await;
    let layout = site.repository.layout();
    let memory = site.store.inner().inner();
    memory.tamper(&layout.outcome(bad), |_| Some("{".into()));
    memory.tamper(&layout.refs(torn), |_| Some("x".into()));
    memory.tamper(&layout.history(cluster(OLD), timeline(2)), |_| Some("x".into()));

    let overview = site.overview().await;
    assert_eq!(overview.unreadable.iter().map(|(id, _)| *id).collect::<Vec<_>>(), [bad]);
    let found = &overview.clusters[0];
    let ids: Vec<_> = found.basebackups.iter().map(|b| (b.listed.record.id, b.refs.is_ok())).collect();
    assert_eq!(ids, [(torn, false), (good, true)]);
    assert_eq!(found.stored_bytes(), None, "a sum that lacks one of its parts is no sum");
    assert_eq!(found.damaged_histories.iter().map(|(t, _)| *t).collect::<Vec<_>>(), [timeline(2)]);
    assert_eq!(found.timelines().into_iter().collect::<Vec<_>>(), [1, 2, 3].map(timeline));
    assert!(found.tree.branch(timeline(3)).is_some());
    // Who recovers must not go by a tree that lacks a branch.
    assert!(site.plan(&target(Target::Latest), false).await.is_err());
}

/// Failure 21b: the stop segment was archived, an earlier one not, and the basebackup counted as good.
#[tokio::test]
async fn failure_21b_a_basebackup_counts_only_with_all_its_wal() {
    let site = Site::create().await;
    let ids = [site.backup(OLD, 1, 3, 5).await, site.backup(OLD, 1, 8, 8).await];
    site.wal(OLD, 1, [3, 5, 8, 9]).await;
    let overview = site.overview().await;
    let found = &overview.clusters[0];
    let missing = Recoverability::MissingWal("000000010000000000000004".parse().unwrap());
    let counted: Vec<_> = found.basebackups.iter().map(|b| b.recoverability).collect();
    assert_eq!(counted, [missing, Recoverability::Recoverable]);
    let windows = &found.windows[&timeline(1)];
    assert_eq!((windows.len(), &windows[0].basebackups[..]), (1, &ids[1..]));
    assert_eq!(site.worth().await, counted);
}

#[tokio::test]
async fn a_child_that_begins_with_a_copy_of_the_stop_segment_makes_up_for_it() {
    let site = Site::create().await;
    site.backup(OLD, 1, 3, 5).await;
    site.wal(OLD, 1, 3..5).await;
    let missing = Recoverability::MissingWal("000000010000000000000005".parse().unwrap());
    assert_eq!(site.worth().await, [missing]);
    site.history(OLD, 2, 1, within(5) + 0x100).await;
    site.wal(OLD, 2, 5..7).await;
    assert_eq!(site.worth().await, [Recoverability::Recoverable]);
    let overview = site.overview().await;
    assert_eq!(overview.clusters[0].basebackups[0].recoverability, Recoverability::Recoverable);
    assert_eq!(overview.clusters[0].windows.keys().collect::<Vec<_>>(), [&timeline(2)]);
}

#[tokio::test]
async fn to_count_the_recoverable_costs_a_page_of_names_for_each() {
    let site = Site::create().await;
    site.backup(OLD, 1, 3, 3).await;
    site.backup(OLD, 1, 30, 32).await;
    site.wal(OLD, 1, 3..2500).await;
    let listed = basebackups::list(&site.repository).await.unwrap().complete;
    site.store.take_calls();
    recoverabilities(&site.repository, &listed).await.unwrap();
    let calls = site.store.take_calls();
    let verbs: Vec<_> = calls.iter().map(|call| call.verb).collect();
    assert_eq!(verbs, [Verb::List; 3], "one for the histories and one for each basebackup: {calls:?}");
}

#[tokio::test]
async fn an_overview_asks_for_no_segment_but_the_last_of_a_window() {
    let site = Site::create().await;
    for first in [3, 10, 200] {
        site.backup(OLD, 1, first, first).await;
    }
    site.wal(OLD, 1, (3..150).chain(200..300)).await;
    site.history(OLD, 2, 1, within(120)).await;
    site.wal(OLD, 2, 120..2000).await;
    site.store.take_calls();
    let overview = site.overview().await;
    assert_eq!(overview.clusters[0].windows.values().map(Vec::len).sum::<usize>(), 3);
    let calls = site.store.take_calls();
    let of_wal = |verb| calls.iter().filter(|call| call.verb == verb && call.key.contains("/wal/")).count();
    // Both timelines are listed by the page; each of three ends is asked for once, and read, with the few segments
    // before it among which a transaction is looked for.
    assert_eq!(of_wal(Verb::List), 1 + 2);
    assert_eq!(of_wal(Verb::Head), 3);
    assert!(calls.len() < 3 * 16 + 60, "{}", calls.len());
}

#[tokio::test]
async fn a_pack_that_two_basebackups_name_is_stored_once() {
    let site = Site::create().await;
    let file: Vec<u8> = (0..1 << 17).map(|at: u32| (at >> 13) as u8 + 1).collect();
    let first = site.backup_of(OLD, 1, (3, 3), &file, None).await;
    let alone = site.overview().await.clusters[0].stored_bytes().unwrap();
    let mut changed = file.clone();
    changed[0] = 99;
    site.backup_of(OLD, 1, (4, 4), &changed, Some(first)).await;
    let both = site.overview().await.clusters[0].stored_bytes().unwrap();
    assert!(alone.stored > 1 << 17 && both.stored > alone.stored, "{alone:?} {both:?}");
    assert!(both.stored < alone.stored + (1 << 16), "{alone:?} {both:?}");
    assert!(both.live >= 1 << 17 && both.live < both.stored, "{both:?}");
}

#[tokio::test]
async fn a_target_behind_a_hole_is_refused_or_ends_before_it() {
    let site = Site::create().await;
    let id = site.backup(OLD, 1, 3, 4).await;
    site.wal(OLD, 1, [3, 4, 5, 8, 9]).await;
    let whole = ["000000010000000000000003-000000010000000000000005"];
    for (asked, reached) in [
        (Target::Lsn(within(5)), Some(whole)),
        (Target::Immediate, Some(["000000010000000000000003-000000010000000000000004"])),
        (Target::Latest, None),
        (Target::Lsn(Lsn(6 << 24)), None),
        (Target::Lsn(within(8)), None),
        (Target::Xid("740".to_owned()), None),
        (Target::Name("before".to_owned()), None),
        (Target::Time("2026-11-20T12:00:00Z".parse().unwrap()), None),
    ] {
        let shown = asked.to_string();
        let request = target(asked);
        let planned = site.plan(&request, false).await;
        let accepted = site.plan(&request, true).await.unwrap();
        if let Some(reached) = reached {
            let planned = planned.unwrap();
            assert_eq!(spans(&planned), reached, "{shown}");
            assert_eq!((planned.target, planned.accepted_hole), (request.clone(), None));
            // Leave that is not needed changes nothing.
            assert_eq!((accepted.target, accepted.accepted_hole), (request, None));
            continue;
        }
        let error = planned.unwrap_err();
        let RecoveryError::Plan(PlanError::Hole { hole, reach, .. }) = &error else { panic!("{error}") };
        assert_eq!((hole.missing[0].segments, reach.end, reach.basebackup), (2, Lsn(6 << 24), id), "{shown}");
        assert_eq!(spans(&accepted), whole);
        assert_eq!(accepted.target.target, Target::Latest);
        assert_eq!(accepted.accepted_hole.unwrap(), *hole);
    }
}

#[tokio::test]
async fn a_segment_that_comes_while_it_is_looked_for_is_no_hole() {
    let site = Site::create().await;
    site.backup(OLD, 1, 3, 3).await;
    site.wal(OLD, 1, [3, 4, 6]).await;
    let second_look = Rule::on(Verb::List, Fault::Delay(Duration::from_millis(50))).key("/wal/").skip(1);
    site.store.inner().inject(second_look);
    let latest = target(Target::Latest);
    let (planned, ()) = futures::join!(site.plan(&latest, false), async {
        tokio::task::yield_now().await;
        site.wal(OLD, 1, [5]).await;
    });
    assert_eq!(spans(&planned.unwrap()), ["000000010000000000000003-000000010000000000000006"]);
}

#[tokio::test]
async fn wal_that_is_damaged_is_said_and_decides_nothing() {
    let site = Site::create().await;
    site.backup(OLD, 1, 3, 3).await;
    site.wal(OLD, 1, 3..6).await;
    let last = WalObjectName::Segment("000000010000000000000005".parse().unwrap());
    let key = site.repository.layout().wal_object(cluster(OLD), last);
    site.store.inner().inner().tamper(&key, |bytes| bytes.map(|bytes| bytes.slice(..bytes.len() / 2)));
    let overview = site.overview().await;
    let end = &overview.clusters[0].windows[&timeline(1)][0].end;
    assert!(end.last_transaction.as_ref().unwrap_err().contains("000000010000000000000005"), "{end:?}");
    let time = target(Target::Time("2026-11-20T12:00:00Z".parse().unwrap()));
    let error = site.plan(&time, true).await.unwrap_err();
    assert!(matches!(error, RecoveryError::Repository(_)), "{error}");
}

/// Failure 26: a target before the end of the backup, or after the last commit.
#[tokio::test]
async fn failure_26_targets_outside_the_archive_are_refused_with_the_window() {
    let site = Site::create().await;
    let id = site.backup(OLD, 1, 3, 4).await;
    site.wal(OLD, 1, 3..6).await;
    let plan = async |asked| site.plan(&target(asked), false).await;
    for asked in [
        Target::Lsn(Lsn(6 << 24)),
        Target::Lsn(within(9)),
        // No transaction ended in this WAL.
        Target::Time("2026-11-20T12:00:00Z".parse().unwrap()),
    ] {
        let error = plan(asked).await.unwrap_err();
        assert!(matches!(error, RecoveryError::Plan(PlanError::BeyondArchive { .. })), "{error}");
        let message = error.to_string();
        assert!(
            message.contains(&format!("basebackup {id} on timeline 1 can end from 0/4000028")),
            "{message}"
        );
        assert!(message.ends_with("to 0/6000000"), "{message}");
    }
    for early in [Target::Lsn(within(3)), Target::Time("2026-11-20T10:30:00Z".parse().unwrap())] {
        let error = plan(early).await.unwrap_err();
        assert!(matches!(error, RecoveryError::NoneBefore { .. }), "{error}");
        let window = format!("basebackup {id} on timeline 1 can end from 0/4000028 (");
        assert!(error.to_string().contains(&window), "{error}");
    }
    for nowhere in [Target::Xid("740".to_owned()), Target::Name("x".to_owned())] {
        let error = plan(nowhere).await.unwrap_err();
        assert!(matches!(error, RecoveryError::Plan(PlanError::NotFound { .. })), "{error}");
        assert!(error.to_string().ends_with("to 0/6000000"), "{error}");
    }
    assert_eq!(plan(Target::Lsn(within(5))).await.unwrap().accepted_hole, None);
}

/// A restore point may lie before the newest basebackup, and only the WAL tells.
#[tokio::test]
async fn a_target_that_only_the_wal_tells_is_looked_for_from_older_basebackups_too() {
    let site = Site::create().await;
    let ids = [site.backup(OLD, 1, 3, 3).await, site.backup(OLD, 1, 300, 300).await];
    site.wal(OLD, 1, 3..310).await;
    let named = target(Target::Name("noon".to_owned()));
    site.store.take_calls();
    let planned = site.plan(&named, false).await.unwrap();
    // In ten segments behind the newest it is not; the older one has more than are read, and the server decides.
    assert_eq!((planned.record.id, planned.unproven), (ids[0], true));
    assert!(planned.warnings()[0].contains("restore point \"noon\" was not found in the first 256"));
    let calls = site.store.take_calls();
    let reads = calls.iter().filter(|call| call.verb == Verb::Get && call.key.contains("/wal/")).count();
    assert!(reads <= 10 + SEGMENTS_FORWARD_MAX, "{reads}");
    // Who names a basebackup means it.
    let newest = ids[1].to_string();
    let request = RecoveryRequest { basebackup: Some(&newest), target: &named, until_hole: true };
    let error = plan_for_target(&site.repository, request).await.unwrap_err();
    assert!(matches!(error, RecoveryError::Plan(PlanError::NotFound { .. })), "{error}");
}

/// PostgreSQL's `latest` is the highest number: a server that was restored on trial and promoted is that, too.
#[tokio::test]
async fn what_the_way_leaves_behind_is_said() {
    let site = Site::create().await;
    site.backup(OLD, 1, 3, 3).await;
    site.history(OLD, 2, 1, within(6)).await;
    site.wal(OLD, 1, 3..12).await;
    site.wal(OLD, 2, 6..8).await;
    let planned = site.plan(&target(Target::Latest), false).await.unwrap();
    assert_eq!(planned.timeline, timeline(2));
    let [warning] = &planned.warnings()[..] else { panic!("{:?}", planned.warnings()) };
    assert!(warning.contains("left timeline 1 at 0/6000028") && warning.contains("--target-timeline 1"));
    assert!(warning.contains("up to 00000001000000000000000B"), "{warning}");
    let named = RecoveryTarget { timeline: Some(timeline(2)), ..target(Target::Latest) };
    for silent in [named, target(Target::Immediate), target(Target::Lsn(within(5)))] {
        assert!(site.plan(&silent, false).await.unwrap().warnings().is_empty(), "{silent:?}");
    }
}

/// Failure 9: a missing `.history` made recovery stop on the older timeline.
#[tokio::test]
async fn failure_9_no_timeline_is_the_newest_while_one_has_no_history() {
    let site = Site::create().await;
    site.backup(OLD, 1, 3, 3).await;
    site.wal(OLD, 1, 3..6).await;
    site.wal(OLD, 2, 6..9).await;
    let named = |number| RecoveryTarget { timeline: Some(timeline(number)), ..target(Target::Latest) };
    for asked in [target(Target::Latest), target(Target::Lsn(within(4))), named(2)] {
        let error = site.plan(&asked, true).await.unwrap_err();
        assert!(error.to_string().contains("timeline 2"), "{error}");
    }
    for accepted in [named(1), target(Target::Immediate)] {
        assert_eq!(site.plan(&accepted, false).await.unwrap().timeline, timeline(1));
    }
    site.history(OLD, 2, 1, within(6)).await;
    let planned = site.plan(&target(Target::Latest), false).await.unwrap();
    assert_eq!((planned.timeline, planned.plan.spans.len()), (timeline(2), 2));
}

#[tokio::test]
async fn a_timeline_is_recovered_from_a_basebackup_that_leads_to_it() {
    let site = Site::create().await;
    let first = site.backup(OLD, 1, 3, 3).await;
    site.history(OLD, 2, 1, within(6)).await;
    site.wal(OLD, 1, 3..9).await;
    let named = |number| RecoveryTarget { timeline: Some(timeline(number)), ..target(Target::Latest) };
    // No WAL of timeline 2 has come yet: of the switch-point segment there is what its parent has.
    let early = site.plan(&target(Target::Latest), false).await.unwrap();
    assert_eq!(spans(&early), ["000000010000000000000003-000000010000000000000006"]);
    assert_eq!((early.timeline, early.plan.spans[0].end), (timeline(2), Some(within(6))));
    site.wal(OLD, 2, 6..9).await;
    let second = site.backup(OLD, 2, 7, 7).await;
    let planned = site.plan(&named(2), false).await.unwrap();
    assert_eq!((planned.record.id, planned.timeline), (second, timeline(2)));
    let planned = site.plan(&named(1), false).await.unwrap();
    assert_eq!((planned.record.id, planned.timeline), (first, timeline(1)));
    assert_eq!(spans(&planned), ["000000010000000000000003-000000010000000000000008"]);
    let error = site.plan(&named(7), false).await.unwrap_err();
    assert!(matches!(error, RecoveryError::NoneOnTimeline { .. }), "{error}");
    assert!(error.hint().is_some());
}
