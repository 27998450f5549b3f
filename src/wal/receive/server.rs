//! The servers of the site, asked in turn: who answers, what it is, and the slot it keeps for us.
//!
//! A primary is taken before a standby, because commits wait for what the primary is told; a standby is better than
//! nobody, and in a failover it is the one that will be promoted. The slot's facts come by SQL. A role that may only
//! replicate asks for less by READ_REPLICATION_SLOT, and before PostgreSQL 15 goes without: there START_REPLICATION
//! takes a slot that was lost, and the WAL it should have kept is found to be gone.

use std::collections::BTreeMap;
use std::time::Duration;

use crate::pg::{Lsn, TimelineHistory, TimelineId, WalSegmentName, WalSegmentSize};
use crate::replication::{
    ConnectOptions, Error as SessionError, ErrorKind, Param, ReplicationConnection, Session,
};
use crate::repo::ClusterId;
use crate::wal::Error;
use crate::wal::receive::is_removed;
use crate::wal::receive::origin::{known_history, parse_history};
use crate::wal::receive::plan::{ServerFacts, SlotFacts, Unfit, plan_start, refuse_clone};
use crate::wal::receive::state::Shared;
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
    /// This primary is the best there is, and does not tell how it came to its timeline: its WAL may be ours.
    Untold(Candidate, Error),
}

/// What is asked by SQL is answered from memory. A server that hangs must not keep us from the others (failure 39);
/// replication commands have a limit of their own.
const STATEMENT_TIMEOUT: Duration = Duration::from_secs(30);

/// What is wanted of the servers.
pub(super) struct Wanted<'a> {
    /// The cluster; else any, and only whose WAL it is.
    pub cluster: Option<ClusterId>,
    /// Where what was received ends.
    pub here: Option<Position>,
    /// Those that have removed what follows, by address: they come last.
    pub removed: &'a [String],
    /// What may tell the histories that servers lack.
    pub shared: Option<&'a Shared>,
}

/// What became of the servers that were asked.
#[derive(Default)]
struct Asked {
    standby: Option<Candidate>,
    last_resort: Option<Candidate>,
    untold_primary: Option<(Candidate, Error)>,
    failure: Option<Error>,
    foreign: Option<(Candidate, Error)>,
    foreign_count: usize,
    unheard: Option<String>,
    oldest: Option<Lsn>,
    /// The history files that they have.
    histories: BTreeMap<TimelineId, Vec<u8>>,
    /// Those that lack one that nobody has told so far.
    untold: Vec<Candidate>,
}

/// Asks the servers in turn, and returns the first primary that fits, else the first standby. Servers of another cluster
/// are passed over.
///
/// # Errors
/// `OtherCluster` where all servers are of another; else the last refusal, where none fits.
pub(super) async fn choose(nodes: &[ConnectOptions], wanted: &Wanted<'_>) -> Result<Choice, Error> {
    let mut asked = Asked::default();
    for options in nodes {
        let candidate = match ask(options).await {
            Ok(candidate) => candidate,
            Err(error) => {
                tracing::debug!("server passed over: {error}");
                asked.unheard = Some(error.to_string());
                asked.failure = worse(asked.failure.take(), error.into());
                continue;
            }
        };
        let found = candidate.facts.cluster();
        if let Some(expected) = wanted.cluster.filter(|expected| *expected != found) {
            asked.foreign = Some((candidate, Error::OtherCluster { expected, found }));
            asked.foreign_count += 1;
            continue;
        }
        if let Some(primary) = asked.judge(candidate, wanted, false).await {
            return Ok(Choice::Server(primary));
        }
    }
    // One that was asked later may have what they lack.
    for candidate in std::mem::take(&mut asked.untold) {
        if let Some(primary) = asked.judge(candidate, wanted, true).await {
            return Ok(Choice::Server(primary));
        }
    }
    asked.conclude(nodes.len())
}

impl Asked {
    /// Decides about a server, and returns it where no better one can come; all were asked where `is_last`.
    async fn judge(
        &mut self,
        mut candidate: Candidate,
        wanted: &Wanted<'_>,
        is_last: bool,
    ) -> Option<Candidate> {
        tell_history(&self.histories, &mut candidate, wanted).await;
        let facts = &candidate.facts;
        let start = match wanted.cluster {
            Some(_) => plan_start(facts, wanted.here, None),
            None => refuse_clone(facts)
                .map(|()| Position { timeline: facts.identity.timeline, lsn: facts.identity.flushed }),
        };
        if start.is_ok() {
            // One that is refused may have come to the same timeline in another way.
            self.histories.extend(candidate.histories.iter().cloned());
        }
        let is_removed = wanted.removed.iter().any(|address| address == candidate.connection.address());
        match start {
            Err(Unfit::NoHistory { .. }) if facts.history.is_none() && !is_last => {
                self.untold.push(candidate);
            }
            Err(unfit) => {
                // One that was started again does not know what it has before it has replayed it.
                let is_starting = facts.standby && matches!(unfit, Unfit::Behind { .. });
                let may_have_it = is_starting || matches!(unfit, Unfit::NoHistory { .. });
                let is_untold = candidate.is_primary && matches!(unfit, Unfit::NoHistory { .. });
                let error = unfit_error(&candidate, unfit);
                if may_have_it {
                    self.unheard = Some(error.to_string());
                }
                if is_untold {
                    self.untold_primary.get_or_insert((candidate, error));
                } else {
                    self.failure = worse(self.failure.take(), error);
                }
            }
            Ok(start) if is_removed => {
                match oldest_behind(&candidate.options, start, facts.segment_size).await {
                    Ok(has) => self.oldest = has.into_iter().chain(self.oldest).min(),
                    // It may have WAL that nobody would ask for again.
                    Err(error) => self.unheard = Some(error.to_string()),
                }
                match &self.last_resort {
                    // A primary keeps a slot for us.
                    Some(known) if facts.standby || !known.facts.standby => {}
                    _ => self.last_resort = Some(candidate),
                }
            }
            Ok(_) if !facts.standby => return Some(candidate),
            Ok(_) => {
                self.standby.get_or_insert(candidate);
            }
        }
        None
    }

    /// Returns the best of all, of so many.
    fn conclude(self, count: usize) -> Result<Choice, Error> {
        let Self { standby, last_resort, untold_primary, oldest, unheard, .. } = self;
        let nobody = || SessionError::Settings { detail: "the site has no connection".into() }.into();
        let removed = last_resort.map(|candidate| Choice::Removed { candidate, oldest, unheard });
        let untold = untold_primary.map(|(candidate, error)| Choice::Untold(candidate, error));
        let choice = standby.map(Choice::Server).or(removed).or(untold);
        choice.ok_or_else(|| match self.foreign {
            Some((_, error)) if self.foreign_count == count => error,
            // Another one, which does not answer now, may be ours.
            Some((candidate, error)) => Error::UnfitServer {
                address: candidate.connection.address().to_owned(),
                detail: error.to_string(),
            },
            None => self.failure.unwrap_or_else(nobody),
        })
    }
}

/// Tells a server the history that it lacks, by what others have, or the spool or the archive; nothing where all of what is
/// wanted is on its own timeline.
async fn tell_history(
    histories: &BTreeMap<TimelineId, Vec<u8>>,
    candidate: &mut Candidate,
    wanted: &Wanted<'_>,
) {
    let (facts, timeline) = (&candidate.facts, candidate.facts.identity.timeline);
    let is_there = wanted.here.is_some_and(|here| here.timeline == timeline);
    if !facts.lacks_history || facts.history.is_some() || is_there {
        return;
    }
    if let Some(content) = histories.get(&timeline) {
        candidate.facts.history = parse_history(timeline, content).ok();
        candidate.histories.push((timeline, content.clone()));
    } else if let Some(shared) = wanted.shared {
        candidate.facts.history = known_history(shared, facts.cluster(), timeline).await;
    }
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
        Unfit::NoHistory { timeline } => Error::NoHistory { address, timeline },
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
    let lacks_history = history.is_none() && identity.timeline != TimelineId::FIRST;
    let facts = ServerFacts { identity, segment_size, history, lacks_history, standby, cluster_name };
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

/// Fetches the history file of a timeline, and those of its ancestors that the server still has (failure 9). Nothing where
/// it lacks the first, as the copy of a server does that was made without WAL.
async fn histories(
    connection: &mut ReplicationConnection,
    timeline: TimelineId,
) -> Result<Histories, SessionError> {
    if timeline == TimelineId::FIRST {
        return Ok((Vec::new(), None));
    }
    let content = match connection.history(timeline).await {
        Err(error) if is_removed(&error) => return Ok((Vec::new(), None)),
        content => content?.to_vec(),
    };
    let history = parse_history(timeline, &content)
        .map_err(|error| SessionError::Unexpected { detail: error.to_string() })?;
    let mut files = vec![(timeline, content)];
    for ancestor in history.ancestors().filter(|ancestor| *ancestor != TimelineId::FIRST) {
        match connection.history(ancestor).await {
            // The server itself never looks at it again.
            Ok(content) => match parse_history(ancestor, &content) {
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
///
/// # Errors
/// Where it may tell a moment later.
async fn oldest_behind(
    options: &ConnectOptions,
    at: Position,
    size: WalSegmentSize,
) -> Result<Option<Lsn>, SessionError> {
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
        Ok(oldest) => {
            let oldest = oldest.and_then(|name| WalSegmentName::parse(&name).ok());
            Ok(oldest.and_then(|name| name.start_lsn(size).ok()))
        }
        Err(error) if error.kind() == ErrorKind::Retry => Err(error),
        Err(error) => {
            tracing::debug!("which WAL the server has is not known: {error}");
            Ok(None)
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
