//! The whole way of a WAL segment: ended on the server, archived by it, and read back here.
//!
//! Everything that can be wrong with an archive_command (the account, the configuration it sees, the network, the
//! keys) shows here and nowhere else.

use std::time::Duration;

use crate::backup::{ArchiverStatus, ServerFacts, switch_wal};
use crate::clock::Clock;
use crate::pg::{WalSegmentName, WalSegmentNumber};
use crate::replication::Session;
use crate::repo::layout::WalObjectName;
use crate::repo::wal_object::{read_wal, verify_wal};
use crate::repo::{Error, ErrorKind, Repository};
use crate::site::item::{Item, describe};
use crate::site::server::cluster_of;

const NAME: &str = "WAL round trip";
/// Between two looks at the archive, growing from the first to the last.
const POLL: (Duration, Duration) = (Duration::from_millis(100), Duration::from_secs(2));
/// What to look at where the archiver has no part in it.
const RECEIVER_HINT: &str =
    "Start `walden daemon` or `walden wal receive`; where one runs its log says what keeps it.";

/// Ends a segment on a primary and waits until it can be read from the archive, for as long as `patience`; `received` says
/// that its WAL comes by streaming.
pub async fn check_wal_round_trip(
    repository: &Repository,
    session: &Session,
    facts: &ServerFacts,
    received: bool,
    patience: Duration,
    clock: &dyn Clock,
) -> Item {
    if facts.identity.in_recovery {
        return Item::skipped(NAME, "a standby cannot end a WAL segment; its primary archives");
    }
    if !facts.archives() && !received {
        return Item::skipped(NAME, "archive_mode is off");
    }
    let end = match switch_wal(session).await {
        Ok(end) => end,
        Err(error) => {
            let hint = error.hint().unwrap_or_else(|| "The server's log may say more.".to_owned());
            return Item::failed(NAME, describe(&error), hint);
        }
    };
    let size = facts.wal_segment_size;
    let segment = WalSegmentName::new(facts.identity.timeline, WalSegmentNumber::ending_at(end, size), size);
    let began = clock.monotonic();
    let mut pause = POLL.0;
    loop {
        let waited = clock.monotonic().duration_since(began);
        match read_back(repository, facts, segment).await {
            Ok(how) => {
                let seconds = (waited.as_millis() / 100) as f64 / 10.0;
                return Item::ok(NAME, format!("{segment} was in the archive after {seconds:.1} s, {how}"));
            }
            Err(error) if !may_come(&error) => {
                let hint = error.hint().unwrap_or("The message says what to mend.");
                return Item::failed(NAME, describe(&error), hint);
            }
            Err(error) if waited >= patience => {
                let why = if error.is_absent() { String::new() } else { format!(": {}", describe(&error)) };
                let seconds = waited.as_secs();
                let detail = format!("{segment} could not be read from the archive after {seconds} s{why}");
                let hint = if received { RECEIVER_HINT.to_owned() } else { archiver_hint(session).await };
                return Item::failed(NAME, detail, hint);
            }
            Err(_) => {}
        }
        tokio::time::sleep(pause.min(patience.saturating_sub(waited))).await;
        pause = (pause * 2).min(POLL.1);
    }
}

fn may_come(error: &Error) -> bool {
    matches!(error.kind(), ErrorKind::Absent | ErrorKind::Retry)
}

/// Reads the segment back as far as this host can, and says how far that was.
async fn read_back(
    repository: &Repository,
    facts: &ServerFacts,
    segment: WalSegmentName,
) -> Result<&'static str, Error> {
    let (cluster, name) = (cluster_of(facts), WalObjectName::Segment(segment));
    let (size, how) = if repository.keyring().can_read() {
        (read_wal(repository, cluster, name).await?.len() as u64, "read back and opened")
    } else {
        let header = verify_wal(repository, cluster, name).await?;
        (header.raw_size, "read back and its signature and digest checked; no private key here opens it")
    };
    if size == u64::from(facts.wal_segment_size.bytes()) {
        return Ok(how);
    }
    let detail = format!("it holds {size} bytes and no whole segment");
    Err(Error::Damaged { object: format!("WAL file {segment}"), detail })
}

/// Says what the server knows about why a segment did not come.
async fn archiver_hint(session: &Session) -> String {
    let failing = ArchiverStatus::ask(session).await.ok().and_then(|archiver| archiver.last_failed_wal);
    match failing {
        Some(failed) => format!(
            "The server's archiver failed with {failed}; the server's log has what the archive_command said."
        ),
        None => "Look whether archive_command archives into this site, and whether it is slow or stuck."
            .to_owned(),
    }
}
