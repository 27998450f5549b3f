//! What each refusal says: why, and from where to where recovery can end instead.

use super::*;
use crate::catalog::recovery_decision::{TargetPlace, plan_recovery, window_for};
use crate::catalog::timeline_tree::TimelineTree;
use crate::catalog::wal_coverage::WalCoverage;

impl Site {
    /// Plans from a basebackup that is named, and returns what the refusal says.
    async fn refusal_of(&self, id: BasebackupId, target: &RecoveryTarget) -> String {
        let id = id.to_string();
        let request = RecoveryRequest { basebackup: Some(&id), target, until_hole: false };
        let error = plan_for_target(&self.repository, request).await.unwrap_err();
        assert!(error.hint().is_some(), "{error}");
        error.to_string()
    }

    /// Plans from whatever basebackup fits, and returns what the refusal says.
    async fn refusal(&self, target: &RecoveryTarget) -> String {
        let error = self.plan(target, false).await.unwrap_err();
        assert!(error.hint().is_some(), "{error}");
        error.to_string()
    }
}

fn on(number: u32) -> RecoveryTarget {
    RecoveryTarget { timeline: Some(timeline(number)), ..target(Target::Latest) }
}

const EARLY_TIME: &str = "2026-11-20T10:30:00Z";

fn early_time() -> Target {
    Target::Time(EARLY_TIME.parse().unwrap())
}

/// The basebackup of 11:00, from within segment 3 to within segment 4, with WAL up to segment 5.
async fn whole_site() -> (Site, BasebackupId, String) {
    let site = Site::create().await;
    let id = site.backup(OLD, 1, 3, 4).await;
    site.wal(OLD, 1, 3..6).await;
    let window = format!(
        "recovery from basebackup {id} on timeline 1 can end from 0/4000028 (2026-11-20T11:00:00Z) to 0/6000000"
    );
    (site, id, window)
}

#[tokio::test]
async fn a_target_before_the_end_of_the_basebackup_is_refused_with_its_window() {
    let (site, id, window) = whole_site().await;
    for (asked, shown) in
        [(Target::Lsn(within(3)), "LSN 0/3000028".to_owned()), (early_time(), format!("time {EARLY_TIME}"))]
    {
        let asked = target(asked);
        assert_eq!(
            site.refusal(&asked).await,
            format!("no basebackup ended before {shown}, not even the oldest: {window}")
        );
        assert_eq!(
            site.refusal_of(id, &asked).await,
            format!("{shown} is before the end of basebackup {id}: {window}")
        );
    }
    // What was read may lie there, too.
    let named = target(Target::Name("dawn".to_owned()));
    let record = &site.plan(&target(Target::Latest), false).await.unwrap().record;
    let tree = TimelineTree::load(&site.repository, record.cluster).await.unwrap();
    let coverage = WalCoverage::load(&site.repository, record.cluster).await.unwrap();
    let reached = window_for(record, &tree, &coverage, &named.target, timeline(1)).unwrap();
    let place = TargetPlace::TooEarly(None);
    let error = plan_recovery(record, &tree, &reached, &named, place, false).unwrap_err();
    assert_eq!(
        error.to_string(),
        format!("restore point \"dawn\" is before the end of basebackup {id}: {window}")
    );
}

#[tokio::test]
async fn a_target_behind_the_archive_is_refused_with_the_window() {
    let (site, _, window) = whole_site().await;
    for (asked, expected) in [
        (Target::Lsn(within(6)), "the archive ends before LSN 0/6000028"),
        (Target::Name("noon".to_owned()), "restore point \"noon\" is not in the archived WAL"),
        (Target::Xid("740".to_owned()), "transaction 740 is not in the archived WAL"),
    ] {
        assert_eq!(site.refusal(&target(asked)).await, format!("{expected}: {window}"));
    }
    site.wal(OLD, 1, [7]).await;
    assert_eq!(
        site.refusal(&target(Target::Latest)).await,
        format!(
            "WAL segment 000000010000000000000006 is missing from the archive on the way to the end of the archive: \
             {window}"
        )
    );
}

#[tokio::test]
async fn a_timeline_that_no_basebackup_leads_to_is_refused_with_the_window_there_is() {
    let (site, id, window) = whole_site().await;
    // Another timeline that left the first before the basebackup ended.
    site.history(OLD, 2, 1, within(3)).await;
    site.wal(OLD, 2, 3..9).await;
    for number in [2, 7] {
        assert_eq!(
            site.refusal(&on(number)).await,
            format!(
                "no basebackup before the end of the archive lies on the way to timeline {number}, not even the \
                 newest: {window}"
            )
        );
        assert_eq!(
            site.refusal_of(id, &on(number)).await,
            format!(
                "timeline {number} does not contain basebackup {id}, which ended on timeline 1: {window}"
            )
        );
    }
}

#[tokio::test]
async fn a_history_that_is_missing_is_refused_with_what_is_reached_without_it_or_with_it() {
    let (site, id, window) = whole_site().await;
    site.wal(OLD, 2, 6..8).await;
    let missing = "the history file of timeline 2 is missing from the archive";
    for refusal in
        [site.refusal(&target(Target::Latest)).await, site.refusal_of(id, &target(Target::Latest)).await]
    {
        assert_eq!(refusal, format!("{missing}: {window}"));
    }
    // No server recovers a basebackup of a timeline without its history.
    let id = site.backup(OLD, 2, 6, 6).await;
    assert_eq!(
        site.refusal(&target(Target::Latest)).await,
        format!(
            "{missing}: with it, recovery from basebackup {id} on timeline 2 can end from 0/6000028 \
             (2026-11-20T12:00:00Z) to 0/8000000"
        )
    );
}

/// There is no window then, and each refusal says so.
#[tokio::test]
async fn where_nothing_can_be_reached_that_is_said_instead_of_a_window() {
    let site = Site::create().await;
    let id = site.backup(OLD, 1, 3, 4).await;
    site.wal(OLD, 1, [4, 5]).await;
    let nothing = format!(
        "basebackup {id} cannot be recovered to any target on timeline 1: WAL segment 000000010000000000000003 is \
         missing from the archive"
    );
    for asked in [Target::Latest, Target::Immediate, Target::Lsn(within(5))] {
        assert_eq!(site.refusal(&target(asked)).await, nothing);
    }
    assert_eq!(
        site.refusal(&target(early_time())).await,
        format!("no basebackup ended before time {EARLY_TIME}, not even the oldest: {nothing}")
    );
    assert_eq!(
        site.refusal_of(id, &on(7)).await,
        format!("timeline 7 does not contain basebackup {id}, which ended on timeline 1: {nothing}")
    );
}
