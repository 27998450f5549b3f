//! The servers of the site, asked in turn: who answers, what it is, and the slot it keeps for us.
//!
//! A primary is taken before a standby, because commits wait for what the primary is told; a standby is better than
//! nobody, and in a failover it is the one that will be promoted. The slot's facts come by SQL. A role that may only
//! replicate asks for less by READ_REPLICATION_SLOT, and before PostgreSQL 15 goes without: there START_REPLICATION
//! takes a slot that was lost, and the WAL it should have kept is found to be gone.

use std::time::Duration;

use crate::pg::{Lsn, TimelineHistory, TimelineId, WalSegmentName, WalSegmentSize};
use crate::replication::{ConnectOptions, Error as SessionError, Param, ReplicationConnection, Session};
use crate::repo::ClusterId;
use crate::wal::Error;
use crate::wal::receive::plan::{ServerFacts, SlotFacts, Unfit, plan_start};
use crate::wal::spool::Position;

/// A server to receive from.
pub(super) struct Candidate {
    pub connection: ReplicationConnection,
    pub options: ConnectOptions,
    pub facts: ServerFacts,
    /// Whether it is known to be no standby: a role that may run no statement cannot tell of version 13.
    pub is_primary: bool,
    /// The history files of its timeline and its ancestors, as far as it has them.
    pub histories: Vec<(TimelineId, Vec<u8>)>,
}

/// What the servers of a site amount to.
pub(super) enum Choice {
    /// This one has what comes next.
    Server(Candidate),
    /// Those that fit have removed it; this is the first of them, or the first primary.
    Removed {
        candidate: Candidate,
        /// Where the oldest WAL begins that any of them has behind what is wanted, as far as they tell.
        oldest: Option<Lsn>,
        /// Why another one, which may have kept it, cannot be asked, if so.
        unheard: Option<String>,
    },
}

/// What is asked by SQL is answered from memory. A server that hangs must not keep us from the others (failure 39);
/// replication commands have a limit of their own.
const STATEMENT_TIMEOUT: Duration = Duration::from_secs(30);

/// Asks the servers in turn, and returns the first primary that fits, else the first standby; those in `removed` come
/// last, by their addresses. Servers of another cluster than `cluster` are passed over.
///
/// # Errors
/// `OtherCluster` where all servers are of another; else the last refusal, where none fits.
pub(super) async fn choose(
    nodes: &[ConnectOptions],
    cluster: Option<ClusterId>,
    here: Option<Position>,
    removed: &[String],
) -> Result<Choice, Error> {
    let (mut standby, mut last_resort, mut failure) = (None, None::<Candidate>, None);
    let (mut foreign, mut foreign_count, mut unheard, mut oldest) = (None, 0, None, None);
    for options in nodes {
        let candidate = match ask(options).await {
            Ok(candidate) => candidate,
            Err(error) => {
                tracing::debug!("server passed over: {error}");
                unheard = Some(error.to_string());
                failure = worse(failure, error.into());
                continue;
            }
        };
        let found = candidate.facts.cluster();
        if let Some(expected) = cluster.filter(|expected| *expected != found) {
            foreign = Some((candidate, Error::OtherCluster { expected, found }));
            foreign_count += 1;
            continue;
        }
        let is_removed = removed.iter().any(|address| address == candidate.connection.address());
        match plan_start(&candidate.facts, here, None) {
            Err(unfit) => {
                // One that was started again does not know what it has before it has replayed it.
                let may_have_it = candidate.facts.standby && matches!(unfit, Unfit::Behind { .. });
                let error = unfit_error(&candidate, unfit);
                if may_have_it {
                    unheard = Some(error.to_string());
                }
                failure = worse(failure, error);
            }
            Ok(wanted) if is_removed => {
                let has = oldest_behind(options, wanted, found.segment_size).await;
                oldest = has.into_iter().chain(oldest).min();
                match &last_resort {
                    // A primary keeps a slot for us.
                    Some(known) if candidate.facts.standby || !known.facts.standby => {}
                    _ => last_resort = Some(candidate),
                }
            }
            Ok(_) if !candidate.facts.standby => return Ok(Choice::Server(candidate)),
            Ok(_) => standby = standby.or(Some(candidate)),
        }
    }
    let nobody = || SessionError::Settings { detail: "the site has no connection".into() }.into();
    let removed = last_resort.map(|candidate| Choice::Removed { candidate, oldest, unheard });
    let choice = standby.map(Choice::Server).or(removed);
    choice.ok_or_else(|| match foreign {
        Some((_, error)) if foreign_count == nodes.len() => error,
        // Another one, which does not answer now, may be ours.
        Some((candidate, error)) => Error::UnfitServer {
            address: candidate.connection.address().to_owned(),
            detail: error.to_string(),
        },
        None => failure.unwrap_or_else(nobody),
    })
}

/// Returns what to tell of two failures: that one server was set back, or else the later.
fn worse(known: Option<Error>, next: Error) -> Option<Error> {
    Some(known.filter(|known| matches!(known, Error::SetBack { .. })).unwrap_or(next))
}

pub(super) fn unfit_error(candidate: &Candidate, unfit: Unfit) -> Error {
    let address = candidate.connection.address().to_owned();
    match unfit {
        // A server sends nothing that it has not flushed, and a standby gets no more than its primary has.
        Unfit::Behind { timeline, flushed, here } if candidate.is_primary => {
            Error::SetBack { address, timeline, flushed, here }
        }
        unfit => Error::UnfitServer { address, detail: unfit.to_string() },
    }
}

async fn ask(options: &ConnectOptions) -> Result<Candidate, SessionError> {
    let mut connection = ReplicationConnection::connect(options).await?;
    let identity = connection.identify().await?;
    let segment_size = parse_segment_size(&connection.setting("wal_segment_size").await?)?;
    let cluster_name = connection.setting("cluster_name").await?;
    let standby = match connection.setting("in_hot_standby").await {
        Ok(value) => Some(value == "on"),
        // PostgreSQL 13 has no such setting.
        Err(SessionError::Sql { .. }) => is_in_recovery(options).await?,
        Err(error) => return Err(error),
    };
    let (histories, history) = histories(&mut connection, identity.timeline).await?;
    let is_primary = standby == Some(false);
    let standby = standby.unwrap_or(false);
    let facts = ServerFacts { identity, segment_size, history, standby, cluster_name };
    Ok(Candidate { connection, options: options.clone(), facts, is_primary, histories })
}

/// Asks by SQL; nothing where the role may not.
///
/// # Errors
/// Where the server does not answer: one that hangs is no primary.
async fn is_in_recovery(options: &ConnectOptions) -> Result<Option<bool>, SessionError> {
    let asked = async {
        let session = Session::connect(options).await?;
        let row = in_time(session.query_one("SELECT pg_is_in_recovery() AS standby", &[])).await?;
        row.bool("standby")
    };
    match asked.await {
        Err(
            error @ (SessionError::Lost { .. }
            | SessionError::Unreachable { .. }
            | SessionError::NotAccepting { .. }),
        ) => Err(error),
        answer => Ok(answer.ok()),
    }
}

/// Waits for the answer to a statement for as long as a server takes that works.
async fn in_time<T>(asked: impl Future<Output = Result<T, SessionError>>) -> Result<T, SessionError> {
    let answer = tokio::time::timeout(STATEMENT_TIMEOUT, asked).await;
    let silent = || format!("the server did not answer within {} s", STATEMENT_TIMEOUT.as_secs());
    answer.unwrap_or_else(|_| Err(SessionError::Lost { detail: silent() }))
}

type Histories = (Vec<(TimelineId, Vec<u8>)>, Option<TimelineHistory>);

/// Fetches the history file of a timeline, and those of its ancestors that the server still has (failure 9).
async fn histories(
    connection: &mut ReplicationConnection,
    timeline: TimelineId,
) -> Result<Histories, SessionError> {
    if timeline == TimelineId::FIRST {
        return Ok((Vec::new(), None));
    }
    let content = connection.history(timeline).await?.to_vec();
    let history = TimelineHistory::parse(timeline, &String::from_utf8_lossy(&content))
        .map_err(|error| SessionError::Unexpected { detail: error.to_string() })?;
    let mut files = vec![(timeline, content)];
    for ancestor in history.ancestors().filter(|ancestor| *ancestor != TimelineId::FIRST) {
        match connection.history(ancestor).await {
            // The server itself never looks at it again.
            Ok(content) => match TimelineHistory::parse(ancestor, &String::from_utf8_lossy(&content)) {
                Ok(_) => files.push((ancestor, content.to_vec())),
                Err(error) => tracing::warn!("the history of timeline {ancestor} is left out: {error}"),
            },
            Err(error @ SessionError::Sql { .. }) => {
                tracing::debug!("no history of timeline {ancestor}: {error}");
            }
            Err(error) => return Err(error),
        }
    }
    files.sort();
    Ok((files, Some(history)))
}

/// Reads what SHOW says of a size, such as `16MB`.
fn parse_segment_size(text: &str) -> Result<WalSegmentSize, SessionError> {
    let unexpected = || SessionError::Unexpected { detail: format!("wal_segment_size is \"{text}\"") };
    let (digits, shift) = match (text.strip_suffix("MB"), text.strip_suffix("GB")) {
        (Some(digits), _) => (digits, 20),
        (_, Some(digits)) => (digits, 30),
        _ => return Err(unexpected()),
    };
    let bytes = digits.parse::<u32>().ok().and_then(|number| number.checked_mul(1 << shift));
    bytes.and_then(|bytes| WalSegmentSize::new(bytes).ok()).ok_or_else(unexpected)
}

/// What the server says of a slot; nothing where there is none.
///
/// # Errors
/// Where the role may not ask in any way.
pub(super) async fn slot_facts(
    candidate: &mut Candidate,
    slot: &str,
) -> Result<Option<SlotFacts>, SessionError> {
    match slot_by_sql(&candidate.options, slot).await {
        Err(error) => {
            tracing::debug!("the slot is not looked at by SQL: {error}");
            Ok(candidate.connection.read_slot(slot).await?.map(SlotFacts::from))
        }
        found => found,
    }
}

/// Returns from where on a physical slot keeps WAL, as far as the server tells.
pub(super) async fn restart_of(candidate: &mut Candidate, slot: &str) -> Option<Lsn> {
    match candidate.connection.read_slot(slot).await {
        Ok(found) => found?.restart,
        // It does not know the command.
        Err(_) => slot_by_sql(&candidate.options, slot).await.ok()??.restart,
    }
}

/// Returns where the oldest WAL of a timeline begins that a server has behind a position, whether or not a slot keeps it;
/// nothing where it does not tell, as to a role that may only replicate.
async fn oldest_behind(options: &ConnectOptions, at: Position, size: WalSegmentSize) -> Option<Lsn> {
    let sql = "SELECT min(name COLLATE \"C\") AS oldest FROM pg_ls_waldir() \
               WHERE name ~ '^[0-9A-F]{24}$' AND left(name, 8) = $1 AND name COLLATE \"C\" > $2";
    let timeline = at.timeline.hex8();
    let wanted = WalSegmentName::containing(at.timeline, at.lsn, size).to_string();
    let asked = async {
        let session = Session::connect(options).await?;
        let params = [Param::Text(&timeline), Param::Text(&wanted)];
        in_time(session.query_one(sql, &params)).await?.text_opt("oldest")
    };
    match asked.await {
        Ok(oldest) => WalSegmentName::parse(&oldest?).ok()?.start_lsn(size).ok(),
        Err(error) => {
            tracing::debug!("which WAL the server has is not known: {error}");
            None
        }
    }
}

async fn slot_by_sql(options: &ConnectOptions, slot: &str) -> Result<Option<SlotFacts>, SessionError> {
    let sql = "SELECT slot_type = 'physical' AS physical, wal_status = 'lost' AS lost, \
               restart_lsn::text AS restart, active AS active, active_pid::bigint AS pid, \
               (SELECT a.application_name FROM pg_stat_replication a WHERE a.pid = s.active_pid) AS who \
               FROM pg_replication_slots s WHERE slot_name = $1";
    let session = Session::connect(options).await?;
    let mut rows = in_time(session.query(sql, &[Param::Text(slot)])).await?;
    let Some(row) = rows.pop() else { return Ok(None) };
    let who = row.text_opt("who")?.unwrap_or_else(|| "another process".to_owned());
    let active = row.bool("active")?.then(|| match row.int_opt("pid") {
        Ok(Some(pid)) => format!("{who} (process {pid} of the server)"),
        _ => who,
    });
    let restart = row.text_opt("restart")?;
    Ok(Some(SlotFacts {
        physical: row.bool("physical")?,
        active,
        lost: row.bool_opt("lost")?.unwrap_or(false),
        restart: restart.as_deref().and_then(|text| text.parse::<Lsn>().ok()),
    }))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_segment_size_is_read_as_show_writes_it() {
        for (text, mib) in [("1MB", 1), ("16MB", 16), ("512MB", 512), ("1GB", 1024)] {
            assert_eq!(parse_segment_size(text).unwrap().bytes(), mib << 20, "{text}");
        }
        for text in ["", "16", "16777216", "3MB", "MB", "8GB", "-1MB"] {
            assert!(parse_segment_size(text).is_err(), "{text:?}");
        }
    }
}
