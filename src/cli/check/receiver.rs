//! What `check` says of receiving by what the receiver wrote down on this host: whether WAL comes in and is stored, and
//! what is missing for good, which is a failure until a basebackup lies behind it. What it wrote is believed for a minute:
//! a receiver that is killed leaves it as it was.
//! Read only: the receiver itself forgets what lies before a basebackup.

use jiff::Timestamp;

use crate::catalog::basebackups;
use crate::config::{Config, SiteConfig, WalSource};
use crate::pg::Lsn;
use crate::repo::Repository;
use crate::site::{Item, describe};
use crate::wal::left_out::RecoveryStart;
use crate::wal::receive::{Gap, ReceiveState, STATE_FILE, read_state, spool_of};

const RECEIVER: &str = "receiver";
const MISSING: &str = "WAL missing";

/// Looks at what a receiver on this host wrote down; nothing to say where none ever ran.
pub(super) async fn check_receiver(
    config: &Config,
    site: &SiteConfig,
    repository: Option<&Repository>,
    now: Timestamp,
) -> Vec<Item> {
    let folder = spool_of(&config.paths.state, &site.name);
    let receives = site.wal == WalSource::Receive;
    let state = match read_state(&folder) {
        Ok(Some(state)) => state,
        Ok(None) => return Vec::new(),
        Err(error) => {
            let hint = "The receiver writes it anew at its start; its log says what it could not do.";
            return vec![Item::warning(RECEIVER, describe(&error), hint)];
        }
    };
    let mut items = Vec::new();
    if receives {
        let file = folder.join(STATE_FILE);
        items.push(judge_receiver(&state, &file.display().to_string(), now));
    }
    if receives || !state.gaps.is_empty() {
        // What cannot be listed is behind nothing.
        let listed = match repository {
            Some(repository) if !state.gaps.is_empty() => {
                basebackups::list(repository).await.unwrap_or_default()
            }
            _ => basebackups::BasebackupList::default(),
        };
        let starts: Vec<_> = listed.complete.iter().map(|listed| RecoveryStart::of(&listed.record)).collect();
        items.push(judge_gaps(&state.gaps, &starts));
    }
    items
}

const START: &str = "Start `walden daemon` or `walden wal receive`";

fn judge_receiver(state: &ReceiveState, file: &str, now: Timestamp) -> Item {
    let position = |lsn: Option<Lsn>| lsn.map_or("nothing".to_owned(), |lsn| lsn.to_string());
    let reached = format!("received: {}, stored: {}", position(state.received), position(state.stored));
    let problems = [&state.store_problem, &state.receive_problem].into_iter().flatten();
    let mut wrong: Vec<String> =
        problems.map(|problem| format!("{} (since {})", problem.message, problem.since)).collect();
    if state.paused {
        wrong.push("receiving pauses: the spool's volume is too full".to_owned());
    }
    if state.is_abandoned(now) {
        let before = if wrong.is_empty() { "" } else { "; before that: " };
        let detail =
            format!("no receiver has run since {}; {reached}{before}{}", state.written_at, wrong.join("; "));
        let hint = format!("{START}; where another host receives now, remove \"{file}\".");
        return Item::failed(RECEIVER, detail, hint);
    }
    if !wrong.is_empty() {
        let hint = format!(
            "It is tried again until the cause is mended; where another host receives now, remove \"{file}\"."
        );
        return Item::failed(RECEIVER, wrong.join("; "), hint);
    }
    match &state.server {
        Some(server) if state.streaming => Item::ok(RECEIVER, format!("from {server}; {reached}")),
        _ => Item::warning(RECEIVER, format!("it receives nothing; {reached}"), format!("{START}.")),
    }
}

fn judge_gaps(gaps: &[Gap], starts: &[RecoveryStart]) -> Item {
    let open: Vec<&Gap> =
        gaps.iter().filter(|gap| !starts.iter().any(|start| gap.lies_before(start))).collect();
    match (open.last(), gaps.len()) {
        (None, 0) => Item::ok(MISSING, "none"),
        (None, count) => Item::ok(MISSING, format!("{count} gaps, all before a basebackup")),
        (Some(gap), _) => {
            let others = match open.len() {
                1 => String::new(),
                count => format!(", and {} gaps before it", count - 1),
            };
            let Gap { timeline, from, to, noticed_at, .. } = gap;
            let detail = format!(
                "{from} to {to} on timeline {timeline}, which no server has any more (noticed {noticed_at}){others}"
            );
            Item::failed(MISSING, detail, "Take a new basebackup: nothing is recovered across the gap.")
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::pg::TimelineId;
    use crate::site::Status;
    use crate::wal::receive::Problem;

    fn at(time: &str) -> Timestamp {
        format!("2026-11-21T{time}Z").parse().unwrap()
    }

    fn receiving() -> ReceiveState {
        ReceiveState {
            written_at: at("10:00:00"),
            streaming: true,
            server: Some("db1".into()),
            received: Some(Lsn(0x300_0000)),
            ..ReceiveState::default()
        }
    }

    #[test]
    fn a_receiver_is_as_good_as_what_it_says() {
        let problem = |message: &str| Some(Problem { message: message.into(), since: at("10:00:00") });
        let said = |state: ReceiveState| {
            let item = judge_receiver(&state, "receive.json", at("10:00:30"));
            (item.status, item.detail)
        };
        let well = "from db1; received: 0/3000000, stored: nothing".to_owned();
        assert_eq!(said(receiving()), (Status::Ok, well));
        assert_eq!(said(ReceiveState { streaming: false, ..receiving() }).0, Status::Warning);
        for (state, words) in [
            (ReceiveState { receive_problem: problem("no server"), ..receiving() }, "no server"),
            (ReceiveState { store_problem: problem("no store"), ..receiving() }, "no store"),
            (ReceiveState { paused: true, ..receiving() }, "too full"),
        ] {
            let (status, detail) = said(state);
            assert!(status == Status::Failed && detail.contains(words), "{detail}");
        }
        let both = ReceiveState { receive_problem: problem("a"), store_problem: problem("b"), ..receiving() };
        assert_eq!(said(both).1, "b (since 2026-11-21T10:00:00Z); a (since 2026-11-21T10:00:00Z)");
    }

    #[test]
    fn a_receiver_that_ended_without_a_word_is_not_believed() {
        let judged = |state: &ReceiveState, time| judge_receiver(state, "receive.json", at(time));
        let killed = receiving();
        assert_eq!(judged(&killed, "10:00:59").status, Status::Ok);
        let item = judged(&killed, "10:01:01");
        let said = "no receiver has run since 2026-11-21T10:00:00Z; received: 0/3000000, stored: nothing";
        assert_eq!((item.status, item.detail.as_str()), (Status::Failed, said));
        assert!(item.hint.unwrap().contains("walden daemon"));
        // One that was stopped is missed as well.
        let stopped = ReceiveState { streaming: false, ..receiving() };
        assert_eq!(judged(&stopped, "11:00:00").detail, said);
        let since = at("09:00:00");
        let problem = Some(Problem { message: "no server".into(), since });
        let detail = judged(&ReceiveState { receive_problem: problem, ..receiving() }, "11:00:00").detail;
        assert_eq!(detail, format!("{said}; before that: no server (since {since})"));
    }

    #[test]
    fn missing_wal_fails_until_a_basebackup_lies_behind_all_of_it() {
        let cluster = "7-16".parse().unwrap();
        let timeline = TimelineId::FIRST;
        let noticed_at = "2026-11-21T10:00:00Z".parse().unwrap();
        let gap = |from, to| Gap { cluster, timeline, from: Lsn(from), to: Lsn(to), noticed_at };
        let gaps = [gap(0x100, 0x200), gap(0x500, 0x600)];
        let start = |lsn| RecoveryStart { cluster, timeline, lsn: Lsn(lsn) };
        assert_eq!(judge_gaps(&[], &[]).status, Status::Ok);
        let all = judge_gaps(&gaps, &[start(0x100)]);
        assert_eq!(all.status, Status::Failed);
        assert!(all.detail.starts_with("0/500 to 0/600 on timeline 1") && all.detail.ends_with("before it"));
        let one = judge_gaps(&gaps, &[start(0x300)]);
        assert!(one.status == Status::Failed && one.detail.ends_with("10:00:00Z)"), "{}", one.detail);
        assert_eq!(judge_gaps(&gaps, &[start(0x300), start(0x600)]).status, Status::Ok);
    }
}
