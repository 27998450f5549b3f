//! A physical replication connection: its few commands, and the stream of WAL.
//!
//! ```text
//! ReplicationConnection ── identify, setting, history, read_slot, create_slot, drop_slot
//!          └── start_streaming ──▶ WalStream ── next … ── end of the timeline ──▶ ReplicationConnection
//! ```
//!
//! A stream ends in one of three ways: the timeline ends (and the connection may start on the next), the server
//! refuses to go on (an error of its own words), or the connection is lost. What to start from, and what is done with
//! the bytes, is the caller's.

use std::fmt::{self, Debug};
use std::time::Duration;

use bytes::{Bytes, BytesMut};
use jiff::Timestamp;
use postgres_protocol::message::backend::{DataRowBody, Message};
use postgres_protocol::message::frontend;
use tokio_postgres::fallible_iterator::FallibleIterator;

use super::connection::{self, Connected};
use super::login::PhysicalReplication;
use super::wal_message::{StandbyStatus, WalMessage};
use super::wire::{Incoming, Wire, refusal, unexpected};
use crate::pg::{Lsn, MajorVersion, SystemIdentifier, TimelineId};
use crate::replication::{ConnectOptions, Error};

/// A connection that takes replication commands.
pub struct ReplicationConnection {
    pub(super) wire: Wire,
    address: String,
    user: String,
    /// What came of the answer that is being read.
    rows: Vec<Row>,
    refused: Option<Error>,
}

/// What IDENTIFY_SYSTEM says.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct SystemIdentity {
    pub system_identifier: SystemIdentifier,
    /// The timeline the server is on; a standby's is the one it replays.
    pub timeline: TimelineId,
    /// Where its durable WAL ends.
    pub flushed: Lsn,
}

/// What READ_REPLICATION_SLOT says of a physical slot.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PhysicalSlot {
    /// From where on it keeps WAL; nothing where it keeps none: it was lost, or has not kept any yet.
    pub restart: Option<Lsn>,
}

/// A timeline that followed the one that was streamed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct NextTimeline {
    pub timeline: TimelineId,
    /// The first position that no longer belongs to the timeline that ended.
    pub switch: Lsn,
}

/// What START_REPLICATION leads to.
pub enum Started {
    Streaming(WalStream),
    /// There is nothing left to stream of a timeline that ended.
    Ended(ReplicationConnection, NextTimeline),
}

/// What comes out of a stream.
pub enum Streamed {
    Message(WalMessage),
    /// The timeline ended.
    Ended(NextTimeline),
}

/// WAL as the server writes it.
pub struct WalStream {
    connection: ReplicationConnection,
    ended: bool,
}

/// A command is answered at once, or the server is stuck.
const COMMAND_TIMEOUT: Duration = Duration::from_secs(60);
/// Rows of an answer; each of ours has one, or none.
const ROWS_MAX: usize = 16;
/// Settings of a connection that is not to end while it is idle, nor to outlive us for long; since which version.
const LASTING: [(MajorVersion, &str); 2] = [
    (MajorVersion::V13, " -c tcp_keepalives_idle=30 -c tcp_keepalives_interval=10 -c tcp_keepalives_count=3"),
    (MajorVersion::V14, " -c idle_session_timeout=0"),
];
/// 2000-01-01, from where the server counts microseconds.
const POSTGRES_EPOCH_SECONDS: i64 = 946_684_800;

impl Debug for ReplicationConnection {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { address, user, .. } = self;
        let mut shown = f.debug_struct("ReplicationConnection");
        shown.field("address", address).field("user", user).finish_non_exhaustive()
    }
}

pub(super) type Row = Vec<Option<Bytes>>;
pub(super) type Values = Vec<Option<String>>;

impl ReplicationConnection {
    /// Connects to the first server of `options` that answers.
    ///
    /// A password file is asked for database `replication`, as all programs of PostgreSQL do.
    pub async fn connect(options: &ConnectOptions) -> Result<Self, Error> {
        let options = options.with("dbname", "replication")?;
        let target = connection::resolve(&options)?;
        let (connected, _) = connection::connect::<PhysicalReplication>(&target, &options, "", 0).await?;
        let Connected { link: wire, address, user } = connected;
        Ok(Self { wire, address, user, rows: Vec::new(), refused: None })
    }

    /// Connects to the one server of `options` that a session reached at `address`, under a name of its own by which
    /// that session finds it among the server's processes.
    ///
    /// However long it is idle the server keeps it: no setting of a role reaches a walsender, so it is told at the start.
    pub async fn connect_beside(
        options: &ConnectOptions,
        (address, version): (&str, MajorVersion),
        name: &str,
    ) -> Result<Self, Error> {
        let options = options.with("dbname", "replication")?.with("application_name", name)?;
        let mut target = connection::resolve(&options)?;
        target.endpoints.retain(|endpoint| endpoint.address.to_string() == address);
        for (_, setting) in LASTING.iter().filter(|(since, _)| version >= *since) {
            target.options.push_str(setting);
        }
        let (connected, _) = connection::connect::<PhysicalReplication>(&target, &options, "", 0).await?;
        let Connected { link: wire, address, user } = connected;
        Ok(Self { wire, address, user, rows: Vec::new(), refused: None })
    }

    /// Speaks to whatever answers on a wire, as if it had been logged in to.
    #[cfg(test)]
    pub(super) fn over(wire: Wire) -> Self {
        Self { wire, address: String::new(), user: String::new(), rows: Vec::new(), refused: None }
    }

    /// Returns where the server was reached, for messages.
    pub fn address(&self) -> &str {
        &self.address
    }

    /// Returns the role of the connection.
    pub fn user(&self) -> &str {
        &self.user
    }

    /// Asks which cluster this is, and where it is.
    pub async fn identify(&mut self) -> Result<SystemIdentity, Error> {
        let row = self.one_row("IDENTIFY_SYSTEM").await?;
        Ok(SystemIdentity {
            system_identifier: parsed(&row, 0, "systemid")?,
            timeline: parsed(&row, 1, "timeline")?,
            flushed: parsed(&row, 2, "xlogpos")?,
        })
    }

    /// Returns a setting of the server, as SHOW writes it.
    pub async fn setting(&mut self, name: &str) -> Result<String, Error> {
        let row = self.one_row(&format!("SHOW {}", identifier(name))).await?;
        Ok(row.into_iter().next().flatten().unwrap_or_default())
    }

    /// Returns the history file of a timeline, which the first has none of.
    pub async fn history(&mut self, timeline: TimelineId) -> Result<Bytes, Error> {
        let mut rows = self.command(&format!("TIMELINE_HISTORY {timeline}")).await?;
        let row = rows.pop().ok_or_else(|| unexpected("no row for a timeline's history".into()))?;
        let content = row.into_iter().nth(1).flatten();
        content.ok_or_else(|| unexpected("a timeline's history is null".into()))
    }

    /// Asks what a physical slot keeps; nothing where there is no slot of that name.
    ///
    /// # Errors
    /// `Sql` for a logical slot, and before PostgreSQL 15, which was the first to have the command.
    pub async fn read_slot(&mut self, name: &str) -> Result<Option<PhysicalSlot>, Error> {
        slot_of(&self.one_row(&format!("READ_REPLICATION_SLOT {}", identifier(name))).await?)
    }

    /// Creates a physical slot that keeps WAL from the last checkpoint's redo position on.
    pub async fn create_slot(&mut self, name: &str) -> Result<(), Error> {
        self.command(&format!("CREATE_REPLICATION_SLOT {} PHYSICAL RESERVE_WAL", identifier(name))).await?;
        Ok(())
    }

    /// Removes a slot that nobody uses.
    pub async fn drop_slot(&mut self, name: &str) -> Result<(), Error> {
        self.command(&format!("DROP_REPLICATION_SLOT {}", identifier(name))).await?;
        Ok(())
    }

    /// Starts streaming a timeline from `start` on; a slot keeps what we have not reported as flushed.
    pub async fn start_streaming(
        mut self,
        slot: Option<&str>,
        start: Lsn,
        timeline: TimelineId,
    ) -> Result<Started, Error> {
        let slot = slot.map(|slot| format!("SLOT {} ", identifier(slot))).unwrap_or_default();
        let command = format!("START_REPLICATION {slot}PHYSICAL {start} TIMELINE {timeline}");
        let answer = tokio::time::timeout(COMMAND_TIMEOUT, async {
            self.query(&command).await?;
            self.answer().await
        });
        match answer.await.unwrap_or_else(|_| Err(silent()))? {
            Answer::CopyBoth => Ok(Started::Streaming(WalStream { connection: self, ended: false })),
            Answer::Rows(rows) => {
                let next = next_timeline(&rows)?;
                Ok(Started::Ended(self, next))
            }
        }
    }

    async fn one_row(&mut self, command: &str) -> Result<Values, Error> {
        let mut rows = self.command(command).await?;
        match (rows.pop(), rows.len()) {
            (Some(row), 0) => Ok(text_of(row)),
            (_, others) => Err(unexpected(format!("{others} rows or none where one was expected"))),
        }
    }

    async fn command(&mut self, command: &str) -> Result<Vec<Row>, Error> {
        let answer = tokio::time::timeout(COMMAND_TIMEOUT, async {
            self.query(command).await?;
            self.answer().await
        });
        match answer.await.unwrap_or_else(|_| Err(silent()))? {
            Answer::Rows(rows) => Ok(rows),
            Answer::CopyBoth => Err(unexpected(format!("{command} was answered by a stream"))),
        }
    }

    pub(super) async fn query(&mut self, command: &str) -> Result<(), Error> {
        let mut out = BytesMut::new();
        frontend::query(command, &mut out).map_err(|error| unexpected(error.to_string()))?;
        self.wire.send(&out).await
    }

    /// Reads up to the end of an answer, or to the start of a stream; may be given up and called again.
    async fn answer(&mut self) -> Result<Answer, Error> {
        loop {
            match self.wire.next().await? {
                Incoming::CopyBoth => return Ok(Answer::CopyBoth),
                Incoming::Other(Message::DataRow(row)) if self.rows.len() < ROWS_MAX => {
                    self.rows.push(values(&row)?);
                }
                Incoming::Other(Message::ErrorResponse(answer)) => match refusal(answer.fields()) {
                    error @ Error::Lost { .. } => return Err(error),
                    error => self.refused = Some(error),
                },
                Incoming::Other(Message::RowDescription(_) | Message::CommandComplete(_)) => {}
                Incoming::Other(Message::ReadyForQuery(_)) => {
                    let rows = std::mem::take(&mut self.rows);
                    return self.refused.take().map_or(Ok(Answer::Rows(rows)), Err);
                }
                _ => return Err(unexpected("a message that is no answer to a command".into())),
            }
        }
    }
}

impl WalStream {
    /// Returns the connection's address.
    pub fn address(&self) -> &str {
        &self.connection.address
    }

    /// Waits for what comes next; may be given up and called again.
    pub async fn next(&mut self) -> Result<Streamed, Error> {
        loop {
            if self.ended {
                let answer = tokio::time::timeout(COMMAND_TIMEOUT, self.connection.answer()).await;
                return match answer.unwrap_or_else(|_| Err(silent()))? {
                    Answer::Rows(rows) => Ok(Streamed::Ended(next_timeline(&rows)?)),
                    Answer::CopyBoth => Err(unexpected("a stream within a stream".into())),
                };
            }
            match self.connection.wire.next().await? {
                Incoming::CopyData(body) => return Ok(Streamed::Message(WalMessage::parse(body)?)),
                Incoming::CopyDone => {
                    let mut out = BytesMut::new();
                    frontend::copy_done(&mut out);
                    self.ended = true;
                    self.connection.wire.send(&out).await?;
                }
                Incoming::Other(Message::ErrorResponse(answer)) => return Err(refusal(answer.fields())),
                // What a server sends that shuts down, once it has our word that we have all.
                Incoming::Other(Message::CommandComplete(_)) => {
                    return Err(Error::Lost { detail: "the server is shutting down".into() });
                }
                _ => return Err(unexpected("a message that does not belong into a stream".into())),
            }
        }
    }

    /// Tells the server how far we are.
    pub async fn report(&mut self, status: StandbyStatus, now: Timestamp) -> Result<(), Error> {
        let micros = now.as_microsecond() - POSTGRES_EPOCH_SECONDS * 1_000_000;
        let mut out = BytesMut::new();
        status.write(micros, &mut out);
        self.connection.wire.send(&out).await
    }

    /// Returns the connection of a stream that ended with its timeline.
    pub fn into_connection(self) -> ReplicationConnection {
        self.connection
    }
}

enum Answer {
    CopyBoth,
    Rows(Vec<Row>),
}

/// Quotes a name as the server's replication grammar takes it.
fn identifier(name: &str) -> String {
    format!("\"{}\"", name.replace('"', "\"\""))
}

fn silent() -> Error {
    Error::Lost { detail: format!("the server did not answer within {} s", COMMAND_TIMEOUT.as_secs()) }
}

pub(super) fn values(row: &DataRowBody) -> Result<Row, Error> {
    let ranges: Vec<_> = row.ranges().collect().map_err(|error| unexpected(error.to_string()))?;
    let whole = row.buffer_bytes();
    Ok(ranges.into_iter().map(|range| range.map(|range| whole.slice(range))).collect())
}

pub(super) fn text_of(row: Row) -> Values {
    row.into_iter().map(|value| value.map(|bytes| String::from_utf8_lossy(&bytes).into_owned())).collect()
}

pub(super) fn parsed<T: std::str::FromStr>(row: &Values, column: usize, name: &str) -> Result<T, Error> {
    let text = row.get(column).cloned().flatten().unwrap_or_default();
    text.parse().map_err(|_| unexpected(format!("column \"{name}\" holds \"{text}\"")))
}

/// Reads what READ_REPLICATION_SLOT answers: type, position and its timeline, all null where there is no slot.
fn slot_of(row: &Values) -> Result<Option<PhysicalSlot>, Error> {
    let holds = |column: usize| row.get(column).is_some_and(Option::is_some);
    if !holds(0) {
        return Ok(None);
    }
    let restart = if holds(1) { Some(parsed(row, 1, "restart_lsn")?) } else { None };
    Ok(Some(PhysicalSlot { restart }))
}

fn next_timeline(rows: &[Row]) -> Result<NextTimeline, Error> {
    let row = rows.first().ok_or_else(|| unexpected("a timeline ended, and no other follows".into()))?;
    let row = text_of(row.clone());
    Ok(NextTimeline { timeline: parsed(&row, 0, "next_tli")?, switch: parsed(&row, 1, "next_tli_startpos")? })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_slot_that_keeps_nothing_is_told_from_one_that_is_not_there() {
        let row = |values: [Option<&str>; 3]| values.map(|value| value.map(str::to_owned)).to_vec();
        let slot = |restart| Some(PhysicalSlot { restart });
        assert_eq!(slot_of(&row([None, None, None])).unwrap(), None);
        assert_eq!(slot_of(&row([Some("physical"), None, None])).unwrap(), slot(None));
        let kept = slot_of(&row([Some("physical"), Some("1/2A000028"), Some("3")])).unwrap();
        assert_eq!(kept, slot(Some(Lsn(0x1_2A00_0028))));
        assert!(slot_of(&row([Some("physical"), Some("somewhere"), Some("3")])).is_err());
        assert_eq!(slot_of(&Vec::new()).unwrap(), None);
    }
}
