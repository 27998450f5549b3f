//! The server's side of a basebackup: start, stop, and everything in between tied to one session.
//!
//! ```text
//! start ── pg_backup_start ── Started …files are copied… stop ── pg_backup_stop ── Stopped
//! ```
//!
//! Non-exclusive on every version, so a client that dies leaves nothing behind: when the `BackupSession` is dropped,
//! or its process is, the server ends the backup. The server is asked who it is at both ends and must be the same.
//! `stop` never waits for the archive: whether the WAL arrived is the caller's question, with the caller's deadline.

use jiff::Timestamp;

use super::server_facts::ServerFacts;
use super::server_identity::{Difference, DirectoryIdentity, ServerIdentity, parent_process};
use crate::pg::{Lsn, MajorVersion, TimelineId, WalSegmentName, WalSegmentNumber};
use crate::replication::{ConnectOptions, Error as SessionError, Param, Session};

/// No backup_label or tablespace_map is longer: labels hold 1 KiB, links 4 KiB each.
const LABEL_BYTES_MAX: usize = 64 << 20;
/// `pg_backup_start` refuses longer labels (MAXPGPATH).
const LABEL_NAME_BYTES_MAX: usize = 1023;

/// Whether the checkpoint a basebackup begins with is done at once or spread over time.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum Checkpoint {
    #[default]
    Fast,
    Spread,
}

/// How a basebackup is started.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct StartOptions {
    pub checkpoint: Checkpoint,
    pub label: String,
}

/// The server's side of a basebackup went wrong.
#[derive(Debug, thiserror::Error)]
pub enum SourceError {
    /// The session failed, or the server refused a statement.
    #[error(transparent)]
    Session(#[from] SessionError),
    /// A label the server would refuse or cut.
    #[error("label is {bytes} bytes long, at most {bytes_max} are possible, on one line")]
    Label { bytes: usize, bytes_max: usize },
    /// The server is not the one the basebackup began with.
    #[error("server changed during the basebackup: {}", list(differences))]
    ServerChanged { differences: Vec<Difference> },
    /// The data directory belongs to another server than the connection.
    #[error("connection and data directory belong to different servers: {}", list(differences))]
    DifferentServer { differences: Vec<Difference> },
    /// The role may not take basebackups.
    #[error("role \"{role}\" may not take a basebackup: {message}")]
    NotPermitted { role: String, message: String },
}

impl SourceError {
    /// Returns a sentence that says what to do, where there is one.
    pub fn hint(&self) -> Option<String> {
        match self {
            Self::Session(error) => error.hint(),
            Self::Label { .. } => Some("Choose a shorter label.".into()),
            Self::ServerChanged { .. } => {
                Some("A restart or a failover ended this basebackup; start another.".into())
            }
            Self::DifferentServer { .. } => {
                Some("Check connection and data_directory of the site: both must name one server.".into())
            }
            Self::NotPermitted { role, .. } => Some(format!(
                "Make \"{role}\" a member of pg_monitor and grant it EXECUTE on the functions that start and stop a backup."
            )),
        }
    }
}

/// Checks that the server neither refuses a label nor cuts it.
pub fn check_label(label: &str) -> Result<(), SourceError> {
    let bytes = label.len();
    if bytes > LABEL_NAME_BYTES_MAX || label.contains(['\n', '\r', '\0']) {
        return Err(SourceError::Label { bytes, bytes_max: LABEL_NAME_BYTES_MAX });
    }
    Ok(())
}

fn list(differences: &[Difference]) -> String {
    let texts: Vec<String> = differences.iter().map(ToString::to_string).collect();
    texts.join("; ")
}

/// What is known once the server is in backup mode.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Started {
    /// The redo point of the checkpoint; START WAL LOCATION of the label.
    pub lsn: Lsn,
    pub timeline: TimelineId,
    /// The segment recovery begins in.
    pub segment: WalSegmentName,
    /// By the server's clock.
    pub at: Timestamp,
}

/// What is known once the server has left backup mode.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Stopped {
    /// The end of the basebackup: recovery must come this far to be consistent.
    pub lsn: Lsn,
    pub timeline: TimelineId,
    /// The segment that holds the last byte before `lsn`.
    pub segment: WalSegmentName,
    /// By the server's clock.
    pub at: Timestamp,
    /// The text of `backup_label`, part of the data.
    pub backup_label: String,
    /// The text of `tablespace_map`, for the record; empty where there are no tablespaces.
    pub tablespace_map: String,
}

/// A session whose server is in backup mode; dropping it ends the backup on the server.
#[derive(Debug)]
pub struct BackupSession {
    session: Session,
    facts: ServerFacts,
    started: Started,
}

impl BackupSession {
    /// Connects and begins a basebackup.
    pub async fn start(options: &ConnectOptions, start: StartOptions) -> Result<Self, SourceError> {
        let session = Session::connect(options).await?;
        let facts = ServerFacts::gather(&session).await?;
        Self::start_on(session, facts, start).await
    }

    /// Begins a basebackup on a session that is there already, after its facts were looked at.
    pub async fn start_on(
        session: Session,
        facts: ServerFacts,
        start: StartOptions,
    ) -> Result<Self, SourceError> {
        check_label(&start.label)?;
        let call = match session.version() {
            MajorVersion::V13 | MajorVersion::V14 => "pg_start_backup($1, $2, false)",
            _ => "pg_backup_start($1, $2)",
        };
        let params = [Param::Text(&start.label), Param::Bool(start.checkpoint == Checkpoint::Fast)];
        let sql = format!("SELECT {call}::text AS lsn, {NOW} AS at");
        let row = session.query_one(&sql, &params).await.map_err(|error| permission(&session, error))?;
        let lsn: Lsn = row.parsed("lsn")?;
        // From here on an error drops the session, and with it the backup on the server.
        let identity = ServerIdentity::ask(&session).await?;
        check_same(&facts.identity, &identity)?;
        let size = facts.wal_segment_size;
        let timeline = identity.timeline;
        let segment = WalSegmentName::new(timeline, WalSegmentNumber::containing(lsn, size), size);
        let started = Started { lsn, timeline, segment, at: row.timestamp("at")? };
        Ok(Self { session, facts, started })
    }

    /// Returns what is known since the start.
    pub fn started(&self) -> &Started {
        &self.started
    }

    /// Returns what the server told about itself before the start.
    pub fn facts(&self) -> &ServerFacts {
        &self.facts
    }

    /// Returns the session, for questions while the files are copied.
    pub fn session(&self) -> &Session {
        &self.session
    }

    /// Checks that a data directory is the one this session's server runs on (failure 21a).
    pub fn check_directory(&self, directory: &DirectoryIdentity) -> Result<(), SourceError> {
        check_directory(&self.facts.identity, directory)
    }

    /// Waits until the session is lost, which ends the basebackup; for racing with the copy.
    pub async fn lost(&self) -> SourceError {
        self.session.lost().await.into()
    }

    /// Ends the basebackup on the server and returns what makes the files consistent.
    pub async fn stop(self) -> Result<Stopped, SourceError> {
        Ok(self.end().await?.0)
    }

    /// As [`BackupSession::stop`], and returns the session, for what is held by it.
    pub async fn end(self) -> Result<(Stopped, Session), SourceError> {
        let identity = ServerIdentity::ask(&self.session).await?;
        check_same(&self.facts.identity, &identity)?;
        let call = match self.session.version() {
            MajorVersion::V13 | MajorVersion::V14 => "pg_stop_backup(false, false)",
            _ => "pg_backup_stop(wait_for_archive => false)",
        };
        let sql = format!("SELECT lsn::text AS lsn, labelfile, spcmapfile, {NOW} AS at FROM {call}");
        let row =
            self.session.query_one(&sql, &[]).await.map_err(|error| permission(&self.session, error))?;
        let lsn: Lsn = row.parsed("lsn")?;
        let (backup_label, tablespace_map) =
            (row.text("labelfile")?, row.text_opt("spcmapfile")?.unwrap_or_default());
        if backup_label.len() > LABEL_BYTES_MAX || tablespace_map.len() > LABEL_BYTES_MAX {
            let detail = "the backup label or the tablespace map is implausibly long".to_owned();
            return Err(SessionError::Unexpected { detail }.into());
        }
        // Asked again: a promotion between the first question and the stop would put the end on another timeline.
        let identity = ServerIdentity::ask(&self.session).await?;
        check_same(&self.facts.identity, &identity)?;
        let size = self.facts.wal_segment_size;
        let segment = WalSegmentName::new(identity.timeline, WalSegmentNumber::ending_at(lsn, size), size);
        let at = row.timestamp("at")?;
        let timeline = identity.timeline;
        let stopped = Stopped { lsn, timeline, segment, at, backup_label, tablespace_map };
        Ok((stopped, self.session))
    }
}

/// Checks that a data directory is the one of the server with this identity.
pub fn check_directory(server: &ServerIdentity, directory: &DirectoryIdentity) -> Result<(), SourceError> {
    let differences = server.differences_from(directory, parent_process(server.backend_pid));
    if differences.is_empty() { Ok(()) } else { Err(SourceError::DifferentServer { differences }) }
}

/// Ends the current WAL segment of a primary, however idle it is, and returns the LSN where it ended.
///
/// A switch alone does nothing on a segment without a record, so one is written first.
pub async fn switch_wal(session: &Session) -> Result<Lsn, SourceError> {
    session.query_one("SELECT pg_logical_emit_message(false, 'walden', '')::text AS lsn", &[]).await?;
    let row = session.query_one("SELECT pg_switch_wal()::text AS lsn", &[]).await;
    Ok(row.map_err(|error| permission(session, error))?.parsed("lsn")?)
}

/// The server's clock, in microseconds.
const NOW: &str = "(extract(epoch FROM clock_timestamp()) * 1000000)::bigint";

fn check_same(before: &ServerIdentity, now: &ServerIdentity) -> Result<(), SourceError> {
    let differences = before.differences(now);
    if differences.is_empty() { Ok(()) } else { Err(SourceError::ServerChanged { differences }) }
}

fn permission(session: &Session, error: SessionError) -> SourceError {
    match error {
        SessionError::Sql { sqlstate, message, .. } if sqlstate == "42501" => {
            SourceError::NotPermitted { role: session.user().to_owned(), message }
        }
        other => other.into(),
    }
}
